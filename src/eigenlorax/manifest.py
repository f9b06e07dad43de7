"""`subspace_config.json`: what a pack holds, as data, and as bytes that notice a change. docs/pack-format.md."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import dtypes, keys, store
from .basis import Basis
from .errors import AdapterNameError, PackDamagedError, PackVersionError
from .packed import Record
from .subspace import Augmentation, Subspace
from .typed import UnfitError, refuse_constant, typed
from .version import __version__

SUBSPACE_FILE = re.compile(r"subspace-[0-9a-f]{8}\.safetensors")
_FILES = {keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG}
_FORMAT = "eigenlorax-pack"
_SINCE_2: dict[str, Any] = {"max_error": None, "auto": False}
"""Fields of `fit` that version 1 lacks, and what stands for them there."""
_REMEDY = "Restore the pack from a copy, or fit it again."


@dataclass(frozen=True, slots=True)
class FitInfo:
    """How the subspace was fitted. `skipped`: adapters left out by request, with the reason.

    One of n_components, energy and max_error was given; auto: whether n_components was found rather than given.
    """

    n_components: int | None
    energy: float | None
    max_error: float | None
    auto: bool
    weighting: str
    sweeps: int
    excluded_modules: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """What decided how many components are kept, in words."""
        if self.max_error is not None:
            return f"every adapter's delta error at most {self.max_error:g}"
        if self.energy is not None:
            return f"energy {self.energy:g}"
        return f"at most {self.n_components} components" + (" (auto)" if self.auto else "")


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
            "format": _FORMAT,
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
        body = json.loads(data, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PackDamagedError(f"{path} is not valid JSON: {error}. {_REMEDY}") from error
    if not isinstance(body, dict) or type(body.get("format_version")) is not int:
        raise PackDamagedError(f"{path} has no format_version: it is not the manifest of a pack. {_REMEDY}")
    if body["format_version"] > keys.FORMAT_VERSION:
        raise PackVersionError(
            f"{path} is of pack format {body['format_version']} (written by eigenlorax "
            f"{body.get('eigenlorax_version', '?')}); this is eigenlorax {__version__}, which reads "
            f"up to format {keys.FORMAT_VERSION}: pip install --upgrade eigenlorax."
        )
    digest = body.pop("digest", None)
    try:
        intact = digest == store.digest(_dump(body))
    except (ValueError, RecursionError) as error:
        raise PackDamagedError(f"{path} holds what no manifest does: {error}. {_REMEDY}") from error
    if not intact:
        raise PackDamagedError(f"{path} was changed after it was written: its digest does not fit. {_REMEDY}")
    try:
        return _manifest(body)
    except (UnfitError, AdapterNameError) as error:
        raise PackDamagedError(
            f"{path} was not written as the format asks: {error} Make the pack again, with another tool or release."
        ) from error


def _manifest(body: dict[str, Any]) -> Manifest:
    if body.get("format") != _FORMAT or body["format_version"] < 1:
        raise UnfitError(f"format and format_version are {body.get('format')!r} and {body['format_version']}.")
    subspace, entries = (dict(typed(dict, body.get(key), key)) for key in ("subspace", "adapters"))
    found = Manifest(
        base_model=typed(str | None, body.get("base_model_name_or_path", ...), "base_model_name_or_path"),
        revision=typed(str | None, body.get("revision", ...), "revision"),
        fit=typed(FitInfo, _fit(body), "fit"),
        subspace_file=typed(str, subspace.pop("file", None), "subspace.file"),
        subspace_sha256=typed(str, subspace.pop("sha256", None), "subspace.sha256"),
        subspace=typed(SubspaceInfo, subspace, "subspace"),
        coefficient_dtype=typed(str, body.get("coefficient_dtype"), "coefficient_dtype"),
        adapters={keys.check_name(name): _entry(fields, f"adapters.{name}") for name, fields in entries.items()},
    )
    _check(found)
    return found


def _fit(body: dict[str, Any]) -> Any:
    """`fit`, with what an older version lacks."""
    fit = body.get("fit")
    if body["format_version"] > 1 or not isinstance(fit, dict):
        return fit
    early = sorted(_SINCE_2.keys() & fit.keys())
    if early:
        raise UnfitError(f"fit has the fields {early}, which version 1 lacks.")
    return {**fit, **_SINCE_2}


def _entry(value: Any, where: str) -> Entry:
    fields = dict(typed(dict, value, where))
    files = typed(dict[str, str], fields.pop("files", None), f"{where}.files")
    return Entry(typed(Record, fields, where), files)


def _check(found: Manifest) -> None:
    """What types do not say. Names of files lead nowhere else than into the pack."""
    fit, subspace = found.fit, found.subspace
    seeds = [augmentation.seed for augmentation in subspace.augmentations]
    sides = [side for pair in subspace.modules.values() for side in pair.values()]
    names = [name.lower() for name in found.adapters]
    files = [set(entry.files) for entry in found.adapters.values()]
    known = {dtypes.name(dtype) for dtype in dtypes.STORED}
    for right, what in (
        (SUBSPACE_FILE.fullmatch(found.subspace_file), f"subspace.file is {found.subspace_file!r}"),
        ({subspace.dtype, found.coefficient_dtype} <= known, "a dtype is not known"),
        (
            [fit.n_components, fit.energy, fit.max_error].count(None) == 2,
            "fit must have one of n_components, energy and max_error",
        ),
        (not fit.auto or fit.n_components is not None, "fit.auto goes with n_components"),
        (all(set(pair) == set(keys.SIDES) for pair in subspace.modules.values()), "a module lacks a side"),
        (all(subspace.n_extra <= side.k <= side.dimension for side in sides), "a k is out of range"),
        (all(side.square >= 0 for side in sides), "a square is negative"),
        (all(a.n_extra >= 1 for a in subspace.augmentations), "an n_extra is below 1"),
        (len(set(seeds)) == len(seeds), "two augmentations have one seed"),
        (len(set(names)) == len(names), "two adapters differ by case alone"),
        (all(_FILES <= one <= {*_FILES, keys.CARRIED} for one in files), "an adapter's files"),
    ):
        if not right:
            raise UnfitError(f"{what}.")


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
