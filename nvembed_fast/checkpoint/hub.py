"""The local directory of a model: a path, or the snapshot of a hub id."""

import os
import re
from pathlib import Path

from nvembed_fast import files
from nvembed_fast.checkpoint import demo
from nvembed_fast.checkpoint.names import CONFIG_FILE, INDEX_FILE
from nvembed_fast.checkpoint.pipeline import LENGTH_FILE, MODULES_FILE, SETTINGS_FILE
from nvembed_fast.tokenization import TOKENIZER_FILES

__all__ = ["download_size", "resolve"]

_SETTINGS = [CONFIG_FILE, MODULES_FILE, SETTINGS_FILE, LENGTH_FILE]
# of modules behind the model, as sentence-transformers names their folders
_BEHIND = ["[0-9]*_*/config.json", "[0-9]*_*/model.safetensors"]
_FETCHED = [*_SETTINGS, "model*.safetensors", INDEX_FILE, *TOKENIZER_FILES, *_BEHIND]
_DOWNLOAD = "Where there is a network, run: hf download {} --local-dir DIRECTORY, and pass DIRECTORY"
_LOGIN = "token=..., or: hf auth login"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    config_only: bool = False,
) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a hub id.

    A path in which a save was killed gives the folder with the whole new model, see `files.current`. Only the
    config, safetensors and tokenizer files of a hub id are fetched, with those of `pipeline`, never code or
    pickles. With `config_only` only the config and those of `pipeline` are fetched.

    Raises:
        FileNotFoundError: no such directory and no such hub id, or the hub is out of reach.
        ValueError: the path is a file.
    """
    if path_or_id == demo.NAME:
        return demo.expanded(cache_dir, local_files_only=local_files_only)
    # not Path.expanduser, which raises RuntimeError for a user that is not there
    name, path = str(path_or_id), Path(os.path.expanduser(path_or_id))
    if name and path.is_dir():  # an empty name as a path would be the working directory
        return files.current(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: pass the directory that holds {CONFIG_FILE} and the weights")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"no directory {name!r}, and no hub id either (those read OWNER/NAME){demo.instead()}"
        )

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else files.expanded(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=_SETTINGS if config_only else _FETCHED,
        )
    except HFValidationError as error:
        raise FileNotFoundError(
            f"no directory {name}, and no hub id either: {error}{demo.instead()}"
        ) from error
    except OSError as error:  # all errors of the hub's client and of the network are OSErrors
        raise FileNotFoundError(_why_not_fetched(name, revision, error) + demo.instead()) from error
    directory = Path(snapshot)
    # a config fetched alone makes a snapshot, and a hub out of reach returns it as it is
    if not config_only and not any(directory.glob("model*.safetensors*")):
        raise FileNotFoundError(
            f"hub id {name!r} has no safetensors files, or only its config is cached and the hub is out of "
            f"reach. {_DOWNLOAD.format(name)}{demo.instead()}"
        )
    return directory


def download_size(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> int:
    """The bytes that `resolve` would fetch with these arguments. 0 also where it would raise an error."""
    is_local = not str(path_or_id) or os.path.exists(os.path.expanduser(path_or_id))
    if is_local or local_files_only or not _HUB_ID.fullmatch(str(path_or_id)):
        return 0
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(
            str(path_or_id),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else files.expanded(cache_dir),
            allow_patterns=_FETCHED,
            dry_run=True,
        )
    except (HFValidationError, OSError):
        return 0
    return sum(file.file_size or 0 for file in found if file.will_download)


def _why_not_fetched(name: str, revision: str | None, error: OSError) -> str:
    from huggingface_hub import errors

    model = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"hub id {model} is gated: accept its terms on its page, then pass a token ({_LOGIN})"
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return f"no directory {name}, and the hub has no {model}, or not without a token ({_LOGIN})"
    cause = error.__cause__ or error
    if isinstance(cause, errors.HfHubHTTPError) and (status := cause.response.status_code) in (401, 403):
        return f"the hub refuses {model} (status {status}): pass a token that may read it ({_LOGIN})"
    if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = "downloads are switched off"
    else:
        reason = (
            f"{type(cause).__name__}: {str(cause).splitlines()[0][:60] if str(cause) else 'no reason given'}"
        )
    return (
        f"no directory {name}, and hub id {model} is neither cached nor within reach ({reason}). "
        f"{_DOWNLOAD.format(name)}"
    )
