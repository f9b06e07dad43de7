"""An orthonormal basis of rows: fit, augment, extend, project, reconstruct.

A basis knows nothing of LoRA. `subspace` holds the pair of bases of each module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OptionError, ShapeError
from . import linalg
from .fit_options import check_size


@dataclass(frozen=True, slots=True)
class Growth:
    """Rows that were appended to a basis after its fit, in one step.

    Attributes:
        n: Number of rows.
        seed: Seed that rebuilds the rows of an augmentation; None for an extension, whose rows are stored.
        payload: Tensors that a file stores in place of the rows; see `Basis`.
    """

    n: int
    seed: int | None
    payload: Mapping[str, Tensor] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal rows, in the dtype that they are stored in.

    The fitted rows come first, in descending order of the singular values, then the rows of each growth step.

    Attributes:
        components: All rows.
        singular_values: Singular values of the stack that was fitted, descending, float32. An exact fit lists all of
            them, beyond k; an iterative fit lists those that it found.
        energy: Fraction of the stack's squared norm in the span of the fitted rows, 0 to 1.
        growth: Rows that were appended after the fit, in order.
        shortfall: Fraction of the stack's squared norm that the first search of an iterative fit is estimated to have
            missed; 0 for an exact fit.
        tail: Squared norm of the stack beyond the listed singular values.
        payload: Tensors that a file stores in place of the fitted rows, such as integers and their scales
            (`codec.storage`); None where the rows are stored as they are.
    """

    components: Float[Tensor, "k d"]
    singular_values: Float[Tensor, " n"]
    energy: float
    # defaults of an exact fit that has not grown
    growth: tuple[Growth, ...] = ()
    shortfall: float = 0.0
    tail: float = 0.0
    payload: Mapping[str, Tensor] | None = None

    @property
    def k(self) -> int:
        """Number of rows."""
        return self.components.shape[0]

    @property
    def dimension(self) -> int:
        """Width of the rows."""
        return self.components.shape[1]

    @property
    def n_extra(self) -> int:
        """Number of augmented rows, which a seed rebuilds."""
        return sum(step.n for step in self.growth if step.seed is not None)

    @property
    def n_extended(self) -> int:
        """Number of rows that were appended for adapters that came after the fit."""
        return sum(step.n for step in self.growth if step.seed is None)

    @property
    def n_fitted(self) -> int:
        """Number of rows that the fit found."""
        return self.k - sum(step.n for step in self.growth)

    @property
    def fitted(self) -> Float[Tensor, "j d"]:
        """The rows that the fit found."""
        return self.components[: self.n_fitted]

    @property
    def stored(self) -> Float[Tensor, "j d"]:
        """The rows that no seed rebuilds, fitted and extended, in order."""
        return self._concatenate(self.fitted, is_augmented=False)

    @property
    def augmented(self) -> Float[Tensor, "j d"]:
        """The rows that seeds rebuild, in order."""
        return self._concatenate(self.components[:0], is_augmented=True)

    @property
    def square(self) -> float:
        """Squared norm of the stack that was fitted."""
        return float(self.singular_values.double().square().sum()) + self.tail

    @property
    def row_bytes(self) -> int:
        """Tensor bytes of the stored rows in the file."""
        if self.payload is None:
            return (self.k - self.n_extra) * self.dimension * self.components.element_size()
        payloads = [self.payload, *(step.payload for step in self.growth if step.payload is not None)]
        return sum(tensor.nbytes for payload in payloads for tensor in payload.values())

    def grown(self, step: int) -> Float[Tensor, "j d"]:
        """Return the rows of growth step number `step`."""
        start = self.k - sum(later.n for later in self.growth[step:])
        return self.components[start : start + self.growth[step].n]

    def before(self, step: int) -> "Basis":
        """Return the basis as it was before growth step number `step`; its rows are a view of these."""
        k = self.k - sum(later.n for later in self.growth[step:])
        return replace(self, components=self.components[:k], growth=self.growth[:step])

    def _concatenate(self, fitted: Tensor, *, is_augmented: bool) -> Float[Tensor, "j d"]:
        """Return `fitted`, then the rows of all augmentations or of all extensions."""
        if not self.growth:
            return fitted
        steps = [
            self.grown(step) for step, growth in enumerate(self.growth) if (growth.seed is not None) == is_augmented
        ]
        return torch.cat([fitted, *steps])


