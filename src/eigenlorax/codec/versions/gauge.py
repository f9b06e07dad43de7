"""Gauges: factorisations (BG, G⁻¹A) of one update whose rows take few bits.

Only the product BA has meaning, so the encoder is free to choose G. Nothing of it is stored.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64

ALIGNMENT_TURNS = 8
"""Number of Gauss–Newton steps of the alignment."""
CLOSE_BITS = 0.02
"""Decrease of the cost, per column, below which the alignment ends."""
_NO_WEIGHT = 1e-6
"""Smallest weight of a row, relative to the largest: rows of zeros would make the equations singular."""

Rows = Float64[np.ndarray, "rank _"]


def singular_gauge(up: Float64[np.ndarray, "rank n_out"], down: Float64[np.ndarray, "rank n_in"]) -> tuple[Rows, Rows]:
    """Return the factors of upᵀ down whose rows are orthogonal on both sides, and of equal norms.

    By Hadamard's inequality, no other gauge takes fewer bits at the same error, if rows are quantised independently.
    """
    up_basis, up_triangle = np.linalg.qr(up.T)
    down_basis, down_triangle = np.linalg.qr(down.T)
    left, singular_values, right = np.linalg.svd(up_triangle @ down_triangle.T)
    roots, rank = np.sqrt(singular_values), len(up)
    new_up, new_down = np.zeros_like(up), np.zeros_like(down)
    # a rank above a width leaves rows of zeros
    count = min(len(roots), rank)
    new_up[:count] = ((up_basis @ left)[:, :count] * roots[:count]).T
    new_down[:count] = (down_basis @ right.T)[:, :count].T * roots[:count, None]
    return new_up, new_down


def align(
    up: Float64[np.ndarray, "rank n_out"],
    down: Float64[np.ndarray, "rank n_in"],
    reference_up: Float64[np.ndarray, "rank n_out"],
    reference_down: Float64[np.ndarray, "rank n_in"],
    noise: float,
) -> tuple[Rows, Rows] | None:
    """Return the factors of upᵀ down that take the fewest bits beside a reference; None if they are singular.

    Minimises Σ width · log(w² m + noise) over G and the rows of both sides of the differences Gᵀ up − up₀ and
    G⁻¹ down − down₀, where m is the mean square of a row and w the norm of the row of the reference that it is
    multiplied by. Least squares would not do: it improves rows of large differences at the cost of small ones, whose
    bits grow as fast. Each step is one of least squares with the weights w² / (w² m + noise).

    Args:
        up, down: Factors of the update.
        reference_up, reference_down: Factors of the reference, of the same rank. Rows of zeros match any row.
        noise: Mean square of the quantisation error, in the units of w² m.
    """
    references = reference_up, reference_down
    candidates = []
    # each side alone says how to change the gauge; one of them may be zero, or have changed beyond recognition
    coordinates = _coordinates(reference_down, down)
    if coordinates is not None and (inverse := _inverse(coordinates)) is not None:
        candidates.append((inverse.T @ up, coordinates @ down))
    coordinates = _coordinates(reference_up, up)
    if coordinates is not None and (inverse := _inverse(coordinates)) is not None:
        candidates.append((coordinates @ up, inverse.T @ down))

    def cost(factors: tuple[Rows, Rows]) -> float:
        squares = _row_squares(factors, references)
        return sum(
            float(rows.shape[1] * np.log(square * np.square(rows - reference).mean(1) + noise).sum())
            for square, rows, reference in zip(squares, factors, references, strict=True)
        )

    best = min(candidates, key=cost, default=None)
    for _ in range(ALIGNMENT_TURNS if best is not None else 0):
        assert best is not None
        weights = [
            np.sqrt(square / (square * np.square(rows - reference).mean(1) + noise))
            for square, rows, reference in zip(_row_squares(best, references), best, references, strict=True)
        ]
        if not all(weight.all() for weight in weights):
            # rows without weight, of an update that is tiny beside the noise
            break
        step = _gauss_newton_step(best, references, weights)
        closer = min(_changed(best, step), key=cost, default=best)
        if not cost(closer) < cost(best) - CLOSE_BITS * (up.shape[1] + down.shape[1]):
            break
        best = closer
    return best


def _changed(factors: tuple[Rows, Rows], step: Float64[np.ndarray, "rank rank"]) -> Iterator[tuple[Rows, Rows]]:
    """Yield factors after a change of gauge by I + X, for X the whole step and shares of it."""
    for share in (1.0, 0.5, 0.25, 0.1):
        change = np.eye(len(step)) + share * step
        inverse = _inverse(change)
        if inverse is not None:
            yield change.T @ factors[0], inverse @ factors[1]


def _row_squares(
    factors: tuple[Rows, Rows], references: tuple[Rows, Rows]
) -> tuple[Float64[np.ndarray, " rank"], Float64[np.ndarray, " rank"]]:
    """Return the squared norm of the row that each up row and each down row is multiplied by.

    A row of the reference may be zero, so that its norm says nothing: the greater norm of the two counts.
    """
    up, down = (
        np.maximum(np.square(rows).sum(1), np.square(reference).sum(1))
        for rows, reference in zip(factors, references, strict=True)
    )
    return np.maximum(down, 1e-300), np.maximum(up, 1e-300)


def _gauss_newton_step(
    factors: tuple[Rows, Rows], references: tuple[Rows, Rows], weights: Sequence[Float64[np.ndarray, " rank"]]
) -> Float64[np.ndarray, "rank rank"]:
    """Return the X that minimises the weighted squared differences of both sides for G = I + X and G⁻¹ = I − X.

    The normal equations P X Q + R X S = C, with Q and R diagonal, become a Sylvester equation, which the eigenvectors
    of two symmetric matrices solve.
    """
    (up, down), (reference_up, reference_down) = factors, references
    column_scale, row_scale = 1 / weights[0], 1 / weights[1]
    right_hand = up @ (reference_up - up).T * weights[0] ** 2 + weights[1][:, None] ** 2 * (
        (down - reference_down) @ down.T
    )
    left_values, left = np.linalg.eigh(up @ up.T * row_scale[:, None] * row_scale)
    right_values, right = np.linalg.eigh(down @ down.T * column_scale[:, None] * column_scale)
    rotated = left.T @ (right_hand * row_scale[:, None] * column_scale) @ right
    sums = left_values[:, None] + right_values
    solution = left @ (rotated / np.maximum(sums, 1e-12 * sums.max())) @ right.T
    step: np.ndarray = solution * row_scale[:, None] * column_scale
    return step


def match_rows(
    down: Float64[np.ndarray, "rank n_in"],
    reference_up: Float64[np.ndarray, "earlier n_out"],
    reference_down: Float64[np.ndarray, "earlier n_in"],
) -> Int64[np.ndarray, " rank"]:
    """Return which row of a reference predicts each row of factors; −1 for none.

    Factors of another rank, as AdaLoRA leaves them, are predicted by the rows of the reference that span most of them.

    Args:
        down: Factor of the update.
        reference_up, reference_down: Factors of the reference.
    """
    rank, earlier = len(down), len(reference_down)
    if rank >= earlier:
        return np.concatenate([np.arange(earlier), np.full(rank - earlier, -1)])
    coordinates = _coordinates(reference_down, down)
    # rows of the reference relative to the factors, weighted by their part of the update
    left = coordinates * _weights(reference_up)[:, None] if coordinates is not None else np.eye(earlier)[:, :rank]
    chosen: list[int] = []
    for _ in range(rank):
        norms = np.square(left).sum(1)
        norms[chosen] = -1
        row = int(norms.argmax())
        chosen.append(row)
        direction = left[row] / max(np.sqrt(norms[row]), 1e-300)
        left = left - np.outer(left @ direction, direction)
    return np.array(sorted(chosen), dtype=np.int64)


def _weights(rows: Rows) -> Float64[np.ndarray, " rank"]:
    norms = np.linalg.norm(rows, axis=1)
    weights: np.ndarray = np.maximum(norms, max(_NO_WEIGHT * norms.max(initial=0), 1e-150))
    return weights


def _coordinates(
    targets: Float64[np.ndarray, "targets _"], rows: Float64[np.ndarray, "rank _"]
) -> Float64[np.ndarray, "targets rank"] | None:
    """Return the coordinates of target rows in a space that other rows span; None if those are dependent.

    Target rows of zeros get coordinates that are orthogonal to those of the others.
    """
    inverse = _inverse(rows @ rows.T)
    if inverse is None:
        return None
    coordinates: np.ndarray = targets @ rows.T @ inverse
    norms = np.linalg.norm(targets, axis=1)
    zeros = norms <= _NO_WEIGHT * norms.max(initial=0)
    if zeros.any() and not zeros.all():
        _, _, directions = np.linalg.svd(coordinates[~zeros])
        free = directions[int((~zeros).sum()) :]
        coordinates[zeros] = free[: int(zeros.sum())] if len(free) >= zeros.sum() else 0
    return coordinates


def _inverse(matrix: Float64[np.ndarray, "rank rank"]) -> Float64[np.ndarray, "rank rank"] | None:
    """Return the inverse of a matrix; None if it is singular to half of float64's digits."""
    if not np.isfinite(matrix).all() or np.linalg.cond(matrix) > 1e8:
        return None
    inverse: np.ndarray = np.linalg.inv(matrix)
    return inverse
