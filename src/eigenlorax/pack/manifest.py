"""The manifest of a pack, `subspace_config.json`, as data and as JSON with a digest. docs/pack-format.md."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..codec.bitstream import MAX_CLUSTERS
from ..codec.storage.base import ModuleSizes, Storage
from ..codec.storage.table import CODED, FLOAT_STORAGES, STORAGES
from ..core import atomic_files, dtypes, keys
from ..core.basis import Basis
from ..core.boundary import MAX_DIMENSION
from ..core.fit_options import SIZE_OPTIONS, WEIGHTINGS
from ..core.json_dataclasses import JsonTypeError, from_json, reject_constant
from ..core.subspace import Augmentation, Subspace
from ..errors import AdapterNameError, PackDamagedError, PackVersionError
from ..version import __version__
from .packed_adapter import Record

SUBSPACE_FILE = re.compile(r"subspace-[0-9a-f]{8}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_ENERGY = 1.000001
"""1, and the rounding of a quotient of two sums."""
_MAX_FIGURE = 2**63
"""Upper limit of all numbers but seeds, which may be any integer."""
_NUMERIC_FIELDS = [name for name, kind in get_type_hints(Record).items() if kind in (int, float)]
"""Fields of an adapter's record that are numbers."""
_FILES = {keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG}
_FORMAT = "eigenlorax-pack"
_SINCE: dict[int, dict[str, Any]] = {
    2: {"max_error": None, "auto": False},
    3: {"solver": "exact"},
    5: {"max_bytes": None, "ratio": None},
}
"""Fields of `fit` by the format version that introduced them, with their values in older packs."""
SOLVERS = ("exact", "iterative")
"""How the bases were computed: by full decompositions, or by subspace iteration (docs/method.md)."""
_REMEDY = "Restore the pack from a copy, or fit it again."


@dataclass(frozen=True, slots=True)
class FitInfo:
    """Options of the fit, and adapters that were skipped.

    Exactly one of n_components, energy, max_error, max_bytes and ratio is not None. auto: whether n_components was
    chosen by leaving adapters out. skipped: adapters that could not be read, with the reason. solver: of `SOLVERS`.
    """

    n_components: int | None
    energy: float | None
    max_error: float | None
    max_bytes: int | None
    ratio: float | None
    auto: bool
    weighting: str
    sweeps: int
    excluded_modules: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    solver: str = SOLVERS[0]

    @property
    def size(self) -> str:
        """The target of the fit, in words."""
        if self.max_error is not None:
            return f"every adapter's delta error at most {self.max_error:g}"
        if self.max_bytes is not None:
            return f"at most {self.max_bytes:,} bytes"
        if self.ratio is not None:
            return f"at least {self.ratio:g} times smaller than the LoRAs in 16 bits"
        if self.energy is not None:
            return f"energy {self.energy:g}"
        return f"at most {self.n_components} components" + (" (auto)" if self.auto else "")


@dataclass(frozen=True, slots=True)
class SideInfo:
    """One side of one module.

    k: number of components, including those appended after the fit. energy: fraction of the squared norm that the
    fitted components keep. square: squared norm of the fitted stack, the weight of `energy` in averages.
    shortfall: estimated fraction of `square` that subspace iteration missed, before sweeps; 0 for exact bases.
    grown: number of components that each step of growth appended.
    """

    dimension: int
    k: int
    energy: float
    square: float
    shortfall: float
    grown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a subspace's growth: an augmentation by random components, or an extension by missing ones.

    fingerprint: of the subspace before the step; None in packs of formats that did not store it. seed: of an
    augmentation, which appends equally many components to every side; None for an extension.
    """

    fingerprint: str | None
    seed: int | None


@dataclass(frozen=True, slots=True)
class SubspaceInfo:
    """A subspace without its tensors. dtype: the name of its storage (`codec.storage`)."""

    dtype: str
    fingerprint: str
    growth: tuple[Step, ...]
    stored_bytes: int
    modules: dict[str, dict[str, SideInfo]]

    @property
    def lineage(self) -> tuple[str | None, ...]:
        """Fingerprints since the fit, by which adapters may refer to it; the last one is the current one."""
        return (*(step.fingerprint for step in self.growth), self.fingerprint)

    @property
    def n_extra(self) -> int:
        """Number of random components per side, over all augmentations."""
        side = next((sides["down"] for sides in self.modules.values()), None)
        return self._sum(side, lambda step: step.seed is not None) if side is not None else 0

    @property
    def n_extended(self) -> int:
        """Number of components that extensions appended, over all sides of all modules."""
        return sum(
            self._sum(side, lambda step: step.seed is None) for pair in self.modules.values() for side in pair.values()
        )

    def _sum(self, side: SideInfo, includes: Callable[[Step], bool]) -> int:
        return sum(n for n, step in zip(side.grown, self.growth, strict=True) if includes(step))

    def sizes(self, fingerprint: str, module: str) -> ModuleSizes:
        """Return the sizes of a module's bases when the subspace had this fingerprint, one of its lineage."""
        if module not in self.modules:
            raise JsonTypeError(f"module {module!r} is not in the subspace.")
        step = self.lineage.index(fingerprint)
        sides = [self.modules[module][side] for side in keys.SIDES]
        down, up = (side.k - sum(side.grown[step:]) for side in sides)
        return ModuleSizes((down, up), (sides[0].dimension, sides[1].dimension))


