"""The library path, operation by operation, on a CPU in every dtype: no interpreter takes part."""

import functools
import types

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from gradients import assert_only_rounding
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from whole_model import HEADS, assert_every_gradient_matches, head_name, make_batch, make_model

from nvembed_fast import NVEmbed, ops
from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.modes import is_transformed
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    ATTENTION_PACK,
    GATED_CASES,
    LATENT_CASES,
    NORM_CASES,
    POOL_CASES,
    ROTARY_CASES,
    SCORE_CASES,
    AttentionCase,
    PoolCase,
    as_tuple,
    assert_gradient_parity,
    assert_parity,
    honest,
    small,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
# two lengths in turns, so that sorting makes two runs of fourteen
UNSORTED = AttentionCase("unsorted", (9, 20) * 6 + (0, 9, 9), 4, 2, 32)
# the operations that are the reference's own
REUSED = {"absorbed_latent_attention", "geglu", "latent_attention", "masked_lse", "swiglu"}


def _norm(case, *args):
    x, _, weight = case.norm_inputs(*args)
    return (x, weight), {"eps": 1e-5}


def _pooled(case, *args, geglu=False):
    x, layout, mask = case.inputs(*args, geglu=geglu)
    return (x,), {"layout": layout, "pool_mask": mask}


def _attention(case, *args):
    *qkv, layout = case.inputs(*args)
    return tuple(qkv), {"layout": layout, "causal": case.causal}


def _rotary(case, *args):
    qkv, *rest = case.inputs(*args)
    return (qkv,), dict(zip(("cos", "sin", "positions", "num_rotated"), rest, strict=True))


def _scores(case, *args):
    q, d, *rest = case.inputs(*args)
    names = ("row_scopes", "column_scopes", "row_keys", "column_keys", "limits", "scale")
    return (q, d), dict(zip(names, rest, strict=True))


# operation -> (its cases, what makes its tensors and its other arguments from one)
PROBLEMS = {
    "flash_attention": ([*small(ATTENTION_CASES), ATTENTION_PACK, UNSORTED], _attention),
    "latent_attention": (small(LATENT_CASES), lambda c, *args: (c.direct_inputs(*args), {})),
    "absorbed_latent_attention": (
        small(LATENT_CASES),
        lambda c, *args: (c.absorbed_inputs(*args)[:4], {"num_heads": c.num_heads}),
    ),
    "mean_pool": (small(POOL_CASES), _pooled),
    "mean_pool_geglu": (small(POOL_CASES), functools.partial(_pooled, geglu=True)),
    "rms_norm": (small(NORM_CASES), _norm),
    "add_rms_norm": (small(NORM_CASES), lambda c, *args: (c.norm_inputs(*args), {"eps": 1e-5})),
    "rotary": (small(ROTARY_CASES), _rotary),
    "swiglu": (small(GATED_CASES), lambda c, *args: ((c.gated_input(*args),), {})),
    "geglu": (small(GATED_CASES), lambda c, *args: ((c.gated_input(*args),), {})),
    "masked_lse": (small(SCORE_CASES), _scores),
}


def _bound(owner, name: str, others: dict):
    """The operation as a function of its tensors alone. float64 ones get tables in float64."""

    def call(*tensors):
        wide = {key: others[key].double() for key in ("cos", "sin") if key in others}
        return getattr(owner, name)(*tensors, **others | (wide if tensors[0].dtype == torch.float64 else {}))

    return call


def _assert_matches(name: str, label: str, tensors, others: dict) -> None:
    """Outputs and gradients."""
    ours, theirs = (_bound(owner, name, others) for owner in (library, reference))
    high = theirs(*(t.double() for t in tensors))
    with torch.no_grad():
        got, low = as_tuple(ours(*tensors)), honest(theirs, tensors)
    for results in zip(got, low, as_tuple(high), strict=True):
        assert_parity(label, *results)
    if name != "flash_attention" or others["layout"].max_length > 1:
        assert_gradient_parity(label, ours, theirs, tensors)
        return
    assert_gradient_parity(label, ours, theirs, tensors, frozen=(0, 1))
    # two numbers of TF32 hold a factor to 2 eps: v in dO V and in the output
    assert_only_rounding(ours, tensors, per_product=4 if tensors[0].dtype == torch.float32 else 0)


def test_what_the_reference_does_best_is_the_reference():
    same = {name for name in ops.OPERATIONS if getattr(library, name) is getattr(reference, name)}
    assert same == REUSED and set(library.__all__) == set(ops.OPERATIONS) == set(PROBLEMS)


@DTYPES
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in REUSED])
def test_matches_the_reference(name, dtype, device):
    cases, make = PROBLEMS[name]
    for case in cases:
        _assert_matches(name, case.name, *make(case, device, dtype))


