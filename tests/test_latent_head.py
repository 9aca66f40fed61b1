"""The identities behind the latent head, in float64, and the life of its cache."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from nvembed_fast import NVEmbed, ops
from nvembed_fast.config import LatentConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.network import latent_head
from nvembed_fast.network.latent_head import LatentHead

CONFIG = LatentConfig(
    num_latents_value=12, num_cross_heads=3, cross_dim_head=20, hidden_dim=16, latent_dim=10
)

ALONE = SeqLayout((4,))


def make_head(config: LatentConfig = CONFIG) -> LatentHead:
    torch.manual_seed(0)
    head = LatentHead(config).double().requires_grad_(False)
    for norm in (head.cross_norm, head.context_norm, head.ff_norm):
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    return head


def original(head: LatentHead, h: torch.Tensor) -> torch.Tensor:
    """h2 of one text, written down from the equations and nothing else."""
    c, n = head.config, head.config.num_cross_heads
    context = F.layer_norm(head.latents, (c.latent_dim,), head.context_norm.weight, head.context_norm.bias)
    x = F.layer_norm(h, (c.hidden_dim,), head.cross_norm.weight, head.cross_norm.bias)
    q = (x @ head.to_q.weight.T).view(len(h), n, c.cross_dim_head)
    k, v = (t.view(-1, n, c.cross_dim_head) for t in (context @ head.to_kv.weight.T).chunk(2, dim=-1))
    weights = (torch.einsum("tnh,lnh->ntl", q, k) / c.cross_dim_head**0.5).softmax(-1)
    h1 = torch.einsum("ntl,lnh->tnh", weights, v).flatten(1) @ head.to_out.weight.T + h
    x = F.layer_norm(h1, (c.hidden_dim,), head.ff_norm.weight, head.ff_norm.bias)
    u, g = (x @ head.ff_up.weight.T + head.ff_up.bias).chunk(2, dim=-1)
    return (u * F.gelu(g)) @ head.ff_down.weight.T + head.ff_down.bias + h1


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
@pytest.mark.parametrize("normalize", [True, False])
def test_hoisted_absorbed_and_commuted_equal_the_original_order(latents, normalize):
    head = make_head(dataclasses.replace(CONFIG, output_normalize=normalize))
    head.mode = latents
    h = torch.randn(9, 16, dtype=torch.float64)
    layout, keep = SeqLayout((5, 4)), torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    h2 = original(head, h)
    wanted = torch.stack([h2[:5][keep[:5]].mean(0), h2[5:][keep[5:]].mean(0)])
    wanted = F.normalize(wanted, dim=-1) if normalize else wanted
    with ops.use_impl("torch"):
        torch.testing.assert_close(head.token_states(h, layout), h2, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(head(h, layout, keep), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ({}, "absorbed"),  # the published head: 512 * 4096 < 4096 * 4608
        ({"cross_dim_head": 64, "hidden_dim": 576, "latent_dim": 576}, "direct"),  # 512 * 576 > 64 * 1088
    ],
)
def test_auto_takes_the_cheaper_form(shape, form):
    with torch.device("meta"):
        assert LatentHead(LatentConfig(**shape)).form() == form


def test_a_changed_weight_is_seen_in_place_and_after_a_move():
    head = make_head()
    head.mode = "absorbed"
    h = torch.randn(4, 16, dtype=torch.float64)
    with ops.use_impl("torch"):
        head.token_states(h, ALONE)  # fills the cache
        head.to_kv.weight.mul_(1.5)
        torch.testing.assert_close(head.token_states(h, ALONE), original(head, h))
        head.to_out.weight.data = head.to_out.weight.data * 2
        torch.testing.assert_close(head.token_states(h, ALONE), original(head, h))
        head.float().double()
        torch.testing.assert_close(head.token_states(h, ALONE), original(head, h))


def test_the_cache_is_used_and_never_stored():
    head = make_head()
    head.mode = "absorbed"
    first, second = head._constant(), head._constant()
    assert first[0] is second[0]
    assert not any("cache" in name for name in head.state_dict())


class Adapter(nn.Module):
    """A low-rank correction beside a frozen projection. It has no `weight`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> torch.Tensor:
        return (self.base.weight + self.up.weight @ self.down.weight).detach()


