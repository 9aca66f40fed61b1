"""The quick interpreter of the tests computes what Triton's own does."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

import quick_interpreter

from nvembed_fast.kernels.flash_attention import flash_attention
from nvembed_fast.kernels.testing import ATTENTION_SHORT, gradients


def test_no_bit_changes(dtype, path, monkeypatch):
    *inputs, layout = ATTENTION_SHORT.inputs("cpu", dtype)

    def results() -> list[torch.Tensor]:
        outputs, grads = gradients(lambda *t: flash_attention(*t, layout, causal=True), inputs)
        return [*outputs, *grads]

    quick = results()
    for owner, name, original in quick_interpreter.REPLACED:
        monkeypatch.setattr(owner, name, original)
    assert len(quick) > 3 and all(map(torch.equal, results(), quick))