@DTYPES
@pytest.mark.parametrize("name", sorted(REUSED))
def test_ops_takes_the_reused_ones_too(name, dtype, device):
    cases, make = PROBLEMS[name]
    tensors, others = make(cases[2], device, dtype)
    with ops.use_impl("library"):
        got, wanted = (f(*tensors) for f in (_bound(ops, name, others), _bound(reference, name, others)))
    assert all(map(torch.equal, as_tuple(got), as_tuple(wanted)))


@DTYPES
@pytest.mark.parametrize("arguments", [{"scale": 0.5}, {"causal": True}, {"return_lse": True}], ids=str)
def test_attention_takes_every_argument(arguments, dtype, device):
    *qkv, layout = UNSORTED.inputs(device, dtype)
    others = {"layout": layout} | arguments
    if "return_lse" in arguments:
        got, wanted = (_bound(o, "flash_attention", others)(*qkv) for o in (library, reference))
        assert all(map(torch.equal, got, wanted))
        return
    plain = reference.flash_attention(*qkv, layout)
    assert not torch.allclose(plain, reference.flash_attention(*qkv, **others)), "it would prove nothing"
    _assert_matches("flash_attention", str(arguments), qkv, others)


@pytest.fixture
def attended(monkeypatch) -> list[tuple[tuple[int, ...], bool]]:
    """A list that fills with (shape of the queries, whether heads are shared) at every call of SDPA."""
    calls, sdpa = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        calls.append((tuple(q.shape), kwargs["enable_gqa"]))
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def test_a_batch_out_of_order_is_sorted_where_that_saves_calls(attended, device):
    *qkv, layout = UNSORTED.inputs(device, torch.float32)
    out = library.flash_attention(*qkv, layout)
    assert [shape for shape, _ in attended] == [(8, 4, 9, 32), (6, 4, 20, 32)]
    torch.testing.assert_close(out, reference.flash_attention(*qkv, layout))
    # a text alone and the same text in the pack
    rows = slice(29, 38)
    alone = library.flash_attention(*(t[rows] for t in qkv), SeqLayout([9], device))
    torch.testing.assert_close(alone, out[rows])


def test_the_order_of_a_layout_is_undone_by_its_places(device):
    layout = SeqLayout((3, 1, 0, 3, 1, 2, 3, 1, 3), device)
    order = layout.by_length()
    assert order.layout.lengths == (0, 1, 1, 1, 2, 3, 3, 3, 3) and len(order.layout.runs()) == 3
    packed = torch.arange(layout.num_tokens, device=device)
    # texts keep their order within a length, and tokens within a text
    assert packed[order.rows].tolist() == [3, 7, 13, 8, 9, 0, 1, 2, 4, 5, 6, 10, 11, 12, 14, 15, 16]
    assert torch.equal(packed[order.rows][order.places], packed)
    assert layout.by_length() is order
    with torch.inference_mode():  # autograd may save them later
        layout = SeqLayout(layout.lengths, device)
        assert not any(t.is_inference() for t in layout.by_length()[1:])
    # sorted, or as many lengths as texts
    for lengths in ((), (5, 5, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9), (5, 6, 5, 6)):
        assert SeqLayout(lengths, device).by_length() is None


@DTYPES
def test_heads_are_repeated_where_no_fused_attention_shares_them(dtype, attended, monkeypatch, device):
    monkeypatch.setattr(library, "_shares_heads", lambda q: False)
    tensors, others = _attention(ATTENTION_PACK, device, dtype)
    assert library.flash_attention(*tensors, **others).shape == tensors[0].shape
    assert attended and not any(shared for _, shared in attended)
    _assert_matches("flash_attention", "repeated", tensors, others)


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "has_flash"),
    [
        (torch.float16, 128, (8, 0), True),
        (torch.bfloat16, 256, (9, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.float16, 264, (9, 0), False),
        (torch.float16, 128, (7, 5), False),
    ],
)
def test_flash_attention_of_pytorch_runs_in_16_bits_from_8_0(
    dtype, width, capability, has_flash, monkeypatch
):
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = types.SimpleNamespace(
        is_cuda=True, is_cpu=False, itemsize=dtype.itemsize, shape=(9, 4, width), device="cuda:0"
    )
    assert library._has_flash(q) is library._shares_heads(q) is has_flash
    on_cpu = torch.zeros(9, 4, width, dtype=dtype)
    assert library._shares_heads(on_cpu) and not library._has_flash(on_cpu)


def test_texts_of_one_length_are_attended_to_without_a_copy(device, monkeypatch):
    q, k, v, layout = AttentionCase("equal", (20, 20), 4, 2, 32).inputs(device, torch.float16)
    made = torch.randn(2, 20, *q.shape[1:], device=device).to(q.dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: made.transpose(1, 2))
    out = library.flash_attention(q, k, v, layout)
    assert torch.equal(out, made.flatten(0, 1)) and out.data_ptr() == made.data_ptr()


