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
from .logistic import classes_of_spread, code_bits
from .quantised_basis import BasisRows, QuantisedBasis
from .side_codes import BatchSideCodes, EncodedSide, encode_side
from .svd_batch import SvdBatch

SCALES = 8
"""Scale levels per octave."""
MAX_SCALE = 255
OVERHEAD = 16.0
"""Bits of a component, or of a core, beside its numbers: its scale and levels."""


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

    The squared errors are of the decoded updates, in float64.

    Args:
        updates: Updates of one module.
        step_sizes: Quantisation step size of each update, absolute.
        down: Basis of the down side, possibly without a row.
        up: Basis of the up side, possibly without a row.
    """
    codes = _encode(updates, step_sizes, down.numbers(updates.dtype), up.numbers(updates.dtype))
    return replace(codes, squared_errors=_decoded_errors(updates, codes, down.rows, up.rows))


def encode_in_batches(
    updates: SvdBatch, step_sizes: Float[Tensor, " n"], down: QuantisedBasis, up: QuantisedBasis
) -> Iterator[tuple[list[int], UpdateCodes]]:
    """Yield the indices of some updates, and their codes as `encode_updates` returns them, in bounded memory."""
    bases = down.numbers(updates.dtype), up.numbers(updates.dtype)
    rows = down.rows, up.rows
    for indices in updates.index_batches():
        batch = updates.select(indices) if len(indices) < len(updates) else updates
        codes = _encode(batch, step_sizes[indices], *bases)
        yield indices, replace(codes, squared_errors=_decoded_errors(batch, codes, *rows))


def measure_updates(
    updates: SvdBatch, step_sizes: Float[Tensor, " n"], down: BasisRows, up: BasisRows
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return about how many bits `encode_updates` takes for each update, and the squared error of each.

    Nothing is decoded: squared errors are off by rounding, in the dtype of the updates.
    """
    bits, squared_errors = torch.zeros_like(step_sizes), torch.zeros_like(step_sizes)
    for indices in updates.index_batches():
        batch = updates.select(indices) if len(indices) < len(updates) else updates
        codes = _encode(batch, step_sizes[indices], down, up)
        bits[indices], squared_errors[indices] = codes.bits, codes.squared_errors
    return bits, squared_errors


def _encode(updates: SvdBatch, step_sizes: Tensor, down: BasisRows, up: BasisRows) -> UpdateCodes:
    projected = down.coordinates(updates.v), up.coordinates(updates.u)
    codes = _encode_components(updates, step_sizes, (down, up), projected)
    # a core with many more numbers than the components cannot pay, and would take much memory
    if not 0 < down.k * up.k <= 2 * updates.rank * (down.k + up.k):
        return codes
    cores, levels, bits, squared_errors = _encode_cores(updates, step_sizes, (down, up), projected, codes.cost())
    with_core = rate_distortion_cost(bits, squared_errors, step_sizes) < codes.cost()
    if not with_core.any():
        return codes
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


def _encode_components(
    updates: SvdBatch, step_sizes: Tensor, bases: tuple[BasisRows, BasisRows], projected: tuple[Tensor, Tensor]
) -> UpdateCodes:
    """Encode updates by their singular components, as many of each as pay.

    Args:
        updates: Updates of one module.
        step_sizes: Quantisation step size of each update.
        bases: Bases of the two sides, (down, up).
        projected: Coordinates in them of the singular vectors, v (n, r, k_down) and u (n, r, k_up).
    """
    dtype = updates.dtype
    lengths = updates.s / step_sizes[:, None]
    scales = (SCALES * lengths.clamp_min(1).log2()).round().clamp(0, MAX_SCALE)
    rounded_lengths = torch.exp2(scales / SCALES)
    # the decoder knows the rounded length L' alone, and multiplies each vector by √(Δ / L'): vectors of length √(L·L')
    # then give the singular value L·Δ
    weights = (lengths * rounded_lengths).sqrt()[..., None].to(dtype)
    v_rows = updates.v * weights
    v = encode_side(v_rows, projected[0] * weights, bases[0])
    # the up side makes up for some of the error of the down side, since it is fitted to the decoded vectors
    mixing, gram, remaining = _best_mixing(v_rows, v, lengths, rounded_lengths)
    u_rows = mixing @ updates.u
    u = encode_side(u_rows, mixing @ projected[1], bases[1])
    gain = BITS_PER_SQUARED_ERROR * (lengths.square() - v.squared_errors - u.squared_errors)
    has_codes = [side.codes.coefficient_levels + side.codes.residual_levels > 0 for side in (v, u)]
    pays = (gain > v.bits + u.bits + OVERHEAD) & has_codes[0] & has_codes[1]
    # components are sorted, and only their number is written: all up to the last one that pays
    counts = (pays * torch.arange(1, pays.shape[1] + 1)).amax(dim=1)
    keep = torch.arange(pays.shape[1])[None] < counts[:, None]
    # a component that is left out differs by all of its vector
    differences = u.differences if keep.all() else torch.where(keep[..., None], u.differences, u_rows)
    weighted = differences @ differences.mT / rounded_lengths[:, None] / rounded_lengths[..., None]
    n = len(step_sizes)
    return UpdateCodes(
        down=v.codes.mask(keep),
        up=u.codes.mask(keep),
        scales=torch.where(keep, scales, 0).to(torch.int64),
        counts=counts,
        cores=torch.zeros(n, bases[1].k, bases[0].k, dtype=torch.int64),
        core_levels=torch.zeros(n, dtype=torch.int64),
        step_sizes=step_sizes,
        bits=((v.bits + u.bits + OVERHEAD) * keep).sum(1),
        squared_errors=(remaining + (weighted * gram).sum((1, 2))).clamp_min(0) * step_sizes.square(),
    )


