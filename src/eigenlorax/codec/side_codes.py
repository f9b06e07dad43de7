"""Singular vectors of one side as integers: coefficients in a quantised basis, and residuals beside them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import dead_zone
from .dead_zone import BITS_PER_SQUARED_ERROR
from .logistic import classes_of_spread, code_bits, row_bits
from .quantised_basis import BasisRows

MEAN_TO_SPREAD = math.sqrt(math.pi / 2)
"""Standard deviation of Gaussian numbers, by their mean absolute value."""
LOWER_CLASSES = (0, 3)
"""Distances below the class of the spread that are tried."""


@dataclass(frozen=True, slots=True)
class BatchSideCodes:
    """One side of the singular components of several updates. A level is a class plus 1, or 0 if all codes are 0.

    Codes are integers in the floating-point dtype that they are computed with.

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
        return self.coefficients.to(torch.float64) @ basis.to(torch.float64) + self.residuals

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
class EncodedSide:
    """Encoded vectors of one side, with what they cost.

    Attributes:
        codes: Codes of the vectors.
        bits: Bits of each vector in a file, estimated.
        differences: What the codes lack of the vectors, in step sizes.
        squared_errors: Squared norm of each difference.
    """

    codes: BatchSideCodes
    bits: Float[Tensor, "n r"]
    differences: Float[Tensor, "n r d"]
    squared_errors: Float[Tensor, "n r"]


def encode_side(rows: Float[Tensor, "n r d"], coordinates: Float[Tensor, "n r k"], basis: BasisRows) -> EncodedSide:
    """Encode vectors.

    Args:
        rows: The vectors, in step sizes.
        coordinates: Their least-squares coordinates in the basis.
        basis: The basis, possibly without a row.
    """
    n, r, d = rows.shape
    coefficients = coordinates
    levels, bits = torch.zeros(n, r, dtype=torch.int64), torch.zeros(n, r, dtype=torch.float64)
    residual = rows
    if basis.k:
        codes = dead_zone.quantise(coordinates)
        profile = torch.from_numpy(basis.profile)
        # divided by its profile, every coefficient of a vector has about the same spread
        spread = (coordinates * torch.exp2(-profile / 4.0).to(rows.dtype)).abs_().sum(-1) / basis.k
        levels, bits = _cheapest_levels(codes.abs(), spread, profile)
        gain = BITS_PER_SQUARED_ERROR * (_squares(coordinates) - _squares(coordinates - codes))
        pays = gain > bits
        coefficients = torch.where(pays[..., None], codes, 0.0)
        levels, bits = torch.where(pays, levels, 0), torch.where(pays, bits, 0.0)
        # of the rounded coefficients: the residual also corrects their rounding errors
        residual = torch.addmm(rows.flatten(0, 1), coefficients.flatten(0, 1), basis.rows, alpha=-1).reshape(n, r, d)
    magnitudes = residual.abs()
    spread = magnitudes.sum(-1) / d
    magnitudes = dead_zone.quantise_magnitudes(magnitudes)
    residual_levels, residual_bits = _cheapest_levels(magnitudes, spread, torch.zeros(d, dtype=torch.int64))
    codes = magnitudes.copysign_(residual)
    differences = residual - codes
    square, error = _squares(residual), _squares(differences)
    pays = BITS_PER_SQUARED_ERROR * (square - error) > residual_bits
    if not pays.all():
        codes.mul_(pays[..., None])
        differences = torch.sub(residual, codes, out=differences)
    side = BatchSideCodes(coefficients, levels, codes, torch.where(pays, residual_levels, 0))
    return EncodedSide(
        side, bits + torch.where(pays, residual_bits, 0.0), differences, torch.where(pays, error, square)
    )


def _squares(rows: Tensor) -> Tensor:
    """Return the squared norms of vectors, (…, d), in one pass, float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.to(torch.float64).square()


def _cheapest_levels(magnitudes: Tensor, mean: Tensor, profile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cheapest level of each vector, of a few that are tried, and its bits.

    Args:
        magnitudes: Absolute integers, (…, d).
        mean: Mean absolute value of each vector before rounding, scaled to one spread throughout the vector, (…,).
        profile: Classes that are added to the level for each number, (d,).
    """
    # the mean absolute value depends less on a few large numbers than the mean square; lower classes are tried
    # for vectors that are nearly zero apart from a few numbers
    first = classes_of_spread(mean.to(torch.float64) * MEAN_TO_SPREAD)
    candidates = torch.stack([(first - lower).clamp_min(0) for lower in LOWER_CLASSES])
    if profile.any():
        profiles = [(classes[..., None] + profile).clamp_min(0) for classes in candidates]
        bits = torch.stack([code_bits(magnitudes, classes).sum(-1) for classes in profiles])
    else:
        bits = row_bits(magnitudes, candidates)
    least, best = bits.min(0)
    return candidates.gather(0, best[None])[0] + 1, least
