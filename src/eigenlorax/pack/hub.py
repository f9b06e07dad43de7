"""Packs on the Hub: the files that a download needs, and the files that a push replaces."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import keys
from ..core.license import ID
from ..errors import OptionError, PackDamagedError, PackMissingError
from ..formats import hub_client
from . import card, folder, tasks
from .folder import PackFolder
from .manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_ADAPTER_FILES = (keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG, keys.SOURCE_FILE, keys.CARRIED)


def fetch(
    source: str | Path,
    adapters: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a pack, after downloading it to the Hub's cache if it is not local.

    The manifest is downloaded first, then the files that it lists.

    Args:
        source: Local folder, or repository as `org/name` or `org/name@revision`.
        adapters: Names of the adapters to download. Default: all.
        revision, token, cache_dir, local_files_only: Options of `huggingface_hub.snapshot_download`.

    Raises:
        PackMissingError: The repository contains no pack.
        PackDamagedError: The repository lacks a file of the pack.
        AdapterNameError: The pack has no adapter of a name in `adapters`.
    """
    repository = hub_client.parsed(source, revision)
    if Path(source).exists() or repository is None:
        return Path(source)
    path = _fetch_manifest(*repository, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    repo_id = repository[0]
    opened = folder.find_pack(path)
    if opened is None:
        raise PackMissingError(f"{repo_id} is not a pack: it has no {keys.MANIFEST} at that revision on the Hub.")
    wanted = opened if adapters is None else opened.select(adapters)
    missing = _missing(wanted)
    if missing:
        hub_client.download(
            repo_id,
            # the commit of the manifest, even if the branch has moved since
            path.name,
            [*missing, *(f"{keys.ADAPTERS}/{name}@*" for name in wanted.manifest.needed)],
            required=missing[0],
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        missing = _missing(wanted)
    if missing:
        raise PackDamagedError(
            f"{repo_id} has no {missing[0]} on the Hub, although its {keys.MANIFEST} lists it. Push the pack again."
        )
    return path


def open_folder(source: str | Path, adapters: Sequence[str] | None = None, **options: Any) -> PackFolder:
    """Return the folder of a pack with its manifest, reduced to some adapters; arguments and errors as `fetch`."""
    opened = folder.open_pack(fetch(source, adapters, **options))
    return opened if adapters is None else opened.select(adapters)


def check_pack(source: str | Path) -> None:
    """Raise the errors of a local folder without a pack, or with a manifest that cannot be read; skip the Hub."""
    if Path(source).exists() or hub_client.parsed(source) is None:
        folder.open_pack(Path(source))


def is_pack(source: str | Path, *, revision: str | None = None) -> bool:
    """Return whether a local folder, or a repository on the Hub, contains a pack."""
    repository = hub_client.parsed(source, revision)
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
    return hub_client.download(
        repo_id,
        revision,
        [keys.MANIFEST, keys.ADAPTER_CONFIG, hub_client.ALWAYS_THERE],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def _missing(wanted: PackFolder) -> list[str]:
    """Return the files that the manifest lists and the folder lacks. Contents are checked when they are read."""
    listed = [*wanted.manifest.subspace_files, *sorted(wanted.manifest.version_files)]
    files = [wanted.path / file for file in listed]
    for name, entry in wanted.manifest.needed.items():
        files += [wanted.adapter(name).current / file for file in entry.files]
    return [file.relative_to(wanted.path).as_posix() for file in files if not file.is_file()]


def push(
    path: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> "CommitInfo":
    """Upload a pack in one commit.

    Files of a previous pack that this one does not list are deleted. Other files of the repository do not change.

    Args:
        path: Folder of the pack.
        repo_id: Repository, which is created if it does not exist.
        private: True to create a private repository; an existing public one raises an error. Default: the default of
            the account.
        revision: Branch, which is created if it does not exist. Default: the main branch.
        message: Message of the commit. Default: the number of adapters.
        token: Access token, True for the stored one, False for none. Default: the stored one, if any.
        create_pr: Open a pull request to the main branch, instead of committing to it.
        license: Identifier of the licence that the model card states, such as "apache-2.0". Default: that of
            all adapters, if they state the same one.

    Returns:
        The commit.

    Raises:
        OptionError: The licence is no identifier.
    """
    if license is not None and not ID.fullmatch(license):
        raise OptionError(
            f"license (--license) is {license!r}; expected an identifier of the Hub, such as apache-2.0, mit or other."
        )
    opened = folder.open_pack(path)
    listed, task = opened.manifest, tasks.common(opened)
    files = [keys.MANIFEST, *listed.subspace_files, *sorted(listed.version_files)]
    files += [f"{keys.ADAPTERS}/{name}/{file}" for name, entry in listed.adapters.items() for file in entry.files]

    def contents(repo: str) -> dict[str, Path | bytes]:
        text = card.render(listed, repo, license, task).encode("utf-8", errors="replace")
        return {**{file: path / file for file in files}, keys.CARD: text}

    return hub_client.commit(
        repo_id,
        contents,
        lambda existing: _outdated(existing, files),
        message=message or f"Upload a pack of {_contents(listed)}",
        private=private,
        revision=revision,
        token=token,
        create_pr=create_pr,
    )


def _contents(listed: Manifest) -> str:
    """Return the numbers of adapters and histories, such as "3 adapters"."""
    counts = {"adapter": len(listed.adapters), "history": len(listed.histories)}
    plurals = {"adapter": "adapters", "history": "histories"}
    shown = [
        f"{count} {kind if count == 1 else plurals[kind]}"
        for kind, count in counts.items()
        if count or (kind == "adapter" and not listed.histories)
    ]
    return " and ".join(shown)


def _outdated(existing: Sequence[str], files: Sequence[str]) -> Iterable[str]:
    """Yield files of bases, adapters and versions of a previous pack in a repository that the new pack does not list.

    Only folders with a source's config count as packed adapters, because `adapters` may contain ordinary LoRAs.
    """
    packed = {path.removesuffix(keys.SOURCE_CONFIG) for path in existing if path.endswith(f"/{keys.SOURCE_CONFIG}")}
    for path in existing:
        parent, _, file = path.rpartition("/")
        adapter = f"{parent}/" in packed and parent.rpartition("/")[0] == keys.ADAPTERS and file in _ADAPTER_FILES
        version = parent == keys.VERSIONS and keys.VERSION_FILE.fullmatch(file)
        if path not in files and (adapter or version or keys.SUBSPACE_FILE.fullmatch(path)):
            yield path