def _varlen_by_the_reference(
    q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa
):
    assert starts is starts_k and longest == longest_k == max(starts.diff()) and enable_gqa
    layout = SeqLayout(starts.diff().tolist(), q.device)
    return reference.flash_attention(q, k, v, layout, scale, window_size == (-1, 0))


def _wrong_varlen(what: str):
    """varlen_attn with one fault."""

    def attend(q, k, v, *args, **kwargs):
        if what == "not there":
            raise RuntimeError("No available kernel")
        if what == "causal ignored":
            kwargs["window_size"] = (-1, -1)
        if what == "scale ignored":
            kwargs["scale"] = None
        out = _varlen_by_the_reference(q, k.detach() if what == "no dk" else k, v, *args, **kwargs)
        return out * 1.05 if what == "5 % off" else out + torch.nan if what == "NaN" else out

    return attend


@pytest.fixture
def ragged(monkeypatch, device):
    """A problem for varlen_attn, as on a GPU with FlashAttention."""
    monkeypatch.setattr(library, "_has_flash", lambda q: True)
    monkeypatch.setattr(library, "_varlen_verdicts", {})
    return ATTENTION_PACK.inputs(device, torch.float16)


def test_varlen_attn_is_taken_once_it_has_proven_itself(ragged, attended, monkeypatch):
    checked = []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _varlen_by_the_reference)
    monkeypatch.setattr(
        library,
        "_check_varlen",
        lambda *a, real=library._check_varlen: checked.append(real(*a)) or checked[-1],
    )
    for _ in range(2):
        out = library.flash_attention(*ragged, 0.2)
    assert checked == [True]
    assert torch.equal(out, reference.flash_attention(*ragged, 0.2))
    # one run is SDPA's
    q, k, v, _ = ragged
    attended.clear()
    library.flash_attention(q[:150], k[:150], v[:150], SeqLayout([150], q.device))
    assert len(attended) == 1
    # causal attention too, and another shape is another check
    library.flash_attention(*ragged, causal=True)
    assert checked == [True]
    library.flash_attention(*(t[..., :16] for t in ragged[:3]), ragged[3])
    assert checked == [True, True]


def test_the_callers_default_device_and_dtype_do_not_reach_the_check_of_varlen_attn(ragged, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _varlen_by_the_reference)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        library.flash_attention(*ragged, 0.2)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert list(library._varlen_verdicts.values()) == [True]


@pytest.mark.parametrize("what", ["not there", "causal ignored", "scale ignored", "no dk", "5 % off", "NaN"])
def test_a_wrong_varlen_attn_is_not_taken(what, ragged, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _wrong_varlen(what))
    out = library.flash_attention(*ragged, 0.2)
    assert list(library._varlen_verdicts.values()) == [False]
    torch.testing.assert_close(out, reference.flash_attention(*ragged, 0.2))


ATEN = torch.ops.aten


