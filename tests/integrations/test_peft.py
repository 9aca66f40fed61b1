"""LoRA by peft around the modules of a model."""

import peft
import torch
from whole_model import make_batch, make_model

from nvembed_fast import ops


def test_lora_starts_at_the_models_vectors_and_alone_gets_gradients():
    model, batch = make_model(), make_batch()
    with ops.use_impl("torch"):
        wanted = model(batch).detach()
        config = peft.LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
        adapted = peft.get_peft_model(model, config)
        got = adapted(batch)
        torch.testing.assert_close(got, wanted)
        (got * torch.randn(got.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    touched = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert touched and all("lora_" in name for name in touched)
    # lora_A waits for lora_B, which starts at zero
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_B" in name)
