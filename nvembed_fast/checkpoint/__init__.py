"""Published checkpoint directories: names, the hub, loading and saving. Decoders to start from. Adapters."""

from nvembed_fast.checkpoint.adapters import add_lora, load_adapter, merge_adapter, save_adapter, trained_on
from nvembed_fast.checkpoint.hub import download_size, resolve
from nvembed_fast.checkpoint.load import load_model
from nvembed_fast.checkpoint.names import published_tensors, tokenizer_files
from nvembed_fast.checkpoint.pipeline import check_modules, max_seq_length, pipeline_files
from nvembed_fast.checkpoint.sampling import adapter_samples, loses_digits, model_samples, stored_samples
from nvembed_fast.checkpoint.save import save_model

__all__ = [
    "adapter_samples",
    "add_lora",
    "check_modules",
    "download_size",
    "load_adapter",
    "load_model",
    "loses_digits",
    "max_seq_length",
    "merge_adapter",
    "model_samples",
    "pipeline_files",
    "published_tensors",
    "resolve",
    "save_adapter",
    "save_model",
    "stored_samples",
    "tokenizer_files",
    "trained_on",
]
