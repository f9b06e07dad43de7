"""`subspace_config.json`: what a pack holds, as data, and as bytes that notice a change. docs/pack-format.md."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import dtypes, keys, store
from .basis import Basis
from .errors import PackDamagedError, PackVersionError
from .packed import Record
from .subspace import Augmentation, Subspace
from .version import __version__


@dataclass(frozen=True, slots=True)
class FitInfo:
    """How the subspace was fitted. `skipped`: adapters left out by request, with the reason."""

    n_components: int | None
    energy: float | None
    weighting: str
    sweeps: int
    excluded_modules: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SideInfo:
    """One side of one module: dimension, components kept (augmented ones included), and the share of energy they keep.

    square: the squared norm of the stack that was fitted, by which shares of several modules are averaged.
    """

    dimension: int
    k: int
    energy: float
    square: float


@dataclass(frozen=True, slots=True)
class SubspaceInfo:
    """What is known of a subspace without its tensors."""

    dtype: str
    fingerprint: str
    augmentations: tuple[Augmentation, ...]
    stored_bytes: int
    modules: dict[str, dict[str, SideInfo]]

    @property
    def n_extra(self) -> int:
        """How many of each side's components are augmented ones."""
        return sum(augmentation.n_extra for augmentation in self.augmentations)


def describe(subspace: Subspace) -> SubspaceInfo:
    """The info of a subspace in memory."""
    modules = {
        name: {side: _side_info(bases.side(side)) for side in keys.SIDES}
        for name, bases in sorted(subspace.modules.items())
    }
    return SubspaceInfo(
        dtypes.name(subspace.dtype), subspace.fingerprint, subspace.augmentations, subspace.stored_bytes, modules
    )


def _side_info(basis: Basis) -> SideInfo:
    square = float(basis.singular_values.double().square().sum())
    return SideInfo(basis.dimension, basis.k, basis.energy, square)


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter: its figures, and the sha256 of each of its files."""

    record: Record
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a pack but its tensors."""

    base_model: str | None
    revision: str | None
    fit: FitInfo
    subspace: SubspaceInfo
    subspace_file: str
    subspace_sha256: str
    coefficient_dtype: str
    adapters: dict[str, Entry]

    def to_bytes(self) -> bytes:
        """The manifest's file: JSON with sorted keys, and a digest of all of it but the digest."""
        body: dict[str, Any] = {
            "format": "eigenlorax-pack",
            "format_version": keys.FORMAT_VERSION,
            "eigenlorax_version": __version__,
            "base_model_name_or_path": self.base_model,
            "revision": self.revision,
            "fit": asdict(self.fit),
            "coefficient_dtype": self.coefficient_dtype,
            "subspace": {**asdict(self.subspace), "file": self.subspace_file, "sha256": self.subspace_sha256},
            "adapters": {name: {**asdict(entry.record), "files": entry.files} for name, entry in self.adapters.items()},
        }
        return _dump({**body, "digest": store.digest(_dump(body))})


def parse(data: bytes, path: Path) -> Manifest:
    """The manifest from its file's bytes; `PackVersionError` or `PackDamagedError` where they cannot be trusted."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise PackDamagedError(f"{path} is not valid JSON: {error}. {_REMEDY}") from error
    if not isinstance(body, dict) or not isinstance(body.get("format_version"), int):
        raise PackDamagedError(f"{path} has no format_version: it is not the manifest of a pack.")
    if body["format_version"] > keys.FORMAT_VERSION:
        raise PackVersionError(
            f"{path} is of pack format {body['format_version']} (written by eigenlorax "
            f"{body.get('eigenlorax_version', '?')}); this is eigenlorax {__version__}, which reads "
            f"up to format {keys.FORMAT_VERSION}: pip install --upgrade eigenlorax."
        )
    digest = body.pop("digest", None)
    if digest != store.digest(_dump(body)):
        raise PackDamagedError(f"{path} was changed after it was written: its digest does not fit. {_REMEDY}")
    return Manifest(
        base_model=body["base_model_name_or_path"],
        revision=body["revision"],
        fit=FitInfo(**body["fit"]),
        subspace_file=body["subspace"].pop("file"),
        subspace_sha256=body["subspace"].pop("sha256"),
        subspace=_subspace_info(**body["subspace"]),
        coefficient_dtype=body["coefficient_dtype"],
        adapters={keys.check_name(name): _entry(fields) for name, fields in body["adapters"].items()},
    )


def _subspace_info(
    augmentations: list[dict[str, int]], modules: dict[str, dict[str, dict[str, Any]]], **fields: Any
) -> SubspaceInfo:
    return SubspaceInfo(
        augmentations=tuple(Augmentation(**fields) for fields in augmentations),
        modules={name: {side: SideInfo(**info) for side, info in sides.items()} for name, sides in modules.items()},
        **fields,
    )


_REMEDY = "Restore the pack from a copy, or fit it again."


def _entry(fields: dict[str, Any]) -> Entry:
    files = fields.pop("files")
    return Entry(Record(**fields), files)


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
