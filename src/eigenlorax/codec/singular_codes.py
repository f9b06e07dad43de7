"""Updates of one module as integers: coefficients in quantised bases, and the residuals that these do not represent.

Each update is a sum of singular components, Σ s·u·vᵀ. Both vectors of a component are scaled to its singular value in
units of the adapter's quantisation step size Δ, so that a rounding error of either is an error of the update of the
same size. Each vector is then written as integer coefficients in the module's basis and, where that is worth its bits,
as an integer residual beside them. Components of small singular values vanish in the rounding by themselves.

An update may have a core between the two bases instead: k_up × k_down integers in place of r · (k_up + k_down). That is
fewer where a basis has about as many components as an adapter has ranks, as when all adapters share their span.

This module does not know of files; `bitstream` makes bytes of its codes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core import linalg
from . import dead_zone
from .dead_zone import BITS_PER_SQUARED_ERROR
from .logistic import classes_of_spread, code_bits, row_bits
from .quantised_basis import BasisRows, QuantisedBasis
from .svd_batch import SvdBatch

SCALES = 8
"""Scale levels per octave."""
MAX_SCALE = 255
MEAN_TO_SPREAD = math.sqrt(math.pi / 2)
"""Standard deviation of Gaussian numbers, by their mean absolute value."""
LOWER_CLASSES = (0, 3)
"""Distances below the class of the spread that are tried."""
OVERHEAD = 16.0
"""Bits of a component, or of a core, beside its numbers: its scale and levels."""


@dataclass(frozen=True, slots=True)
class BatchSideCodes:
    """One side of the singular components of several updates. A level is a class plus 1, or 0 if all codes are 0.

    Codes are integers in float64, in which they are computed with.

    Attributes:
        coefficients: Codes of class level − 1 + profile of the basis.
        coefficient_levels: Level of each vector's coefficients.
        residuals: Codes of class level − 1.
        residual_levels: Level of each vector's residual.
    """

    coefficients: Float[Tensor, "n r k"]
    coefficient_levels: Int[Tensor, "n r"]
    residuals: Float[Tensor, "n r d"]
    residual_levels: Int[Tensor, "n r"]

    def rows(self, basis: Float[Tensor, "k d"]) -> Float[Tensor, "n r d"]:
        """Return the decoded vectors in step sizes, float64, given the rows of the basis."""
        return self.coefficients @ basis.to(torch.float64) + self.residuals

    def mask(self, keep: Tensor) -> "BatchSideCodes":
        """Set the codes of components to zero where the mask `keep`, (n, r) or (n, 1), is 0."""
        if keep.all():
            return self
        return BatchSideCodes(
            self.coefficients * keep[..., None],
            self.coefficient_levels * keep,
            self.residuals * keep[..., None],
            self.residual_levels * keep,
        )


@dataclass(frozen=True, slots=True)
class UpdateCodes:
    """Several updates as integers: of singular components, or of a core between the bases in their place.

    Attributes:
        down: Components on the down side.
        up: Components on the up side.
        scales: Scale of each component, in eighths of an octave of step sizes.
        counts: Number of components that each update keeps.
        cores: Codes of class level − 1 + the profiles of both bases; 0 for updates that have components.
        core_levels: Level of each core; 0 for updates that have components.
        step_sizes: Quantisation step size of each update, absolute.
        bits: Bits of each update in a file, estimated.
        squared_errors: Squared error of each update, absolute.
    """

    down: BatchSideCodes
    up: BatchSideCodes
    scales: Int[Tensor, "n r"]
    counts: Int[Tensor, " n"]
    cores: Int[Tensor, "n k_up k_down"]
    core_levels: Int[Tensor, " n"]
    step_sizes: Float[Tensor, " n"]
    bits: Float[Tensor, " n"]
    squared_errors: Float[Tensor, " n"]

    def cost(self) -> Float[Tensor, " n"]:
        """Return the rate–distortion cost of each update, in bits."""
        return rate_distortion_cost(self.bits, self.squared_errors, self.step_sizes)


def rate_distortion_cost(bits: Tensor, squared_errors: Tensor, step_sizes: Tensor) -> Float[Tensor, " n"]:
    """Return bits plus squared errors, converted to bits at the price `BITS_PER_SQUARED_ERROR` for these step sizes."""
    return bits + BITS_PER_SQUARED_ERROR * squared_errors / step_sizes.square()


def encode_updates(
    updates: SvdBatch, step_sizes: Float[Tensor, " n"], down: QuantisedBasis, up: QuantisedBasis
) -> UpdateCodes:
    """Encode updates, each in the form that costs less: singular components, or a core between the bases.

    Args:
        updates: Updates of one module.
        step_sizes: Quantisation step size of each update, absolute.
        down: Basis of the down side, possibly without a row.
        up: Basis of the up side, possibly without a row.
    """
    return _encode(updates, step_sizes, down.numbers(), up.numbers())


def encode_in_batches(
    updates: SvdBatch, step_sizes: Float[Tensor, " n"], down: QuantisedBasis, up: QuantisedBasis
) -> Iterator[tuple[list[int], UpdateCodes]]:
    """Yield the indices of some updates, and their codes as `encode_updates` returns them, in bounded memory."""
    bases = down.numbers(), up.numbers()
    for indices in updates.index_batches():
        batch = updates.select(indices) if len(indices) < len(updates) else updates
        yield indices, _encode(batch, step_sizes[indices], *bases)


def _encode(updates: SvdBatch, step_sizes: Tensor, down: BasisRows, up: BasisRows) -> UpdateCodes:
    codes = _encode_components(updates, step_sizes, down, up)
    # a core with many more numbers than the components cannot pay, and would take much memory
    if not 0 < down.k * up.k <= 2 * updates.rank * (down.k + up.k):
        return codes
    cores, levels, bits, squared_errors = _encode_cores(updates, step_sizes, down, up, codes.cost())
    with_core = rate_distortion_cost(bits, squared_errors, step_sizes) < codes.cost()
    with_components = torch.where(with_core, 0, 1)
    return replace(
        codes,
        down=codes.down.mask(with_components[:, None]),
        up=codes.up.mask(with_components[:, None]),
        scales=codes.scales * with_components[:, None],
        counts=codes.counts * with_components,
        cores=torch.where(with_core[:, None, None], cores, 0),
        core_levels=torch.where(with_core, levels, 0),
        bits=torch.where(with_core, bits, codes.bits),
        squared_errors=torch.where(with_core, squared_errors, codes.squared_errors),
    )


def measure_updates(
    updates: SvdBatch, step_sizes: Float[Tensor, " n"], down: QuantisedBasis, up: QuantisedBasis
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return about how many bits `encode_updates` takes for each update, and the squared error of each."""
    bits, squared_errors = torch.zeros_like(step_sizes), torch.zeros_like(step_sizes)
    for indices, codes in encode_in_batches(updates, step_sizes, down, up):
        bits[indices], squared_errors[indices] = codes.bits, codes.squared_errors
    return bits, squared_errors


