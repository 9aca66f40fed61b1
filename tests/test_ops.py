import threading

import pytest
import torch

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import AttentionCase, LatentCase, RowCase

GPU = torch.cuda.is_available()


def test_torch_and_auto_on_a_cpu_take_the_reference():
    x = torch.randn(3, 8)
    with ops.use_impl("torch"):
        assert ops.choose(x.device, x.dtype) == ("torch", "it was asked for")
    assert ops.choose(x.device, x.dtype)[0] == "torch"
    assert torch.equal(ops.swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


def test_use_impl_is_undone_also_after_an_error():
    with pytest.raises(RuntimeError), ops.use_impl("torch"):
        raise RuntimeError
    assert ops._state.impl == "auto"


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


def test_an_unknown_impl_names_the_choices():
    with (
        pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ops.use_impl("cuda"),
    ):
        pass


def test_triton_on_a_cpu_works_only_in_the_interpreter(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.use_impl("triton"):
        assert ops.choose(cpu, torch.float32)[0] == "triton"
        with pytest.raises(ValueError, match="bf16 is computed wrongly by the Triton interpreter"):
            ops.choose(cpu, torch.bfloat16)
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            ValueError, match="impl='triton' cannot run here: tensors are on cpu, not on a GPU"
        ):
            ops.swiglu(torch.randn(3, 8))


def test_triton_in_float64_raises_and_auto_takes_the_reference():
    with ops.use_impl("triton"), pytest.raises(ValueError, match="not written for torch.float64"):
        ops.swiglu(torch.randn(3, 8, dtype=torch.float64))


@pytest.mark.skipif(GPU, reason="patches the interpreter's part")
def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with ops.use_impl("triton"), pytest.raises(ValueError, match="the package triton is not installed"):
        ops.swiglu(torch.randn(3, 8))
    assert ops.choose(torch.device("cuda", 0), torch.float16) == (
        "torch",
        "the package triton is not installed",
    )


def test_an_old_gpu_takes_the_reference_and_says_why(monkeypatch):
    monkeypatch.setattr(ops, "_capability", lambda index: (7, 5))
    impl, why = ops.choose(torch.device("cuda", 0), torch.float16)
    assert impl == "torch" and "8.0 or later, got 7.5" in why


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("flash_attention", AttentionCase("narrow", (5, 9), 2, 1, 8).inputs),
        ("flash_attention", AttentionCase("too-wide", (5, 9), 2, 1, 272).inputs),
        ("rms_norm", lambda *a: (*RowCase("wide", 2, 16400).norm_inputs(*a)[::2], 1e-5)),
        ("absorbed_latent_attention", LatentCase("many", 3, 1040, 1, 8, 16).absorbed_inputs),
    ],
)
def test_a_shape_beyond_a_kernels_limits_takes_the_reference_under_auto_alone(
    name, inputs, device, monkeypatch
):
    op, args = getattr(ops, name), inputs(device, torch.float32)
    with ops.use_impl("triton"), pytest.raises(ValueError, match="for this kernel, got"):
        op(*args)
    monkeypatch.setattr(ops, "choose", lambda *_: ("triton", "as on a GPU"))
    torch.testing.assert_close(op(*args), getattr(reference, name)(*args))


def test_every_operation_reaches_its_kernel():
    """A wrong module name in the table would show only on a GPU otherwise."""
    for name in ops.OPERATIONS:
        assert ops._kernel(name).__name__ == name
    assert len(ops.OPERATIONS) == 10


@pytest.mark.skipif(GPU, reason="about CPU libraries")
@pytest.mark.parametrize("width", [64, 576])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(width, all_cores):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, width, generator=g), torch.randn(96, width, generator=g)
    whole = ops.linear(x, weight)
    for rows in (1, 2, 3, 5, 7, 9, 31, 100):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows]), rows
