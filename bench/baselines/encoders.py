"""The whole encoder, and the ways of running the same weights that it is compared with.

Everyone gets texts and gives vectors in the caller's order, and everyone's texts are tokenised alike: window
by window, in a thread, while the device computes. The rivals' weights are views of ours.

- `Original`: the order of the published code. Texts are padded in the caller's order, SDPA takes an additive
  mask [B, 1, S, S], keys and values of the latents are computed for every text, and the feed-forward of the
  head runs on padding too. Left out is what only slows it further: its key/value cache and fp32 weights under
  autocast.
- `Sorted`: transformers' MistralModel as well as it goes without changing it. Texts are sorted by length, a
  batch of equal lengths has no mask at all, keys and values of the latents are kept, and the head sees no
  padding.
- `Compiled`: the same under torch.compile, layer by layer: all layers share one compiled graph.
- `Ours`: `NVEmbed.encode`.

Shape suffixes: B texts, S tokens of the longest one, T tokens without padding, D model width.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from bench.baselines import latent_blocks
from bench.measure.results import OURS
from bench.measure.timing import peak_memory
from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import published_tensors
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.layout import to_device
from nvembed_fast.kernels.testing import skewed_lengths
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import Placement
from nvembed_fast.tokenization import TextTokenizer

EOS, EOS_ID = "</s>", 2
MAX_LENGTH = 4096
PARITY_LAYERS, PARITY_BATCH = 2, 4
# of one text against the fp32 path, in 16 and in 32 bits
LEAST_COSINE, MOST_DIFFERENCE = 0.999, 1e-4
# on one mix; after that a rival sits out
ENOUGH_SECONDS = 30.0


@dataclass(frozen=True)
class Mix:
    """Texts of random words with given numbers of tokens.

    Attributes:
        name: the case of a result's row.
        lengths: tokens per text, its end mark and the instruction included.
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
        """(texts, instruction) for `word_tokenizer(vocab_size)`; the same on every call."""
        generator = np.random.default_rng(0)

        def words(count: int) -> str:
            return " ".join(map(_word, generator.integers(EOS_ID + 1, vocab_size, count).tolist()))

        skipped = self.instruction_length
        instruction = words(skipped) + " " if skipped else ""
        return [words(length - skipped - 1) for length in self.lengths], instruction


@dataclass(frozen=True)
class Scale:
    """What is measured on one kind of machine.

    Attributes:
        config: of the model.
        mixes: of texts.
        batch_sizes: among which every rival finds its best, mix by mix.
        search_texts, search_tokens: how much of a mix that search looks at (`search_runs`).
        parity_lengths: of the texts that rivals are compared on before they are timed. Sorted and four to a
            batch they make a ragged batch, one of equal lengths and a single text.
    """

    config: NVEmbedConfig
    mixes: tuple[Mix, ...]
    batch_sizes: tuple[int, ...]
    search_texts: int
    search_tokens: int
    parity_lengths: tuple[int, ...]


GPU = Scale(
    config=NVEmbedConfig(),
    mixes=(
        Mix("one query", (50,), instruction_length=18, rounds=50),
        Mix("queries", (50,) * 1024, instruction_length=18),
        Mix("all 32", (32,) * 2048),
        Mix("all 512", (512,) * 128),
        Mix("all 4096", (4096,) * 16),
        Mix("skewed", skewed_lengths(4096)),
    ),
    batch_sizes=(1, 8, 32, 128),
    search_texts=128,
    search_tokens=65536,
    parity_lengths=(41, 700, 128, 41, 300, 41, 129, 41, 40),
)
# SmolLM2-135M
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
    mixes=(
        Mix("one query", (50,), instruction_length=18, rounds=10),
        Mix("queries", (50,) * 8, instruction_length=18),
        Mix("all 32", (32,) * 16),
        Mix("all 256", (256,) * 2),
        Mix("skewed", skewed_lengths(16, median=48, least=16, most=256)),
    ),
    batch_sizes=(1, 8, 32, 128),
    search_texts=8,
    search_tokens=512,
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
    mixes=(
        Mix("one query", (9,), instruction_length=4, rounds=1),
        Mix("queries", (9,) * 4, instruction_length=4, rounds=1),
        Mix("all 4", (4,) * 4, rounds=1),
        Mix("skewed", skewed_lengths(6, median=8, least=2, most=32), rounds=1),
    ),
    batch_sizes=(1, 2, 4),
    search_texts=4,
    search_tokens=64,
    parity_lengths=(7, 23, 11, 7, 13, 7, 9, 7, 6),
)