def describe(subspace: Subspace, storage: Storage | None = None) -> SubspaceInfo:
    """Return the info of a subspace in memory. storage: of its components; by default floats of their dtype."""
    modules = {
        name: {side: _side_info(bases.side(side)) for side in keys.SIDES}
        for name, bases in sorted(subspace.modules.items())
    }
    *earlier, fingerprint = subspace.lineage
    growth = tuple(Step(previous, seed) for previous, seed in zip(earlier, subspace.seeds, strict=True))
    dtype = storage.name if storage is not None else dtypes.name(subspace.dtype)
    return SubspaceInfo(dtype, fingerprint, growth, subspace.stored_bytes, modules)


def _side_info(basis: Basis) -> SideInfo:
    grown = tuple(step.n for step in basis.growth)
    return SideInfo(basis.dimension, basis.k, basis.energy, basis.square, basis.shortfall, grown)


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter in the manifest: its figures, and the sha256 of each of its files."""

    record: Record
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A pack without its tensors."""

    base_model: str | None
    revision: str | None
    fit: FitInfo
    subspace: SubspaceInfo
    subspace_file: str
    subspace_sha256: str
    coefficient_dtype: str
    adapters: dict[str, Entry]

    def to_bytes(self) -> bytes:
        """Return the manifest's file: JSON with sorted keys, including a digest of the rest."""
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
        return _dump({**body, "digest": atomic_files.digest(_dump(body))})


def parse(data: bytes, path: Path) -> Manifest:
    """Return the manifest in a file's bytes; `PackVersionError` for a newer format, else `PackDamagedError`."""
    try:
        body = json.loads(data, parse_constant=reject_constant)
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
        intact = digest == atomic_files.digest(_dump(body))
    except (ValueError, RecursionError) as error:
        raise PackDamagedError(f"{path} has values that no manifest can have: {error}. {_REMEDY}") from error
    if not intact:
        raise PackDamagedError(f"{path} was changed after it was written: its digest does not fit. {_REMEDY}")
    try:
        return _manifest(body)
    except (JsonTypeError, AdapterNameError) as error:
        raise PackDamagedError(
            f"{path} does not follow the pack format: {error} Write the pack again, with another tool or release."
        ) from error


def _manifest(body: dict[str, Any]) -> Manifest:
    if body.get("format") != _FORMAT or body["format_version"] < 1:
        raise JsonTypeError(f"format and format_version are {body.get('format')!r} and {body['format_version']}.")
    fit = from_json(FitInfo, _fit(body), "fit")
    subspace, entries = dict(_subspace(body)), dict(from_json(dict, body.get("adapters"), "adapters"))
    listed = Manifest(
        base_model=from_json(str | None, body.get("base_model_name_or_path", ...), "base_model_name_or_path"),
        revision=from_json(str | None, body.get("revision", ...), "revision"),
        fit=fit,
        subspace_file=from_json(str, subspace.pop("file", None), "subspace.file"),
        subspace_sha256=from_json(str, subspace.pop("sha256", None), "subspace.sha256"),
        subspace=from_json(SubspaceInfo, subspace, "subspace"),
        coefficient_dtype=from_json(str, body.get("coefficient_dtype"), "coefficient_dtype"),
        adapters={
            keys.check_name(name): _entry(fields, f"adapters.{name}", body["format_version"])
            for name, fields in entries.items()
        },
    )
    _check(listed, body["format_version"])
    return listed


