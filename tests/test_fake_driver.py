"""Launches, devices and compiled variants, counted by Triton's launcher on a driver that launches nothing.

Ceilings fail when they rise. One that can be lowered is lowered in the commit that allows it. The functions
that take no fixture run in the process of `fake_gpu`.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from fake_driver import gpu
from whole_model import HEADS, VOCAB, make_model

from nvembed_fast import NVEmbed, ops
from nvembed_fast.kernels import (
    absorbed_latent_attention,
    flash_attention,
    gated,
    latent_attention,
    rms_norm,
    rotary,
    tuned,
)
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.packing import PackedBatch
from tools import predict

ABSORBED = HEADS[1]
# operations of PyTorch that launch nothing on a GPU
NO_LAUNCH = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select"),
    *("slice", "split", "split_with_sizes", "t", "transpose", "unsqueeze", "view", "_unsafe_view"),
}


def packed(lengths) -> PackedBatch:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCAB, n) for n in lengths]
    return PackedBatch.from_ids(ids, [min(2, n) for n in lengths], "cuda")


def forward(layers: int) -> tuple[Counter, Counter]:
    """What a forward launches: our kernels and PyTorch's."""
    model = make_model(ABSORBED, "cuda", torch.bfloat16, layers=layers).requires_grad_(False)
    batch = packed((9, 1, 30, 17))
    with torch.no_grad():
        # compiles, and builds what is kept
        model(batch)
        gpu.forget_counts()
        model(batch)
    library = {name: count for name, count in gpu.operations().items() if name not in NO_LAUNCH}
    return Counter(launch.kernel for launch in gpu.launches()), Counter(library)


def test_launches_of_a_forward(fake_gpu):
    (one, library_one), (two, library_two) = fake_gpu(forward, 1), fake_gpu(forward, 2)
    layer, library_layer = two - one, library_two - library_one
    assert layer == {
        "_rms_norm_fwd_kernel": 2,
        "_rotary_fwd_kernel": 1,
        "_flash_attention_fwd_kernel": 1,
        "_gated_fwd_kernel": 1,
    }
    assert library_layer == {"mm": 4}
    # the last norm, the latents, and the two means
    assert one - layer == {
        "_rms_norm_fwd_kernel": 1,
        "_absorbed_latent_attention_fwd_kernel": 1,
        "_mean_pool_fwd_kernel": 2,
    }
    fixed = library_one - library_layer
    assert fixed.total() <= 12, fixed
    per_layer, rest = (layer + library_layer).total(), (one - layer + fixed).total()
    assert predict.LAYERS * per_layer + rest == predict.OUR_KERNELS


# the most binaries of each kernel over any batches: a model of one dtype on one GPU. The tiles of attention
# follow the longest text in three classes, the norm of one layer has no residual, a mean has a GEGLU or none
INFERENCE = {
    "_absorbed_latent_attention_fwd_kernel": 1,
    "_flash_attention_fwd_kernel": 3,
    "_gated_fwd_kernel": 1,
    "_mean_pool_fwd_kernel": 2,
    "_mean_pool_fwd_combine_kernel": 2,
    "_rms_norm_fwd_kernel": 2,
    "_rotary_fwd_kernel": 1,
}
TRAINING = INFERENCE | {
    "_absorbed_latent_attention_bwd_kernel": 1,
    "_flash_attention_bwd_delta_kernel": 1,
    "_flash_attention_bwd_dq_kernel": 2,
    "_flash_attention_bwd_dkv_kernel": 3,
    "_gated_bwd_kernel": 1,
    "_mean_pool_bwd_kernel": 2,
    "_rms_norm_bwd_kernel": 2,
    "_rms_norm_bwd_dweight_kernel": 1,
    "_rotary_fwd_kernel": 2,
}


def random_batches(num_batches: int, training: bool) -> dict[str, int]:
    """The variants of each kernel behind these batches."""
    rng = np.random.default_rng(1)
    model = make_model(ABSORBED, "cuda", torch.bfloat16, width=64).requires_grad_(training)
    for i in range(num_batches):
        lengths = random_lengths(rng, kind=i % 5)
        with torch.set_grad_enabled(training):
            vectors = model(packed(lengths))
        if training:
            vectors.sum().backward()
    return gpu.variants()


