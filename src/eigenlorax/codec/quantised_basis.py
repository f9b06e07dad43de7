"""A basis as integers, with a quantisation step size for each row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core import linalg
from .class_tables import CLASSES
from .logistic import row_bits
from .narrow_integers import narrow

HEADER_BITS = 16
"""Bits of a row beside its codes: its fineness and its profile."""
# 2^0, 2^¼, 2^½ and 2^¾, each the nearest float64
_QUARTER_OCTAVES = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])


@dataclass(frozen=True, slots=True)
class BasisRows:
    """A basis as numbers, for many updates that are encoded with it.

    Attributes:
        rows: The rows of `QuantisedBasis`, in the dtype of the updates.
        gram: Inner products of the rows, float64.
        inverse_gram: Inverse of `gram`, or its pseudoinverse where rows are linearly dependent.
        profile: As in `QuantisedBasis`.
    """

    rows: Float[Tensor, "k d"]
    gram: Float[Tensor, "k k"]
    inverse_gram: Float[Tensor, "k k"]
    profile: Int[np.ndarray, " k"]

    @classmethod
    def of(cls, rows: Float[Tensor, "k d"], profile: Int[np.ndarray, " k"]) -> "BasisRows":
        """Return the basis of these rows."""
        gram = (rows @ rows.mT).to(torch.float64)
        return cls(rows, gram, linalg.symmetric_inverse(gram), profile)

    @property
    def k(self) -> int:
        return len(self.rows)

    def coordinates(self, vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Return the least-squares coordinates of vectors: quantised rows are not orthonormal."""
        return (vectors @ self.rows.mT) @ self.inverse_gram.to(vectors.dtype)

    def leading(self, count: int) -> "BasisRows":
        """Return the first rows."""
        if count == self.k:
            return self
        gram = self.gram[:count, :count]
        return BasisRows(self.rows[:count], gram, linalg.symmetric_inverse(gram), self.profile[:count])


