"""Repositories of the Hub: download to the cache, list, commit. A wrapper of huggingface_hub with our errors.

huggingface_hub's cache, tokens and environment variables apply. This module does not know the files of a pack.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..core import keys
from ..errors import EigenloraxError, FormatError, HubError, OptionError, PackBusyError, reason
from ..version import __version__
from . import urls

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_DEFAULT_BRANCH = "main"
ALWAYS_THERE = ".gitattributes"
"""A small file that every repository has. It is always requested, since huggingface_hub warns if no pattern matches."""
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REPO_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

TIMEOUT = 4.0
"""Seconds to wait for the first answer of the Hub, unless HF_HUB_ETAG_TIMEOUT is set."""
_ANSWER_LIFETIME = 60.0
"""Seconds for which the Hub counts as reachable or not after a request."""
_answers: dict[str, tuple[float, str | None]] = {}
"""Time of the last request, and the reason why it failed or None, by endpoint."""

# a URL after `Path` has removed one of its slashes
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def adapter_name(source: str | Path, subfolder: str | None = None) -> str:
    """Return the adapter name that a source gives: the last part of a path or URL, or `org--name` for a Hub id."""
    if isinstance(source, str) and urls.is_url(source):
        last = urls.adapter_name(source, subfolder)
        if subfolder is None and is_file_name(last):
            return keys.name_from_file(last, urls.adapter_name(source.rpartition("/")[0]))
        return last
    local = Path(source)
    if local.exists():
        # not resolved: a link gives its own name, not the name of its target
        whole = Path(os.path.abspath(local / subfolder if subfolder else local))
        if is_file_name(whole.name) and whole.is_file():
            return keys.name_from_file(whole.name, whole.parent.name)
        # as diffusers saves a LoRA
        return keys.name_from_file(keys.LORA_FILE, whole.name) if (whole / keys.LORA_FILE).is_file() else whole.name
    match = _REPO_ID.fullmatch(str(source))
    # for a missing path, the last part only: the name may be printed or stored
    segments = [match["repo"] if match else local.name, *([subfolder.strip("/")] if subfolder else [])]
    return "--".join(segments).replace("/", "--")


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
    """Return the folder of an adapter and its name. Files of a repository are downloaded to the Hub's cache first.

    Args:
        source: A local folder or a Hub id.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder in the repository or in the local folder.
        token: Access token of the Hub, as in huggingface_hub.
        cache_dir: Cache folder of the Hub, as in huggingface_hub.
        local_files_only: Whether files are only taken from the cache.
        allow_pickle: Whether `adapter_model.bin` is downloaded too.

    Raises:
        FormatError: The source is neither a folder nor has the form of a Hub id.
        HubError: The Hub does not have the repository, or cannot be reached.
    """
    local = Path(source)
    if local.exists():
        folder = local / subfolder if subfolder else local
        if not folder.is_dir():
            raise FormatError(f"{folder} is not a folder: an adapter is the folder with {keys.ADAPTER_CONFIG}.")
        return folder, adapter_name(source, subfolder)
    check_exists(source)
    repository = parsed(source, revision)
    assert repository is not None
    weights = [keys.ADAPTER_WEIGHTS, keys.LORA_FILE, keys.MLX_WEIGHTS, *([keys.ADAPTER_PICKLE] if allow_pickle else [])]
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    # with a pack's manifest, an error can say that the repository is a pack
    folder = download(
        *repository,
        [
            *(prefix + name for name in (keys.ADAPTER_CONFIG, keys.MANIFEST, keys.CARD, keys.LICENSE, *weights)),
            ALWAYS_THERE,
        ],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return folder / prefix, adapter_name(source, subfolder)


def check_exists(source: str | Path) -> None:
    """Raise `FormatError` if an adapter is not on this machine, and is neither a URL nor has the form of a Hub id."""
    if Path(source).exists() or (isinstance(source, str) and urls.is_url(source)):
        return
    if is_file_name(source):
        raise FormatError(f"{source} does not exist.")
    if parsed(source) is None:
        hint = " Pass a URL as a string, not as a Path." if _URL_AS_PATH.match(str(source)) else ""
        raise FormatError(f"{source} does not exist, and is not the id of a repository on the Hub (org/name).{hint}")


def is_file_name(source: str | Path) -> bool:
    """Return whether a path or URL has the suffix of a safetensors or GGUF file."""
    return str(source).lower().endswith(keys.FILE_SUFFIXES)


def parsed(source: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """Return repository and revision of a Hub id (`org/name`, `org/name@revision`); None for any other text.

    Raises:
        FormatError: The id and the argument both give a revision.
    """
    match = _REPO_ID.fullmatch(str(source))
    if match is None:
        return None
    if revision and match["revision"]:
        raise FormatError(f"two revisions for {match['repo']}: {match['revision']!r} and {revision!r}. Pass one.")
    return match["repo"], revision or match["revision"]


def may_be_model(text: str) -> bool:
    """Return whether a text has the form of a model id, which `base_model` in a model card requires."""
    return _MODEL_ID.fullmatch(text) is not None


def cached_repo(folder: Path) -> str | None:
    """Return the repository of a folder in the Hub's cache; None for any other folder."""
    snapshots = folder.absolute().parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return None
    return snapshots.parent.name.removeprefix("models--").replace("--", "/")