def scale_for(device: str, smallest: bool = False) -> Scale:
    """What is measured on "cuda" or on "cpu"."""
    return SMALLEST if smallest else GPU if device == "cuda" else SMALL


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
    return NVEmbed(model, tokenizer).eval()


def mistral_model(ours: NVEmbed) -> nn.Module:
    """transformers' MistralModel without a causal mask, on views of our weights."""
    from transformers import MistralConfig, MistralModel

    text = ours.config.text_config
    config = MistralConfig(
        **dataclasses.asdict(text)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta}},
        sliding_window=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = MistralModel(config)
    weights = dict(ours.model.named_parameters())
    table = published_tensors(ours.config)
    backbone = "embedding_model."
    views = {
        name.removeprefix(backbone): weights[slot.parameter].detach()[slot.rows]
        for name, slot in table.items()
        if name.startswith(backbone)
    }
    model.load_state_dict(views, assign=True)
    # its frequencies are in no state dict, and so still on meta
    model.rotary_emb = type(model.rotary_emb)(config).to(ours.device)
    return model.eval().requires_grad_(False)


class Padded:
    """Batches of a number of texts, padded at the right to their longest.

    Args:
        ours: whose weights and tokenizer are used.
    """

    by_length = True

    def __init__(self, ours: NVEmbed):
        self.ours = ours
        self.device = ours.device
        self.mistral = mistral_model(ours)
        self.head: LatentHead = ours.model.head

    @torch.no_grad()
    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """[N, D] fp32 on the device, of unit norm, in the order of the texts."""
        result = torch.empty(len(texts), self.ours.config.hidden_size, device=self.device)
        place = np.arange(len(texts))
        if self.by_length:
            # characters over all texts; tokens inside a window
            place = np.argsort([-len(text) for text in texts], kind="stable")
            texts = [texts[index] for index in place]
        for first, window in self.ours.stream.tokenized(texts, instruction, MAX_LENGTH):
            lengths = np.array(window.lengths())
            order = np.argsort(-lengths, kind="stable") if self.by_length else np.arange(len(lengths))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                vectors = self.embed(
                    [window.ids[row] for row in rows], [window.first_pooled[row] for row in rows]
                )
                result.index_copy_(0, to_device(torch.from_numpy(place[first + rows]), self.device), vectors)
        return result

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        """[B, D] vectors of one batch."""
        raise NotImplementedError

    def pad(self, ids: Sequence[np.ndarray], multiple: int = 1) -> tuple[torch.Tensor, np.ndarray]:
        """[B, S] ids on the device, and [B, S] bool on the host: True at tokens."""
        lengths = np.array([len(i) for i in ids])
        longest = -(-lengths.max() // multiple) * multiple
        real = np.arange(longest) < lengths[:, None]
        padded = np.full(real.shape, EOS_ID, dtype=np.int64)
        padded[real] = np.concatenate(ids)
        return to_device(torch.from_numpy(padded), self.device), real


class Original(Padded):
    """The published order of computation."""

    by_length = False

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        input_ids_BS, real = self.pad(ids)
        real_BS = to_device(torch.from_numpy(real), self.device)
        dtype = self.ours.dtype
        bias_BS = torch.zeros_like(real_BS, dtype=dtype).masked_fill_(~real_BS, torch.finfo(dtype).min)
        longest = input_ids_BS.shape[1]
        mask_B1SS = bias_BS[:, None, None, :].expand(-1, 1, longest, -1).contiguous()
        h_BSD = self.mistral(input_ids_BS, attention_mask=mask_B1SS).last_hidden_state
        h2_BSD = latent_blocks.original(self.head, h_BSD)
        starts_B1 = to_device(torch.tensor(first_pooled)[:, None], self.device)
        pooled_BS = real_BS & (torch.arange(longest, device=self.device) >= starts_B1)
        mean_BD = (h2_BSD.float() * pooled_BS[..., None]).sum(1) / pooled_BS.sum(1, keepdim=True)
        return F.normalize(mean_BD, dim=-1)


class Sorted(Padded):
    """Stock transformers on sorted texts, with a head that repeats nothing and sees no padding."""

    def __init__(self, ours: NVEmbed):
        super().__init__(ours)
        self.block = latent_blocks.Hoisted(self.head)
        self.pool: Callable = self.pool_packed

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        is_ragged = len({len(i) for i in ids}) > 1
        # a mask's rows have to be aligned for the fast kernels; without a mask a pad would cost one
        input_ids_BS, real = self.pad(ids, multiple=8 if is_ragged else 1)
        mask = to_device(torch.from_numpy(real), self.device)[:, None, None, :] if is_ragged else None
        h_TD = self.mistral(input_ids_BS, attention_mask=mask).last_hidden_state.flatten(0, 1)
        if is_ragged:
            h_TD = h_TD.index_select(0, to_device(torch.from_numpy(real.ravel().nonzero()[0]), self.device))
        text, token = real.nonzero()
        keep = token >= np.array(first_pooled)[text]
        counts = np.bincount(text, keep).astype(np.float32)
        text_T, keep_T, counts_B = (
            to_device(torch.from_numpy(array), self.device) for array in (text, keep, counts)
        )
        return self.pool(h_TD, text_T, keep_T, counts_B)

    def pool_packed(
        self, h_TD: torch.Tensor, text_T: torch.Tensor, keep_T: torch.Tensor, counts_B: torch.Tensor
    ) -> torch.Tensor:
        """[B, D] vectors of [T, D] states without padding."""
        h2_TD = self.block(h_TD)
        sum_BD = torch.zeros(len(counts_B), h_TD.shape[1], device=h_TD.device)
        sum_BD = sum_BD.index_add(0, text_T, h2_TD.float() * keep_T[:, None])
        return F.normalize(sum_BD / counts_B[:, None], dim=-1)


class Compiled(Sorted):
    """`Sorted` under torch.compile, with dynamic shapes."""

    backend: str | Callable = "inductor"

    def __init__(self, ours: NVEmbed):
        super().__init__(ours)
        # one graph each for one text, equal lengths and ragged ones, in two dtypes; beyond the limit
        # torch.compile would silently run the model uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in self.mistral.layers:
            layer.compile(dynamic=True, backend=self.backend)
        self.mistral.norm.compile(dynamic=True, backend=self.backend)
        self.pool = torch.compile(self.pool_packed, dynamic=True, backend=self.backend)


class Ours:
    """`NVEmbed.encode`, which cuts batches by tokens itself."""

    def __init__(self, ours: NVEmbed):
        self.ours = ours

    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """[N, D] fp32 on the device; `batch_size` is not used."""
        return self.ours.encode(texts, instruction, MAX_LENGTH, show_progress=False)


class Graphed:
    """`NVEmbed.encode` text by text, by CUDA graphs: for one query."""

    def __init__(self, ours: NVEmbed):
        placement = Placement.decide(
            ours.config, device=ours.device, dtype=ours.dtype, impl=ours.placement.impl, cuda_graphs=True
        )
        self.ours = NVEmbed(ours.model, ours.text_tokenizer, placement)

    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """As `Ours.encode`."""
        vectors = [self.ours.encode([text], instruction, MAX_LENGTH, show_progress=False) for text in texts]
        return torch.cat(vectors)


GRAPHED = f"{OURS}, CUDA graphs"
# impl of a result's row -> its encoder; ours is the last
ENCODERS: dict[str, type[Padded] | type[Ours] | type[Graphed]] = {
    "original": Original,
    "MistralModel, sorted": Sorted,
    "MistralModel, sorted, compiled": Compiled,
    GRAPHED: Graphed,
    OURS: Ours,
}
GPU_ONLY = {
    "MistralModel, sorted, compiled": "torch.compile is timed on a GPU alone",
    GRAPHED: "needs a GPU",
}


@dataclass(frozen=True)
class Parity:
    """How far the vectors of an encoder are from those of our fp32 path in plain PyTorch.

    Attributes:
        error: the largest of any text, in the dtype that is timed.
        unit: "1 - cosine" in 16 bits, "relative" in fp32.
        obstacle: why it must not be timed; None where it may.
    """

    error: float
    unit: str
    obstacle: str | None


class ParityCheck:
    """Our vectors on the first layers of a scale's model, for encoders to be compared with.

    Texts are run with and without an instruction, PARITY_BATCH to a batch.
    """

    def __init__(self, scale: Scale, device: str, dtype: torch.dtype):
        text = dataclasses.replace(scale.config.text_config, num_hidden_layers=PARITY_LAYERS)
        self._timed = random_encoder(dataclasses.replace(scale.config, text_config=text), device, dtype)
        self._wide = copy.deepcopy(self._timed).float()
        skipped = min(scale.parity_lengths) // 2
        mixes = [Mix("", scale.parity_lengths), Mix("", scale.parity_lengths, skipped)]
        self._cases = [mix.texts(text.vocab_size) for mix in mixes]
        oracle = dataclasses.replace(self._wide.placement, impl="torch")
        self._wanted = self._vectors(Ours(NVEmbed(self._wide.model, self._wide.text_tokenizer, oracle)))

    def _vectors(self, encoder: Padded | Ours) -> torch.Tensor:
        return torch.cat([encoder.encode(*texts, PARITY_BATCH) for texts in self._cases])

    def of(self, make: Callable[[NVEmbed], Padded | Ours]) -> Parity:
        """The parity of the encoder that `make` builds: in fp32, then in the dtype that is timed."""
        got = self._vectors(make(self._wide))
        wanted = self._wanted
        error = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
        # not (a < b): NaN is red too
        if not error < MOST_DIFFERENCE:
            return Parity(error, "relative", f"parity is red: fp32 differs by {error:.2g}")
        if self._timed.dtype == torch.float32:
            return Parity(error, "relative", None)
        got = self._vectors(make(self._timed))
        error = 1.0 - F.cosine_similarity(got.double(), wanted.double()).min().item()
        obstacle = None if error < 1 - LEAST_COSINE else f"parity is red: a cosine of {1 - error:.6f}"
        return Parity(error, "1 - cosine", obstacle)


def wall_clock() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def warm_up(encode: Callable[[list[str], int], object], texts: list[str]) -> None:
    """Run whatever is compiled anew: one text, equal lengths and, where there are any, unequal ones."""
    first = texts[0]
    encode([first], 1)
    encode([first, first], 2)
    encode([first, max(texts, key=len), min(texts, key=len)], 3)


def search_runs(mix: Mix, texts: list[str], scale: Scale, by_length: bool) -> list[list[str]]:
    """Texts of a mix that show which batch size is the best on all of it.

    Sorted by length, neighbours from four places of the order, because a few texts sorted alone would be far
    more ragged than the whole; else the first texts.
    """
    most = scale.search_texts
    if by_length and len(texts) > most and len(set(mix.lengths)) > 1:
        ranked = sorted(range(len(texts)), key=mix.lengths.__getitem__)
        firsts = [len(texts) * eighth // 8 - most // 2 for eighth in (1, 3, 5, 7)]
        return [[texts[index] for index in ranked[first : first + most]] for first in firsts]
    seen = itertools.accumulate(mix.lengths[:most])
    return [texts[: max(sum(tokens <= scale.search_tokens for tokens in seen), 1)]]


def fitting_batch_sizes(
    encode: Callable[[list[str], int], object],
    runs: Sequence[list[str]],
    sizes: Sequence[int],
    clock: Callable[[], float] = wall_clock,
) -> list[int]:
    """The batch sizes that fit in memory, the fastest first.

    Args:
        encode: of texts, in batches of a size.
        runs: texts on which it is timed, run by run.
        sizes: to try; those beyond the number of texts are the same.
        clock: seconds; waits for the device.
    """
    seconds = {}
    for size in sorted({min(size, len(runs[-1])) for size in sizes}):
        try:
            encode(runs[-1][:size], size)  # to have the memory
            start = clock()
            for run in runs:
                encode(run, size)
            seconds[size] = clock() - start
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return sorted(seconds, key=seconds.get)


@dataclass
class Entry:
    """An encoder on one mix.

    Attributes:
        encode: of a batch size: the whole mix, end to end.
        sizes: batch sizes that are left, the fastest first; none is left when none fits in memory.
        seconds: of every pass so far.
        peak: MiB that the first pass took beside the weights; None on a CPU.
    """

    encode: Callable[[int], object]
    sizes: list[int]
    seconds: list[float] = field(default_factory=list)
    peak: float | None = None
    clock: Callable[[], float] = wall_clock

    def take_turn(self) -> None:
        """A pass, unless earlier ones took ENOUGH_SECONDS; out of memory, the next best size takes over."""
        while self.sizes and sum(self.seconds) < ENOUGH_SECONDS:
            try:
                return self.run()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                del self.sizes[0]
                self.seconds.clear()

    def run(self) -> None:
        """A pass at the best size."""
        if self.seconds or not torch.cuda.is_available():
            self._pass()
        else:
            self.peak = peak_memory(self._pass)

    def _pass(self) -> None:
        start = self.clock()
        self.encode(self.sizes[0])
        self.seconds.append(self.clock() - start)
