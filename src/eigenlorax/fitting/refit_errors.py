"""Delta errors of adapters that were refitted without their originals: exact where possible, else upper bounds."""

import math
from dataclasses import astuple, dataclass, replace

import torch

from ..core import linalg
from ..core.adapter import Adapter, LoRAFactors, delta_square
from ..pack.outside_tensors import PRETRAINED_ERROR
from ..pack.packed_adapter import PackedAdapter
from ..pack.record import Record


@dataclass(frozen=True, slots=True)
class UpdateSquares:
    """Squared Frobenius norms of one adapter's update before and after a refit.

    Attributes:
        before: ‖update before‖² over the modules of the old subspace.
        after: ‖update after‖² over the same modules.
        moved: ‖update after − update before‖² over the same modules.
        outside: ‖update before‖² over modules of the new subspace that are not in the old one.
        moved_outside: ‖update after − update before‖² over these modules.
        excluded: ‖update before‖² over modules that are in neither subspace. No delta error includes them.
        rounded_outside: Upper bound of ‖update before − original‖² over the modules of `outside`, whose factors an
            entropy-coded pack rounds.
    """

    before: float
    after: float
    moved: float
    outside: float
    moved_outside: float
    excluded: float = 0.0
    rounded_outside: float = 0.0


def compare_updates(before: Adapter, after: Adapter, old: PackedAdapter, new: PackedAdapter) -> UpdateSquares:
    """Compare one adapter's reconstructions by the old and the new pack.

    Args:
        before: Reconstruction by the old pack.
        after: Reconstruction by the new pack.
        old: The adapter in the old pack.
        new: The adapter in the new pack.
    """
    inside, outside, excluded, rounded = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0
    # a head may have a larger error than a LoRA; an earlier refit without originals may have coded the LoRA twice
    largest = old.record.head_error
    factor_error = largest if old.record.bound else min(largest, PRETRAINED_ERROR)
    for module, factors in before.modules.items():
        refitted = after.modules[module]
        squares = delta_square(factors), delta_square(refitted), _difference_square(factors, refitted)
        added = outside if module in new.subspace_names else excluded
        sums = inside if module in old.subspace_names else added
        sums[:] = [total + square for total, square in zip(sums, squares, strict=True)]
        if sums is outside:
            rounded += _rounding_bound(factors, factor_error) ** 2
    return UpdateSquares(inside[0], inside[1], inside[2], outside[0], outside[2], excluded[0], rounded)


def _rounding_bound(factors: LoRAFactors, error: float) -> float:
    """Return an upper bound of ‖B̂Â − BA‖ for decoded factors whose relative errors are at most `error`.

    It is ‖B̂ − B‖ · ‖A‖₂ + ‖B̂‖₂ · ‖Â − A‖, where the norm of an error is at most error / (1 − error) times that of the
    decoded factor.
    """
    down, up = factors.down.double(), factors.up.double()
    share = error / max(1 - error, 1e-6)
    down_error, up_error = share * float(down.norm()), share * float(up.norm())
    spectral_down, spectral_up = (float(torch.linalg.matrix_norm(side, 2)) for side in (down, up))
    return abs(factors.scaling) * (up_error * (spectral_down + down_error) + spectral_up * down_error)


def _difference_square(first: LoRAFactors, second: LoRAFactors) -> float:
    """Return ‖D − D'‖² of two updates of any ranks and scales, exact to float64 rounding of the larger norm."""
    up = torch.cat([first.scaling * first.up.double(), -second.scaling * second.up.double()], dim=1)
    return max(float(linalg.product_square(up, torch.cat([first.down.double(), second.down.double()]))), 0.0)