def _fit(body: dict[str, Any]) -> Any:
    """Return `fit` with the fields that an older format lacks."""
    version, fit = body["format_version"], body.get("fit")
    if not isinstance(fit, dict):
        return fit
    lacking = {name: value for since, new in _SINCE.items() if version < since for name, value in new.items()}
    early = sorted(lacking.keys() & fit.keys())
    if early:
        raise JsonTypeError(f"fit has the fields {early}, which version {version} lacks.")
    return {**fit, **lacking}


def _subspace(body: dict[str, Any]) -> dict[str, Any]:
    """Return `subspace` with the fields that formats 1 and 2 lack, whose subspaces grew by augmentations only."""
    fields = dict(from_json(dict, body.get("subspace"), "subspace"))
    if body["format_version"] >= 3:
        return fields
    steps = from_json(tuple[Augmentation, ...], fields.pop("augmentations", ...), "subspace.augmentations")
    modules = from_json(dict[str, dict[str, _EarlySide]], fields.get("modules"), "subspace.modules")
    if "growth" in fields:
        raise JsonTypeError(f"subspace has the field growth, which version {body['format_version']} lacks.")
    grown = [step.n_extra for step in steps]
    return {
        **fields,
        "growth": [{"fingerprint": None, "seed": step.seed} for step in steps],
        "modules": {
            name: {side: {**asdict(info), "shortfall": 0.0, "grown": grown} for side, info in pair.items()}
            for name, pair in modules.items()
        },
    }


@dataclass(frozen=True, slots=True)
class _EarlySide:
    """A side in formats 1 and 2."""

    dimension: int
    k: int
    energy: float
    square: float


def _entry(value: Any, where: str, version: int) -> Entry:
    fields = dict(from_json(dict, value, where))
    if version < 3:
        if "bound" in fields:
            raise JsonTypeError(f"{where} has the field bound, which version {version} lacks.")
        fields["bound"] = False
    files = from_json(dict[str, str], fields.pop("files", None), f"{where}.files")
    return Entry(from_json(Record, fields, where), files)


def _check(listed: Manifest, version: int) -> None:
    """Raise `JsonTypeError` for values that have the right type and cannot be true.

    File names are among them: none may lead out of the pack.
    """
    if not SUBSPACE_FILE.fullmatch(listed.subspace_file):
        raise JsonTypeError(f"subspace.file is {listed.subspace_file!r}.")
    _check_storages(listed, version)
    _check_fit(listed.fit)
    _check_sides(listed.subspace)
    _check_growth(listed.subspace)
    _check_adapters(listed)


def _check_all(checks: Iterable[tuple[object, str]]) -> None:
    """Raise `JsonTypeError` with the text of the first check that is false."""
    for is_right, text in checks:
        if not is_right:
            raise JsonTypeError(f"{text}.")


def _check_storages(listed: Manifest, version: int) -> None:
    subspace = listed.subspace
    known = STORAGES.keys() if version >= 5 else FLOAT_STORAGES.keys()
    components, coefficients = STORAGES.get(subspace.dtype), STORAGES.get(listed.coefficient_dtype)
    has_cores = coefficients is not None and coefficients.core_kind is not None
    is_paired = coefficients is not None and coefficients.pairs_components
    equal_sides = all(len({(side.k, side.grown) for side in pair.values()}) == 1 for pair in subspace.modules.values())
    is_coded = {subspace.dtype == CODED.name, listed.coefficient_dtype == CODED.name}
    _check_all(
        [
            ({subspace.dtype, listed.coefficient_dtype} <= known, "a dtype is not known"),
            (components is None or components.holds_components, "subspace.dtype is one of cores"),
            (not has_cores or subspace.dtype in FLOAT_STORAGES, "cores are between rows of no float dtype"),
            (not is_paired or equal_sides, "cores are diagonal, and the two sides of a module differ"),
            (len(is_coded) == 1, "one dtype is coded, and the other is not"),
        ]
    )