@pytest.mark.parametrize(
    "keeps", [[], [ATEN.bmm.default, ATEN._scaled_dot_product_flash_attention_for_cpu.default]]
)
def test_varlen_attn_is_checked_inside_a_checkpointed_layer(keeps, ragged, monkeypatch):
    """Checkpointing counts what autograd saves, and a selective one keeps results in their order."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", _varlen_by_the_reference)
    q, k, v, layout = ragged
    contexts = functools.partial(create_selective_checkpoint_contexts, keeps)
    options = {"context_fn": contexts} if keeps else {}

    def gradient(call):
        leaf = q.clone().requires_grad_()
        call(lambda q: library.flash_attention(q, k, v, layout, 0.2), leaf).sum().backward()
        return leaf.grad

    got = gradient(lambda layer, q: checkpoint(layer, q, use_reentrant=False, **options))
    assert list(library._varlen_verdicts.values()) == [True]
    assert torch.equal(got, gradient(lambda layer, q: layer(q)))


def test_varlen_attn_takes_no_part_in_a_transform(ragged, monkeypatch):
    def untransformed(*args, **kwargs):
        assert not is_transformed()
        return _varlen_by_the_reference(*args, **kwargs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", untransformed)
    q, k, v, layout = ragged

    def loss(q):
        return library.flash_attention(q, k, v, layout, 0.2).float().sum()

    torch.func.grad(loss)(q)
    assert library._varlen_verdicts == {}
    loss(q)
    torch.func.grad(loss)(q)
    assert list(library._varlen_verdicts.values()) == [True]


def test_a_full_gpu_is_no_verdict_on_varlen_attn(ragged, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", full)
    out = library.flash_attention(*ragged, 0.2)
    assert library._varlen_verdicts == {}
    torch.testing.assert_close(out, reference.flash_attention(*ragged, 0.2))


@pytest.mark.parametrize("name", ["mean_pool", "mean_pool_geglu"])
def test_nan_in_a_dropped_token_or_a_neighbour_does_not_matter(name, device):
    case = PoolCase("nan", (5, 1, 0, 7, 7), 16)
    (x,), others = PROBLEMS[name][1](case, device, torch.float16)
    others["pool_mask"][6] = True
    clean = getattr(library, name)(x, **others)
    x[~others["pool_mask"]] = torch.nan
    x[6:13] = torch.nan
    got = getattr(library, name)(x, **others)
    assert got[3].isnan().all(), "the poison did not arrive, so this test would prove nothing"
    others_ = [0, 1, 2, 4]
    assert torch.equal(got[others_], clean[others_]) and not clean.isnan().any()


def test_nan_in_a_neighbour_does_not_matter_to_attention(device):
    q, k, v, layout = UNSORTED.inputs(device, torch.float16)
    clean = library.flash_attention(q, k, v, layout)
    for t in (q, k, v):
        t[9:29] = torch.nan
    got = library.flash_attention(q, k, v, layout)
    assert torch.equal(got[:9], clean[:9]) and torch.equal(got[29:], clean[29:])
    assert got[9:29].isnan().all()


@DTYPES
def test_a_geglu_is_in_fp32_a_few_tokens_at_a_time(dtype, monkeypatch, device):
    rows, gelu = [], F.gelu

    def spy(x):
        rows.append(x.shape[:-1].numel())
        return gelu(x)

    monkeypatch.setattr(library, "MAX_ROWS", 8)
    tensors, others = _pooled(PoolCase("chunks", (3, 3, 3, 20, 20, 41), 32), device, dtype, geglu=True)
    monkeypatch.setattr(F, "gelu", spy)
    library.mean_pool_geglu(*tensors, **others)
    assert rows == [6, 3] + [8] * 5 + [8] * 5 + [1]
    monkeypatch.undo()
    monkeypatch.setattr(library, "MAX_ROWS", 8)
    _assert_matches("mean_pool_geglu", "chunks", tensors, others)


@DTYPES
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_in_place_and_not(inplace, dtype, device):
    for case in small(ROTARY_CASES):
        qkv, *rest = case.inputs(device, dtype)
        high = reference.rotary(qkv.double(), rest[0].double(), rest[1].double(), *rest[2:])
        low, before = reference.rotary(qkv, *rest), qkv.clone()
        got = library.rotary(qkv, *rest, inplace=inplace)
        assert (got is qkv) == inplace and (inplace or torch.equal(qkv, before))
        assert_parity(case.name, got, low, high)


def test_torch_compile_reads_the_capability_without_a_break():
    """On a GPU `_has_flash` is traced."""
    from torch._dynamo.variables.torch import constant_fold_functions

    assert "get_device_properties" in library._has_flash.__code__.co_names
    assert torch.cuda.get_device_properties in constant_fold_functions


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_nothing_waits_for_the_device(name, monkeypatch, device):
    # it looks at positions on a CPU alone
    monkeypatch.setattr(library, "check_rotary", lambda *_: None)
    cases, make = PROBLEMS[name]
    for case in cases:
        tensors, others = make(case, device, torch.float16)
        with Waits() as waits, torch.no_grad():
            getattr(library, name)(*tensors, **others)
        assert not waits.count, case.name
    with Waits() as waits:
        torch.ones(1).item()
    assert waits.count == 1, "it counts nothing, so this test would prove nothing"


@pytest.mark.parametrize("head", HEADS, ids=head_name)
def test_every_gradient_of_a_model_matches(head, device):
    assert_every_gradient_matches(head, torch.float32, device, "library")


def test_a_model_gives_the_references_vectors(tiny_directory):
    texts = ["one", "a longer text than that", "", "one", "two words"]
    vectors = [
        NVEmbed.from_pretrained(tiny_directory, device="cpu", impl=i).encode(texts, show_progress=False)
        for i in ("library", "torch")
    ]
    torch.testing.assert_close(*map(torch.as_tensor, vectors), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", [(9, 4) * 4, (8, 8, 2)], ids=["sorted", "neighbours"])
def test_a_model_compiles_as_one_graph(lengths, device):
    torch._dynamo.reset()
    model, batch = make_model(HEADS[2], device, layers=1), make_batch(device, lengths)
    # before any list of the layout is made, because the lists are traced, too
    with ops.use_impl("library"):
        vectors = torch.compile(model, fullgraph=True, backend="eager")(batch)
        torch.testing.assert_close(vectors, model(batch))
    assert batch.layout.by_length() or len(batch.layout.runs()) < 3, "no run, so this test would prove less"
