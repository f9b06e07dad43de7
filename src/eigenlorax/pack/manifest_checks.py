"""Checks of a manifest whose fields have the right types: impossible values, and file names outside the pack."""

from collections.abc import Iterable
from typing import get_type_hints

from ..codec.storage.traits import CODED, FLOAT_TRAITS, TRAITS
from ..core import keys
from ..core.fit_options import PURPOSES, SIZE_OPTIONS, WEIGHTINGS
from ..core.json_dataclasses import JsonTypeError
from ..core.limits import MAX_CLUSTERS, MAX_DIMENSION
from . import source_configs
from .manifest import SOLVERS, FitInfo, Manifest, SubspaceInfo
from .record import Record

_MAX_ENERGY = 1.000001
"""Maximum energy: 1, with a margin for the rounding of a quotient of two sums."""
_MAX_FIGURE = 2**63
"""Upper limit of all numbers except seeds, which may be any integer."""
_NUMERIC_FIELDS = [name for name, kind in get_type_hints(Record).items() if kind in (int, float)]
"""Fields of an adapter's record that are numbers."""
_FILES = {keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG}
"""Files that every adapter has."""


def check(manifest: Manifest) -> None:
    """Raise `JsonTypeError` for impossible values, and for file names outside the pack."""
    _check_bases(manifest)
    _check_adapters(manifest)
    _check_parents(manifest)
    _check_all([(source_configs.is_small(manifest.source_fields), "source_fields is too large")])
    if manifest.basis is not None:
        _check_bases(manifest.basis)
        _check_training_basis(manifest, manifest.basis)


def _check_bases(manifest: Manifest) -> None:
    """Check all fields but the adapters, of a pack or of its basis for training."""
    if not keys.SUBSPACE_FILE.fullmatch(manifest.subspace_file):
        raise JsonTypeError(f"subspace.file is {manifest.subspace_file!r}.")
    _check_storages(manifest)
    _check_fit(manifest.fit)
    _check_sides(manifest.subspace)
    _check_growth(manifest.subspace)
    digests = [manifest.subspace_sha256, *(each for each in manifest.subspace.lineage if each is not None)]
    _check_all(
        [
            (all(keys.is_digest(text) for text in digests), "a digest is not 64 hexadecimal digits"),
            (manifest.subspace.stored_bytes >= 0, "subspace.stored_bytes is negative"),
            (
                0 <= manifest.subspace.reference_bytes <= manifest.subspace.stored_bytes,
                "subspace.reference_bytes is not 0 to stored_bytes",
            ),
        ]
    )


def _check_training_basis(manifest: Manifest, basis: Manifest) -> None:
    """Check that a basis for training has the modules of its entropy-coded pack, and another file."""
    widths, basis_widths = (
        {name: [pair[side].dimension for side in keys.SIDES] for name, pair in each.subspace.modules.items()}
        for each in (manifest, basis)
    )
    _check_all(
        [
            (manifest.coefficient_dtype == CODED, "a pack that is not coded has a basis"),
            (basis.coefficient_dtype != CODED, "the basis is coded"),
            (widths == basis_widths, "the basis has other modules than the subspace"),
            (basis.subspace_file != manifest.subspace_file, "the basis has the file of the subspace"),
        ]
    )


def _check_all(checks: Iterable[tuple[object, str]]) -> None:
    """Raise `JsonTypeError` with the text of the first check that is false."""
    for is_right, text in checks:
        if not is_right:
            raise JsonTypeError(f"{text}.")


def _check_storages(manifest: Manifest) -> None:
    subspace, version = manifest.subspace, manifest.format_version
    known = TRAITS.keys() if version >= 5 else FLOAT_TRAITS.keys()
    components, coefficients = TRAITS.get(subspace.dtype), TRAITS.get(manifest.coefficient_dtype)
    has_cores = coefficients is not None and coefficients.core_kind is not None
    is_paired = coefficients is not None and coefficients.pairs_components
    equal_sides = all(len({(side.k, side.grown) for side in pair.values()}) == 1 for pair in subspace.modules.values())
    is_coded = {subspace.dtype == CODED, manifest.coefficient_dtype == CODED}
    _check_all(
        [
            ({subspace.dtype, manifest.coefficient_dtype} <= known, "a dtype is not known"),
            (components is None or components.holds_components, "subspace.dtype is one of cores"),
            (not has_cores or subspace.dtype in FLOAT_TRAITS, "cores are between rows of no float dtype"),
            (not is_paired or equal_sides, "cores are diagonal, and the two sides of a module differ"),
            (len(is_coded) == 1, "one dtype is coded, and the other is not"),
            (version != 6 or is_coded == {True}, f"format {version} is one of coded packs, and no dtype is"),
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
            (fit.purpose is None or fit.purpose in PURPOSES, f"fit.purpose is {fit.purpose!r}"),
            (fit.head_error is None or 0 < fit.head_error < 1, f"fit.head_error is {fit.head_error!r}"),
        ]
    )


def _check_sides(subspace: SubspaceInfo) -> None:
    sides = [side for pair in subspace.modules.values() for side in pair.values()]
    # each cluster of a coded pack has a basis of its own
    n_bases = MAX_CLUSTERS if subspace.dtype == CODED else 1
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


def _check_adapters(manifest: Manifest) -> None:
    names = {name.lower() for name in manifest.adapters}
    entries = list(manifest.adapters.values())
    allowed = {*_FILES, keys.CARRIED, keys.SOURCE_FILE}
    digests = [digest for entry in entries for digest in (entry.record.source_sha256, *entry.files.values())]
    _check_all(
        [
            (len(names) == len(manifest.adapters), "two adapters differ by case alone"),
            (all(_FILES <= set(entry.files) <= allowed for entry in entries), "an adapter's files"),
            (all(keys.CARRIED in entry.files or not entry.record.carried_bytes for entry in entries), "carried_bytes"),
            (all(keys.is_digest(text) for text in digests), "a digest is not 64 hexadecimal digits"),
            (all(_has_valid_figures(entry.record) for entry in entries), "a figure of an adapter"),
        ]
    )


def _check_parents(manifest: Manifest) -> None:
    """Check that each parent is another adapter of the pack that has codes of its own."""
    for name, entry in manifest.adapters.items():
        if entry.parent is None:
            continue
        parent = manifest.adapters.get(entry.parent)
        where = f"the parent of {name!r} is {entry.parent!r}, which"
        _check_all(
            [
                (entry.parent != name, f"{where} is the adapter itself"),
                (parent is not None, f"{where} is not in the pack"),
                (parent is None or parent.parent is None, f"{where} has a parent too"),
                (not entry.record.coefficient_bytes, f"{name!r} has a parent, and coefficient_bytes of its own"),
            ]
        )


def _has_valid_figures(record: Record) -> bool:
    """Return whether all figures are non-negative, and so small that sums of squares do not overflow."""
    return all(0 < rank < _MAX_FIGURE for rank in record.ranks) and all(
        0 <= getattr(record, name) < _MAX_FIGURE for name in _NUMERIC_FIELDS
    )
