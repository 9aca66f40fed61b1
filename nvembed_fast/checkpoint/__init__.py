"""Published checkpoint directories: names, the hub, loading and saving. Decoders to start from."""

from nvembed_fast.checkpoint.hub import download_size, resolve
from nvembed_fast.checkpoint.load import load_model
from nvembed_fast.checkpoint.names import published_tensors, tokenizer_files
from nvembed_fast.checkpoint.sampling import loses_digits, model_samples, stored_samples
from nvembed_fast.checkpoint.save import save_model

__all__ = [
    "download_size",
    "load_model",
    "loses_digits",
    "model_samples",
    "published_tensors",
    "resolve",
    "save_model",
    "stored_samples",
    "tokenizer_files",
]
