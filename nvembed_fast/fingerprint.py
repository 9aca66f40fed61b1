"""Short names for what vectors depend on, so that vectors of two models are never compared unseen.

`of_model` names the vector space of a model by hashing:

1. The weights, by `of_weights`: of each tensor its published name, its shape and the fp32 values of a few
   rows. The files' number and dtype do not count, so a model that is saved again without loss keeps its
   name.
2. The config, with the instruction rule in it (`is_mask_instruction`, `pooling_start`). Fields at their
   defaults do not count, so a field that a later version adds changes no name. `torch_dtype` does not
   count.
3. The tokenizer: the content of its file, and the end mark.

It misses a weight that differs in other rows than the sampled ones, such as one word of the embedding. It
misses code that was added to a module without a parameter, such as a hook.

`of_texts` names a list of texts.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["of_decoder", "of_model", "of_texts", "of_weights"]


def of_model(weights: str, config: NVEmbedConfig, tokenizer: TextTokenizer) -> str:
    """The name of a vector space, 32 hexadecimal digits. `weights` is a name by `of_weights`."""
    default = {**asdict(NVEmbedConfig()), "torch_dtype": config.torch_dtype}
    settings = _differing(asdict(config), default)
    return _name([weights, json.dumps(settings, sort_keys=True), tokenizer.definition])


def of_weights(samples: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """The name of weights, given as (published name, shape, sampled fp32 values) in any order."""
    tensors = []
    for name, shape, values in samples:
        # adding zero takes the sign of a zero away
        digest = hashlib.blake2b((values + 0.0).astype("<f4").tobytes()).hexdigest()
        tensors.append(json.dumps([name, shape, digest]))
    return _name(sorted(tensors))


def of_decoder(samples: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """The same of the decoder's weights among those of a model, which are those that an adapter stands on."""
    return of_weights(sample for sample in samples if sample[0].startswith("embedding_model."))


def of_texts(texts: Iterable[str]) -> str:
    """The name of texts in their order, 32 hexadecimal digits."""
    return _name(texts)


def _differing(settings: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _differing(value, default[key]) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != default[key]
    }


def _name(parts: Iterable[str]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        # with its length, or two parts could be cut elsewhere
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()
