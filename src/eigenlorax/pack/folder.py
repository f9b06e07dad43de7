"""A pack on disk: files read with their hashes checked, and a whole pack replaced in one step.

Tensor files are named by content and never changed. An adapter is in `adapters/<name>`, or, where a writer was killed
between replacing the manifest and tidying up, in `adapters/<name>@<hash8>`; the manifest's hashes tell which. The
manifest is replaced last but for the card, and what it does not list is not in the pack. docs/pack-format.md has the
reasons.
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
from ..core import basis as one
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
from . import card, manifest, packed_adapter
from .manifest import Entry, Manifest
from .packed_adapter import PackedAdapter, References

LOCK_SECONDS = 20.0
REPORT_MARK = re.compile(rb"Made by eigenlorax \S+ from the subspace of fingerprint ")
"""What every report says that is to be read by people."""
# Rebuilt directions may differ in their last bits from machine to machine; a sum over d entries of at most 1 by more.
_CHECK_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Opened:
    """A manifest as it was read, and the digest of its bytes: whether it is still the one on disk."""

    manifest: Manifest
    digest: str


def read_manifest(folder: Path) -> Opened | None:
    """The manifest of the pack in `folder`; None where there is no pack."""
    path = folder / keys.MANIFEST
    if not path.is_file():
        return None
    try:
        data = read_file(path, MAX_MANIFEST_BYTES)
    except FormatError as error:
        raise PackDamagedError(f"{error} It cannot be the manifest of a pack.") from error
    return Opened(manifest.parse(data, path), atomic_files.digest(data))


def open_manifest(folder: Path) -> Opened:
    """The manifest of the pack in `folder`; `PackMissingError` where there is no pack."""
    opened = read_manifest(folder)
    if opened is None:
        how = f"`eigenlorax fit ADAPTER... -o {folder}` makes one, `eigenlorax pull ORG/NAME -o {folder}` gets one"
        if (folder / keys.ADAPTER_CONFIG).is_file():
            how = f"It is an adapter: `eigenlorax fit {folder} MORE... -o pack/` makes a pack, `pull` gets one"
        raise PackMissingError(f"{folder} is not a pack: it has no {keys.MANIFEST}. {how} from the Hub.")
    return opened


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The right to write to the pack in `folder`, which exists. One process at a time, reentrant within it."""
    check_no_link(folder)
    with atomic_files.lock(folder / keys.LOCK, LOCK_SECONDS):
        yield


def read_subspace(folder: Path, found: Manifest) -> Subspace:
    """Read the bases, rebuild augmented directions from their seeds, and compare all with what the writer had."""
    path = folder / found.subspace_file
    with _still_listed(folder, lambda now: now.subspace_sha256 == found.subspace_sha256):
        data = _read_checked(path, found.subspace_sha256, found.subspace.stored_bytes + MAX_HEADER_BYTES)
    with damaged_on_error(path):
        return _subspace(from_safetensors(data), found, path)


def _subspace(tensors: Mapping[str, Tensor], found: Manifest, path: Path) -> Subspace:
    info, storage = found.subspace, storage_by_name(found.subspace.dtype)
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
        down, up = (_basis(tensors, name, side, found) for side in keys.SIDES)
        modules[name] = ModuleBases(down, up)
    subspace = Subspace(modules)
    _check_lineage(subspace, found, path)
    for name, bases in subspace.modules.items() if info.n_extra else ():
        for side in keys.SIDES:
            rebuilt, wanted_check = (
                one.augmentation_checksums(bases.side(side)),
                tensors[keys.extra_check_key(name, side)],
            )
            if not torch.allclose(rebuilt, wanted_check, rtol=0, atol=_CHECK_TOLERANCE):
                raise PackDamagedError(
                    f"{path}: this machine rebuilds the augmented directions of {name}.{side} differently from the one "
                    f"that wrote the pack (seeds {[a.seed for a in subspace.augmentations]}). Coefficients on "
                    "them would mean something else here; please report it with the output of `eigenlorax env`."
                )
    return subspace


