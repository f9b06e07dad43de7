"""`refit`: another basis for the adapters of a pack, and what that changes for whom.

Each adapter is fitted from its original where that is given, else from what the pack gives back. The latter is an exact
LoRA, but what the pack had lost of it stays lost, and its error against the original is followed, not measured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..codec.storage.table import storage_by_name
from ..core import dtypes, linalg, module_names
from ..core.adapter import Adapter, LoRAFactors, delta_square
from ..core.fit_options import BYTE_TARGETS, SIZE_OPTIONS
from ..errors import WARN_ABOVE, OptionError
from ..formats.sources import Sources
from ..pack.pack import Pack, check_warn_above, warn_of_losses
from ..pack.packed_adapter import PackedAdapter, Record
from .fit import fit
from .match_sources import recognise
from .options import is_entropy_coded

NOTICEABLE = 1e-6
"""A rise of a delta error up to which an adapter is not said to have got worse: rounding."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a refit has changed for one adapter.

    from_original: whether it was fitted from its original, or from what the pack gave back. error_before, error_after:
    its delta error against the original, None where it is untrained. bound: whether error_after is no more than what it
    is at most, since the original was not given. moved: ‖update after − update before‖ ÷ ‖update before‖; None where
    there was none. bytes_before, bytes_after: of its coefficients and what it carries.
    """

    from_original: bool
    error_before: float | None
    error_after: float | None
    bound: bool
    moved: float | None
    bytes_before: int
    bytes_after: int

    @property
    def worse(self) -> bool:
        """Whether more of the adapter is lost than before, or may be."""
        if self.error_before is None or self.error_after is None:
            return False
        return self.error_after > self.error_before + NOTICEABLE


@dataclass(frozen=True, slots=True)
class Refit:
    """A pack with another basis, and what that changed, by adapter."""

    pack: Pack
    changes: Mapping[str, Change]

    @property
    def worse(self) -> list[str]:
        """The adapters that lose more than before, or may do so; those that lose most more first."""
        rises = {
            name: (change.error_after or 0.0) - (change.error_before or 0.0)
            for name, change in self.changes.items()
            if change.worse
        }
        return sorted(rises, key=lambda name: (-rises[name], name))


def refit(
    pack: Pack | str | Path,
    adapters: Sources | None = None,
    *,
    n_components: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | float | None = None,
    ratio: float | None = None,
    weighting: str | None = None,
    sweeps: int | None = None,
    dtype: str | torch.dtype | None = None,
    coefficient_dtype: str | torch.dtype | None = None,
    warn_above: float = WARN_ABOVE,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Refit:
    """A new basis for all adapters of a pack; the pack that was passed stays as it is.

    adapters: originals, in any form that `fit` takes, recognised by their content. Those that are not among them are
        fitted from what the pack gives back.
    n_components, energy, max_error, max_bytes, ratio, weighting, sweeps: as in `fit`; by default what the pack was
        fitted with. dtype, coefficient_dtype: by default the pack's, unless max_error, max_bytes or ratio is given.
        A pack with cores becomes one of coefficients.
    options: those of `read_adapter`.

    Adapters that were trained in the old subspace and saved elsewhere do not belong to the new one.
    """
    pack = pack if isinstance(pack, Pack) else Pack.from_pretrained(pack)
    warn_above = check_warn_above(warn_above)
    report = progress or (lambda stage, done, total: None)
    if not pack.names:
        raise OptionError("the pack has no adapter: there is nothing to fit a basis to. `eigenlorax add` puts some in.")
    originals: Mapping[str, Adapter] = {}
    if adapters is not None:
        originals = recognise(pack, adapters, report, options, 3).adapters
    elif options:
        raise OptionError(f"{', '.join(sorted(options))}: options of reading are for originals, and none are given.")
    given = {name: originals.get(name) or pack.adapter(name, torch.float64) for name in pack.names}
    names = set(module_names.canonical_names(adapter.specs for adapter in given.values()).values())
    old = pack.fit_info
    given_sizes = (n_components, energy, max_error, max_bytes, ratio)
    sizes: dict[str, Any] = dict(zip(SIZE_OPTIONS, given_sizes, strict=True))
    by_default = all(value is None for value in sizes.values())
    if by_default:
        sizes = {name: getattr(old, name) for name in SIZE_OPTIONS}
    # what finds by itself how numbers are stored is not told how they were
    by_bytes = any(value is not None for value in (max_error, max_bytes, ratio))
    stored: list[str | None] = [None, None]
    if not by_bytes:
        stored = [pack.storage, storage_by_name(pack.coefficient_storage).basis_storage.name]
        if pack.is_coded:
            # what the pack gives back is in float64, which says nothing of what it is worth
            stored = [None if by_default or set(originals) == set(given) else dtypes.name(pack.dtype)] * 2
    weighting = old.weighting if weighting is None else weighting
    dtype = stored[0] if dtype is None else dtype
    coefficient_dtype = stored[1] if coefficient_dtype is None else coefficient_dtype
    aims = {name: sizes[name] for name in BYTE_TARGETS}
    if sweeps is None and not is_entropy_coded(aims, weighting, dtype, coefficient_dtype):
        sweeps = old.sweeps
    found = fit(
        given,
        **sizes,
        weighting=weighting,
        sweeps=sweeps,
        exclude_modules=[name for name in old.excluded_modules if name in names],
        dtype=dtype,
        coefficient_dtype=coefficient_dtype,
        same_base=True,
        warn_above=1.0,
        device=device,
        progress=progress,
    )
    # what is kept beside components, or is lost by rounding them to steps or for want of a full core, may be in any
    # direction
    in_components = not (pack.is_coded or found.is_coded or pack.cores == "diagonal")
    members: dict[str, PackedAdapter] = {}
    changes: dict[str, Change] = {}
    for done, name in enumerate(pack.names):
        report("comparing adapters", done, len(pack.names))
        before, after = pack.packed(name), found.packed(name)
        squares = _compared(pack.adapter(name, torch.float64), found.adapter(name, torch.float64), before)
        record = after.record
        if name not in originals:
            alone = not originals and before.subspace in (None, pack.info.fingerprint) and in_components
            record = _followed(before.record, record, squares, alone=alone, projected=not pack.is_coded)
        members[name] = replace(after, record=record)
        changes[name] = _change(before.record, record, squares, name in originals)
    report("comparing adapters", len(pack.names), len(pack.names))
    renewed = Pack(
        found.subspace,
        found.info,
        members,
        replace(found.fit_info, skipped=old.skipped),
        base_model=pack.base_model,
        revision=pack.revision,
        coefficient_dtype=found.coefficient_storage,
    )
    renewed.notes.extend(found.notes)
    renewed.frontier.extend(found.frontier)
    warn_of_losses(renewed.records, warn_above, "Refit from the originals, or with more components.")
    return Refit(renewed, changes)


@dataclass(frozen=True, slots=True)
class Squares:
    """Squared norms of an adapter's update in the modules of its subspace: before, as the pack gave it back; after; and
    of the difference, moved. outside, moved_outside: the same of its other modules, which the pack kept as they were.
    """

    before: float
    after: float
    moved: float
    outside: float
    moved_outside: float


def _compared(before: Adapter, after: Adapter, packed: PackedAdapter) -> Squares:
    found = {True: [0.0, 0.0, 0.0], False: [0.0, 0.0, 0.0]}
    for module in before.modules:
        one, other = before.modules[module], after.modules[module]
        own = delta_square(one), delta_square(other), _difference_square(one, other)
        is_inside = module in packed.places
        found[is_inside] = [total + square for total, square in zip(found[is_inside], own, strict=True)]
    (squared, after_squared, moved), (outside, _, moved_outside) = found[True], found[False]
    return Squares(squared, after_squared, moved, outside, moved_outside)


def _difference_square(one: LoRAFactors, other: LoRAFactors) -> float:
    """‖D − D'‖² of any two gauges; as exact as the larger of the two norms allows."""
    left = torch.cat([one.scaling * one.up.double(), -other.scaling * other.up.double()], dim=1)
    return max(float(linalg.product_square(left, torch.cat([one.down.double(), other.down.double()]))), 0.0)


