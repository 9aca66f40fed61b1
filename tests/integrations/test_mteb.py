"""A model that mteb evaluates: eight lines around `encode`."""

import mteb
import numpy as np
import pytest
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from torch.utils.data import DataLoader

from nvembed_fast import NVEmbed


class Encoder(AbsEncoder):
    def __init__(self, model: NVEmbed, instruction: str):
        self.model, self.instruction = model, instruction

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = "" if prompt_type is PromptType.document else self.instruction
        return self.model.encode(texts, instruction=instruction).numpy()


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory)


TEXTS = [{"text": "one"}, {"text": "two words"}, {"text": "a third text"}]


@pytest.mark.parametrize("prompt_type", [PromptType.query, PromptType.document])
def test_mteb_gets_the_vectors_of_encode(prompt_type, model):
    metadata = mteb.get_task("STSBenchmark").metadata
    got = Encoder(model, "Instruct: find\nQuery: ").encode(
        DataLoader(TEXTS, batch_size=2),
        task_metadata=metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
    )
    instruction = "Instruct: find\nQuery: " if prompt_type is PromptType.query else ""
    wanted = model.encode([row["text"] for row in TEXTS], instruction=instruction).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
