"""From the name of a repository to a local folder, and back, by huggingface_hub. Its cache, tokens and switches count.

What a pack is, and which files make one, is not known here.
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
"""A small file of every repository: huggingface_hub warns where nothing that is asked for is found."""
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REPO_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

SECONDS = 4.0
"""The time for an answer to the first request, where HF_HUB_ETAG_TIMEOUT says nothing else."""
_REMEMBERED = 60.0
_answers: dict[str, tuple[float, str | None]] = {}
"""Endpoint → when it was asked last, and why it could not be."""

# what `Path` makes of a URL
_WAS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def name_of(source: str | Path, subfolder: str | None = None) -> str:
    """The adapter name that a folder, a file, a URL or a repository gives: its last part, or `org--name`."""
    if isinstance(source, str) and urls.is_url(source):
        last = urls.name_of(source, subfolder)
        if subfolder is None and last.lower().endswith(keys.LORA_SUFFIX):
            return keys.name_from_file(last, urls.name_of(source.rpartition("/")[0]))
        return last
    local = Path(source)
    if local.exists():
        # not resolved: a link is called what it is called, not what it leads to
        whole = Path(os.path.abspath(local / subfolder if subfolder else local))
        is_file = whole.name.lower().endswith(keys.LORA_SUFFIX) and whole.is_file()
        if is_file:
            return keys.name_from_file(whole.name, whole.parent.name)
        # as diffusers saves a LoRA
        return keys.name_from_file(keys.LORA_FILE, whole.name) if (whole / keys.LORA_FILE).is_file() else whole.name
    match = _REPO_ID.fullmatch(str(source))
    # where it is neither there nor on the Hub, its folders are nobody's business
    parts = [match["repo"] if match else local.name, *([subfolder.strip("/")] if subfolder else [])]
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
    repository = parsed(source, revision)
    if repository is None:
        hint = " A URL is given as a text, not as a Path." if _WAS_URL.match(str(source)) else ""
        raise FormatError(f"{source} does not exist, and is not the id of a repository on the Hub (org/name).{hint}")
    weights = [keys.ADAPTER_WEIGHTS, keys.LORA_FILE, *([keys.ADAPTER_PICKLE] if allow_pickle else [])]
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    # a pack's manifest is fetched so that a pack can be told from what is neither
    folder = download(
        *repository,
        [*(prefix + name for name in (keys.ADAPTER_CONFIG, keys.MANIFEST, *weights)), ALWAYS_THERE],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return folder / prefix, name_of(source, subfolder)


def parsed(source: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """The repository, and the revision of `org/name@revision` or the one given beside it, not both; None where
    `source` has not the form of an id."""
    match = _REPO_ID.fullmatch(str(source))
    if match is None:
        return None
    if revision and match["revision"]:
        raise FormatError(f"two revisions for {match['repo']}: {match['revision']!r} and {revision!r}. Give one.")
    return match["repo"], revision or match["revision"]


def may_be_model(text: str) -> bool:
    """Whether the Hub would take a text for a model's id, as `base_model` in a card has to be one."""
    return _MODEL_ID.fullmatch(text) is not None


def cached_repo(folder: Path) -> str | None:
    """The repository that a folder is the snapshot of, if it is one in the Hub's cache."""
    snapshots = folder.absolute().parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return None
    return snapshots.parent.name.removeprefix("models--").replace("--", "/")