def _basis(tensors: Mapping[str, Tensor], name: str, side: str, found: Manifest) -> Basis:
    """One basis, its rows in the order in which coefficients refer to them: augmented ones between stored ones."""
    info, storage = found.subspace.modules[name][side], storage_by_name(found.subspace.dtype)
    steps = list(zip(info.grown, found.subspace.growth, strict=True))
    stored = {step: n for step, (n, one) in enumerate(steps) if one.seed is None}
    fitted = info.k - sum(info.grown)
    values = _spectrum(tensors, keys.singular_values_key(name, side))
    (rows, payload), *more = storage.read_components(
        tensors, keys.components_key(name, side), fitted, stored, info.dimension
    )
    basis = Basis(rows, values, info.energy, shortfall=info.shortfall, payload=payload)
    if found.fit.solver != manifest.SOLVERS[0] or payload is not None:
        basis = replace(basis, tail=max(info.square - basis.square, 0.0))
    appended = iter(more)
    for n, step in steps:
        if step.seed is not None:
            _check_extra(tensors, keys.extra_check_key(name, side), found.subspace.n_extra)
            basis = one.augment(basis, n, step.seed, f"{name}.{side}")
        else:
            basis = one.extend(basis, *next(appended))
    if not bool(basis.components.isfinite().all()):
        raise ValueError(f"the components of {name}.{side} are not finite")
    return basis


def _spectrum(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A side's singular values; `ValueError` for what cannot be some."""
    found = tensors[key]
    if found.dtype != torch.float32 or found.dim() != 1 or not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"{key} is {tuple(found.shape)}, {found.dtype}, and should be finite numbers of at least 0")
    return found


def _check_extra(tensors: Mapping[str, Tensor], key: str, n_extra: int) -> None:
    """`ValueError` unless each augmented row has its number, before the first of them is rebuilt."""
    found = tensors[key]
    if found.dtype != torch.float32 or tuple(found.shape) != (n_extra,):
        raise ValueError(f"{key} is {tuple(found.shape)}, {found.dtype}, and should be {(n_extra,)}, torch.float32")


def _check_lineage(subspace: Subspace, found: Manifest, path: Path) -> None:
    """`PackDamagedError` unless the rows are those of all the fingerprints that adapters may refer to."""
    for wanted, got in zip(found.subspace.lineage, subspace.lineage, strict=True):
        if wanted not in (None, got):
            raise PackDamagedError(
                f"{path}: its rows have the fingerprint {got[:12]}…; by {keys.MANIFEST} it is {wanted[:12]}…. Make the "
                "pack again, with another tool or release."
            )


def subspace_bytes(subspace: Subspace, storage: Storage) -> bytes:
    """The subspace's file: components and spectra; of augmented directions only what checks their rebuilding."""
    tensors: dict[str, Tensor] = {}
    for name, bases in subspace.modules.items():
        for side in keys.SIDES:
            basis = bases.side(side)
            tensors |= storage.basis_tensors(basis, keys.components_key(name, side))
            tensors[keys.singular_values_key(name, side)] = basis.singular_values
            if basis.n_extra:
                tensors[keys.extra_check_key(name, side)] = one.augmentation_checksums(basis)
    return to_safetensors(tensors, metadata={"format": "pt"})


def read_adapter(folder: Path, name: str, entry: Entry, storage: Storage, references: References) -> PackedAdapter:
    """Read one adapter of the pack and check every byte of it. storage: of its coefficients."""
    with _still_listed(folder, lambda now: now.adapters.get(name) == entry):
        files = _read_adapter_files(folder, name, entry)
    with damaged_on_error(_place(folder, name)):
        return packed_adapter.from_files(name, files, entry.record, storage, references)


def place(folder: Path, name: str, entry: Entry) -> Path:
    """The folder that an adapter is in: its spare place, where it is still there, or its own."""
    spare = _spare_place(folder, name, entry)
    return spare if spare.is_dir() else _place(folder, name)


def verify(folder: Path, found: Manifest) -> None:
    """Read every byte of the pack; `PackDamagedError` names the first file that is not what was written."""

    def same(now: Manifest) -> bool:
        # what was found may be a part of the pack
        return (
            replace(now, adapters={name: entry for name, entry in now.adapters.items() if name in found.adapters})
            == found
        )

    with _still_listed(folder, same):
        _read_checked(
            folder / found.subspace_file, found.subspace_sha256, found.subspace.stored_bytes + MAX_HEADER_BYTES
        )
        for name, entry in found.adapters.items():
            _read_adapter_files(folder, name, entry)


@contextmanager
def _still_listed(folder: Path, same: Callable[[Manifest], bool]) -> Iterator[None]:
    """`PackBusyError` in the place of `PackDamagedError` if the files read are not those of the pack that is there now:
    a writer has replaced them since it was opened."""
    try:
        yield
    except PackDamagedError as error:
        if same(open_manifest(folder).manifest):
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
    spare = _spare_place(folder, name, entry)
    if spare.is_dir():
        try:
            return _read_all_checked(spare, entry)
        except PackDamagedError:
            # a writer that tidies up may just have given it its own place
            if spare.is_dir():
                raise
    return _read_all_checked(_place(folder, name), entry)


