"""The texts and the models that the encoder is measured on.

Texts are random words with a stated number of tokens. Weights are random, in the shape of a published model.
The tokenizer is one of whole words. It is cheap, and all encoders share it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from nvembed_fast import NVEmbed, ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.testing import skewed_lengths
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import Placement
from nvembed_fast.tokenization import TextTokenizer

EOS, EOS_ID = "</s>", 2
MAX_LENGTH = 4096


@dataclass(frozen=True)
class Workload:
    """Texts of random words with given numbers of tokens.

    Attributes:
        name: the case of a figure.
        lengths: tokens per text, including its end mark and the instruction.
        instruction_length: leading tokens of every text that are its instruction.
        rounds: how often it is timed.
    """

    name: str
    lengths: tuple[int, ...]
    instruction_length: int = 0
    rounds: int = 3

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def texts(self, vocab_size: int) -> tuple[list[str], str]:
        """(texts, instruction) for `word_tokenizer(vocab_size)`. Every call gives the same."""
        generator = np.random.default_rng(0)

        def words(count: int) -> str:
            return " ".join(map(_word, generator.integers(EOS_ID + 1, vocab_size, count).tolist()))

        prefix = self.instruction_length
        instruction = words(prefix) + " " if prefix else ""
        return [words(length - prefix - 1) for length in self.lengths], instruction


@dataclass(frozen=True)
class Scale:
    """The model and the workloads of one kind of machine.

    Attributes:
        config: of the model.
        workloads: of texts.
        batch_sizes: among which every baseline finds its best, workload by workload.
        search_texts, search_tokens: how much of a workload that search looks at (`passes.search_runs`).
        parity_lengths: of the texts that the encoders are compared on before they are timed. Sorted and four
            to a batch they make a ragged batch, one of equal lengths and a single text.
    """

    config: NVEmbedConfig
    workloads: tuple[Workload, ...]
    batch_sizes: tuple[int, ...]
    search_texts: int
    search_tokens: int
    parity_lengths: tuple[int, ...]


GPU = Scale(
    config=NVEmbedConfig(),
    workloads=(
        Workload("one query", (50,), instruction_length=18, rounds=50),
        Workload("queries", (50,) * 1024, instruction_length=18),
        Workload("all 32", (32,) * 2048),
        Workload("all 512", (512,) * 128),
        Workload("all 4096", (4096,) * 16),
        Workload("skewed", skewed_lengths(2048)),
    ),
    # 512 short texts, or 4 of the longest, are the 16,384 tokens that ours takes at once
    batch_sizes=(4, 8, 32, 128, 512),
    search_texts=512,
    search_tokens=32768,
    parity_lengths=(41, 700, 128, 41, 300, 41, 129, 41, 40),
)
# the shape of SmolLM2-135M
SMALL = Scale(
    config=NVEmbedConfig(
        BackboneConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100000.0,
        ),
        LatentConfig(cross_dim_head=64, hidden_dim=576, latent_dim=576),
    ),
    workloads=(
        Workload("one query", (50,), instruction_length=18, rounds=10),
        Workload("queries", (50,) * 8, instruction_length=18),
        Workload("all 32", (32,) * 16),
        Workload("all 256", (256,) * 4),
        Workload("skewed", skewed_lengths(64, 48, 16, 256)),
    ),
    batch_sizes=(1, 4, 16),
    search_texts=64,
    search_tokens=1024,
    parity_lengths=(21, 100, 64, 21, 90, 21, 33, 21, 20),
)
# for the tests
SMALLEST = Scale(
    config=NVEmbedConfig(
        BackboneConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=500.0,
        ),
        LatentConfig(
            num_latents_value=12, num_cross_heads=2, cross_dim_head=24, hidden_dim=64, latent_dim=64
        ),
    ),
    workloads=(
        Workload("one query", (9,), instruction_length=4, rounds=1),
        Workload("queries", (9,) * 4, instruction_length=4, rounds=1),
        Workload("all 4", (4,) * 4, rounds=1),
        Workload("skewed", skewed_lengths(6, 8, 2, 32), rounds=1),
    ),
    batch_sizes=(1, 2, 4),
    search_texts=16,
    search_tokens=64,
    parity_lengths=(7, 23, 11, 7, 13, 7, 9, 7, 6),
)


# by device
SCALES = {"cuda": GPU, "cpu": SMALL}
# of ours. "auto" would take the library's path where a kernel is unproven, and time it under our name
IMPLS: dict[str, ops.Impl] = {"cuda": "triton", "cpu": "torch"}


def _word(token: int) -> str:
    return f"w{token}"


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of words w3, w4, ...: a text of n words has n tokens, and one more for its end mark."""
    vocab = {"<unk>": 0, EOS: EOS_ID} | {_word(token): token for token in range(EOS_ID + 1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def draw_weights(model: nn.Module, width: int) -> None:
    """Norms 1, all others from N(0, 0.02) at a width of 4096.

    Narrower models draw wider, so that products keep their size.
    """
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02 * (4096 / width) ** 0.5)


def random_encoder(config: NVEmbedConfig, device: str, dtype: torch.dtype) -> NVEmbed:
    """A model with weights of `draw_weights`, drawn on the device."""
    with torch.device("meta"):
        model = NVEmbedModel(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    draw_weights(model, config.hidden_size)
    tokenizer = TextTokenizer(word_tokenizer(config.text_config.vocab_size), EOS, config.pooling_start)
    placement = Placement.decide(config, device=device, dtype=dtype, impl=IMPLS[device])
    return NVEmbed(model, tokenizer, placement).eval()
