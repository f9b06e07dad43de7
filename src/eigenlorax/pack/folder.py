"""A pack on disk: reading files and checking their hashes, and replacing a whole pack in one step.

Tensor files are named by content and never modified. An adapter is in `adapters/<name>`. If a writer was killed after
it replaced the manifest, it may still be in `adapters/<name>@<hash8>`; the hashes in the manifest decide. The manifest
is replaced after everything but the card, and files that it does not list are not in the pack. docs/pack-format.md
gives the reasons.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..codec.storage.base import Storage
from ..codec.storage.table import storage_by_name
from ..core import atomic_files, checkpoint, keys
from ..core import basis as bases
from ..core.atomic_files import Files
from ..core.basis import Basis
from ..core.boundary import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_REPORT_BYTES,
    MEMORY_ALLOWANCE,
    check_expansion,
    damaged_on_error,
    read_file,
)
from ..core.subspace import ModuleBases, Subspace
from ..errors import FormatError, PackBusyError, PackDamagedError, PackExistsError, PackMissingError
from . import adapter_files, card, manifest
from .adapter_files import SubspaceHistory
from .manifest import Entry, Manifest
from .packed_adapter import PackedAdapter

LOCK_SECONDS = 20.0
REPORT_MARK = re.compile(rb"Made by eigenlorax \S+ from the subspace of fingerprint ")
"""A sentence of every HTML and Markdown report."""
# random components differ in their last bits between machines, and the check sums over all entries of a row
_CHECK_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class OpenedManifest:
    """A manifest that was read, and the digest of its bytes, by which a change on disk is noticed."""

    manifest: Manifest
    digest: str


def read_manifest(folder: Path) -> OpenedManifest | None:
    """Read the manifest of the pack in `folder`; None where there is no pack."""
    path = folder / keys.MANIFEST
    if not path.is_file():
        return None
    try:
        data = read_file(path, MAX_MANIFEST_BYTES)
    except FormatError as error:
        raise PackDamagedError(f"{error} It cannot be the manifest of a pack.") from error
    return OpenedManifest(manifest.parse(data, path), atomic_files.digest(data))


def open_manifest(folder: Path) -> OpenedManifest:
    """Read the manifest of the pack in `folder`; `PackMissingError` where there is no pack."""
    opened = read_manifest(folder)
    if opened is None:
        remedy = f"`eigenlorax fit ADAPTER... -o {folder}` makes one, `eigenlorax pull ORG/NAME -o {folder}` gets one"
        if (folder / keys.ADAPTER_CONFIG).is_file():
            remedy = f"It is an adapter: `eigenlorax fit {folder} MORE... -o pack/` makes a pack, `pull` gets one"
        raise PackMissingError(f"{folder} is not a pack: it has no {keys.MANIFEST}. {remedy} from the Hub.")
    return opened


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the pack in `folder`, which exists. One process at a time; reentrant within a process."""
    check_no_link(folder)
    with atomic_files.lock(folder / keys.LOCK, LOCK_SECONDS):
        yield


def read_subspace(folder: Path, listed: Manifest) -> Subspace:
    """Read the bases, rebuild random components from their seeds, and compare both with the manifest."""
    path = folder / listed.subspace_file
    with _busy_if_replaced(folder, lambda current: current.subspace_sha256 == listed.subspace_sha256):
        data = _read_checked(path, listed.subspace_sha256, listed.subspace.stored_bytes + MAX_HEADER_BYTES)
    with damaged_on_error(path):
        return _subspace(from_safetensors(data), listed, path)