def _read_all_checked(place: Path, entry: Entry) -> dict[str, bytes]:
    record = entry.record
    tensor_bytes = {
        keys.ADAPTER_WEIGHTS: record.coefficient_bytes + record.head_bytes,
        keys.CARRIED: record.carried_bytes,
    }
    limits = {file: size + MAX_HEADER_BYTES + MEMORY_ALLOWANCE for file, size in tensor_bytes.items()}
    return {
        file: _read_checked(place / file, sha256, limits.get(file, MAX_JSON_BYTES))
        for file, sha256 in entry.files.items()
    }


def _has_adapter(folder: Path, name: str, entry: Entry) -> bool:
    """Whether the adapter's files are there, byte for byte."""
    try:
        _read_adapter_files(folder, name, entry)
    except PackDamagedError:
        return False
    return True


def _place(folder: Path, name: str) -> Path:
    return folder / keys.ADAPTERS / name


def _spare_place(folder: Path, name: str, entry: Entry) -> Path:
    """Where an adapter waits while the pack before it still needs its place; '@' is in no adapter's name."""
    content = "".join(f"{file}{sha256}" for file, sha256 in sorted(entry.files.items()))
    return folder / keys.ADAPTERS / f"{name}@{atomic_files.digest(content.encode())[:8]}"


def check_no_link(folder: Path) -> None:
    """Raise `PackExistsError` where the adapters of a pack are in a linked folder: a writer would delete files there.

    Readers follow such a link.
    """
    adapters = folder / keys.ADAPTERS
    if adapters.is_symlink():
        raise PackExistsError(
            f"{adapters} is a link to {adapters.readlink()}: what is changed in the pack would be changed there, where "
            "another pack may need it. Nothing was changed; put a copy of that folder in the place of the link."
        )


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything but a pack that may be replaced, or what a killed writer left of one."""
    check_outside(folder)
    atomic_files.check_is_folder(folder)
    check_no_link(folder)
    if (folder / keys.MANIFEST).is_file():
        if not overwrite:
            raise PackExistsError(
                f"{folder} is a pack already. Choose another folder, or replace it with overwrite=True (--overwrite)."
            )
    elif folder.exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if not _is_left_over(entry))
        if foreign:
            raise PackExistsError(
                f"{folder} exists, is not a pack, and holds {foreign[0]!r}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + ". Choose another folder; nothing was changed."
            )


def check_outside(folder: Path) -> None:
    """`PackExistsError` if `folder` lies in a pack, be it by a link: writing there would damage that one."""
    for parent in (*folder.absolute().parents, *folder.resolve().parents):
        if (parent / keys.MANIFEST).is_file():
            raise PackExistsError(f"{folder} lies in the pack {parent}. Choose a folder outside it.")


def _is_left_over(path: Path) -> bool:
    """Whether a killed writer of a first pack may have left this in the pack's folder. Adapters of other kinds are not
    ours: a folder named `adapters` may be somebody's only copy of the sources."""
    if path.name == keys.ADAPTERS:
        return path.is_dir() and all(_is_staged(child) or _is_packed(child) for child in path.iterdir())
    if manifest.SUBSPACE_FILE.fullmatch(path.name):
        return not path.is_dir()
    return path.name == keys.LOCK or _is_staged(path)


def _is_staged(path: Path) -> bool:
    return path.name.startswith(atomic_files.STAGING_PREFIX)


def _is_packed(path: Path) -> bool:
    """Whether a folder is an adapter of a pack; only such ones keep their source's config."""
    return (path / keys.SOURCE_CONFIG).is_file() and not path.is_symlink()


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """`folder`, locked, for a pack to be written to; after an error it is as it was if no pack came to be in it."""
    with atomic_files.ensure_folder(folder):
        there = set(folder.iterdir())
        with locked(folder):
            try:
                yield
            except BaseException:
                if not (folder / keys.MANIFEST).exists():
                    _remove_new(folder, there)
                raise


def _remove_new(folder: Path, there: set[Path]) -> None:
    """Remove what came into the folder with a pack that did not, while its lock is held: one who waits for it takes
    another if it is gone."""
    lock, adapters = folder / keys.LOCK, folder / keys.ADAPTERS
    for path, remove in ((adapters, Path.rmdir), (lock, Path.unlink)):
        if path not in there:
            with suppress(OSError):
                remove(path)