@pytest.mark.parametrize("latents", ["auto", "direct", "absorbed"])
@pytest.mark.parametrize("names", [["to_q"], ["to_kv"], ["to_out"], ["to_q", "to_kv", "to_out"]])
def test_an_adapter_counts_and_learns_and_merges(latents, names):
    head, h = make_head(), torch.randn(4, 16, dtype=torch.float64)
    head.mode = latents
    with ops.use_impl("torch"):
        before = head(h, ALONE)  # fills the cache
        adapters = {name: Adapter(getattr(head, name)) for name in names}
        for name, adapter in adapters.items():
            setattr(head, name, adapter)
        for factor in (1, -3):  # as by the steps of an optimizer
            for adapter in adapters.values():
                adapter.up.weight.data.mul_(factor)
            merged = make_head()
            for name, adapter in adapters.items():
                getattr(merged, name).weight.copy_(adapter.merged())
            got = head(h, ALONE)
            torch.testing.assert_close(got, merged(h, ALONE), rtol=1e-12, atol=1e-12)
            assert (got - before).abs().max() > 1e-3
        got.sum().backward()
        for name, adapter in adapters.items():
            for layer in (adapter.up, adapter.down):
                assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0, name
        # the merge of an adapter writes through .data and puts the old module back
        for name, adapter in adapters.items():
            adapter.base.weight.data = adapter.merged()
            setattr(head, name, adapter.base)
        torch.testing.assert_close(head(h, ALONE), merged(h, ALONE), rtol=1e-12, atol=1e-12)


def doubled(_module, _args, output):
    return 2 * output


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
@pytest.mark.parametrize("name", ["context_norm", "to_q", "to_kv", "to_out"])
@pytest.mark.parametrize("added", ["hook", "forward", "parametrization", "bias"])
def test_whatever_stands_around_a_weight_counts(latents, name, added):
    head, h = make_head(), torch.randn(4, 16, dtype=torch.float64)
    head.mode = latents
    module = getattr(head, name)
    with ops.use_impl("torch"):
        before = head(h, ALONE)
        if added == "hook":
            module.register_forward_hook(doubled)
        elif added == "forward":
            forward = module.forward
            module.forward = lambda x: 2 * forward(x)
        elif added == "parametrization":
            parametrize.register_parametrization(module, "weight", nn.Softplus())
        else:
            module.bias = nn.Parameter(torch.full(module.weight.shape[:1], 2.0).double(), False)
        got = head(h, ALONE)
        head.mode = "direct"
        head._cache.clear()
        torch.testing.assert_close(got, head(h, ALONE), rtol=1e-12, atol=1e-12)
    assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_of_the_backward_is_called(register):
    head, seen = make_head(), []
    head.mode = "absorbed"
    head.requires_grad_(True)
    projections = (head.context_norm, head.to_q, head.to_kv, head.to_out)
    for module in projections[:2]:
        getattr(module, register)(lambda module, *_: seen.append(module))
    with ops.use_impl("torch"):
        h = torch.randn(4, 16, dtype=torch.float64)
        head(h, ALONE).sum().backward()
        assert set(seen) == set(projections[:2])
        everywhere = getattr(nn.modules.module, register.replace("register_", "register_module_"))
        for module in projections[:2]:
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        handle = everywhere(lambda module, *_: seen.append(module))
        try:
            head(h, ALONE).sum().backward()
        finally:
            handle.remove()
    assert set(projections) <= set(seen)