@dataclass(frozen=True, slots=True)
class QuantisedBasis:
    """Rows of a basis as integers: row a is codes[a] · 2^(−fineness[a] / 4).

    Attributes:
        codes: Integers of the rows.
        fineness: Step size of each row, in quarters of an octave below 1.
        profile: Number of classes, 0 or less, by which coefficients on each row are smaller than on the row where they
            are largest.
        blocks: Number of rows of each cluster; empty if there is one. The rows of one cluster are nearly orthonormal.
    """

    codes: Int[Tensor, "k d"]
    fineness: Int[np.ndarray, " k"]
    profile: Int[np.ndarray, " k"]
    blocks: tuple[int, ...] = ()

    @classmethod
    def empty(cls, dimension: int) -> "QuantisedBasis":
        """Return a basis without a row."""
        no_integers = np.zeros(0, dtype=np.int64)
        return cls(torch.zeros(0, dimension, dtype=torch.int64), no_integers, no_integers)

    @classmethod
    def concatenate(cls, blocks: Sequence["QuantisedBasis"]) -> "QuantisedBasis":
        """Join the bases of several clusters, one after the other."""
        if len(blocks) == 1:
            # a single cluster is not marked as such
            return blocks[0]
        return cls(
            torch.cat([block.codes for block in blocks]),
            np.concatenate([block.fineness for block in blocks]),
            np.concatenate([block.profile for block in blocks]),
            tuple(block.k for block in blocks),
        )

    @property
    def k(self) -> int:
        return len(self.fineness)

    @property
    def dimension(self) -> int:
        return self.codes.shape[1]

    def span(self, cluster: int) -> slice:
        """Return which rows are those of a cluster."""
        if not self.blocks:
            return slice(0, self.k)
        start = sum(self.blocks[:cluster])
        return slice(start, start + self.blocks[cluster])

    def block(self, cluster: int) -> "QuantisedBasis":
        """Return the basis of one cluster by itself."""
        rows = self.span(cluster)
        return QuantisedBasis(self.codes[rows], self.fineness[rows], self.profile[rows])

    @property
    def rows(self) -> Float[Tensor, "k d"]:
        """The rows in float32, as a reader of the codes computes them."""
        return (self.codes.to(torch.float64) * self._step_sizes).to(torch.float32)

    @property
    def _step_sizes(self) -> Float[Tensor, "k 1"]:
        # the pack's fingerprint is of these rows, and a power function may be off in the last bit on some machines
        return torch.from_numpy(np.ldexp(_QUARTER_OCTAVES[-self.fineness % 4], -self.fineness // 4))[:, None]

    def numbers(self, dtype: torch.dtype = torch.float64) -> BasisRows:
        """Return the basis as numbers, for updates of this dtype. Products in float32 may be off in the last bit."""
        if dtype == torch.float32:
            return BasisRows.of(self.codes.to(dtype).mul_(self._step_sizes.to(dtype)), self.profile)
        return BasisRows.of(self.rows.to(dtype), self.profile)

    def leading(self, count: int) -> "QuantisedBasis":
        """Return the first rows, in integers of the narrowest dtype that holds them."""
        codes = self.codes[:count].numpy()
        return QuantisedBasis(torch.from_numpy(narrow(codes)), self.fineness[:count], self.profile[:count])

    def row_bits(self) -> Float[Tensor, " k"]:
        """Return about how many bits each row takes in a file."""
        classes = torch.from_numpy(row_classes(self.fineness, self.dimension))
        return row_bits(self.codes.to(torch.float64).abs(), classes[None])[0] + HEADER_BITS

    def bits(self) -> float:
        """Return about how many bits the basis takes in a file."""
        return float(self.row_bits().sum())


def row_classes(fineness: np.ndarray, dimension: int) -> np.ndarray:
    """Return the class of the codes of each row, from its step size and the spread of numbers in a unit row."""
    # a number of a unit row has the standard deviation d^(−½)
    unit_class = round(16 + 4 * math.log2(math.sqrt(3) / math.pi) - 2 * math.log2(dimension))
    classes: np.ndarray = np.clip(fineness + unit_class, 0, CLASSES - 1)
    return classes


def quantise_basis(
    rows: Float[Tensor, "k d"], importance: Float[Tensor, " k"], energy: Float[Tensor, " k"]
) -> QuantisedBasis:
    """Quantise orthonormal rows, each with a step size that is the inverse of its importance.

    An error in a row is an error of every update, in proportion to the coefficients on that row. With these step sizes,
    a code of a basis costs as much squared error as a code of an adapter.

    Args:
        rows: Orthonormal rows.
        importance: Norm of all adapters' coefficients on each row, in units of their step sizes.
        energy: Mean square of the coefficients on each row, up to a common factor.

    Returns:
        The basis, without rows all of whose codes would be 0.
    """
    survives = surviving_rows(importance, rows.shape[1])
    rows, importance, energy = rows[survives], importance[survives], energy[survives]
    # a quarter of an octave is fine enough: the cost is flat around the best step size
    fineness = (4 * importance.clamp_min(1).log2()).round().to(torch.int64).clamp(0, 255).numpy()
    step_sizes = torch.from_numpy(2.0 ** (fineness / 4.0))[:, None]
    # 4 classes an octave of amplitude are 2 an octave of energy
    profile = 2 * (energy / energy.max().clamp_min(1e-300)).clamp_min(2.0**-60).log2() if len(energy) else energy
    codes = (rows * step_sizes.to(rows.dtype)).round_()
    return QuantisedBasis(codes.to(torch.int64), fineness, profile.round().to(torch.int64).clamp(-120, 0).numpy())


def surviving_rows(importance: Float[Tensor, " k"], dimension: int) -> Bool[Tensor, " k"]:
    """Return which rows of a basis have codes that are not all 0."""
    # a number of a unit row is about d^(−½): below 0.4 of a step size, nearly all of them round to 0
    survives: Tensor = importance > 0.4 * dimension**0.5
    return survives