def follow_record(before: Record, after: Record, squares: UpdateSquares, *, alone: bool, projected: bool) -> Record:
    """Return the record of an adapter that was refitted from the old pack's reconstruction.

    The new error against the original is computed or bounded from the old error and the change of the update.

    Args:
        before: Record in the old pack.
        after: Record in the new pack, with the error against the old reconstruction.
        squares: Squared norms of the update and of its change.
        alone: True if all adapters of the refit are in the span of the components on which this adapter was projected.
            Then the old error is orthogonal to the change, and the squares add up. Else the error is an upper bound.
        projected: True if the old error is orthogonal to the old reconstruction, except for rounding.
    """
    old_error = before.delta_error
    is_orthogonal_to_components = old_error >= 1 and (alone or projected)
    if squares.outside == 0 and (squares.before == 0 or is_orthogonal_to_components):
        error = old_error
    elif alone:
        error = _orthogonal_error(old_error, squares)
    elif projected and not before.bound and old_error < 1:
        error = _worst_projected_error(old_error, squares) + before.rounding_error
    else:
        error = worst_error(old_error, squares)
    if squares.rounded_outside:
        # by the triangle inequality; the norm of the old update is at most 1 + old_error times that of the original
        norm = math.sqrt(squares.outside + squares.before / (1 + old_error) ** 2)
        rounding = math.sqrt(squares.rounded_outside) / norm
        error = (error + rounding) / max(1 - rounding, 1e-6)
    return replace(
        after,
        delta_error=error,
        bound=before.bound or not alone,
        untrained=before.untrained,
        # 0 in the new pack, where codes are kept or decoded numbers are stored exactly
        head_error=before.head_error + after.head_error * (1 + before.head_error),
        source_head_bytes=before.source_head_bytes,
        source_carried_bytes=before.source_carried_bytes,
        head_numbers=before.head_numbers,
        carried_numbers=before.carried_numbers,
        source_sha256=before.source_sha256,
        source_file_bytes=before.source_file_bytes,
    )


def _orthogonal_error(error: float, squares: UpdateSquares) -> float:
    """Return the error if the old error is orthogonal to the old update and to the change."""
    original = squares.before / (1 - error**2) if error < 1 else 0.0
    return math.sqrt((original * error**2 + squares.moved + squares.moved_outside) / (original + squares.outside))


def _worst_projected_error(error: float, squares: UpdateSquares) -> float:
    """Return the largest error for an original D = D̂ + E, where E is orthogonal to the old update D̂.

    In the worst case, E is parallel to the part of the change that is orthogonal to D̂.
    """
    residual = squares.before * error**2 / (1 - error**2)
    along = (squares.before - squares.after + squares.moved) ** 2 / (4 * squares.before) if squares.before else 0.0
    across = max(squares.moved - along, 0.0)
    worst = along + (math.sqrt(across) + math.sqrt(residual)) ** 2 + squares.moved_outside
    return math.sqrt(worst / (squares.before + residual + squares.outside))


def worst_error(error: float, squares: UpdateSquares) -> float:
    """Return the largest delta error for any original D with ‖D − D̂‖ = error · ‖D‖, where D̂ is the old update.

    Such originals are a sphere with centre c = D̂ / (1 − error²) and radius ρ = error · ‖c‖. With D̃ for the new update,
    D = c + ρu for a unit vector u, and squares of modules outside added on both sides,

        ‖D − D̃‖² / ‖D‖² = (A + ⟨B, u⟩) / (C + ⟨G, u⟩),  A = ‖c − D̃‖² + ρ², B = 2ρ (c − D̃), C = ‖c‖² + ρ², G = 2ρ c.

    Its maximum λ over u satisfies A − λC + ‖B − λG‖ = 0, whose square is quadratic in λ. The triangle inequality would
    give a looser bound: it combines the largest numerator with the smallest denominator.
    """
    # in units of the total, so that the fourth powers below neither overflow nor vanish
    total = squares.before + squares.outside
    before, after, moved, outside, moved_outside, *_ = (square / total for square in astuple(squares))
    if error >= 1:
        # the originals are not bounded by a sphere: maximise over their norm
        change, smallest = math.sqrt(moved + moved_outside), math.sqrt(before) / (1 + error)
        size = max(error * outside / change, smallest) if change else math.inf
        return (error + change / size) / math.sqrt(1 + outside / size**2)
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
