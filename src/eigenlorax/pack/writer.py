"""Atomic replacement of a pack on disk: at any moment, the folder contains the old pack or the new one.

Files are written beside the old ones. An adapter is written to a spare folder if the old pack needs its own folder. The
manifest is replaced after all files except the card, and files that it does not list are not in the pack.
docs/pack-format.md gives the reasons.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core import atomic_files, checkpoint, keys
from ..core.atomic_files import Files
from ..errors import OptionError, PackBusyError, PackDamagedError, PackExistsError, PackVersionError
from ..formats import hub_client
from . import card, manifest_json, report_files
from .folder import AdapterFolder, PackFolder, check_no_link, find_pack, is_unchanged, locked
from .manifest import Manifest


def check_no_cache(target: Path) -> None:
    """Raise `OptionError` for a folder in the Hub's cache: later downloads would use changed files as the Hub's."""
    repo_id = hub_client.cached_repo(target)
    if repo_id is not None:
        raise OptionError(
            f"{target} is the copy of {repo_id} in the Hub's cache, which must not be changed. Save the pack to "
            f"another path, pack.save('pack/'), or download it with `eigenlorax pull {repo_id} -o pack/`."
        )


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise `PackExistsError` if a pack cannot be written to a folder.

    The folder must not exist, be empty except for files of a killed writer, or contain a pack that may be replaced.

    Args:
        folder: The folder.
        overwrite: True if a pack in it may be replaced.
    """
    check_outside(folder)
    atomic_files.check_is_folder(folder)
    check_no_link(folder)
    if (folder / keys.MANIFEST).is_file():
        if not overwrite:
            raise PackExistsError(
                f"{folder} is a pack already. Choose another folder, or replace it with overwrite=True (--overwrite)."
            )
    elif folder.exists():
        foreign = sorted(path.name for path in folder.iterdir() if not _is_left_over(path))
        if foreign:
            raise PackExistsError(
                f"{folder} exists, is not a pack, and contains {foreign[0]!r}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + ". Choose another folder; nothing was changed."
            )


def check_outside(folder: Path) -> None:
    """Raise `PackExistsError` if `folder` is in a pack, even through a link: writing there would damage that pack."""
    for parent in (*folder.absolute().parents, *folder.resolve().parents):
        if (parent / keys.MANIFEST).is_file():
            raise PackExistsError(f"{folder} is in the pack {parent}. Choose a folder outside it.")


def _is_left_over(path: Path) -> bool:
    """Return whether a killed writer may have left this path in the folder of a new pack.

    A folder `adapters` with other contents than packed adapters may be the user's only copy of the sources.
    """
    if path.name == keys.ADAPTERS:
        return path.is_dir() and all(_is_staged(child) or _is_packed(child) for child in path.iterdir())
    if path.name == keys.VERSIONS:
        return path.is_dir() and all(_is_staged(child) or _is_version(child) for child in path.iterdir())
    if keys.SUBSPACE_FILE.fullmatch(path.name):
        return not path.is_dir()
    return path.name == keys.LOCK or _is_staged(path)


def _is_staged(path: Path) -> bool:
    return path.name.startswith(atomic_files.STAGING_PREFIX)


def _is_packed(path: Path) -> bool:
    """Return whether a folder is an adapter of a pack: only such folders contain their source's config."""
    return (path / keys.SOURCE_CONFIG).is_file() and not path.is_symlink()


