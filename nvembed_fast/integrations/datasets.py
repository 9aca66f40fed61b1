"""Tables of the hub, record by record, by the library datasets."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["open_table"]

_BUFFER = 10_000


def open_table(
    hub_id: str, config: str | None, split: str, seed: int | None
) -> tuple[str, Iterable[Mapping[str, Any]]]:
    """A table of the hub, streamed, at the revision that is the newest now.

    Args:
        hub_id: of the data set.
        config: of its table. None: the only one.
        split: of the table.
        seed: None keeps the order. Another one shuffles the files, and the records in a buffer of 10,000.

    Returns:
        The revision, and the records.

    Raises:
        ImportError: datasets is missing.
        OSError: the hub is out of reach, or has no such table.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("public sets need datasets: pip install 'nvembed-fast[data]'") from error
    from huggingface_hub import HfApi

    try:
        revision = str(HfApi().dataset_info(hub_id).sha)
        records = load_dataset(hub_id, config, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # as the hub's clients raise them
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise OSError(
            f"{hub_id} cannot be read from the hub ({reason:.200}): check the network and HF_HUB_OFFLINE. "
            "Sets that are done stay, and the same command goes on"
        ) from error
    return revision, records if seed is None else records.shuffle(seed=seed, buffer_size=_BUFFER)
