"""A pack in a repository of the Hub: which of its files are fetched, and which files a push replaces."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import keys
from ..errors import PackDamagedError, PackMissingError
from ..formats import hub
from . import card, folder, manifest
from .manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_ADAPTER_FILES = (keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG, keys.SOURCE_FILE, keys.CARRIED)


def chosen(found: Manifest, names: Sequence[str] | None) -> Manifest:
    """A manifest with these adapters alone; `AdapterNameError` for one that it lacks. None: all of them."""
    if names is None:
        return found
    for name in names:
        keys.check_known(name, found.adapters)
    return replace(found, adapters={name: entry for name, entry in found.adapters.items() if name in names})


def fetch(
    source: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a pack: a local one as it is, else that in the Hub's cache, with these adapters at least.

    The manifest is fetched first; it says which files there have to be.
    """
    repository = hub.parsed(source, revision)
    if Path(source).exists() or repository is None:
        return Path(source)
    place = _fetch_manifest(*repository, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    repo_id = repository[0]
    opened = folder.read_manifest(place)
    if opened is None:
        raise PackMissingError(f"{repo_id} is not a pack: it has no {keys.MANIFEST} at that revision on the Hub.")
    wanted = chosen(opened.manifest, adapters)
    missing = _missing(place, wanted)
    if missing:
        hub.download(
            repo_id,
            # all of it from the commit that the manifest is from
            place.name,
            [*missing, *(f"{keys.ADAPTERS}/{name}@*" for name in wanted.adapters)],
            required=missing[0],
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        missing = _missing(place, wanted)
    if missing:
        raise PackDamagedError(
            f"{repo_id} has no {missing[0]} on the Hub, though its {keys.MANIFEST} lists it. Push the pack again."
        )
    return place


def is_pack(source: str | Path, *, revision: str | None = None) -> bool:
    """Whether there is a pack in a local folder, or else in a repository on the Hub."""
    repository = hub.parsed(source, revision)
    if Path(source).exists() or repository is None:
        return (Path(source) / keys.MANIFEST).is_file()
    return (_fetch_manifest(*repository) / keys.MANIFEST).is_file()


def _fetch_manifest(
    repo_id: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    return hub.download(
        repo_id,
        revision,
        [keys.MANIFEST, keys.ADAPTER_CONFIG, hub.ALWAYS_THERE],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _missing(place: Path, wanted: Manifest) -> list[str]:
    """The files of a pack that are not in its folder. Whether the bytes of the others are right is seen on reading."""
    files = [place / wanted.subspace_file]
    for name, entry in wanted.adapters.items():
        files += [folder.place(place, name, entry) / file for file in entry.files]
    return [path.relative_to(place).as_posix() for path in files if not path.is_file()]


def push(
    place: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> "CommitInfo":
    """Make the pack of a repository the one in the folder `place`, in one commit.

    Of the files that are there, those of a pack that this one does not list are deleted; others stay.
    """
    found = folder.open_manifest(place).manifest
    files = [keys.MANIFEST, found.subspace_file]
    files += [f"{keys.ADAPTERS}/{name}/{file}" for name, entry in found.adapters.items() for file in entry.files]

    def contents(repo: str) -> dict[str, Path | bytes]:
        text = card.render(found, repo).encode("utf-8", errors="replace")
        return {**{file: place / file for file in files}, keys.CARD: text}

    return hub.commit(
        repo_id,
        contents,
        lambda there: _stale(there, files),
        message=message or f"Upload a pack of {len(found.adapters)} adapters",
        private=private,
        revision=revision,
        token=token,
        create_pr=create_pr,
    )


def _stale(there: Sequence[str], files: Sequence[str]) -> Iterable[str]:
    """Bases and adapters of a pack before. A folder is taken for an adapter's if it keeps its source's config, as only
    those of packs do: `adapters` may hold somebody's LoRAs."""
    packed = {path.removesuffix(keys.SOURCE_CONFIG) for path in there if path.endswith(f"/{keys.SOURCE_CONFIG}")}
    for path in there:
        parent, _, file = path.rpartition("/")
        adapter = f"{parent}/" in packed and parent.rpartition("/")[0] == keys.ADAPTERS and file in _ADAPTER_FILES
        if path not in files and (adapter or manifest.SUBSPACE_FILE.fullmatch(path)):
            yield path
