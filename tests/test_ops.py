import functools
import inspect
import threading

import exact_bf16
import pytest
import torch
from torch.autograd import forward_ad

from nvembed_fast import ops
from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import AttentionCase, LatentCase, RowCase

GPU = torch.cuda.is_available()


def test_torch_and_auto_on_a_cpu_take_the_reference():
    x = torch.randn(3, 8)
    with ops.use_impl("torch"):
        assert ops.choose(x.device, x.dtype) == ("torch", "it was asked for")
    assert ops.choose(x.device, x.dtype)[0] == "torch"
    assert torch.equal(ops.swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


def test_library_is_taken_on_any_device_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(library, "swiglu", lambda x: "by the library")
    with ops.use_impl("library"):
        assert ops.choose(torch.device("cuda", 0), torch.float64) == ("library", "it was asked for")
        assert ops.swiglu(torch.randn(3, 8)) == "by the library"


def test_use_impl_is_undone_also_after_an_error():
    with pytest.raises(RuntimeError), ops.use_impl("torch"):
        raise RuntimeError
    assert ops._state.impl == "auto"


def test_torch_compile_reads_use_impl(device):
    torch._dynamo.reset()
    took_kernels = []

    def look(graph, _):
        took_kernels.append(any("nvembed_fast" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled, x = torch.compile(ops.swiglu, fullgraph=True, backend=look), torch.randn(3, 8, device=device)
    for impl in ("triton", "torch", "triton"):
        with ops.use_impl(impl):
            wanted = ops.swiglu(x)  # first: a graph holds for the kernels that are imported by then
            torch.testing.assert_close(compiled(x), wanted)
    assert took_kernels == [True, False]


def test_checkpoint_contexts_carry_the_impl_into_another_thread():
    seen = []
    with ops.use_impl("torch"):
        _, again = ops.checkpoint_contexts()

    def recompute():
        seen.append(ops._state.impl)
        with again:
            seen.append(ops._state.impl)

    thread = threading.Thread(target=recompute)
    thread.start()
    thread.join()
    assert seen == ["auto", "torch"]


def test_checkpoint_contexts_can_be_entered_again_and_by_two_threads_at_once():
    seen, both = [], threading.Barrier(2)
    with ops.use_impl("torch"):
        _, again = ops.checkpoint_contexts()

    def recompute(before):
        with ops.use_impl(before):
            for _ in range(2):
                with again:
                    both.wait(10)
                    seen.append(ops._state.impl)
                both.wait(10)
                seen.append(ops._state.impl)

    threads = [threading.Thread(target=recompute, args=(impl,)) for impl in ("library", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["library"] * 2 + ["torch"] * 4 + ["triton"] * 2


def test_an_unknown_impl_names_the_choices():
    with (
        pytest.raises(
            ValueError, match="impl must be one of 'auto', 'triton', 'library', 'torch', got 'cuda'"
        ),
        ops.use_impl("cuda"),
    ):
        pass


def test_triton_on_a_cpu_works_only_in_the_interpreter(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.use_impl("triton"):
        assert ops.choose(cpu, torch.float32)[0] == "triton"
        monkeypatch.setattr(ops, "INTERPRETED_DTYPES", exact_bf16.SHIPPED_DTYPES)  # the tests mend bf16
        with pytest.raises(ValueError, match="bf16 is computed wrongly by the Triton interpreter"):
            ops.choose(cpu, torch.bfloat16)
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            ValueError, match="impl='triton' cannot run here: tensors are on cpu, not on a GPU.* 'library' or"
        ):
            ops.swiglu(torch.randn(3, 8))


@pytest.mark.skipif(GPU, reason="patches the interpreter's part")
def test_the_interpreter_asked_for_after_triton_was_imported_is_told(monkeypatch):
    import triton.language

    monkeypatch.setattr(
        triton.language, "sum", lambda: None
    )  # as without TRITON_INTERPRET, a compiled function
    with ops.use_impl("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET was set after triton was"):
        ops.swiglu(torch.ones(3, 8))
    assert ops.swiglu(torch.ones(3, 8)).shape == (3, 4)  # by "auto", without triton


def test_triton_in_float64_raises_and_auto_takes_what_the_device_has():
    with ops.use_impl("triton"), pytest.raises(ValueError, match="not written for torch.float64"):
        ops.swiglu(torch.randn(3, 8, dtype=torch.float64))
    for device, wanted in (("cpu", "torch"), ("cuda:0", "library")):
        impl, why = ops.choose(torch.device(device), torch.float64)
        assert impl == wanted and "not written for torch.float64" in why


@pytest.mark.skipif(GPU, reason="patches the interpreter's part")
def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with ops.use_impl("triton"), pytest.raises(ValueError, match="the package triton is not installed"):
        ops.swiglu(torch.randn(3, 8))
    assert ops.choose(torch.device("cuda", 0), torch.float16) == (
        "library",
        "the package triton is not installed",
    )


def test_no_tangent_is_lost(monkeypatch, device):
    """The kernels have none, and autograd does not say so where a launcher is called itself."""
    monkeypatch.setattr(ops, "_capability", lambda index: (9, 0))
    x, weight = torch.randn(5, 16, device=device), torch.randn(16, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with (
            ops.use_impl("triton"),
            pytest.raises(ValueError, match="no rules for forward mode or torch.func"),
        ):
            ops.rms_norm(dual, weight, 1e-5)
        for impl in ("torch", "library"):
            with ops.use_impl(impl):
                assert forward_ad.unpack_dual(ops.rms_norm(dual, weight, 1e-5)).tangent is not None
        assert ops.choose(torch.device("cuda", 0), torch.float32)[0] == "library"
    assert ops.choose(torch.device("cuda", 0), torch.float32)[0] == "triton"
    tangent = torch.ones_like(x)
    got = torch.func.jvp(lambda x: ops.rms_norm(x, weight, 1e-5), (x,), (tangent,))[1]
    torch.testing.assert_close(
        got, torch.func.jvp(lambda x: reference.rms_norm(x, weight, 1e-5), (x,), (tangent,))[1]
    )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_a_transform_of_torch_func_takes_no_kernel(transform, monkeypatch, device):
    monkeypatch.setattr(ops, "_capability", lambda index: (9, 0))
    x, weight, taken = torch.randn(5, 16, device=device), torch.randn(16, device=device), []

    def loss(x, impl="auto", rms_norm=ops.rms_norm):
        taken.append(ops.choose(torch.device("cuda", 0), torch.float32)[0])
        with ops.use_impl(impl):
            return rms_norm(x.view(-1, 16), weight, 1e-5).square().sum()

    got = transform(loss)(x)
    with pytest.raises(ValueError, match="no rules for forward mode or torch.func"):
        transform(functools.partial(loss, impl="triton"))(x)
    torch.testing.assert_close(got, transform(functools.partial(loss, rms_norm=reference.rms_norm))(x))
    loss(x, "torch")
    assert taken == ["library"] * 3 + ["triton"]


def test_an_old_gpu_takes_the_library_and_says_why(monkeypatch):
    monkeypatch.setattr(ops, "_capability", lambda index: (7, 5))
    impl, why = ops.choose(torch.device("cuda", 0), torch.float16)
    assert impl == "library" and "8.0 or later, got 7.5" in why


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("flash_attention", AttentionCase("narrow", (5, 9), 2, 1, 8).inputs),
        ("flash_attention", AttentionCase("too-wide", (5, 9), 2, 1, 272).inputs),
        ("rms_norm", lambda *a: (*RowCase("wide", 2, 16400).norm_inputs(*a)[::2], 1e-5)),
        ("absorbed_latent_attention", LatentCase("many", 3, 1040, 1, 8, 16).absorbed_inputs),
    ],
)
def test_a_shape_beyond_a_kernels_limits_takes_the_library_under_auto_alone(
    name, inputs, device, monkeypatch
):
    op, args = getattr(ops, name), inputs(device, torch.float32)
    with ops.use_impl("triton"), pytest.raises(ValueError, match="for this kernel, got"):
        op(*args)
    monkeypatch.setattr(ops, "choose", lambda *_: ("triton", "as on a GPU"))
    torch.testing.assert_close(op(*args), getattr(reference, name)(*args))
    monkeypatch.setattr(library, name, lambda *_: "by the library")
    assert op(*args) == "by the library"


def _valid(name, device) -> dict[str, object]:
    """Arguments by keyword, of small tensors."""
    layout = SeqLayout((3, 0, 4), device)
    t, ids = (functools.partial(torch.ones, device=device, dtype=d) for d in (None, torch.int64))
    attention = {"q": t(7, 4, 16), "k": t(7, 2, 16), "v": t(7, 2, 16), "layout": layout}
    norm = {"x": t(7, 32), "weight": t(32), "eps": 1e-5}
    return {
        "flash_attention": attention,
        "latent_attention": {"q": t(7, 2, 16), "k": t(5, 2, 16), "v": t(5, 2, 16)},
        "absorbed_latent_attention": {
            "x": t(7, 32),
            "a": t(10, 32),
            "b": t(10, 32),
            "residual": t(7, 32),
            "num_heads": 2,
        },
        "mean_pool": {"x": t(7, 32), "layout": layout, "pool_mask": t(7, dtype=torch.bool)},
        "mean_pool_geglu": {"value_gate": t(7, 32), "layout": layout, "pool_mask": t(7, dtype=torch.bool)},
        "rms_norm": norm,
        "add_rms_norm": {**norm, "residual": t(7, 32)},
        "rotary": {
            "qkv": t(7, 3, 16),
            "cos": t(4, 8),
            "sin": t(4, 8),
            "positions": layout.positions,
            "num_rotated": 2,
        },
        "swiglu": {"gate_up": t(7, 32)},
        "geglu": {"value_gate": t(7, 32)},
        "masked_lse": {
            "q": t(7, 32),
            "d": t(5, 32),
            "row_scopes": ids(7, 1),
            "column_scopes": ids(5, 2),
            "row_keys": 2 * ids(7, 3),
            "column_keys": ids(5, 1),
            "limits": 40 * t(7),
            "scale": 0.5,
        },
    }[name]


def _columns_first(t):
    return t.mT.contiguous().mT


# operation, its argument, what is wrong with it, the message
WRONG = [
    ("flash_attention", "q", lambda q: q[:6], r"q must be \[7, N, H\], got \(6, 4, 16\)"),
    ("flash_attention", "q", lambda q: q[:, :3], "q must be .* N a multiple of the 2 heads of k"),
    ("flash_attention", "q", lambda q: q[..., :0], r"q must be \[7, N, H\], got \(7, 4, 0\)"),
    ("flash_attention", "q", lambda q: q.int(), "q must be fp16, bf16 or fp32, got .* torch.int32"),
    ("flash_attention", "k", lambda k: k[:6], r"k must be \[7, G, 16\], got \(6, 2, 16\)"),
    ("flash_attention", "k", lambda k: k.half(), "k must be torch.float32 like q, got .* torch.float16"),
    ("flash_attention", "k", lambda k: k.to("meta"), "k must be on .* like the layout, got .* on meta"),
    ("flash_attention", "v", lambda v: v[:, :1], r"v must be \[7, 2, 16\] like k, got \(7, 1, 16\)"),
    ("flash_attention", "v", _columns_first, "v must be strided with contiguous heads"),
    ("flash_attention", "layout", lambda _: SeqLayout((3, 3)), r"q must be \[6, N, H\]"),
    ("flash_attention", "scale", lambda _: -1.0, "scale must be positive and finite, got -1.0"),
    ("flash_attention", "scale", lambda _: float("nan"), "scale must be positive and finite, got nan"),
    ("flash_attention", "scale", lambda _: True, "scale must be positive and finite, got True"),
    ("flash_attention", "causal", lambda _: 0.25, "causal must be True or False, got 0.25"),
    ("latent_attention", "q", lambda q: q[0], r"q must be \[T, N, H\] with a last stride of 1"),
    ("latent_attention", "q", lambda q: q[..., :0], r"q must be \[T, N, H\]"),
    ("latent_attention", "q", _columns_first, r"q must be \[T, N, H\] with a last stride of 1"),
    ("latent_attention", "k", lambda k: k[:, :1], r"k must be \[L, 2, 16\] torch.float32 on"),
    ("latent_attention", "k", lambda k: k[:0], r"k must be \[L, 2, 16\]"),
    ("latent_attention", "v", lambda v: v[:4], r"v must be \[L, 2, 16\]"),
    ("latent_attention", "v", lambda v: v.half(), r"v must be \[L, 2, 16\] .* got .* torch.float16"),
    ("latent_attention", "v", lambda v: v.to("meta"), r"v must be \[L, 2, 16\] .* got .* on meta"),
    ("latent_attention", "scale", lambda _: 0.0, "scale must be positive and finite, got 0.0"),
    ("absorbed_latent_attention", "x", lambda x: x[0], r"x must be \[T, D\] with contiguous rows"),
    ("absorbed_latent_attention", "x", _columns_first, r"x must be \[T, D\] with contiguous rows"),
    ("absorbed_latent_attention", "x", lambda x: x.int(), "x must be fp16, bf16 or fp32"),
    ("absorbed_latent_attention", "a", lambda a: a[:, :16], r"a must be \[N \* L, 32\]"),
    ("absorbed_latent_attention", "a", lambda a: a.half(), r"a must be \[N \* L, 32\] torch.float32"),
    ("absorbed_latent_attention", "a", lambda a: a[:0], r"a must be .* with N = 2 and L >= 1"),
    ("absorbed_latent_attention", "b", lambda b: b[:1], r"b must be \(10, 32\) torch.float32 on"),
    ("absorbed_latent_attention", "residual", lambda r: r[:1], r"residual must be \(7, 32\)"),
    ("absorbed_latent_attention", "num_heads", lambda _: 3, r"a must be .* with N = 3 and L >= 1"),
    ("absorbed_latent_attention", "num_heads", lambda _: 0, r"a must be .* with N = 0 and L >= 1"),
    ("mean_pool", "x", lambda x: x[:3], r"x must be \[7, D\] on .* got \(3, 32\)"),
    ("mean_pool", "x", lambda x: torch.cat([x, x]), r"x must be \[7, D\] on .* got \(14, 32\)"),
    ("mean_pool", "x", _columns_first, r"x must be \[7, D\] on .* contiguous rows"),
    ("mean_pool", "x", lambda x: x.int(), "x must be fp16, bf16 or fp32"),
    ("mean_pool", "pool_mask", lambda m: m[:3], r"pool_mask must be \[7\] torch.bool .* got \(3,\)"),
    ("mean_pool", "pool_mask", lambda m: m.int(), r"pool_mask must be \[7\] torch.bool .* torch.int32"),
    ("mean_pool", "pool_mask", lambda m: torch.cat([m, m]), r"pool_mask must be \[7\] torch.bool"),
    ("mean_pool_geglu", "value_gate", lambda x: x[:, :31], "value_gate must be .* an even number of columns"),
    ("mean_pool_geglu", "value_gate", lambda x: x[:3], r"value_gate must be \[7, 2F\] on .* got \(3, 32\)"),
    ("mean_pool_geglu", "pool_mask", lambda m: m.to("meta"), r"pool_mask must be \[7\] .* on meta"),
    ("rms_norm", "x", lambda x: x[0], r"x must be \[T, D\] with contiguous rows and D > 0, got \(32,\)"),
    ("rms_norm", "x", _columns_first, r"x must be \[T, D\] with contiguous rows"),
    ("rms_norm", "x", lambda x: x.int(), "x must be fp16, bf16 or fp32"),
    ("rms_norm", "weight", lambda w: w[:1], r"weight must be \[32\] torch.float32 on .* got \(1,\)"),
    ("rms_norm", "weight", lambda w: w.half(), r"weight must be \[32\] torch.float32 on .* torch.float16"),
    ("rms_norm", "weight", lambda w: w.repeat(2)[::2], r"weight must be .* contiguous"),
    ("rms_norm", "eps", lambda _: -1e-5, "eps must be finite and not negative, got -1e-05"),
    ("rms_norm", "eps", lambda _: float("nan"), "eps must be finite and not negative, got nan"),
    ("add_rms_norm", "residual", lambda r: r[:1], r"residual must be \(7, 32\) .* got \(1, 32\)"),
    ("add_rms_norm", "residual", lambda r: r.half(), r"residual must be .* torch.float16"),
    ("add_rms_norm", "residual", _columns_first, "residual must be .* contiguous rows"),
    ("rotary", "qkv", lambda q: q[..., :15], "qkv must be .* an even H"),
    ("rotary", "qkv", lambda q: q.mT, "qkv must be .* with contiguous heads"),
    ("rotary", "cos", lambda c: c[:, :1], r"cos must be \[P, 8\] torch.float32 on"),
    ("rotary", "cos", lambda c: c.half(), "cos must be .* torch.float32 on .* torch.float16"),
    ("rotary", "cos", lambda c: c[:3], r"sin must be \[P, 8\] .*, got \(4, 8\)"),
    ("rotary", "sin", _columns_first, "sin must be .* contiguous rows"),
    ("rotary", "positions", lambda p: p[:1], r"positions must be \[7\] torch.int32 on"),
    ("rotary", "positions", lambda p: p.long(), r"positions must be \[7\] torch.int32 .* torch.int64"),
    ("rotary", "num_rotated", lambda _: 4, "num_rotated must be between 0 and the 3 heads of qkv, got 4"),
    ("rotary", "num_rotated", lambda _: -1, "num_rotated must be between 0 and the 3 heads of qkv, got -1"),
    ("swiglu", "gate_up", lambda x: x[:, :31], r"gate_up must be \[T, 2F\] with an even, positive number"),
    ("swiglu", "gate_up", lambda x: x[0], r"gate_up must be \[T, 2F\] with contiguous rows"),
    ("geglu", "value_gate", _columns_first, r"value_gate must be \[T, 2F\] with contiguous rows"),
    (
        "geglu",
        "value_gate",
        lambda x: x[:, :0],
        r"value_gate must be .* an even, positive number",
    ),
    ("masked_lse", "q", lambda q: q[0], r"q must be \[B, D\] with contiguous rows and D > 0, got \(32,\)"),
    ("masked_lse", "q", _columns_first, r"q must be \[B, D\] with contiguous rows"),
    ("masked_lse", "q", lambda q: q[:, :0], r"q must be \[B, D\] .* got \(7, 0\)"),
    ("masked_lse", "q", lambda q: q.int(), "q must be fp16, bf16 or fp32"),
    ("masked_lse", "d", lambda d: d[:, :16], r"d must be \[M, 32\] torch.float32 on .* got \(5, 16\)"),
    ("masked_lse", "d", lambda d: d.half(), r"d must be \[M, 32\] torch.float32 on .* torch.float16"),
    ("masked_lse", "d", _columns_first, r"d must be \[M, 32\] .* with contiguous rows"),
    (
        "masked_lse",
        "row_scopes",
        lambda t: t[:6],
        r"row_scopes must be \[7, S\] torch.int64 on .* got \(6, 1\)",
    ),
    ("masked_lse", "row_scopes", lambda t: t[:, 0], r"row_scopes must be \[7, S\]"),
    ("masked_lse", "column_scopes", lambda t: t.int(), r"column_scopes must be \[5, S\] .* torch.int32"),
    ("masked_lse", "row_keys", lambda t: t[:, :0], r"row_keys must be \[7, K\] torch.int64"),
    ("masked_lse", "row_keys", lambda t: t.repeat(1, 2)[:, ::2], r"row_keys must be .* contiguous"),
    ("masked_lse", "column_keys", lambda t: t.to("meta"), r"column_keys must be \[5, K\] .* on meta"),
    ("masked_lse", "limits", lambda t: t[:6], r"limits must be \[7\] torch.float32 on .* got \(6,\)"),
    ("masked_lse", "limits", lambda t: t.half(), r"limits must be \[7\] torch.float32"),
    ("masked_lse", "limits", lambda t: t.requires_grad_(), "limits must be .* contiguous and detached"),
    ("masked_lse", "scale", lambda _: 0.0, "scale must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(
    "name, argument, spoil, message", WRONG, ids=[f"{name}-{argument}" for name, argument, *_ in WRONG]
)
def test_all_implementations_refuse_a_wrong_input_with_the_same_words(name, argument, spoil, message, device):
    arguments = _valid(name, device)
    arguments[argument] = spoil(arguments.get(argument))
    errors = []
    # the function of each path itself: `ops` might choose the same one twice
    for operation in (getattr(reference, name), getattr(library, name), ops._kernel(name)):
        with pytest.raises(ValueError, match=f"^{message}") as error:
            operation(**arguments)
        errors.append(str(error.value))
    assert len(set(errors)) == 1


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_every_operation_takes_keywords_and_has_a_wrong_input(name, device):
    assert name in {wrong for wrong, *_ in WRONG}
    results = []
    for impl in ("torch", "triton", "library"):
        with ops.use_impl(impl):
            results.append(getattr(ops, name)(**_valid(name, device)))
    torch.testing.assert_close(results[1:], [results[0]] * 2)


@pytest.mark.skipif(GPU, reason="the values are known on a CPU alone")
@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_beyond_the_tables_is_refused_on_a_cpu(position, device):
    arguments = _valid("rotary", device)
    arguments["positions"] = arguments["positions"].clone().fill_(position)
    for operation in (reference.rotary, library.rotary, ops._kernel("rotary")):
        with pytest.raises(
            ValueError, match=f"positions must be from 0 to 3, .* got {position} to {position}"
        ):
            operation(**arguments)


@pytest.mark.parametrize("name", ["flash_attention", "latent_attention", "rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_every_tensor_follows_the_autocast_rule(name, by_keyword, device):
    """One tensor comes in fp32 and the others in 16 bits, by keyword too."""
    kind, low = ("cuda", torch.bfloat16) if device == "cuda" else ("cpu", torch.float16)
    arguments = _valid(name, device)
    last = {"flash_attention": "v", "latent_attention": "v"}.get(name, "weight")
    for key, t in arguments.items():
        if isinstance(t, torch.Tensor) and key != last:
            arguments[key] = t.to(low)
    parameters = [p for p in inspect.signature(getattr(ops, name)).parameters if p in arguments]
    for impl in ("torch", "triton", "library"):
        with ops.use_impl(impl), torch.autocast(kind, low):
            op = getattr(ops, name)
            out = op(**arguments) if by_keyword else op(*(arguments[p] for p in parameters))
        out = out[0] if isinstance(out, tuple) else out
        assert out.dtype == (low if "attention" in name else torch.float32)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_attention_that_is_trained_in_16_bits_on_a_cpu_is_computed_in_fp32(is_autocast):
    layout = SeqLayout([5, 5, 3])
    q, k, v = (torch.randn(13, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    gradient = torch.randn(13, 4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        out = ops.flash_attention(q, k, v, layout)
    out.backward(gradient)
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = reference.flash_attention(*wide, layout)
    expected.backward(gradient.float())
    assert torch.equal(out, expected.to(torch.bfloat16))
    for narrow, exact in zip((q, k, v), wide, strict=True):
        assert torch.equal(narrow.grad, exact.grad.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["flash_attention", "mean_pool", "mean_pool_geglu"])
def test_no_gradient_on_a_cpu_is_as_large_as_the_batch_for_each_run_of_lengths(name):
    layout = SeqLayout([5, 5, 3, 2])
    x = torch.randn(15, 4, 16, requires_grad=True)
    if name == "flash_attention":
        out = reference.flash_attention(x, x, x, layout)
    else:
        out = getattr(reference, name)(x.flatten(1), layout)
    # a slice's gradient is x with zeros around, and there is one for each run
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [other for other, _ in node.next_functions if other is not None]
    assert "SliceBackward0" not in seen and "SplitWithSizesBackward0" in seen


def test_every_operation_reaches_its_kernel():
    """A wrong module name in the table would show only on a GPU otherwise."""
    for name in ops.OPERATIONS:
        assert ops._kernel(name).__name__ == name
    assert len(ops.OPERATIONS) == 11


@pytest.mark.skipif(GPU, reason="about CPU libraries")
@pytest.mark.parametrize("width", [64, 576])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(width, all_cores):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, width, generator=g), torch.randn(96, width, generator=g)
    whole = ops.linear(x, weight)
    for rows in (1, 2, 3, 5, 7, 9, 31, 100):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows]), rows


def _registered(device) -> dict[str, list[object]]:
    """Right arguments of every registered operation. Anyone may call those, without the public function."""
    t = functools.partial(torch.ones, device=device)
    lengths, layout = torch.tensor([3, 0, 4], dtype=torch.int32), SeqLayout((3, 0, 4), device)
    mask, fp32 = t(7, dtype=torch.bool), torch.float32
    q, k, latents, x, p = t(7, 4, 16), t(7, 2, 16), t(5, 4, 16), t(7, 32), t(7, 10)
    tables = (t(4, 8), t(4, 8), layout.positions, 2)
    masks = [t(n, 1, dtype=torch.int64) for n in (7, 5, 7, 5)]
    return {
        "flash_attention": [q, k, k, lengths, 0.25, False],
        "flash_attention_bwd": [q, k, k, q, t(4, 7), q, t(4, 7), lengths, 0.25, False, True, True, True],
        "latent_attention": [q, latents, latents, 0.25, True],
        "latent_attention_bwd": [q, latents, latents, q, t(4, 7), q, 0.25, True, True, True],
        "absorbed_latent_attention": [x, t(10, 32), t(10, 32), x, 2],
        "absorbed_latent_attention_bwd": [x, t(10, 32), t(10, 32), p, x, 2, True],
        "mean_pool": [x, lengths, mask, True],
        "mean_pool_bwd": [x, t(3, 16), lengths, mask, 7, fp32],
        "rms_norm": [x, t(32), 1e-5],
        "add_rms_norm": [x, x, t(32), 1e-5],
        "rms_norm_bwd": [x, t(32), x, x, 1e-5, True, True],
        "rotary": [t(7, 3, 16), *tables, False],
        "rotary_": [t(7, 3, 16), *tables],
        "gated": [x, True],
        "gated_bwd": [x, t(7, 16), True],
        "masked_lse": [x, t(5, 32), *masks, t(7), 0.5],
        "masked_lse_bwd": [x, t(5, 32), *masks, t(7), t(7), t(7), 0.5, True, True],
    }


def test_no_cuda_graph_keeps_the_lists_of_its_first_batch(device):
    """Of mode="reduce-overhead": an operation that takes lengths makes its lists from their values."""
    ops._kernel("rotary")  # imports all
    found = {}
    for name in _registered(device):
        operation = getattr(torch.ops.nvembed_fast, name).default
        reads_lengths = "host_lengths" in [argument.name for argument in operation._schema.arguments]
        assert (torch.Tag.cudagraph_unsafe in operation.tags) is reads_lengths, name
        found.setdefault(reads_lengths, []).append(name)
    assert len(found[True]) == 4 and found[False]


SPOILS = {
    "one row less": lambda t: t[:-1],
    "one column less": lambda t: t[..., :-1],
    "another dtype": lambda t: t.to(torch.int64 if t.dtype == torch.int32 else torch.int8),
    "one dimension more": lambda t: t[None],
}


@pytest.mark.parametrize("name", sorted(_registered("cpu")))
def test_a_registered_operation_refuses_a_tensor_that_does_not_fit(name, device):
    ops._kernel("rotary")  # imports all
    operation, arguments = getattr(torch.ops.nvembed_fast, name), _registered(device)[name]
    operation(*arguments)
    tried = 0
    for place, argument in enumerate(arguments):
        for what, spoil in SPOILS.items() if isinstance(argument, torch.Tensor) else ():
            if place == 0 and what == "one row less" and name in ("gated", "rms_norm", "latent_attention"):
                continue  # their first input alone says how many rows there are
            spoiled = [*arguments[:place], spoil(argument), *arguments[place + 1 :]]
            with pytest.raises(ValueError, match=r"must be|must have"):
                operation(*spoiled)
            tried += 1
    assert tried


def _strided(t: torch.Tensor) -> list[torch.Tensor]:
    """Copies amid NaN (1 in integers): columns behind every row, and one element between any two."""
    shapes = {(*t.shape[:-1], t.shape[-1] + 3): (..., slice(t.shape[-1])), (*t.shape, 2): (..., 0)}
    filling = torch.nan if t.is_floating_point() else 1
    return [t.new_full(shape, filling)[place].copy_(t) for shape, place in shapes.items()]


@pytest.mark.parametrize("name", sorted(_registered("cpu")))
def test_a_registered_operation_reads_the_strides_or_refuses_them(name, device):
    ops._kernel("rotary")
    operation = getattr(torch.ops.nvembed_fast, name)
    g, refused = torch.Generator().manual_seed(0), set()

    def arguments():
        drawn = []
        for t in _registered(device)[name]:
            is_drawn = isinstance(t, torch.Tensor) and t.is_floating_point()
            drawn.append(torch.rand(t.shape, generator=g.manual_seed(len(drawn))).to(t) if is_drawn else t)
        return drawn

    def result(tensors):
        # rotary_ gives its first argument
        out = operation(*tensors)
        return [tensors[0] if out is None else out] if not isinstance(out, tuple | list) else list(out)

    wanted = result(arguments())
    for place, argument in enumerate(arguments()):
        for strided in _strided(argument) if isinstance(argument, torch.Tensor) else ():
            try:
                got = result([*arguments()[:place], strided, *arguments()[place + 1 :]])
            except ValueError as error:
                assert "must be" in str(error)
                refused.add(place)
                continue
            torch.testing.assert_close(got, wanted, msg=lambda m, place=place: f"argument {place}: {m}")
    if name in ("flash_attention_bwd", "latent_attention_bwd"):
        assert 4 in refused, "kernels take an lse as contiguous"


def test_every_registered_operation_is_tried():
    ops._kernel("rotary")
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1].split(".")[0] for name in names if name.startswith("nvembed_fast::")}
    assert ours == set(_registered("cpu"))


@pytest.mark.skipif(GPU, reason="the values are known on a CPU alone")
def test_a_registered_operation_refuses_a_position_beyond_the_tables():
    ops._kernel("rotary")
    for name in ("rotary", "rotary_"):
        arguments = _registered("cpu")[name]
        arguments[3] = arguments[3] + 1
        with pytest.raises(ValueError, match="positions must be from 0 to 3, .* got 1 to 4"):
            getattr(torch.ops.nvembed_fast, name)(*arguments)