def _encode_components(updates: SvdBatch, step_sizes: Tensor, down: BasisRows, up: BasisRows) -> UpdateCodes:
    """Encode updates by their singular components, as many of each as pay."""
    lengths = updates.s / step_sizes[:, None]
    scales = (SCALES * lengths.clamp_min(1).log2()).round().clamp(0, MAX_SCALE)
    rounded_lengths = torch.exp2(scales / SCALES)
    # the decoder knows the rounded length L' alone, and multiplies each vector by √(Δ / L'): vectors of length √(L·L')
    # then give the singular value L·Δ
    v, v_bits, v_errors = _encode_side(updates.v * (lengths * rounded_lengths).sqrt()[..., None], down)
    # the up side makes up for some of the error of the down side, since it is fitted to the decoded vectors
    u_rows = _best_up_rows(updates, step_sizes, v.rows(down.rows), rounded_lengths)
    u, u_bits, u_errors = _encode_side(u_rows, up)
    gain = BITS_PER_SQUARED_ERROR * (lengths.square() - v_errors - u_errors) - v_bits - u_bits - OVERHEAD
    pays = (gain > 0) & (v.coefficient_levels + v.residual_levels > 0) & (u.coefficient_levels + u.residual_levels > 0)
    ranks = torch.arange(1, pays.shape[1] + 1)
    # components are sorted, and only their number is written: all up to the last one that pays
    counts = (pays * ranks).amax(dim=1)
    keep = ranks[None] <= counts[:, None]
    n = len(step_sizes)
    codes = UpdateCodes(
        down=v.mask(keep),
        up=u.mask(keep),
        scales=torch.where(keep, scales, 0).to(torch.int64),
        counts=counts,
        cores=torch.zeros(n, up.k, down.k, dtype=torch.int64),
        core_levels=torch.zeros(n, dtype=torch.int64),
        step_sizes=step_sizes,
        bits=((v_bits + u_bits + OVERHEAD) * keep).sum(1),
        squared_errors=torch.zeros_like(step_sizes),
    )
    right, left = dequantise(codes, down.rows, up.rows)
    root = updates.s.sqrt()[..., None]
    # component beside component: no two large numbers are subtracted
    errors = linalg.difference_square((updates.u * root).mT, updates.v * root, left.mT, right)
    return replace(codes, squared_errors=errors)