def _followed(before: Record, after: Record, squares: Squares, *, alone: bool, projected: bool) -> Record:
    """The record of an adapter that was fitted without its original: of that it says what it said, and what is lost is
    followed from what was lost before and what has changed since.

    alone: nothing has entered the fit but what lies in the components that the adapter was projected on. Then what was
    lost is orthogonal to what has changed, and squares add up; else the error is what it is at most. projected: what
    was lost before is orthogonal to what was kept, but for rounding.
    """
    lost_before = before.delta_error
    is_lost = lost_before >= 1 and (alone or projected)
    if squares.outside == 0 and (squares.before == 0 or is_lost):
        error = lost_before
    elif alone:
        error = _error_of_orthogonal(lost_before, squares)
    elif projected and not before.bound and lost_before < 1:
        error = _worst_of_projected(lost_before, squares) + before.rounding_error
    else:
        error = worst_error(lost_before, squares)
    return replace(
        after,
        delta_error=error,
        bound=before.bound or not alone,
        untrained=before.untrained,
        source_sha256=before.source_sha256,
        source_file_bytes=before.source_file_bytes,
    )


def _error_of_orthogonal(error: float, squares: Squares) -> float:
    known = squares.before / (1 - error**2) if error < 1 else 0.0
    return math.sqrt((known * error**2 + squares.moved + squares.moved_outside) / (known + squares.outside))