def _subspace(tensors: Mapping[str, Tensor], listed: Manifest, path: Path) -> Subspace:
    info, storage = listed.subspace, storage_by_name(listed.subspace.dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    n_rebuilt = sum(side.dimension for pair in info.modules.values() for side in pair.values()) * info.n_extra
    check_expansion(n_rebuilt * storage.dtype.itemsize, size, "the augmented rows of the bases")
    tensors = storage.decode_bases(
        tensors,
        {
            keys.components_key(name, s): (pair[s].k - sum(pair[s].grown), pair[s].dimension)
            for name, pair in info.modules.items()
            for s in keys.SIDES
        },
    )
    modules = {}
    for name in info.modules:
        down, up = (_basis(tensors, name, side, listed) for side in keys.SIDES)
        modules[name] = ModuleBases(down, up)
    subspace = Subspace(modules)
    _check_lineage(subspace, listed, path)
    for name, pair in subspace.modules.items() if info.n_extra else ():
        for side in keys.SIDES:
            rebuilt, expected = bases.augmentation_checksums(pair.side(side)), tensors[keys.extra_check_key(name, side)]
            if not torch.allclose(rebuilt, expected, rtol=0, atol=_CHECK_TOLERANCE):
                raise PackDamagedError(
                    f"{path}: this machine rebuilds the random components of {name}.{side} differently from the one "
                    f"that wrote the pack (seeds {[a.seed for a in subspace.augmentations]}). Their coefficients would "
                    "mean other updates here. Please report it with the output of `eigenlorax env`."
                )
    return subspace


def _basis(tensors: Mapping[str, Tensor], name: str, side: str, listed: Manifest) -> Basis:
    """Return one basis with its rows in the order of coefficients: random components between stored ones."""
    info, storage = listed.subspace.modules[name][side], storage_by_name(listed.subspace.dtype)
    steps = list(zip(info.grown, listed.subspace.growth, strict=True))
    stored = {index: n for index, (n, step) in enumerate(steps) if step.seed is None}
    fitted = info.k - sum(info.grown)
    values = _spectrum(tensors, keys.singular_values_key(name, side))
    (rows, payload), *more = storage.read_components(
        tensors, keys.components_key(name, side), fitted, stored, info.dimension
    )
    basis = Basis(rows, values, info.energy, shortfall=info.shortfall, payload=payload)
    if listed.fit.solver != manifest.SOLVERS[0] or payload is not None:
        basis = replace(basis, tail=max(info.square - basis.square, 0.0))
    appended = iter(more)
    for n, step in steps:
        if step.seed is not None:
            _check_extra(tensors, keys.extra_check_key(name, side), listed.subspace.n_extra)
            basis = bases.augment(basis, n, step.seed, f"{name}.{side}")
        else:
            basis = bases.extend(basis, *next(appended))
    if not bool(basis.components.isfinite().all()):
        raise ValueError(f"the components of {name}.{side} are not finite")
    return basis


def _spectrum(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """Return a side's singular values; `ValueError` for a tensor that cannot hold them."""
    values = tensors[key]
    if values.dtype != torch.float32 or values.dim() != 1 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"{key} is {tuple(values.shape)}, {values.dtype}, and should be finite numbers of at least 0")
    return values


def _check_extra(tensors: Mapping[str, Tensor], key: str, n_extra: int) -> None:
    """Raise `ValueError` unless there is one check sum per random component; called before they are rebuilt."""
    sums = tensors[key]
    if sums.dtype != torch.float32 or tuple(sums.shape) != (n_extra,):
        raise ValueError(f"{key} is {tuple(sums.shape)}, {sums.dtype}, and should be {(n_extra,)}, torch.float32")


def _check_lineage(subspace: Subspace, listed: Manifest, path: Path) -> None:
    """Raise `PackDamagedError` unless the rows have all the fingerprints that adapters may refer to."""
    for expected, actual in zip(listed.subspace.lineage, subspace.lineage, strict=True):
        if expected not in (None, actual):
            raise PackDamagedError(
                f"{path}: its rows have the fingerprint {actual[:12]}…; by {keys.MANIFEST} it is {expected[:12]}…. "
                "Make the pack again, with another tool or release."
            )


def subspace_bytes(subspace: Subspace, storage: Storage) -> bytes:
    """Return the subspace's file: components and singular values, and check sums of random components."""
    tensors: dict[str, Tensor] = {}
    for name, pair in subspace.modules.items():
        for side in keys.SIDES:
            basis = pair.side(side)
            tensors |= storage.basis_tensors(basis, keys.components_key(name, side))
            tensors[keys.singular_values_key(name, side)] = basis.singular_values
            if basis.n_extra:
                tensors[keys.extra_check_key(name, side)] = bases.augmentation_checksums(basis)
    return to_safetensors(tensors, metadata={"format": "pt"})


def read_adapter(folder: Path, name: str, entry: Entry, storage: Storage, history: SubspaceHistory) -> PackedAdapter:
    """Read one adapter of the pack and check every byte of it. storage: of its coefficients."""
    with _busy_if_replaced(folder, lambda current: current.adapters.get(name) == entry):
        files = _read_adapter_files(folder, name, entry)
    with damaged_on_error(_own_folder(folder, name)):
        return adapter_files.from_files(name, files, entry.record, storage, history)


def adapter_folder(folder: Path, name: str, entry: Entry) -> Path:
    """Return the folder that an adapter is in: the spare one, if it is still there, or its own."""
    spare = _spare_folder(folder, name, entry)
    return spare if spare.is_dir() else _own_folder(folder, name)


def verify(folder: Path, listed: Manifest) -> None:
    """Read every byte of the pack; `PackDamagedError` names the first file that was changed."""

    def is_same(current: Manifest) -> bool:
        # only a part of the pack may have been opened
        adapters = {name: entry for name, entry in current.adapters.items() if name in listed.adapters}
        return replace(current, adapters=adapters) == listed

    with _busy_if_replaced(folder, is_same):
        _read_checked(
            folder / listed.subspace_file, listed.subspace_sha256, listed.subspace.stored_bytes + MAX_HEADER_BYTES
        )
        for name, entry in listed.adapters.items():
            _read_adapter_files(folder, name, entry)


@contextmanager
def _busy_if_replaced(folder: Path, is_same: Callable[[Manifest], bool]) -> Iterator[None]:
    """Raise `PackBusyError` in place of `PackDamagedError` if another process replaced the files that are read.

    is_same: whether the manifest that is there now lists the same files.
    """
    try:
        yield
    except PackDamagedError as error:
        if is_same(open_manifest(folder).manifest):
            raise
        raise PackBusyError(f"{folder} was changed by another process since it was opened. Open it again.") from error


def _read_checked(path: Path, sha256: str, limit: int) -> bytes:
    try:
        data = read_file(path, limit)
    except FileNotFoundError as error:
        raise PackDamagedError(f"{path} is missing. Restore the pack from a copy, or fit it again.") from error
    except FormatError as error:
        raise PackDamagedError(f"{error} Restore the pack from a copy, or fit it again.") from error
    if atomic_files.digest(data) != sha256:
        raise PackDamagedError(
            f"{path} was changed after it was written: its sha256 is not the one in {keys.MANIFEST}. Restore the pack "
            "from a copy, or fit it again."
        )
    return data


def _read_adapter_files(folder: Path, name: str, entry: Entry) -> dict[str, bytes]:
    spare = _spare_folder(folder, name, entry)
    if spare.is_dir():
        try:
            return _read_all_checked(spare, entry)
        except PackDamagedError:
            # another process may just have moved it to its own folder
            if spare.is_dir():
                raise
    return _read_all_checked(_own_folder(folder, name), entry)


def _read_all_checked(path: Path, entry: Entry) -> dict[str, bytes]:
    record = entry.record
    tensor_bytes = {
        keys.ADAPTER_WEIGHTS: record.coefficient_bytes + record.head_bytes,
        keys.CARRIED: record.carried_bytes,
    }
    limits = {file: size + MAX_HEADER_BYTES + MEMORY_ALLOWANCE for file, size in tensor_bytes.items()}
    return {
        file: _read_checked(path / file, sha256, limits.get(file, MAX_JSON_BYTES))
        for file, sha256 in entry.files.items()
    }


def _has_adapter(folder: Path, name: str, entry: Entry) -> bool:
    """Return whether the adapter's files are there, byte for byte."""
    try:
        _read_adapter_files(folder, name, entry)
    except PackDamagedError:
        return False
    return True


def _own_folder(folder: Path, name: str) -> Path:
    return folder / keys.ADAPTERS / name


def _spare_folder(folder: Path, name: str, entry: Entry) -> Path:
    """Return where an adapter is written while the previous pack needs its folder; no adapter's name contains '@'."""
    content = "".join(f"{file}{sha256}" for file, sha256 in sorted(entry.files.items()))
    return folder / keys.ADAPTERS / f"{name}@{atomic_files.digest(content.encode())[:8]}"


def check_no_link(folder: Path) -> None:
    """Raise `PackExistsError` if `adapters` is a link, since a writer would delete files in the folder it points to.

    Readers follow such a link.
    """
    adapters = folder / keys.ADAPTERS
    if adapters.is_symlink():
        raise PackExistsError(
            f"{adapters} is a link to {adapters.readlink()}: changes of the pack would be made there, where another "
            "pack may need the files. Nothing was changed; replace the link by a copy of that folder."
        )


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise `PackExistsError` unless `folder` can take a pack: it is free, or holds a pack that may be replaced.

    Files that a killed writer left do not count.
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
                f"{folder} exists, is not a pack, and holds {foreign[0]!r}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + ". Choose another folder; nothing was changed."
            )