def _encode_cores(
    updates: SvdBatch, step_sizes: Tensor, down: BasisRows, up: BasisRows, cost_limits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cores, levels, bits and squared errors; these are infinite where the bits alone exceed the cost limit."""
    v, u = updates.v @ down.dual_rows.mT, updates.u @ up.dual_rows.mT
    exact = (u * (updates.s / step_sizes[:, None])[..., None]).mT @ v
    codes = dead_zone.quantise(exact)
    profile = core_profile(down.profile, up.profile)
    spread = (exact.square() * torch.exp2(-profile / 2.0)).mean((1, 2)).sqrt()
    levels = classes_of_spread(spread) + 1
    bits = code_bits(codes, (levels[:, None, None] - 1 + profile).clamp_min(0)).sum((1, 2)) + OVERHEAD
    squared_errors = torch.full_like(bits, math.inf)
    # what lies outside of the two spans is lost with any core; most cores cost too much by that and their bits alone,
    # and need no decomposition
    inside = ((up.rows @ up.rows.mT) @ exact @ (down.rows @ down.rows.mT) * exact).sum((1, 2))
    # less what rounding may add to the difference
    outside = ((1 - 1e-12) * (updates.s / step_sizes[:, None]).square().sum(1) - inside).clamp_min(0)
    if indices := torch.nonzero(bits + BITS_PER_SQUARED_ERROR * outside < cost_limits)[:, 0].tolist():
        left, right = core_factors(codes[indices], step_sizes[indices], updates.ranks[indices])
        squared_errors[indices] = _squared_error(updates.select(indices), right @ down.rows, left.mT @ up.rows)
    return codes.to(torch.int64), levels, bits, squared_errors


def core_profile(down: np.ndarray, up: np.ndarray) -> Int[Tensor, "k_up k_down"]:
    """Return by how many classes each number of a core is smaller than the largest, from the profiles of its bases."""
    return torch.from_numpy(up)[:, None] + torch.from_numpy(down)[None]


def core_factors(
    cores: Tensor, step_sizes: Tensor, ranks: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k_up r"], Float[Tensor, "n r k_down"]]:
    """Factor integer cores, (n, k_up, k_down), in the best way of these ranks, by a truncated SVD.

    Rounding errors give a quantised core full rank, which the adapter does not have. r is the largest of the ranks, or
    the smaller side of the cores if that is less.
    """
    u, s, v = torch.linalg.svd(cores.to(torch.float64), full_matrices=False)
    rank = min(int(ranks.max()), s.shape[1])
    within_rank = torch.arange(rank) < ranks[:, None]
    root = (s[:, :rank] * within_rank * step_sizes[:, None]).sqrt()
    return u[:, :, :rank] * root[:, None], v[:, :rank] * root[..., None]


def _best_up_rows(updates: SvdBatch, step_sizes: Tensor, v_rows: Tensor, rounded_lengths: Tensor) -> Tensor:
    """Return the vectors of the up side that are best for given ones of the down side, in step sizes.

    Least squares over all components of an update together: decoded vectors of the down side are not orthogonal.
    """
    gram = v_rows @ v_rows.mT
    nonzero = gram.diagonal(dim1=1, dim2=2) > 0
    # a relative ridge keeps nearly parallel vectors from large coefficients that cancel; a component whose vector
    # vanished gets a 1, so that the system has a solution
    gram = gram + torch.diag_embed(torch.where(nonzero, 1e-9 * gram.diagonal(dim1=1, dim2=2), 1.0))
    mixing = torch.linalg.solve(gram, (v_rows @ updates.v.mT) * (updates.s / step_sizes[:, None])[:, None, :])
    rows: Tensor = rounded_lengths[..., None] * (mixing @ updates.u)
    return rows


def _encode_side(rows: Tensor, basis: BasisRows) -> tuple[BatchSideCodes, Tensor, Tensor]:
    """Encode vectors (n, r, d), in step sizes; return also the bits and the squared error of each vector, (n, r)."""
    n, r, d = rows.shape
    residual, coefficients = rows, torch.zeros(n, r, basis.k, dtype=torch.float64)
    levels, bits = torch.zeros(n, r, dtype=torch.int64), torch.zeros(n, r, dtype=torch.float64)
    if basis.k:
        exact = rows @ basis.dual_rows.mT
        codes = dead_zone.quantise(exact)
        profile = torch.from_numpy(basis.profile)
        # divided by its profile, every coefficient of a vector has about the same spread
        levels, bits = _cheapest_levels(codes, exact * torch.exp2(-profile / 4.0), profile)
        gain = BITS_PER_SQUARED_ERROR * (_squares(exact) - _squares(exact - codes))
        pays = gain > bits
        coefficients = torch.where(pays[..., None], codes, 0.0)
        levels, bits = torch.where(pays, levels, 0), torch.where(pays, bits, 0.0)
        # of the rounded coefficients: the residual also corrects their rounding errors
        residual = rows - coefficients @ basis.rows
    codes = dead_zone.quantise(residual)
    square = _squares(residual)
    residual_levels, residual_bits = _cheapest_levels(codes, residual, torch.zeros(d, dtype=torch.int64))
    error = _squares(residual - codes)
    pays = BITS_PER_SQUARED_ERROR * (square - error) > residual_bits
    residuals = codes if pays.all() else torch.where(pays[..., None], codes, 0.0)
    side = BatchSideCodes(coefficients, levels, residuals, torch.where(pays, residual_levels, 0))
    return side, bits + torch.where(pays, residual_bits, 0.0), torch.where(pays, error, square)


def _squares(rows: Tensor) -> Tensor:
    """Return the squared norms of vectors, (…, d), in one pass."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.square()


def _cheapest_levels(codes: Tensor, scaled: Tensor, profile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cheapest level of each vector, of a few that are tried, and its bits.

    Args:
        codes: Integers, (…, d).
        scaled: The numbers before rounding, (…, d), scaled to one spread throughout the vector.
        profile: Classes that are added to the level for each number, (d,).
    """
    # the mean absolute value depends less on a few large numbers than the mean square; lower classes are tried
    # for vectors that are nearly zero apart from a few numbers
    mean = torch.linalg.vector_norm(scaled, ord=1, dim=-1) / scaled.shape[-1]
    first = classes_of_spread(mean * MEAN_TO_SPREAD)
    candidates = torch.stack([(first - lower).clamp_min(0) for lower in LOWER_CLASSES])
    if profile.any():
        profiles = [(classes[..., None] + profile).clamp_min(0) for classes in candidates]
        bits = torch.stack([code_bits(codes, classes).sum(-1) for classes in profiles])
    else:
        bits = row_bits(codes, candidates)
    least, best = bits.min(0)
    return candidates.gather(0, best[None])[0] + 1, least


def dequantise(codes: UpdateCodes, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Decode codes of components to factors.

    Args:
        codes: Codes of n updates, all of components.
        down: Rows of the basis of the down side, (k_down, in).
        up: Rows of the basis of the up side, (k_up, out).

    Returns:
        Factors (n, r, in) and (n, r, out), float64. An update is the product of the second, transposed, with the first.
    """
    weight = (codes.step_sizes[:, None] * torch.exp2(-codes.scales.to(torch.float64) / SCALES)).sqrt()[..., None]
    return codes.down.rows(down) * weight, codes.up.rows(up) * weight


def _squared_error(updates: SvdBatch, right: Tensor, left: Tensor) -> Tensor:
    """Return ‖update − leftᵀ · right‖² of each update, from Gram matrices of the factors."""
    lefts = torch.cat([updates.u * updates.s[..., None], -left], dim=1)
    rights = torch.cat([updates.v, right], dim=1)
    return ((lefts @ lefts.mT) * (rights @ rights.mT)).sum((1, 2)).clamp_min(0)