def _best_mixing(
    rows: Tensor, encoded: EncodedSide, lengths: Tensor, rounded_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the vectors of the up side that are best for decoded ones of the down side.

    Least squares over all components of an update together: decoded vectors of the down side are not orthogonal. With
    the decoded rows V̂ = V − E, the rows W that minimise ‖Σ L·uᵀv − Wᵀ·V̂‖² are W = (F + Y)·U, where F = √(L / L') and
    V̂·V̂ᵀ·Y = V̂·Eᵀ·F: no two large numbers are subtracted.

    Args:
        rows: Exact vectors V of the down side, in step sizes, (n, r, d).
        encoded: The same, encoded.
        lengths: Singular values L in step sizes, (n, r).
        rounded_lengths: The same, L', as the decoder knows them.

    Returns:
        Rows of combinations of the left singular vectors, in step sizes, (n, r, r); V̂·V̂ᵀ, (n, r, r); and the squared
        error that remains with these vectors, in squared step sizes, (n,).
    """
    factors = (lengths / rounded_lengths).sqrt()
    decoded = rows - encoded.differences
    gram = (decoded @ decoded.mT).to(torch.float64)
    inner = (decoded @ encoded.differences.mT).to(torch.float64) * factors[:, None]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # a relative ridge keeps nearly parallel vectors from large coefficients that cancel; a component whose vector
    # vanished gets a 1, so that the system has a solution
    ridge = 1e-9 if decoded.dtype == torch.float64 else 1e-6
    change = torch.linalg.solve(gram + torch.diag_embed(torch.where(diagonal > 0, ridge * diagonal, 1.0)), inner)
    remaining = (factors.square() * encoded.squared_errors).sum(1)
    remaining = remaining + (change * (gram @ change - 2 * inner)).sum((1, 2))
    mixing = (change + torch.diag_embed(factors)) * (rounded_lengths * (diagonal > 0))[..., None]
    return mixing.to(decoded.dtype), gram, remaining


def _decoded_errors(updates: SvdBatch, codes: UpdateCodes, down: Tensor, up: Tensor) -> Float[Tensor, " n"]:
    """Return the squared error of each update that is decoded from its codes, with the rows of the two bases."""
    right, left = dequantise(codes, down, up)
    root = updates.s.sqrt()[..., None]
    # component beside component: no two large numbers are subtracted
    errors = linalg.difference_square((updates.u * root).mT, updates.v * root, left.mT, right)
    # those of cores have been measured already
    return torch.where(codes.core_levels > 0, codes.squared_errors, errors)


def _encode_cores(
    updates: SvdBatch,
    step_sizes: Tensor,
    bases: tuple[BasisRows, BasisRows],
    projected: tuple[Tensor, Tensor],
    cost_limits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cores, levels, bits and squared errors; these are infinite where the bits alone exceed the cost limit."""
    (down, up), (v, u) = bases, (rows.to(torch.float64) for rows in projected)
    lengths = updates.s / step_sizes[:, None]
    exact = (u * lengths[..., None]).mT @ v
    codes = dead_zone.quantise(exact)
    profile = core_profile(down.profile, up.profile)
    spread = (exact.square() * torch.exp2(-profile / 2.0)).mean((1, 2)).sqrt()
    levels = classes_of_spread(spread) + 1
    bits = code_bits(codes, (levels[:, None, None] - 1 + profile).clamp_min(0)).sum((1, 2)) + OVERHEAD
    squared_errors = torch.full_like(bits, math.inf)
    # what lies outside of the two spans is lost with any core; most cores cost too much by that and their bits alone,
    # and need no decomposition
    inside = (up.gram @ exact @ down.gram * exact).sum((1, 2))
    # less what rounding may add to the difference
    rounding = 16 * torch.finfo(updates.dtype).eps
    outside = ((1 - rounding) * lengths.square().sum(1) - inside).clamp_min(0)
    if indices := torch.nonzero(bits + BITS_PER_SQUARED_ERROR * outside < cost_limits)[:, 0].tolist():
        left, right = core_factors(codes[indices], step_sizes[indices], updates.ranks[indices])
        rows = down.rows.to(torch.float64), up.rows.to(torch.float64)
        squared_errors[indices] = _squared_error(updates.select(indices), right @ rows[0], left.mT @ rows[1])
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
    rights = torch.cat([updates.v.to(left.dtype), right], dim=1)
    return ((lefts @ lefts.mT) * (rights @ rights.mT)).sum((1, 2)).clamp_min(0)