def unreachable() -> str | None:
    """Return why the Hub cannot be asked, or None where it answers.

    One request without a retry says so, and holds for a minute. huggingface_hub repeats each of its own requests five
    times, for 23 s, and transformers makes several of them for one model.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline: HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    known = _answers.get(endpoint)
    if known is None or time.monotonic() - known[0] >= _REMEMBERED:
        seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
        known = _answers[endpoint] = _ask(endpoint, seconds)
    return known[1]


def _ask(endpoint: str, seconds: float) -> tuple[float, str | None]:
    from huggingface_hub import get_session

    failures = _connection_errors()
    found: list[str | None] = []

    def request() -> None:
        try:
            # whatever the status is, it is an answer
            get_session().request("HEAD", endpoint, timeout=seconds)
            found.append(None)
        except failures as error:
            found.append(f"{endpoint} does not answer: {reason(error)}")

    # a thread, since looking up the name of a host knows no timeout
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return time.monotonic(), found[0] if found else f"{endpoint} has not answered within {seconds:g} s"


@contextmanager
def offline() -> Iterator[None]:
    """A block in which huggingface_hub makes no request, as with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _connection_errors() -> tuple[type[Exception], ...]:
    """The exceptions of a connection that fails: those of httpx or of requests, whichever huggingface_hub is built on,
    and OSError."""
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
    """The snapshot in the Hub's cache, named by its commit, with those files (patterns, too) that the repository has.

    required: a file without which the rest is of no use: an error where the Hub cannot be asked for it.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    unasked = None if local_files_only else unreachable()
    how: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only or bool(unasked),
    }
    try:
        with offline() if how["local_files_only"] else nullcontext():
            place = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files, **how))
            if required is not None and not (place / required).is_file():
                # some releases of huggingface_hub give what part of a snapshot there is where the Hub cannot be asked
                try:
                    huggingface_hub.hf_hub_download(repo_id, required, revision=revision, **how)
                except hub_errors.LocalEntryNotFoundError:
                    raise
                except hub_errors.EntryNotFoundError:
                    # it could, and has no such file: the caller knows what that means
                    return place
            return place
    except hub_errors.LocalEntryNotFoundError as error:
        # what it answered, if it did
        answer = error.__cause__
        why, when = unasked or "offline, or no connection", "with a connection"
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
            f"{f' at revision {revision}' if revision else ''}: {reason(error)} A private one needs a token (HF_TOKEN)."
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise HubError(f"{repo_id} could not be had from the Hub: {reason(error)}") from error


def files(
    repo_id: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """The files of a repository; where the Hub is not to be asked, those of it in the cache."""
    import huggingface_hub

    if local_files_only or unreachable():
        place = download(repo_id, revision, ["*"], cache_dir=cache_dir, local_files_only=True)
        return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    try:
        return sorted(huggingface_hub.HfApi(token=token).list_repo_files(repo_id, revision=revision))
    except _connection_errors() as error:
        raise HubError(f"{repo_id} could not be had from the Hub: {reason(error)}") from error


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
    """Make one commit in a repository, which is made if it is not there.

    One, so that whoever downloads meanwhile gets all of the old state or all of the new one. files: for the whole id
    of the repository, what to put at which path in it. stale: which of the files that are there are to be deleted.
    `PackBusyError` if there was another commit since it was asked.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if create_pr and revision not in (None, _DEFAULT_BRANCH):
        raise OptionError(
            f"a pull request goes to {_DEFAULT_BRANCH}: leave the revision ({revision}) away, or create_pr."
        )
    api = huggingface_hub.HfApi(token=token, library_name="eigenlorax", library_version=__version__)
    why = unreachable()
    if why is not None:
        raise HubError(f"{repo_id} cannot be pushed to: {why}. Nothing was pushed; run it again with a connection.")
    with _explained(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision or _DEFAULT_BRANCH)
        if private and not before.private:
            raise HubError(
                f"{repo} is there already, and public: nothing was pushed. Make it private on the Hub first."
            )
        there = list(api.list_repo_files(repo, revision=before.sha))
        deleted = [CommitOperationDelete(path) for path in sorted(stale(there))]
        return api.create_commit(
            repo,
            [*deleted, *(CommitOperationAdd(path, data) for path, data in sorted(files(repo).items()))],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Our errors in the place of those that pushing to a repository ends in."""
    # the latter two come from its parts for large files
    causes: tuple[type[Exception], ...] = (*_connection_errors(), ValueError, RuntimeError)
    try:
        yield
    except EigenloraxError:
        raise
    except causes as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:
            raise PackBusyError(
                f"{repo_id} was changed on the Hub while this was pushed, by somebody else. Nothing was pushed; run it "
                "again."
            ) from error
        if status in (401, 403, 404):
            raise HubError(
                f"{repo_id} cannot be pushed to: {reason(error)} It takes a token that may write there (HF_TOKEN, or "
                "`hf auth login`)."
            ) from error
        raise HubError(f"{repo_id} cannot be pushed to: {reason(error)}") from error