def test_a_norm_of_the_latents_without_a_bias_or_with_another_eps_counts():
    head, h = make_head(), torch.randn(4, 16, dtype=torch.float64)

    def check():
        head.mode = "absorbed"
        got = head(h, ALONE)
        head.mode = "direct"
        head._cache.pop("direct", None)
        torch.testing.assert_close(got, head(h, ALONE), rtol=1e-12, atol=1e-12)

    with ops.use_impl("torch"):
        check()
        head.context_norm.eps = 0.5
        check()
        head.context_norm = nn.LayerNorm(len(head.context_norm.weight), bias=False).double()
        head.requires_grad_(False)
        check()


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_is_called_for_each_projection(register):
    head, h = make_head(), torch.randn(4, 16, dtype=torch.float64)
    seen = []
    with ops.use_impl("torch"):
        wanted = head(h, ALONE)  # fills the cache
        handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
        try:
            got = head(h, ALONE)
        finally:
            handle.remove()
    assert {head.to_q, head.to_kv, head.to_out, head.context_norm} <= set(seen)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
@pytest.mark.parametrize("write", ["data", "numpy"])
@pytest.mark.parametrize("names", [["latents"], ["context_norm.bias"], ["to_kv.weight"], None])
def test_content_written_behind_a_weight_is_seen(tiny_directory, tmp_path, latents, write, names):
    """Right are the vectors of the model when saved and loaded again."""
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu", latents=latents)
    before = model.encode(["a b c"])
    weights = dict(model.model.head.named_parameters())
    for weight in weights.values() if names is None else [weights[name] for name in names]:
        if write == "data":
            weight.data.mul_(-3).add_(0.1)
        else:
            array = weight.numpy()
            array[...] = -3 * array + 0.1
    model.save_pretrained(tmp_path / "saved")
    anew = NVEmbed.from_pretrained(tmp_path / "saved", device="cpu", latents=latents)
    wanted, got = anew.encode(["a b c"]), model.encode(["a b c"])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert (wanted - before).abs().max() > 1e-3, "nothing changed, so this test would prove nothing"