def _check_fit(fit: FitInfo) -> None:
    sizes = [getattr(fit, name) for name in SIZE_OPTIONS]
    one_size = sizes.count(None) == len(SIZE_OPTIONS) - 1
    _check_all(
        [
            (one_size, f"fit must have one of {', '.join(SIZE_OPTIONS[:-1])} and {SIZE_OPTIONS[-1]}"),
            (not fit.auto or fit.n_components is not None, "fit.auto goes with n_components"),
            (fit.solver in SOLVERS, f"fit.solver is {fit.solver!r}"),
            (fit.weighting in WEIGHTINGS, f"fit.weighting is {fit.weighting!r}"),
            (0 <= fit.sweeps < _MAX_FIGURE, "fit.sweeps is out of range"),
            (all(value is None or 0 < value < _MAX_FIGURE for value in sizes), "the size in fit is out of range"),
        ]
    )


def _check_sides(subspace: SubspaceInfo) -> None:
    sides = [side for pair in subspace.modules.values() for side in pair.values()]
    # each cluster of a coded pack has a basis of its own
    n_bases = MAX_CLUSTERS if subspace.dtype == CODED.name else 1
    _check_all(
        [
            (all(set(pair) == set(keys.SIDES) for pair in subspace.modules.values()), "a module lacks a side"),
            (all(len(side.grown) == len(subspace.growth) for side in sides), "a side lacks a step of growth"),
            (all(n >= 0 for side in sides for n in side.grown), "a side has grown by less than nothing"),
            (all(sum(side.grown) <= side.k <= n_bases * side.dimension for side in sides), "a k is out of range"),
            (all(0 < side.dimension <= MAX_DIMENSION for side in sides), f"a dimension is not 1 to {MAX_DIMENSION:,}"),
            (all(0 <= side.energy <= _MAX_ENERGY for side in sides), "an energy is not 0 to 1"),
            (all(side.square >= 0 for side in sides), "a square is negative"),
            (all(side.shortfall >= 0 for side in sides), "a shortfall is negative"),
        ]
    )


def _check_growth(subspace: SubspaceInfo) -> None:
    sides = [side for pair in subspace.modules.values() for side in pair.values()]
    by_step = [(step, [side.grown[i] for side in sides]) for i, step in enumerate(subspace.growth)]
    seeds = [step.seed for step in subspace.growth if step.seed is not None]
    fingerprints = [fingerprint for fingerprint in subspace.lineage if fingerprint is not None]
    _check_all(
        [
            (all(max(grown, default=0) > 0 for _, grown in by_step), "a step of growth appends nothing"),
            (
                all(len(set(grown)) == 1 for step, grown in by_step if step.seed is not None),
                "an augmentation appends to some sides more than to others",
            ),
            (len(set(seeds)) == len(seeds), "two augmentations have one seed"),
            (len(set(fingerprints)) == len(fingerprints), "two times of the subspace have one fingerprint"),
        ]
    )


def _check_adapters(listed: Manifest) -> None:
    names = {name.lower() for name in listed.adapters}
    entries, subspace = list(listed.adapters.values()), listed.subspace
    allowed = {*_FILES, keys.CARRIED, keys.SOURCE_FILE}
    digests = [listed.subspace_sha256, *(each for each in subspace.lineage if each is not None)]
    digests += [digest for entry in entries for digest in (entry.record.source_sha256, *entry.files.values())]
    _check_all(
        [
            (len(names) == len(listed.adapters), "two adapters differ by case alone"),
            (all(_FILES <= set(entry.files) <= allowed for entry in entries), "an adapter's files"),
            (all(keys.CARRIED in entry.files or not entry.record.carried_bytes for entry in entries), "carried_bytes"),
            (all(_SHA256.fullmatch(text) for text in digests), "a digest is not 64 hexadecimal digits"),
            (
                subspace.stored_bytes >= 0 and all(_has_valid_figures(entry.record) for entry in entries),
                "a figure of an adapter",
            ),
        ]
    )


def _has_valid_figures(record: Record) -> bool:
    """Return whether no figure is negative, or so large that sums of squares overflow."""
    return all(0 < rank < _MAX_FIGURE for rank in record.ranks) and all(
        0 <= getattr(record, name) < _MAX_FIGURE for name in _NUMERIC_FIELDS
    )


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")