def check_outside(folder: Path) -> None:
    """Raise `PackExistsError` if `folder` lies in a pack, even through a link: writing there would damage that pack."""
    for parent in (*folder.absolute().parents, *folder.resolve().parents):
        if (parent / keys.MANIFEST).is_file():
            raise PackExistsError(f"{folder} lies in the pack {parent}. Choose a folder outside it.")


def _is_left_over(path: Path) -> bool:
    """Return whether a killed writer of a first pack may have left this path in the pack's folder.

    A folder named `adapters` with anything but packed adapters may be the user's only copy of the sources.
    """
    if path.name == keys.ADAPTERS:
        return path.is_dir() and all(_is_staged(child) or _is_packed(child) for child in path.iterdir())
    if manifest.SUBSPACE_FILE.fullmatch(path.name):
        return not path.is_dir()
    return path.name == keys.LOCK or _is_staged(path)


def _is_staged(path: Path) -> bool:
    return path.name.startswith(atomic_files.STAGING_PREFIX)


def _is_packed(path: Path) -> bool:
    """Return whether a folder is an adapter of a pack; only those contain their source's config."""
    return (path / keys.SOURCE_CONFIG).is_file() and not path.is_symlink()


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create `folder` if needed and hold its lock. After an error without a pack written, remove what was created."""
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
    """Remove `adapters` and the lock if this writer created them.

    The lock is still held: a process that waits for it creates another one once it is gone.
    """
    lock, adapters = folder / keys.LOCK, folder / keys.ADAPTERS
    for path, remove in ((adapters, Path.rmdir), (lock, Path.unlink)):
        if path not in existing:
            with suppress(OSError):
                remove(path)


def write(
    folder: Path, previous: Manifest | None, new: Manifest, subspace: bytes | None, adapters: Mapping[str, Files]
) -> str:
    """Replace the pack in `folder`, locked by the caller, by the one of `new`, and return its manifest's digest.

    previous: the manifest that is there now, if it can be read. subspace, adapters: bytes of files that may not be
    on disk yet. Until the manifest is replaced, a failure leaves the pack unchanged.
    """
    data = new.to_bytes()
    # a manifest that could not be read again must not replace one that can
    manifest.parse(data, folder / keys.MANIFEST)
    atomic_files.remove_abandoned(folder)
    written: list[Path] = []
    try:
        # files reach the disk before the manifest that lists them
        with atomic_files.defer_folder_syncs():
            target = folder / new.subspace_file
            if subspace is not None and not _holds(target, subspace):
                written += [] if target.exists() else [target]
                atomic_files.write_file(target, subspace)
            (folder / keys.ADAPTERS).mkdir(exist_ok=True)
            atomic_files.sync_folder(folder)
            for name, files in adapters.items():
                entry, is_replaced = new.adapters[name], previous is not None and name in previous.adapters
                if _has_adapter(folder, name, entry):
                    continue
                path = _free_folder(folder, name, entry, is_replaced=is_replaced)
                written.append(path)
                atomic_files.write_folder(path, files, overwrite=True)
        # the name of a base model comes from a file and may contain lone surrogates, which UTF-8 cannot encode
        text = card.render(new).encode("utf-8", errors="replace")
        with (
            atomic_files.stage_file(folder / keys.CARD, text) as replace_card,
            atomic_files.stage_file(folder / keys.MANIFEST, data) as replace_manifest,
        ):
            with _outdated_reports_removed(folder, previous, new):
                replace_manifest()
            replace_card()
    except BaseException:
        if not _holds(folder / keys.MANIFEST, data):
            for path in written:
                atomic_files.remove(path)
        raise
    # leftovers are not in the pack; the next writer tries again
    with suppress(OSError):
        _tidy(folder, new)
    checkpoint.discard_default(folder)
    return atomic_files.digest(data)


def _content(listed: Manifest) -> tuple[object, ...]:
    """Return the fields of a manifest that a report depends on."""
    return listed.adapters, listed.subspace, listed.subspace_sha256


def _holds(path: Path, data: bytes) -> bool:
    return atomic_files.read_regular_file(path, len(data)) == data


def _free_folder(folder: Path, name: str, entry: Entry, is_replaced: bool) -> Path:
    """Return where a new adapter can be written: its own folder, or a spare one while the old pack needs that.

    is_replaced: whether the pack that is there has an adapter of this name.
    """
    path = _own_folder(folder, name)
    if not path.exists():
        return path
    if not (is_replaced or _is_packed(path)):
        raise PackExistsError(
            f"{path} is in the way of a new adapter, and is not one of the pack: move it elsewhere first."
        )
    return _spare_folder(folder, name, entry)


def _tidy(folder: Path, listed: Manifest) -> None:
    """Move adapters from spare folders to their own, and remove our files that the manifest does not list."""
    for name, entry in listed.adapters.items():
        spare = _spare_folder(folder, name, entry)
        if spare.is_dir():
            atomic_files.remove(_own_folder(folder, name))
            spare.rename(_own_folder(folder, name))
    for path in (folder / keys.ADAPTERS).iterdir():
        if path.name not in listed.adapters and (_is_staged(path) or _is_packed(path)):
            atomic_files.remove(path)
    for path in folder.iterdir():
        if manifest.SUBSPACE_FILE.fullmatch(path.name) and path.name != listed.subspace_file:
            atomic_files.remove(path)


@contextmanager
def _outdated_reports_removed(folder: Path, previous: Manifest | None, new: Manifest) -> Iterator[None]:
    """Remove our reports if the pack's content changes in the block; an error brings them back.

    They are moved before the block, so that a process killed in it leaves no report about another pack.
    """
    is_same = previous is not None and _content(previous) == _content(new)
    reports = [path for path in (folder / name for name in keys.REPORTS) if not is_same and is_report(path)]
    moved = {path: folder / f"{atomic_files.STAGING_PREFIX}{path.name}" for path in reports}
    try:
        for path, staged in moved.items():
            path.replace(staged)
        yield
    except BaseException:
        for path, staged in moved.items():
            if staged.exists():
                staged.replace(path)
        raise
    # the next writer removes what is left
    with suppress(OSError):
        for staged in moved.values():
            staged.unlink()


def is_report(path: Path) -> bool:
    """Return whether a file is a report that `eigenlorax report` wrote: HTML, Markdown or JSON."""
    data = atomic_files.read_regular_file(path, MAX_REPORT_BYTES)
    if data is None:
        return False
    if path.suffix.lower() != ".json":
        return REPORT_MARK.search(data) is not None
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("schema") == keys.REPORT_SCHEMA


def entries(adapters: Mapping[str, PackedAdapter], files: Mapping[str, Files]) -> dict[str, Entry]:
    """Return the manifest's entries of adapters with these files."""
    return {
        name: Entry(adapters[name].record, {file: atomic_files.digest(data) for file, data in sorted(content.items())})
        for name, content in files.items()
    }


def subspace_name(data: bytes) -> tuple[str, str]:
    """Return the file name and the sha256 of a subspace's bytes."""
    sha256 = atomic_files.digest(data)
    return f"subspace-{sha256[:8]}.safetensors", sha256