def test_forward_and_a_held_stream_see_written_content_too(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    ids, stream = torch.tensor([[1, 5, 6, 2]]), model.stream
    mask = torch.ones_like(ids)
    before = model(ids, mask, mask)["sentence_embeddings"]
    model.model.head.latents.data.neg_()
    after = model(ids, mask, mask)["sentence_embeddings"]
    [(_, negative)] = stream(["a"])
    model.model.head.latents.data.neg_()
    [(_, positive)] = stream(["a"])
    for one, other in ((before, after), (negative, positive)):
        assert (one - other).abs().max() > 1e-3
    assert torch.equal(positive[0], model.encode("a"))


def test_a_sample_lies_in_every_column_and_holds_all_of_a_small_weight():
    small, large = torch.arange(100.0), torch.arange(512.0).repeat(4096, 1)
    sample = latent_head._sample([small, large])
    assert torch.equal(sample[:100], small)
    assert len(sample) - 100 <= 4096 and set(sample[100:].tolist()) == set(range(512))


@pytest.mark.parametrize("shape", [(512, 4096), (4096, 512), (1024, 2048), (600, 600)])
def test_a_write_to_some_neighbouring_rows_or_columns_is_seen(shape):
    """Its promise: 1 % of the rows, or of the columns. By the places of the sampled elements."""
    rows, columns = shape
    places = latent_head._sample([torch.arange(rows * columns, dtype=torch.int32).view(shape)])
    assert len(places) < 6000
    for found, count in ((places // columns, rows), (places % columns, columns)):
        hit = torch.cat([torch.tensor([-1]), found.unique(), torch.tensor([count])])
        assert (hit.diff() - 1).max() <= max(0.01 * count, 1)


def test_a_weight_whose_memory_was_freed_counts_as_changed():
    head = make_head()
    with ops.use_impl("torch"):
        head(torch.randn(4, 16, dtype=torch.float64), ALONE)
    assert head.cached() and not any(head.stale().values())
    head.to_kv.weight.untyped_storage().resize_(0)
    assert head.stale() and all(head.stale().values())
    for form in head.stale():
        head.forget(form)
    assert not head.cached()


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
def test_gradients_reach_every_weight_of_the_cross_attention(latents):
    head = make_head().requires_grad_(True)
    head.mode = latents
    with ops.use_impl("torch"):
        head(torch.randn(4, 16, dtype=torch.float64), SeqLayout((4,))).sum().backward()
    for name, weight in head.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
def test_weights_in_training_are_never_cached(latents):
    """A fused optimizer changes weights and leaves their version counters alone."""
    head = make_head().float().requires_grad_(True)
    head.mode = latents
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
    h, version = torch.randn(4, 16), head.to_kv.weight._version
    with ops.use_impl("torch"):
        with torch.no_grad():
            before = head(h, ALONE)
        head(h, ALONE).sum().backward()
        optimizer.step()
        assert head.to_kv.weight._version == version, "it was moved, so this test would prove nothing"
        with torch.no_grad():
            after = head(h, ALONE)
        anew = LatentHead(CONFIG)
        anew.load_state_dict(head.state_dict())
        anew.mode = latents
        torch.testing.assert_close(after, anew(h, ALONE).detach())
        assert (after - before).abs().max() > 1e-3


def test_built_once_inside_built_once_is_refused():
    head = make_head().requires_grad_(True)
    with (
        ops.use_impl("torch"),
        head.built_once(),
        pytest.raises(ValueError, match="one block goes around the whole step"),
        head.built_once(),
    ):
        pass


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
def test_built_once_for_a_step_of_two_backwards(latents, monkeypatch):
    head = make_head().requires_grad_(True)
    head.mode = latents
    h = torch.randn(2, 4, 16, dtype=torch.float64)

    def step():
        for part in h:
            head(part, ALONE).square().sum().mul(3).sub(head(part, ALONE)[0, 0]).backward()
        grads = {name: p.grad for name, p in head.named_parameters()}
        head.zero_grad()
        return grads

    builds, build = [], head._build
    monkeypatch.setattr(head, "_build", lambda: builds.append(1) or build())
    with ops.use_impl("torch"):
        wanted = step()
        assert len(builds) == 4
        with head.built_once():
            early = step()
            assert early["to_kv.weight"] is None, "the weights behind the built tensors wait for the end"
        assert len(builds) == 5
    for name, parameter in head.named_parameters():
        total = parameter.grad if early[name] is None else early[name]
        torch.testing.assert_close(total, wanted[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_built_once_sums_the_shares_of_many_backwards_in_fp32(latents, dtype):
    """In bf16 a share of 2**-9 beside a sum of 1 is lost, however often it comes."""
    head = make_head().to(dtype).requires_grad_(True)
    head.mode = latents
    found = []
    for shares in ([1.125], [1.0] + [2.0**-9] * 64):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), head.built_once():
            for share in shares:
                one, other = head._constant()
                (one.sum() * share + other.sum() * share).backward()
        found.append({name: p.grad for name, p in head.named_parameters() if p.grad is not None})
        head.zero_grad()
    assert found[0].keys() == found[1].keys() >= {"latents", "to_kv.weight"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_built_once_leaves_nothing_behind_after_an_error():
    head = make_head().requires_grad_(True)
    with ops.use_impl("torch"), pytest.raises(RuntimeError, match="stop"), head.built_once():
        head(torch.randn(4, 16, dtype=torch.float64), ALONE).sum().backward()
        raise RuntimeError("stop")
    assert head._shared is None and head.to_kv.weight.grad is None


def test_matrices_that_overflow_say_what_to_do():
    head = make_head().half()
    head.to_q.weight.fill_(3e4)
    head.to_kv.weight.fill_(3e4)
    head.mode = "absorbed"
    with (
        ops.use_impl("torch"),
        pytest.raises(ValueError, match="overflows torch.float16: load with dtype='bfloat16'"),
    ):
        head.token_states(torch.randn(4, 16).half(), ALONE)
    assert not head._cache


def test_rejects_an_unknown_form():
    head = make_head()
    head.mode = "fast"
    with pytest.raises(ValueError, match="latents must be one of 'auto', 'direct', 'absorbed', got 'fast'"):
        head.form()