def _worst_of_projected(error: float, squares: Squares) -> float:
    """Of an original D = D̂ + E, where E is orthogonal to D̂ and in the worst of such directions: E adds to that part of
    what has changed which is orthogonal to D̂."""
    lost = squares.before * error**2 / (1 - error**2)
    along = (squares.before - squares.after + squares.moved) ** 2 / (4 * squares.before) if squares.before else 0.0
    across = max(squares.moved - along, 0.0)
    worst = along + (math.sqrt(across) + math.sqrt(lost)) ** 2 + squares.moved_outside
    return math.sqrt(worst / (squares.before + lost + squares.outside))


def worst_error(error: float, squares: Squares) -> float:
    """Return the largest delta error beside any original D with ‖D − D̂‖ = error · ‖D‖, of which D̂ was given back.

    Such originals are a sphere of centre c = D̂ / (1 − error²) and radius ρ = error · ‖c‖. With D̃ for what is given back
    now, D = c + ρu for a unit vector u, and squares of modules outside added on both sides,

        ‖D − D̃‖² / ‖D‖² = (A + ⟨B, u⟩) / (C + ⟨G, u⟩),  A = ‖c − D̃‖² + ρ², B = 2ρ (c − D̃), C = ‖c‖² + ρ², G = 2ρ c.

    Its maximum λ over u has A − λC + ‖B − λG‖ = 0, whose square is quadratic in λ. The triangle inequality alone would
    take the smallest original for the farthest one, which it is not.
    """
    # powers of four are ahead
    total = squares.before + squares.outside
    before, after, moved, outside, moved_outside = (square / total for square in astuple(squares))
    if error >= 1:
        # there is no sphere: the original may be as large as makes this worst
        all_moved, least = math.sqrt(moved + moved_outside), math.sqrt(before) / (1 + error)
        size = max(error * outside / all_moved, least) if all_moved else math.inf
        return (error + all_moved / size) / math.sqrt(1 + outside / size**2)
    inner = (before + after - moved) / 2
    shrink = 1 - error**2
    centre = before / shrink**2
    radius = error**2 * centre
    apart = max(centre - 2 * inner / shrink + after, 0.0)
    a, c = apart + radius + moved_outside, centre + radius + outside
    b_square, g_square, b_g = 4 * radius * apart, 4 * radius * centre, 4 * radius * (centre - inner / shrink)
    half, leading = a * c - b_g, c**2 - g_square
    root = math.sqrt(max(half**2 - leading * (a**2 - b_square), 0.0))
    return math.sqrt(max((half + root) / leading, 0.0))


def _change(before: Record, after: Record, squares: Squares, from_original: bool) -> Change:
    norm = squares.before + squares.outside
    trained = not before.untrained
    return Change(
        from_original=from_original,
        error_before=before.delta_error if trained else None,
        error_after=after.delta_error if trained else None,
        bound=after.bound,
        moved=math.sqrt((squares.moved + squares.moved_outside) / norm) if norm else None,
        bytes_before=before.coefficient_bytes + before.carried_bytes,
        bytes_after=after.coefficient_bytes + after.carried_bytes,
    )


def changes_json(found: Refit) -> dict[str, Any]:
    """The changes as JSON has them."""
    return {name: {**asdict(change), "worse": change.worse} for name, change in found.changes.items()}