def write(
    folder: Path, before: Manifest | None, new: Manifest, subspace: bytes | None, adapters: Mapping[str, Files]
) -> str:
    """Make the pack in `folder`, locked by the caller, the one that `new` describes; the digest of its manifest.

    before: what is there now, if it can be read. subspace, adapters: the bytes of what may not be there yet. Up to the
    moment the manifest is replaced, a failure leaves the pack as it was.
    """
    data = new.to_bytes()
    # what could not be read again must not replace what can
    manifest.parse(data, folder / keys.MANIFEST)
    atomic_files.remove_abandoned(folder)
    written: list[Path] = []
    try:
        # on the disk before the manifest that lists it is
        with atomic_files.defer_folder_syncs():
            target = folder / new.subspace_file
            if subspace is not None and not _holds(target, subspace):
                written += [] if target.exists() else [target]
                atomic_files.write_file(target, subspace)
            (folder / keys.ADAPTERS).mkdir(exist_ok=True)
            atomic_files.sync_folder(folder)
            for name, files in adapters.items():
                entry, listed = new.adapters[name], before is not None and name in before.adapters
                if _has_adapter(folder, name, entry):
                    continue
                place = _free_place(folder, name, entry, listed=listed)
                written.append(place)
                atomic_files.write_folder(place, files, overwrite=True)
        # what a base model is called came from outside: it may hold what UTF-8 cannot
        text = card.render(new).encode("utf-8", errors="replace")
        with (
            atomic_files.stage_file(folder / keys.CARD, text) as replace_card,
            atomic_files.stage_file(folder / keys.MANIFEST, data) as replace_manifest,
        ):
            with _reports_away(folder, before, new):
                replace_manifest()
            replace_card()
    except BaseException:
        if not _holds(folder / keys.MANIFEST, data):
            for path in written:
                atomic_files.remove(path)
        raise
    # what cannot be tidied now is no part of the pack; the next writer tries again
    with suppress(OSError):
        _tidy(folder, new)
    checkpoint.discard_default(folder)
    return atomic_files.digest(data)


def _content(found: Manifest) -> tuple[object, ...]:
    """What a report is about."""
    return found.adapters, found.subspace, found.subspace_sha256


def _holds(path: Path, data: bytes) -> bool:
    return atomic_files.read_regular_file(path, len(data)) == data


def _free_place(folder: Path, name: str, entry: Entry, listed: bool) -> Path:
    """Where a new adapter may be written: its own place, or, while a pack that is there may need that, a spare one."""
    place = _place(folder, name)
    if not place.exists():
        return place
    if not (listed or _is_packed(place)):
        raise PackExistsError(f"{place} is not an adapter of the pack, and in the way of one: move it elsewhere first.")
    return _spare_place(folder, name, entry)


def _tidy(folder: Path, found: Manifest) -> None:
    """Give every adapter its own place, and remove what the manifest does not list and a writer of ours wrote."""
    for name, entry in found.adapters.items():
        spare = _spare_place(folder, name, entry)
        if spare.is_dir():
            atomic_files.remove(_place(folder, name))
            spare.rename(_place(folder, name))
    for path in (folder / keys.ADAPTERS).iterdir():
        if path.name not in found.adapters and (_is_staged(path) or _is_packed(path)):
            atomic_files.remove(path)
    for path in folder.iterdir():
        if manifest.SUBSPACE_FILE.fullmatch(path.name) and path.name != found.subspace_file:
            atomic_files.remove(path)


@contextmanager
def _reports_away(folder: Path, before: Manifest | None, new: Manifest) -> Iterator[None]:
    """Remove reports of ours on a pack that becomes another one in the block; an error brings them back.

    They are away before the block: if its process is killed, nobody could tell that they are on the pack before.
    """
    same = before is not None and _content(before) == _content(new)
    reports = [path for path in (folder / name for name in keys.REPORTS) if not same and is_report(path)]
    away = {path: folder / f"{atomic_files.STAGING_PREFIX}{path.name}" for path in reports}
    try:
        for path, beside in away.items():
            path.replace(beside)
        yield
    except BaseException:
        for path, beside in away.items():
            if beside.exists():
                beside.replace(path)
        raise
    # what stays is swept by the next writer
    with suppress(OSError):
        for beside in away.values():
            beside.unlink()


def is_report(path: Path) -> bool:
    """Whether a file is a report that `eigenlorax report` has written, in whatever form."""
    data = atomic_files.read_regular_file(path, MAX_REPORT_BYTES)
    if data is None:
        return False
    if path.suffix.lower() != ".json":
        return REPORT_MARK.search(data) is not None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("schema") == keys.REPORT_SCHEMA


def entries(adapters: Mapping[str, PackedAdapter], files: Mapping[str, Files]) -> dict[str, Entry]:
    """The manifest's entries of adapters whose files are these."""
    return {
        name: Entry(adapters[name].record, {file: atomic_files.digest(data) for file, data in sorted(content.items())})
        for name, content in files.items()
    }


def subspace_name(data: bytes) -> tuple[str, str]:
    """File name and sha256 of a subspace's bytes."""
    sha256 = atomic_files.digest(data)
    return f"subspace-{sha256[:8]}.safetensors", sha256
