"""A pack on disk: files read with their hashes checked, and a whole pack replaced in one step.

Tensor files are named by content and never changed. An adapter is in `adapters/<name>`, or, where a writer was killed
between replacing the manifest and tidying up, in `adapters/<name>@<hash8>`; the manifest's hashes tell which. The
manifest is replaced last, and what it does not list is not in the pack. docs/pack-format.md has the reasons.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from . import basis as one
from . import card, keys, manifest, packed, store
from .basis import Basis
from .errors import PackDamagedError, PackExistsError, PackMissingError
from .manifest import Entry, Manifest
from .packed import PackedAdapter
from .store import Files
from .subspace import ModuleBases, Subspace
from .subspace import augment as augmented

LOCK_SECONDS = 20.0
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
    data = path.read_bytes()
    return Opened(manifest.parse(data, path), store.digest(data))


def open_manifest(folder: Path) -> Opened:
    """The manifest of the pack in `folder`; `PackMissingError` where there is no pack."""
    opened = read_manifest(folder)
    if opened is None:
        raise PackMissingError(
            f"{folder} is not a pack: it has no {keys.MANIFEST}. `eigenlorax fit ADAPTER... -o {folder}` makes one."
        )
    return opened


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The right to write to the pack in `folder`, which exists. One process at a time, reentrant within it."""
    with store.lock(folder / keys.LOCK, LOCK_SECONDS):
        yield


def read_subspace(folder: Path, found: Manifest) -> Subspace:
    """The bases, with augmented directions rebuilt from their seeds and compared with what the writer had."""
    path = folder / found.subspace_file
    tensors = from_safetensors(_read_checked(path, found.subspace_sha256))
    modules = {}
    for name, sides in found.subspace.modules.items():
        down, up = (
            Basis(
                tensors[keys.components_key(name, side)],
                tensors[keys.singular_values_key(name, side)],
                sides[side].energy,
            )
            for side in keys.SIDES
        )
        modules[name] = ModuleBases(down, up)
    subspace = Subspace(modules)
    for augmentation in found.subspace.augmentations:
        subspace = augmented(subspace, augmentation.n_extra, augmentation.seed)
    for name, bases in subspace.modules.items() if found.subspace.augmentations else ():
        for side in keys.SIDES:
            rebuilt, wanted = one.extra_check(bases.side(side)), tensors[keys.extra_check_key(name, side)]
            if not torch.allclose(rebuilt, wanted, rtol=0, atol=_CHECK_TOLERANCE):
                raise PackDamagedError(
                    f"{path}: this machine rebuilds the augmented directions of {name}.{side} differently from the one "
                    f"that wrote the pack (seeds {[a.seed for a in found.subspace.augmentations]}). Coefficients on "
                    "them would mean something else here; please report it with the output of `eigenlorax env`."
                )
    return subspace


def subspace_bytes(subspace: Subspace) -> bytes:
    """The subspace's file: fitted components and spectra; of augmented directions only what checks their rebuilding."""
    tensors: dict[str, Tensor] = {}
    for name, bases in subspace.modules.items():
        for side in keys.SIDES:
            basis = bases.side(side)
            tensors[keys.components_key(name, side)] = basis.fitted.clone()
            tensors[keys.singular_values_key(name, side)] = basis.singular_values
            if basis.n_extra:
                tensors[keys.extra_check_key(name, side)] = one.extra_check(basis)
    return to_safetensors(tensors, metadata={"format": "pt"})


def read_adapter(folder: Path, name: str, entry: Entry) -> PackedAdapter:
    """One adapter of the pack, every byte of it checked."""
    return packed.from_files(name, _read_adapter_files(folder, name, entry), entry.record)


def verify(folder: Path, found: Manifest) -> None:
    """Read every byte of the pack; `PackDamagedError` names the first file that is not what was written."""
    _read_checked(folder / found.subspace_file, found.subspace_sha256)
    for name, entry in found.adapters.items():
        _read_adapter_files(folder, name, entry)


def _read_checked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise PackDamagedError(f"{path} is missing. Restore the pack from a copy, or fit it again.")
    data = path.read_bytes()
    if store.digest(data) != sha256:
        raise PackDamagedError(
            f"{path} was changed after it was written: its sha256 is not the one in {keys.MANIFEST}. Restore the pack "
            "from a copy, or fit it again."
        )
    return data


