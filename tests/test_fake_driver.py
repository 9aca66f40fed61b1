"""Launches, devices and compiled variants, counted by Triton's launcher on a driver that launches nothing.

Ceilings fail when they rise. One that can be lowered is lowered in the commit that allows it. The functions
that take no fixture run in the process of `fake_gpu`.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_driver import gpu
from whole_model import HEADS, VOCAB, make_model

from nvembed_fast import NVEmbed, ops
from nvembed_fast.packing import PackedBatch

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
    assert fixed.total() <= 13, fixed


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