def _is_version(path: Path) -> bool:
    return keys.VERSION_FILE.fullmatch(path.name) is not None and not path.is_dir()


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create `folder` if needed and hold its lock. If the block fails before a pack is written, undo the creation."""
    with atomic_files.ensure_folder(folder):
        existing = set(folder.iterdir())
        with locked(folder):
            try:
                yield
            except BaseException:
                if not (folder / keys.MANIFEST).exists():
                    _remove_new(folder, existing)
                raise


def _remove_new(folder: Path, existing: set[Path]) -> None:
    """Remove the folders of adapters and versions, and the lock, if this writer created them.

    The lock is still held. A process that waits for it creates a new one when it is removed.
    """
    lock, adapters, versions = (folder / name for name in (keys.LOCK, keys.ADAPTERS, keys.VERSIONS))
    for path, remove in ((adapters, Path.rmdir), (versions, Path.rmdir), (lock, Path.unlink)):
        if path not in existing:
            with suppress(OSError):
                remove(path)


def replaced_manifest(target: Path, opened: PackFolder | None, overwrite: bool) -> Manifest | None:
    """Return the manifest that will be replaced; None if there is none that can be read.

    Args:
        target: Folder of the pack.
        opened: The pack in this folder if it is an earlier state of the pack to save; else None.
        overwrite: True if another pack may be replaced.

    Raises:
        PackBusyError: Another process changed the pack since it was opened.
        PackExistsError: The folder cannot be replaced.
    """
    if not (target / keys.MANIFEST).exists():
        return None
    if opened is not None:
        if not is_unchanged(opened):
            raise PackBusyError(
                f"{target} was changed by another process since it was opened. Open it again and repeat."
            )
        return opened.manifest
    check_free(target, overwrite)
    try:
        previous = find_pack(target)
    except (PackDamagedError, PackVersionError):
        return None
    return previous.manifest if previous is not None else None


def write(
    folder: Path, previous: Manifest | None, new: Manifest, named_by_content: Files, adapters: Mapping[str, Files]
) -> PackFolder:
    """Replace the pack in a folder, and return the new one.

    The caller holds the lock. Until the manifest is replaced, a failure leaves the old pack unchanged.

    Args:
        folder: Folder of the pack.
        previous: Current manifest; None if there is none that can be read.
        new: New manifest.
        named_by_content: Files of bases and versions that may not be on disk yet, by path in the folder.
        adapters: Files of adapters that may not be on disk yet, by adapter and name.
    """
    data = manifest_json.to_bytes(new)
    # check that the new manifest can be read, before it replaces one that can
    manifest_json.parse(data, folder / keys.MANIFEST)
    for path in (folder, folder / keys.VERSIONS):
        atomic_files.remove_abandoned(path)
    written: list[Path] = []
    try:
        # files reach the disk before the manifest that lists them
        with atomic_files.defer_folder_syncs():
            for file, content in named_by_content.items():
                target = folder / file
                if not target.parent.is_dir():
                    target.parent.mkdir()
                if not _holds(target, content):
                    written += [] if target.exists() else [target]
                    atomic_files.write_file(target, content)
            (folder / keys.ADAPTERS).mkdir(exist_ok=True)
            atomic_files.sync_folder(folder)
            for name, files in adapters.items():
                adapter = AdapterFolder(folder, name, new.adapters[name])
                if adapter.is_complete():
                    continue
                path = _free_folder(adapter, is_replaced=previous is not None and name in previous.adapters)
                written.append(path)
                atomic_files.write_folder(path, files, overwrite=True)
        # the name of a base model comes from a file and may contain lone surrogates, which UTF-8 cannot encode
        text = card.render(new).encode("utf-8", errors="replace")
        with (
            atomic_files.stage_file(folder / keys.CARD, text) as replace_card,
            atomic_files.stage_file(folder / keys.MANIFEST, data) as replace_manifest,
        ):
            with report_files.outdated_reports_removed(folder, previous, new):
                replace_manifest()
            replace_card()
    except BaseException:
        if not _holds(folder / keys.MANIFEST, data):
            for path in written:
                atomic_files.remove(path)
        raise
    # files that cannot be removed are not in the pack; the next writer tries again
    with suppress(OSError):
        _tidy(folder, new)
    checkpoint.discard_default(folder)
    return PackFolder(folder, new, atomic_files.digest(data))


def _holds(path: Path, data: bytes) -> bool:
    return atomic_files.read_regular_file(path, len(data)) == data


def _free_folder(adapter: AdapterFolder, is_replaced: bool) -> Path:
    """Return the folder for a new adapter: its own, or a spare one while the old pack needs its own.

    Args:
        adapter: The adapter.
        is_replaced: True if the old pack has an adapter of this name.

    Raises:
        PackExistsError: The adapter's own folder exists and is not part of the pack.
    """
    path = adapter.own
    if not path.exists():
        return path
    if not (is_replaced or _is_packed(path)):
        raise PackExistsError(
            f"{path} is in the way of a new adapter, and is not part of the pack: move it elsewhere first."
        )
    return adapter.spare


def _tidy(folder: Path, manifest: Manifest) -> None:
    """Move adapters from spare folders to their own, and remove files of packs that the manifest does not list."""
    for name, entry in manifest.adapters.items():
        adapter = AdapterFolder(folder, name, entry)
        if adapter.spare.is_dir():
            atomic_files.remove(adapter.own)
            adapter.spare.rename(adapter.own)
    for path in (folder / keys.ADAPTERS).iterdir():
        if path.name not in manifest.adapters and (_is_staged(path) or _is_packed(path)):
            atomic_files.remove(path)
    for path in folder.iterdir():
        if keys.SUBSPACE_FILE.fullmatch(path.name) and path.name not in manifest.subspace_files:
            atomic_files.remove(path)
    versions, listed = folder / keys.VERSIONS, manifest.version_files
    if versions.is_dir():
        for path in versions.iterdir():
            if _is_version(path) and f"{keys.VERSIONS}/{path.name}" not in listed:
                atomic_files.remove(path)
        if not listed:
            # other files in it stay
            with suppress(OSError):
                versions.rmdir()