def component_rule(n_components: int | None, energy: float | None) -> Callable[[Tensor, tuple[int, int]], int]:
    """Return the rule that determines a number of components from a spectrum (`linalg.RowBlocks.leading`).

    The rule never gives more than the numerical rank.

    Args:
        n_components: Maximum number of components.
        energy: Fraction of squared norm, reached with as few components as possible. Exactly one of the two is given.
    """
    check_size(n_components, energy)
    fraction = 1.0 if energy is None else energy

    def rule(singular_values: Tensor, shape: tuple[int, int]) -> int:
        rank = linalg.numerical_rank(singular_values, shape)
        if n_components is not None:
            return min(n_components, rank)
        cumulated = singular_values[:rank].square().cumsum(0)
        # relative to the last sum, not to 1, so that energy=1.0 is reached in spite of rounding
        return min(int((cumulated < fraction * cumulated[-1]).sum()) + 1, rank)

    return rule


def fit(
    rows: Float[Tensor, "n d"],
    *,
    n_components: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> Basis:
    """Fit a basis: the leading right singular vectors of the rows, uncentred (arXiv 2502.04700, §3).

    docs/method.md says why the rows are not centred. All arithmetic is float64.

    Args:
        rows: Rows to fit, not all of them zero.
        n_components: Maximum number of components.
        energy: Fraction of squared norm to reach, above 0 and at most 1. Exactly one of the two is given.
        dtype: Dtype of the stored components. Default: the dtype of the rows.

    Raises:
        OptionError: All rows are zero, or not exactly one of `n_components` and `energy` is given.
    """
    if not bool(rows.any()):
        raise OptionError(
            f"every row of the {tuple(rows.shape)} matrix is zero, so no component can be fitted. Exclude it."
        )
    # one block, so that its weight is the only one
    identity = torch.eye(rows.shape[0], dtype=torch.float64)
    leading = linalg.RowBlocks.stack([rows]).leading([identity], component_rule(n_components, energy))
    total = leading.singular_values.square().sum()
    return Basis(
        components=leading.components().to(dtype or rows.dtype),
        singular_values=leading.singular_values.float(),
        energy=float(leading.projection.square().sum() / total),
    )


def augment(basis: Basis, n_extra: int, seed: int, label: str) -> Basis:
    """Append random orthonormal rows that are orthogonal to the others (arXiv 2502.04700, §3.3: pseudo-components).

    The rows are a function of the present components, the seed and the label alone. Machines may differ in the last
    bits, which `augmentation_checksums` detects.

    Args:
        basis: The basis, which stays as it is.
        n_extra: Number of rows to append, at least 1.
        seed: Seed of the rows.
        label: Name of the matrix. It enters the random numbers, so that one seed gives each matrix its own rows.

    Raises:
        OptionError: `n_extra` is below 1.
        ShapeError: There would be more rows than dimensions.
    """
    if n_extra < 1:
        raise OptionError(f"n_extra must be at least 1, got {n_extra}.")
    if basis.k + n_extra > basis.dimension:
        raise ShapeError(
            f"{label}: {basis.k} components and {n_extra} extra components exceed its {basis.dimension} dimensions; "
            f"n_extra can be at most {basis.dimension - basis.k}."
        )
    # Gaussian rows, so that every direction outside the present rows is equally likely
    rows = torch.from_numpy(seeded_normal_rows(n_extra, basis.dimension, seed, label))
    extra = linalg.orthogonal_complement_rows(rows, basis.components.to(torch.float64))
    return replace(
        basis,
        components=torch.cat([basis.components, extra.to(basis.components.dtype)]),
        growth=(*basis.growth, Growth(n_extra, seed)),
    )


def random(k: int, dimension: int, seed: int, label: str, dtype: torch.dtype) -> Basis:
    """Return a basis of random orthonormal rows, whose span is uniformly distributed.

    The rows are a function of the arguments alone. They differ from those that `augment` appends for the same seed and
    label, so that a random basis can be augmented with any seed. There is no stack that was fitted: the singular values
    are those of the rows themselves.

    Args:
        k: Number of rows, 0 to `dimension`.
        dimension: Width of the rows.
        seed: Seed of the rows.
        label: Name of the matrix. It enters the random numbers, so that one seed gives each matrix its own rows.
        dtype: Dtype of the stored components.
    """
    rows = torch.from_numpy(seeded_normal_rows(k, dimension, seed, f"random\0{label}"))
    components = linalg.orthonormal_rows(rows) if k else rows
    return Basis(components.to(dtype), torch.ones(k), energy=1.0)


def extend(basis: Basis, rows: Float[Tensor, "m d"], payload: Mapping[str, Tensor] | None = None) -> Basis:
    """Append rows that will be stored, converted to the basis's dtype.

    Args:
        basis: The basis, which stays as it is.
        rows: Orthonormal rows, orthogonal to those of the basis.
        payload: Tensors that a file stores in their place, if the basis has such a payload.
    """
    return replace(
        basis,
        components=torch.cat([basis.components, rows.to(basis.components.dtype)]),
        growth=(*basis.growth, Growth(rows.shape[0], None, payload)),
    )


def seeded_normal_rows(n: int, dimension: int, seed: int, label: str) -> np.ndarray:
    """Return standard normal numbers, (n, dimension) float64, that depend on seed and label alone.

    NumPy guarantees Philox's raw stream across releases, but not its normal distribution; so the Box–Muller transform
    is computed here.
    """
    # 128 bits, the size of a Philox key; little-endian, so that all machines read the same two words
    key = np.frombuffer(sha256(f"{seed}\0{label}".encode()).digest()[:16], dtype="<u8")
    stream, rows = np.random.Philox(key=key), np.empty((n, dimension))
    # about a million numbers at a time: each takes some fifty bytes of temporary arrays
    rows_per_chunk = max(1, (1 << 20) // dimension)
    for start in range(0, n, rows_per_chunk):
        chunk = rows[start : start + rows_per_chunk]
        # 53 bits and a half: uniform in the open interval (0, 1), so that the logarithm is finite
        uniform = ((stream.random_raw(2 * chunk.size) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        # Box–Muller gives two normal numbers per pair; only the cosine is used, and packs depend on that by now
        radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
        chunk[:] = (radius * np.cos(angle)).reshape(chunk.shape)
    return rows


def augmentation_checksums(basis: Basis) -> Float[Tensor, " n_extra"]:
    """Return the sum of each augmented row, float32, by which a reader verifies the rows that it has rebuilt."""
    # float32 drops the last bits, in which machines may differ
    return basis.augmented.to(torch.float64).sum(dim=1).float()


def dual_components(basis: Basis) -> Float[Tensor, "k d"]:
    """Return the rows that `project` multiplies by, float64.

    They are the components, corrected for the rounding to the stored dtype (`linalg.dual_rows`).
    """
    return linalg.dual_rows(basis.components.to(torch.float64))


def project(
    rows: Float[Tensor, "n d"], basis: Basis, dual_rows: Float[Tensor, "k d"] | None = None
) -> Float[Tensor, "n k"]:
    """Return the least-squares coefficients of each row in the basis as it is stored, float64.

    Args:
        rows: Rows of the basis's width.
        basis: The basis.
        dual_rows: `dual_components(basis)`. Pass it where many calls share one basis.
    """
    check_width(rows.shape[1], basis)
    return rows.to(torch.float64) @ (dual_components(basis) if dual_rows is None else dual_rows).mT


def check_width(width: int, basis: Basis) -> None:
    """Raise `ShapeError` unless rows of this width can be projected on the basis."""
    if width != basis.dimension:
        raise ShapeError(f"rows of width {width} cannot be projected on a basis of width {basis.dimension}.")


def reconstruct(coefficients: Float[Tensor, "n j"], basis: Basis) -> Float[Tensor, "n d"]:
    """Return the rows that the coefficients represent, float64.

    Fewer coefficients than components stem from an earlier state of the basis. They are multiplied by the components
    of that state alone, so that the result is bit for bit what it was then.
    """
    width = coefficients.shape[1]
    if width > basis.k:
        raise ShapeError(f"{width} coefficients per row exceed the {basis.k} components of the basis.")
    return coefficients.to(torch.float64) @ basis.components[:width].to(torch.float64)