def random_lengths(rng: np.random.Generator, kind: int) -> list[int]:
    match kind:
        case 0:
            return [int(n) for n in np.clip(rng.lognormal(4, 1, int(rng.integers(1, 8))), 1, 700)]
        case 1:
            return [int(rng.integers(1, 300))]
        case 2:
            return [int(rng.integers(1, 20)) for _ in range(int(rng.integers(1, 30)))]
        case 3:
            return [16] * int(rng.integers(1, 20))
        case _:
            return [1] * int(rng.integers(1, 4))


@pytest.mark.parametrize("ceilings", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_variants_of_random_batches(fake_gpu, ceilings):
    assert fake_gpu(random_batches, 200, ceilings is TRAINING) == ceilings


def variants_after_warm_up(training: bool) -> list[dict[str, int]]:
    """Of a model that was warmed up, before and after random batches."""
    rng = np.random.default_rng(1)
    model = make_model(ABSORBED, "cuda", torch.bfloat16, width=64).requires_grad_(training)
    encoder = NVEmbed(model, SimpleNamespace(check_ids=lambda size: None))
    model.head.mode = "absorbed"
    assert encoder.warm_up(training=training, show_progress=False)
    assert all(weight.grad is None for weight in model.parameters())
    warm = gpu.variants()
    for i in range(20):
        with torch.set_grad_enabled(training):
            vectors = model(packed(random_lengths(rng, kind=i % 5)))
        if training:
            vectors.sum().backward()
    encoder.warm_up(training=training, show_progress=False)
    return [warm, gpu.variants()]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_nothing_compiles_after_a_warm_up(fake_gpu, training):
    warm, later = fake_gpu(variants_after_warm_up, training)
    assert later == warm
    if not training:
        # documents drop no token, so there is no mask
        assert warm == INFERENCE | {"_mean_pool_fwd_kernel": 4}


def on_another_device() -> tuple[set, set, bool]:
    """The devices of launches and of memory, of tensors on cuda:1 while cuda:0 is current."""
    import triton
    from triton.runtime._allocation import _allocator

    def users(size, alignment, stream):
        raise AssertionError("the user's allocator is for the user's kernels")

    triton.set_allocator(users)
    model = make_model(ABSORBED, "cuda:1", torch.bfloat16, width=64)
    ids = [np.arange(n) for n in (9, 1, 30)]
    for _ in range(2):
        with torch.no_grad():
            model(PackedBatch.from_ids(ids, [0] * 3, "cuda:1"))
    # the backward runs in this thread, which stays on cuda:0
    model(PackedBatch.from_ids(ids, [0] * 3, "cuda:1")).sum().backward()
    assert torch.cuda.current_device() == 0
    has_scratch = (1, 512) in [(device, size % 1024) for device, size in gpu.allocated()]
    assert has_scratch, "no kernel asked for scratch memory, so this test would prove nothing"
    launched_on = {launch.device for launch in gpu.launches()}
    return launched_on, {device for device, _ in gpu.allocated()}, _allocator.get() is users


def test_launches_and_scratch_memory_follow_the_tensors(fake_gpu):
    launched_on, allocated_on, keeps_allocator = fake_gpu(on_another_device)
    assert (launched_on, allocated_on) == ({1}, {1})
    assert keeps_allocator


def random_call(rng: np.random.Generator, layouts: list):
    """A call of an operation whose launches are repeated, of few kinds, so that they come again."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[int(rng.integers(3))]
    num_tokens, width = int(rng.choice([1, 7, 16])), int(rng.choice([32, 64]))

    def new(*shape, dtype=dtype):
        # a row longer or a place further: strides and addresses that are no multiples of 16
        padded, shift = int(rng.choice([0, 0, 1])), int(rng.choice([0, 0, 1]))
        rows = torch.zeros(*shape[:-1], shape[-1] + padded + shift, dtype=dtype, device="cuda")
        return rows[..., shift : shift + shape[-1]]

    match int(rng.integers(6)):
        case 0:
            return ops.rms_norm, new(num_tokens, width), new(width), 1e-5
        case 1:
            x, residual, eps = new(num_tokens, width), new(num_tokens, width), float(rng.choice([1e-5, 1e-6]))
            return ops.add_rms_norm, x, residual, new(width), eps
        case 2:
            return (ops.swiglu, ops.geglu)[int(rng.integers(2))], new(num_tokens, width)
        case 3:
            layout = layouts[int(rng.integers(2))]
            tables = (new(32, width // 2, dtype=torch.float32) for _ in range(2))
            qkv, num_rotated = new(layout.num_tokens, 4, width), int(rng.integers(1, 5))
            return ops.rotary, qkv, *tables, layout.positions, num_rotated, bool(rng.integers(2))
        case 4:
            # now and then another layout, maybe at the address of one that is gone
            if rng.integers(8) == 0:
                layouts[0] = SeqLayout((int(rng.integers(1, 40)), 3), "cuda")
            layout = layouts[int(rng.integers(2))]
            q, k, v = new(layout.num_tokens, 4, width).split((2, 1, 1), dim=1)
            scale = (None, 0.5)[int(rng.integers(2))]
            return ops.flash_attention, q, k, v, layout, scale, bool(rng.integers(2))
        case _:
            a = new(2 * 24, width)
            x, residual = (torch.zeros(num_tokens, width, dtype=dtype, device="cuda") for _ in range(2))
            return ops.absorbed_latent_attention, x, a, torch.zeros_like(a), residual, 2


def described(call: gpu.Call, results, inputs) -> list:
    """What must not differ between two ways to make a call. Results have addresses of their own."""
    results = results if isinstance(results, tuple) else (results,)
    known = {t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
    arguments = []
    for value in call.arguments:
        if isinstance(value, torch.Tensor):
            is_new = type(value) is gpu.DeviceTensor and value.data_ptr() not in known
            place = "new" if is_new and value.is_floating_point() else value.data_ptr()
            value = (place, value.dtype, value.shape, value.stride())
        arguments.append(value)
    shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in results]
    return [call.function, call.grid, call.stream, arguments, shapes]


@contextlib.contextmanager
def by_triton_alone() -> Iterator[None]:
    """No launch is repeated inside a `with` block: Triton binds the arguments of each."""
    modules = (absorbed_latent_attention, flash_attention, gated, latent_attention, rms_norm, rotary)
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "_launch_fwd", module._launch_fwd.__wrapped__))
        yield


def compare_ways(num_calls: int, seed: int) -> tuple[int, int]:
    """How many calls were launched directly, and by how many compiled kernels."""
    from triton.runtime.jit import JITFunction

    rng = np.random.default_rng(seed)
    layouts = [SeqLayout((9, 1, 30), "cuda"), SeqLayout((70,), "cuda")]
    num_direct, functions = 0, set()
    with (
        torch.no_grad(),
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run,
    ):
        for _ in range(num_calls):
            operation, *args = random_call(rng, layouts)
            before = run.call_count
            results = operation(*args)
            found = described(gpu.last_call(), results, args)
            num_direct += run.call_count == before
            functions.add(found[0])
            with by_triton_alone():
                results = operation(*args)
            wanted = described(gpu.last_call(), results, args)
            assert found == wanted, (operation.__name__, found, wanted)
    return num_direct, len(functions)


@pytest.mark.parametrize("seed", range(2))
def test_a_repeated_launch_is_the_one_that_triton_would_make(fake_gpu, seed):
    num_direct, num_kernels = fake_gpu(compare_ways, 400, seed)
    assert num_direct > 50 and num_kernels > 30, "too few, so this test would prove nothing"


def after_its_layout() -> tuple[bool, bool]:
    """Whether a launch reads the lists of its own layout, which lies where one that is gone lay."""
    with torch.no_grad():
        q, k, v = torch.zeros(9, 4, 16, device="cuda").split((2, 1, 1), dim=1)
        layout = SeqLayout((9,), "cuda")
        for _ in range(2):
            ops.flash_attention(q, k, v, layout)
        place, old = id(layout), layout.cu_seqlens.data_ptr()
        del layout
        others = []
        while not others or (id(others[-1]) != place and len(others) < 1000):
            others.append(SeqLayout((4, 5), "cuda"))
        ops.flash_attention(q, k, v, others[-1])
    lists = others[-1].cu_seqlens
    read = [t for t in gpu.last_call().arguments if isinstance(t, torch.Tensor) and t.shape == lists.shape]
    return id(others[-1]) == place, any(t.data_ptr() == lists.data_ptr() != old for t in read)


def test_a_launch_of_a_layout_ends_with_it(fake_gpu):
    is_same_place, reads_its_own = fake_gpu(after_its_layout)
    assert is_same_place, "no layout lies where the first one lay, so this test would prove nothing"
    assert reads_its_own


def keeps_lists() -> bool:
    with torch.no_grad():
        q, k, v = torch.zeros(9, 4, 16, device="cuda").split((2, 1, 1), dim=1)
        layout = SeqLayout((9,), "cuda")
        ops.flash_attention(q, k, v, layout)
        lists = weakref.ref(layout.cu_seqlens)
        del layout
        for _ in range(16):  # launches whose arguments the fake GPU holds
            ops.rms_norm(torch.zeros(3, 32, device="cuda"), torch.ones(32, device="cuda"), 1e-5)
    return lists() is not None


def test_the_lists_of_a_layout_end_with_it(fake_gpu):
    assert not fake_gpu(keeps_lists)


def norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a norm was launched without Triton's binder."""
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
        ops.rms_norm(x, weight, 1e-5)
    return run.call_count == 0


def around_hooks() -> list[tuple]:
    from triton import knobs

    x, weight = torch.ones(3, 32, device="cuda"), torch.ones(32, device="cuda")
    seen = [("first", norm(x, weight)), ("again", norm(x, weight))]
    entered = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(entered.append)
        seen.append(("hook", norm(x, weight), len(entered)))
        chain.remove(entered.append)
        entered.clear()
    kernel, hook = rms_norm._rms_norm_fwd_kernel, lambda *args, **named: None
    kernel.add_pre_run_hook(hook)
    seen.append(("hook before the run", norm(x, weight)))
    kernel.pre_run_hooks.clear()
    with mock.patch.object(knobs.runtime, "debug", True):
        seen.append(("debug", norm(x, weight), gpu.variants()["_rms_norm_fwd_kernel"]))
    seen.append(("again", norm(x, weight)))
    return seen


def test_hooks_and_settings_of_triton_hold(fake_gpu):
    assert fake_gpu(around_hooks) == [
        ("first", False),
        ("again", True),
        *[("hook", False, 1)] * 2,
        ("hook before the run", False),
        ("debug", False, 2),
        ("again", True),
    ]


def after_a_good_call() -> list[str]:
    """What is said to a bad call whose shapes and strides are those of a good one before."""
    x, weight = torch.ones(3, 32, device="cuda"), torch.ones(32, device="cuda")
    qkv, tables = torch.ones(3, 2, 32, device="cuda"), torch.ones(8, 16, device="cuda")
    positions = torch.zeros(3, dtype=torch.int32, device="cuda")
    layout, other = SeqLayout((3,), "cuda"), SeqLayout((4,), "cuda")
    with torch.no_grad():
        for _ in range(2):
            ops.rms_norm(x, weight, 1e-5)
            ops.rotary(qkv, tables, tables.clone(), positions, 2, True)
            ops.flash_attention(qkv, qkv.clone(), qkv.clone(), layout)
        bad = (
            lambda: ops.rms_norm(x, weight.half(), 1e-5),
            lambda: ops.rms_norm(x, weight, -1.0),
            lambda: ops.rotary(qkv.clone().requires_grad_(), tables, tables.clone(), positions, 2, True),
            lambda: ops.flash_attention(qkv, qkv.clone(), qkv.clone(), other),
        )
        said = []
        for call in bad:
            with pytest.raises(ValueError) as caught:
                call()
            said.append(str(caught.value).split(",")[0])
    return said


def test_a_bad_call_is_refused_after_a_good_one(fake_gpu):
    assert fake_gpu(after_a_good_call) == [
        "weight must be [32] torch.float32 on cuda:0",
        "eps must be finite and not negative",
        "rotary(inplace=True) would overwrite a tensor that needs a gradient",
        "q must be [4",
    ]


def after_tuning() -> list[int]:
    """The warps of a norm by the rule, by an entry, and by the rule again."""
    x, weight = torch.ones(3, 32, device="cuda"), torch.ones(32, device="cuda")
    entry = {("rms_norm.fwd", gpu.CAPABILITY, "width32-bits32"): {"BLOCK_T": 2, "num_warps": 8}}

    def warps() -> int:
        for _ in range(2):
            ops.rms_norm(x, weight, 1e-5)
        return gpu.launches()[-1].num_threads // 32

    found = [warps()]
    with tuned.use(entry):
        found.append(warps())
    return [*found, warps()]


def test_a_tuned_entry_ends_the_repeated_launches_of_the_rule(fake_gpu):
    rule, by_entry, after = fake_gpu(after_tuning)
    assert by_entry == 8 != rule == after


def programs_for_tiles() -> list[int]:
    """The programs of a repeated launch: for 250 tiles by the rule and by an entry, and for 5 tiles."""
    entry = {"AHEAD": True, "PERSISTENT": True}
    key = ("flash_attention.fwd", gpu.CAPABILITY, "width128-group4-bits16-longest128")

    def programs(count: int) -> int:
        layout = SeqLayout((70,) * count, "cuda")
        q, k, v = torch.zeros(70 * count, 6, 128, device="cuda", dtype=torch.bfloat16).split((4, 1, 1), 1)
        for _ in range(2):
            ops.flash_attention(q, k, v, layout)
        return gpu.launches()[-1].num_programs

    with torch.no_grad():
        found = [programs(50)]
        with tuned.use({key: entry}):
            return [*found, programs(50), programs(1)]


def test_one_program_on_a_multiprocessor_walks_several_tiles(fake_gpu):
    assert fake_gpu(programs_for_tiles) == [250, 132, 5]


def on_another_stream() -> bool:
    import triton

    x, weight = torch.ones(3, 32, device="cuda"), torch.ones(32, device="cuda")
    for _ in range(2):
        ops.rms_norm(x, weight, 1e-5)
    other = mock.patch.object(triton.runtime.driver.active, "get_current_stream", lambda device: 99)
    with other, pytest.raises(RuntimeError, match="invalid resource handle"):
        ops.rms_norm(x, weight, 1e-5)
    return gpu.last_call().stream == 99


def test_a_repeated_launch_goes_to_the_current_stream(fake_gpu):
    assert fake_gpu(on_another_stream)


def call_with_errors() -> list[str]:
    """What a launch says with an error of the driver, and whether the next one is well again."""
    x, weight = torch.ones(3, 16, device="cuda"), torch.ones(16, device="cuda")
    said = []
    for errors in ({"load": 2}, {"launch": 2}):
        with gpu.failing(**errors), pytest.raises(RuntimeError) as caught:
            ops.rms_norm(x, weight, 1e-5)
        said.append(str(caught.value))
    ops.rms_norm(x, weight, 1e-5)
    return [*said, gpu.launches()[-1].kernel]


def test_errors_of_the_driver_are_told(fake_gpu):
    *errors, last = fake_gpu(call_with_errors)
    assert errors == ["Triton Error [CUDA]: out of memory"] * 2
    assert last == "_rms_norm_fwd_kernel"


def call_compiled() -> tuple[bytes, int]:
    with gpu.compiler("triton"):
        ops.swiglu(torch.ones(3, 64, device="cuda"))
        (launch,) = gpu.launches()
        (binaries, *_) = gpu.kernels()[launch.kernel].device_caches[0]
        (binary,) = binaries.values()
        return binary.kernel[:4], launch.num_threads


def test_the_compiler_may_be_the_real_one(fake_gpu):
    magic, num_threads = fake_gpu(call_compiled)
    assert (magic, num_threads) == (b"\x7fELF", 64)


def call_nothing() -> float:
    return ops.swiglu(torch.ones(3, 64, device="cuda")).isnan().all().item()


def test_what_no_kernel_has_written_is_nan(fake_gpu):
    assert fake_gpu(call_nothing)