def unreachable() -> str | None:
    """Return why the Hub cannot be reached, or None if it answers.

    The answer to one request without retries is reused for a minute. huggingface_hub repeats each of its own requests
    five times, for 23 s, and transformers makes several for one model.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline: HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    answer = _answers.get(endpoint)
    if answer is None or time.monotonic() - answer[0] >= _ANSWER_LIFETIME:
        timeout = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else TIMEOUT
        answer = _answers[endpoint] = _ask(endpoint, timeout)
    return answer[1]


def _ask(endpoint: str, timeout: float) -> tuple[float, str | None]:
    """Send one request, and return the time of the answer, and the reason why it failed or None."""
    from huggingface_hub import get_session

    failures = _connection_errors()
    answers: list[str | None] = []

    def request() -> None:
        try:
            # an answer of any status means that the Hub can be reached
            get_session().request("HEAD", endpoint, timeout=timeout)
            answers.append(None)
        except failures as error:
            answers.append(f"{endpoint} does not answer: {reason(error)}")

    # in a thread, since the lookup of a host name has no timeout
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return time.monotonic(), answers[0] if answers else f"{endpoint} has not answered within {timeout:g} s"


@contextmanager
def offline() -> Iterator[None]:
    """Prevent huggingface_hub from making requests inside the block, like HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of failed connections: OSError, and the exceptions of httpx or requests.

    A release of huggingface_hub uses one of these libraries; the base classes of its HTTP error show which.
    """
    from huggingface_hub import errors as hub_errors

    return (*cast(tuple[type[Exception], ...], hub_errors.HfHubHTTPError.__bases__), OSError)


def download(
    repo_id: str,
    revision: str | None,
    files: list[str],
    *,
    required: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download files of a repository, and return its folder in the cache, which is named by the commit.

    Args:
        repo_id: Id of the repository, `org/name`.
        revision: Branch, tag or commit; None for the default branch.
        files: Names or patterns. Files that the repository lacks are ignored.
        required: A file that must be in the cache if the Hub cannot be reached.
        token: Access token of the Hub, as in huggingface_hub.
        cache_dir: Cache folder of the Hub, as in huggingface_hub.
        local_files_only: Whether files are only taken from the cache.

    Raises:
        HubError: The Hub does not have the repository or the revision, or cannot be reached and the cache lacks them.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    obstacle = None if local_files_only else unreachable()
    options: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only or bool(obstacle),
    }
    try:
        with offline() if options["local_files_only"] else nullcontext():
            snapshot = Path(
                huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files, **options)
            )
            if required is not None and not (snapshot / required).is_file():
                # offline, some releases of huggingface_hub return an incomplete snapshot: ask for the file itself
                try:
                    huggingface_hub.hf_hub_download(repo_id, required, revision=revision, **options)
                except hub_errors.LocalEntryNotFoundError:
                    raise
                except hub_errors.EntryNotFoundError:
                    # the repository has no such file; the caller decides whether that is an error
                    return snapshot
            return snapshot
    except hub_errors.LocalEntryNotFoundError as error:
        answer = error.__cause__
        why, when = obstacle or "offline, or no connection", "with a connection"
        if isinstance(answer, hub_errors.HfHubHTTPError):
            why, when = reason(answer), "when it can"
        missing = f"{required} of {repo_id} is not" if required else f"{repo_id} is neither a local folder nor"
        raise HubError(
            f"{missing} in the Hub's cache, and the Hub cannot be asked ({why}). Check the path, or run it once {when}."
        ) from error
    except (
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.HFValidationError,
    ) as error:
        raise HubError(
            f"{repo_id} is neither a local folder nor a repository that the Hub shows you"
            f"{f' at revision {revision}' if revision else ''}: {reason(error)} A private repository needs a token "
            "(HF_TOKEN)."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise HubError(f"{repo_id} could not be downloaded from the Hub: {reason(error)}") from error


def files(
    repo_id: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """List the files of a repository, or its files in the cache if the Hub cannot be reached."""
    import huggingface_hub

    if local_files_only or unreachable():
        snapshot = download(repo_id, revision, ["*"], cache_dir=cache_dir, local_files_only=True)
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    try:
        return sorted(huggingface_hub.HfApi(token=token).list_repo_files(repo_id, revision=revision))
    except _connection_errors() as error:
        raise HubError(f"the files of {repo_id} could not be listed: {reason(error)}") from error


def commit(
    repo_id: str,
    files: Callable[[str], Mapping[str, Path | bytes]],
    stale: Callable[[list[str]], Iterable[str]],
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> "CommitInfo":
    """Make one commit in a repository, which is created if it does not exist.

    A single commit, so that a download at the same time gets the old state or the new one.

    Args:
        repo_id: Id of the repository.
        files: Function that returns the files to write by path, from the full id of the repository.
        stale: Function that returns the files to delete, from the list of files in the repository.
        message: First line of the commit message.
        private: Whether a new repository is private.
        revision: Branch. Default: main.
        token: Access token of the Hub, as in huggingface_hub.
        create_pr: Whether a pull request is opened instead of a commit to main.

    Raises:
        PackBusyError: Another commit was made in the meantime.
        HubError: The repository cannot be written, or is public although `private` is set.
        OptionError: `create_pr` is set with a `revision` other than main.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if create_pr and revision not in (None, _DEFAULT_BRANCH):
        raise OptionError(f"a pull request goes to {_DEFAULT_BRANCH}: remove the revision ({revision}), or create_pr.")
    api = huggingface_hub.HfApi(token=token, library_name="eigenlorax", library_version=__version__)
    why = unreachable()
    if why is not None:
        raise HubError(f"cannot push to {repo_id}: {why}. Run the command again when the Hub is reachable.")
    with _push_errors(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision or _DEFAULT_BRANCH)
        if private and not before.private:
            raise HubError(
                f"{repo} already exists and is public. Nothing was pushed. Make it private on the Hub first."
            )
        existing = list(api.list_repo_files(repo, revision=before.sha))
        deleted = [CommitOperationDelete(path) for path in sorted(stale(existing))]
        return api.create_commit(
            repo,
            [*deleted, *(CommitOperationAdd(path, data) for path, data in sorted(files(repo).items()))],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,
        )


@contextmanager
def _push_errors(repo_id: str) -> Iterator[None]:
    """Convert the errors of a push to `HubError` and `PackBusyError`."""
    # huggingface_hub's code for large files raises ValueError and RuntimeError
    causes: tuple[type[Exception], ...] = (*_connection_errors(), ValueError, RuntimeError)
    try:
        yield
    except EigenloraxError:
        raise
    except causes as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:
            raise PackBusyError(
                f"{repo_id} was changed on the Hub by another commit during the push. Nothing was pushed; run the "
                "command again."
            ) from error
        if status in (401, 403, 404):
            raise HubError(
                f"cannot push to {repo_id}: {reason(error)} A token with write access is needed (HF_TOKEN, or "
                "`hf auth login`)."
            ) from error
        raise HubError(f"cannot push to {repo_id}: {reason(error)}") from error