def _read_adapter_files(folder: Path, name: str, entry: Entry) -> dict[str, bytes]:
    spare = _spare_place(folder, name, entry)
    place = spare if spare.is_dir() else _place(folder, name)
    return {file: _read_checked(place / file, sha256) for file, sha256 in entry.files.items()}


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
    return folder / keys.ADAPTERS / f"{name}@{store.digest(content.encode())[:8]}"


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything but a pack that may be replaced, or what a killed writer left of one."""
    if folder.is_symlink() and not folder.exists():
        raise PackExistsError(f"{folder} is a link to nothing.")
    if folder.exists() and not folder.is_dir():
        raise PackExistsError(f"{folder} exists and is not a folder.")
    if (folder / keys.MANIFEST).is_file():
        if not overwrite:
            raise PackExistsError(
                f"{folder} is a pack already. Choose another folder, or replace it with --overwrite (overwrite=True)."
            )
    elif folder.exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry.name))
        if foreign:
            raise PackExistsError(
                f"{folder} exists, is not a pack, and holds {foreign[0]!r}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + ". Choose another folder; nothing was changed."
            )


def _is_ours(name: str) -> bool:
    return name in {keys.ADAPTERS, keys.CARD, keys.LOCK} or name.startswith((store.STAGING, "subspace-"))


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """`folder` for a pack to be written to; removed again if none came to be in it."""
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if fresh and not (folder / keys.MANIFEST).exists():
            store.remove(folder)
        raise


def write(
    folder: Path, before: Manifest | None, new: Manifest, subspace: bytes | None, adapters: Mapping[str, Files]
) -> str:
    """Make the pack in `folder`, locked by the caller, the one that `new` describes; the digest of its manifest.

    before: what is there now, if it can be read. subspace, adapters: the bytes of what may not be there yet. Up to the
    moment the manifest is replaced, a failure leaves the pack as it was.
    """
    store.sweep_staging(folder)
    written: list[Path] = []
    try:
        target = folder / new.subspace_file
        if subspace is not None and not (target.is_file() and target.read_bytes() == subspace):
            written += [] if target.exists() else [target]
            store.write_file(target, subspace)
        (folder / keys.ADAPTERS).mkdir(exist_ok=True)
        for name, files in adapters.items():
            if _has_adapter(folder, name, new.adapters[name]):
                continue
            # a pack that is there still needs its own folder, until the manifest is replaced
            occupied = before is not None and name in before.adapters
            place = _spare_place(folder, name, new.adapters[name]) if occupied else _place(folder, name)
            written.append(place)
            store.write_folder(place, files, overwrite=True)
        data = new.to_bytes()
        store.write_file(folder / keys.CARD, card.render(new).encode("utf-8"))
        store.write_file(folder / keys.MANIFEST, data)
    except BaseException:
        for path in written:
            store.remove(path)
        raise
    _tidy(folder, new)
    return store.digest(data)


def _tidy(folder: Path, found: Manifest) -> None:
    """Give every adapter its own place, and remove what the manifest does not list."""
    for name, entry in found.adapters.items():
        spare = _spare_place(folder, name, entry)
        if spare.is_dir():
            store.remove(_place(folder, name))
            spare.rename(_place(folder, name))
    for path in (folder / keys.ADAPTERS).iterdir():
        if path.name not in found.adapters:
            store.remove(path)
    for path in folder.glob("subspace-*.safetensors"):
        if path.name != found.subspace_file:
            store.remove(path)


def entries(adapters: Mapping[str, PackedAdapter], files: Mapping[str, Files]) -> dict[str, Entry]:
    """The manifest's entries of adapters whose files are these."""
    return {
        name: Entry(adapters[name].record, {file: store.digest(data) for file, data in sorted(content.items())})
        for name, content in files.items()
    }


def subspace_name(data: bytes) -> tuple[str, str]:
    """File name and sha256 of a subspace's bytes."""
    sha256 = store.digest(data)
    return f"subspace-{sha256[:8]}.safetensors", sha256
