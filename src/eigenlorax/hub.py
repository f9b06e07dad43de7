"""From the name of a repository to a local folder, by huggingface_hub. Its cache, tokens and offline switch count."""

import os
import re
from pathlib import Path

from . import keys
from .errors import FormatError, HubError, reason

_REPO_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def name_of(source: str | Path, subfolder: str | None = None) -> str:
    """The adapter name that a folder or a repository gives: its last part, or `org--name`."""
    local = Path(source)
    if local.exists():
        # not resolved: a link is called what it is called, not what it leads to
        return Path(os.path.abspath(local / subfolder if subfolder else local)).name
    match = _REPO_ID.fullmatch(str(source))
    parts = [match["repo"] if match else str(source), *([subfolder.strip("/")] if subfolder else [])]
    return "--".join(parts).replace("/", "--")


def adapter_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> tuple[Path, str]:
    """The folder of an adapter, and the name it goes by: a local folder as it is, else the Hub's files in its cache."""
    local = Path(source)
    if local.exists():
        folder = local / subfolder if subfolder else local
        if not folder.is_dir():
            raise FormatError(f"{folder} is not a folder: an adapter is the folder that holds {keys.ADAPTER_CONFIG}.")
        return folder, name_of(source, subfolder)
    match = _REPO_ID.fullmatch(str(source))
    if match is None:
        raise FormatError(f"{source} does not exist, and is not the id of a repository on the Hub (org/name).")
    weights = [keys.ADAPTER_WEIGHTS, *([keys.ADAPTER_PICKLE] if allow_pickle else [])]
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    folder = _download(
        match["repo"],
        _one_revision(match, revision),
        [prefix + name for name in (keys.ADAPTER_CONFIG, *weights)],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return folder / prefix, name_of(source, subfolder)


def pack_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a pack: a local one as it is, else all of the repository's pack in the Hub's cache."""
    local = Path(source)
    match = _REPO_ID.fullmatch(str(source))
    if local.exists() or match is None:
        return local
    return _download(
        match["repo"],
        _one_revision(match, revision),
        [keys.MANIFEST, "subspace-*.safetensors", f"{keys.ADAPTERS}/*"],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _one_revision(match: re.Match[str], revision: str | None) -> str | None:
    """The revision of `org/name@revision` or the one given beside it, not both."""
    if revision and match["revision"]:
        raise FormatError(f"two revisions for {match['repo']}: {match['revision']!r} and {revision!r}. Give one.")
    return revision or match["revision"]


def _download(
    repo_id: str,
    revision: str | None,
    files: list[str],
    *,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=files,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except hub_errors.LocalEntryNotFoundError as error:
        # what it answered, if it did
        answer = error.__cause__
        why, when = "offline, or no connection", "with a connection"
        if isinstance(answer, hub_errors.HfHubHTTPError):
            why, when = reason(answer), "when it can"
        raise HubError(
            f"{repo_id} is neither a local folder nor in the Hub's cache, and the Hub cannot be asked ({why}). Check "
            f"the path, or run it once {when}."
        ) from error
    except (
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.HFValidationError,
    ) as error:
        raise HubError(
            f"{repo_id} is neither a local folder nor a repository that the Hub shows you"
            f"{f' at revision {revision}' if revision else ''}: {reason(error)} A private one needs a token (HF_TOKEN)."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise HubError(f"{repo_id} could not be had from the Hub: {reason(error)}") from error
