"""LoRA by peft around the modules of a model, and our adapters in its file format, both ways."""

import dataclasses
import warnings

import numpy as np
import peft
import pytest
import torch
from transformers import MistralConfig, MistralModel
from whole_model import LATENT, TEXT, make_batch, make_model

from nvembed_fast import ops
from nvembed_fast.checkpoint import add_lora, load_adapter, merge_adapter, save_adapter
from nvembed_fast.checkpoint.names import published_tensors
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch

IDS = np.random.default_rng(0).integers(0, 50, 17)


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


def stock_and_ours() -> tuple[MistralModel, NVEmbedModel]:
    """A decoder of transformers, and our model on the same weights. Causal, as the stock one is."""
    torch.manual_seed(0)
    stock = MistralModel(
        MistralConfig(
            vocab_size=50,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=TEXT.rope_theta,
            rms_norm_eps=TEXT.rms_norm_eps,
            sliding_window=None,
        )
    ).eval()
    ours = NVEmbedModel(NVEmbedConfig(dataclasses.replace(TEXT, is_causal=True), LATENT)).eval()
    stored = {f"embedding_model.{name}": value for name, value in stock.state_dict().items()}
    with torch.no_grad():
        for name, slot in published_tensors(ours.config).items():
            if name in stored:
                ours.get_parameter(slot.parameter)[slot.rows] = stored[name]
    return stock, ours


def states(model) -> torch.Tensor:
    """[T, D] hidden states of one text."""
    with torch.no_grad(), ops.use_impl("torch"):
        if isinstance(model, NVEmbedModel):
            return model.embedding_model(PackedBatch.from_ids([IDS], [0]))
        return model(torch.tensor(IDS)[None]).last_hidden_state[0]


def fill(model, names: str) -> None:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))


def test_the_bases_agree():
    stock, ours = stock_and_ours()
    torch.testing.assert_close(states(ours), states(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["full", "lora", "frozen"])
def test_stock_peft_on_a_stock_decoder_loads_our_adapter(head, tmp_path):
    stock, ours = stock_and_ours()
    before = states(stock)
    add_lora(ours, rank=4, alpha=16, dropout=0.1, head=head)
    fill(ours, "lora_B")
    wanted = states(ours.eval())
    assert (wanted - before).abs().max() > 0.1, "adapters that do nothing prove nothing"
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # of keys that are missing, or fields that it does not know
        loaded = peft.PeftModel.from_pretrained(stock, tmp_path)
    torch.testing.assert_close(states(loaded), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(loaded.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj", "gate_proj"]], ids=str)
@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_that_stock_peft_has_written_loads(targets, rank, tmp_path):
    stock, ours = stock_and_ours()
    before = states(ours)
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=targets, task_type="FEATURE_EXTRACTION"
    )
    adapted = peft.get_peft_model(stock, config)
    fill(adapted, "lora_B")
    wanted = states(adapted.eval())
    assert (wanted - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    adapter = load_adapter(ours, tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.head) == (rank, 8, 0.1, "frozen")
    torch.testing.assert_close(states(ours), wanted, rtol=1e-5, atol=1e-5)
    merge_adapter(ours)
    torch.testing.assert_close(states(ours), wanted, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_changes_more_than_products_is_refused(tmp_path):
    stock, ours = stock_and_ours()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    peft.get_peft_model(stock, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save=\['norm'\] is not supported: it is no plain LoRA"):
        load_adapter(ours, tmp_path)
