"""One matrix of rows: fit an orthonormal basis, augment it, project on it, reconstruct from it.

Nothing here knows what a LoRA is. The pair of coupled bases of a LoRA module is in `subspace`.
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


@dataclass(frozen=True, slots=True)
class Growth:
    """Rows that were appended to a basis after its fit. seed: what rebuilds them; None where they are stored.

    payload: as for `Basis`, of these rows.
    """

    n: int
    seed: int | None
    payload: Mapping[str, Tensor] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal rows, in the dtype they are stored in: those that were fitted, the best-fitting direction first, then
    those of each growth.

    singular_values: those of the stack the basis was fitted on, descending, float32: all of them, which go on beyond k,
        or those that an iterative fit has found.
    energy: the share of the stack's squared norm that lies in the span of the fitted rows, 0 to 1.
    growth: what was appended since, in order.
    shortfall: the share of the stack's squared norm that the search for the first rows, before sweeps, is estimated to
        have missed; 0 where the fit is exact.
    tail: the stack's squared norm beyond the singular values that are listed.
    payload: what lies in the file in the place of the fitted rows, by name, where that is not the rows themselves
        (`codec.storage`).
    """

    components: Float[Tensor, "k d"]
    singular_values: Float[Tensor, " n"]
    energy: float
    growth: tuple[Growth, ...] = ()
    shortfall: float = 0.0
    tail: float = 0.0
    payload: Mapping[str, Tensor] | None = None

    @property
    def k(self) -> int:
        return self.components.shape[0]

    @property
    def dimension(self) -> int:
        return self.components.shape[1]

    @property
    def n_extra(self) -> int:
        """How many rows are augmented directions, rebuilt from a seed."""
        return sum(one.n for one in self.growth if one.seed is not None)

    @property
    def n_extended(self) -> int:
        """How many rows are directions of adapters that came after the fit."""
        return sum(one.n for one in self.growth if one.seed is None)

    @property
    def n_fitted(self) -> int:
        """How many rows the fit has found, which are the first ones."""
        return self.k - sum(one.n for one in self.growth)

    @property
    def fitted(self) -> Float[Tensor, "j d"]:
        """The components that were fitted."""
        return self.components[: self.n_fitted]

    @property
    def stored(self) -> Float[Tensor, "j d"]:
        """The components that no seed rebuilds, in order."""
        return self._rows(stored=True)

    @property
    def augmented(self) -> Float[Tensor, "j d"]:
        """The components that are rebuilt from seeds, in order."""
        return self._rows(stored=False)

    @property
    def square(self) -> float:
        """The squared norm of the stack the basis was fitted on."""
        return float(self.singular_values.double().square().sum()) + self.tail

    @property
    def row_bytes(self) -> int:
        """Tensor bytes of the stored rows, as they lie in the file."""
        if self.payload is None:
            return (self.k - self.n_extra) * self.dimension * self.components.element_size()
        payloads = [self.payload, *(one.payload for one in self.growth if one.payload is not None)]
        return sum(tensor.nbytes for payload in payloads for tensor in payload.values())

    def grown(self, step: int) -> Float[Tensor, "j d"]:
        """The rows that one growth has appended."""
        start = self.k - sum(one.n for one in self.growth[step:])
        return self.components[start : start + self.growth[step].n]

    def before(self, step: int) -> "Basis":
        """The basis as it was before that growth; its rows are a view of these."""
        kept = self.k - sum(one.n for one in self.growth[step:])
        return replace(self, components=self.components[:kept], growth=self.growth[:step])

    def _rows(self, *, stored: bool) -> Float[Tensor, "j d"]:
        if not self.growth:
            return self.components if stored else self.components[:0]
        found = [self.grown(step) for step, one in enumerate(self.growth) if (one.seed is None) == stored]
        return torch.cat([self.fitted if stored else self.components[:0], *found])


def component_rule(n_components: int | None, energy: float | None) -> Callable[[Tensor, tuple[int, int]], int]:
    """The rule that turns a spectrum into a number of components (`linalg.RowStack.leading`).

    Either at most `n_components`, or the smallest number whose squared singular values reach `energy` of the total;
    never more than the numerical rank.
    """
    check_size(n_components, energy)
    share = 1.0 if energy is None else energy

    def choose(singular_values: Tensor, shape: tuple[int, int]) -> int:
        rank = linalg.numerical_rank(singular_values, shape)
        if n_components is not None:
            return min(n_components, rank)
        kept = singular_values[:rank].square().cumsum(0)
        # relative to the last sum, not to 1, so that energy=1.0 is reached in spite of rounding
        return min(int((kept < share * kept[-1]).sum()) + 1, rank)

    return choose


def check_size(n_components: int | None, energy: float | None) -> None:
    """`OptionError` unless exactly one of the two is given and in its range."""
    if (n_components is None) == (energy is None):
        raise OptionError(
            f"give either n_components or energy, not both or neither: got {n_components=}, {energy=}. "
            "For example n_components=32, or energy=0.9."
        )
    if n_components is not None and n_components < 1:
        raise OptionError(f"n_components must be at least 1, got {n_components}.")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy is a fraction of squared norm, above 0 and at most 1, got {energy}.")


def fit(
    rows: Float[Tensor, "n d"],
    *,
    n_components: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> Basis:
    """Leading right singular vectors of the rows, uncentred (arXiv 2502.04700 §3; why not centred: docs/method.md).

    dtype: the one the components are stored in; the rows' own where it is not given. All arithmetic is float64.
    """
    if not bool(rows.any()):
        raise OptionError(f"every row is zero: a {tuple(rows.shape)} matrix without a direction cannot be fitted.")
    identity = torch.eye(rows.shape[0], dtype=torch.float64)
    leading = linalg.RowBlocks([rows]).leading([identity], component_rule(n_components, energy))
    total = leading.singular_values.square().sum()
    return Basis(
        components=leading.components().to(dtype or rows.dtype),
        singular_values=leading.singular_values.float(),
        energy=float(leading.projection.square().sum() / total),
    )


def augment(basis: Basis, n_extra: int, seed: int, label: str) -> Basis:
    """`n_extra` further orthonormal rows from `seed`, orthogonal to those that are there (§3.3, pseudo-components).

    label: names the matrix, so that one seed gives every matrix rows of its own. The rows are a function of the stored
    components, the seed and the label alone; another machine may differ in the last bits (`extra_check` tells).
    """
    if n_extra < 1:
        raise OptionError(f"n_extra must be at least 1, got {n_extra}.")
    if basis.k + n_extra > basis.dimension:
        raise ShapeError(
            f"{label}: {basis.k} components and {n_extra} extra ones are more than its {basis.dimension} dimensions; "
            f"at most n_extra={basis.dimension - basis.k} fits."
        )
    rows = torch.from_numpy(seeded_normal_rows(n_extra, basis.dimension, seed, label))
    extra = linalg.orthogonal_complement_rows(rows, basis.components.to(torch.float64))
    return replace(
        basis,
        components=torch.cat([basis.components, extra.to(basis.components.dtype)]),
        growth=(*basis.growth, Growth(n_extra, seed)),
    )


def extend(basis: Basis, rows: Float[Tensor, "m d"], payload: Mapping[str, Tensor] | None = None) -> Basis:
    """The basis with further rows, which are orthonormal, and orthogonal to those that are there; in its own dtype.

    payload: of these rows, where the basis has one.
    """
    return replace(
        basis,
        components=torch.cat([basis.components, rows.to(basis.components.dtype)]),
        growth=(*basis.growth, Growth(rows.shape[0], None, payload)),
    )


def seeded_normal_rows(n: int, dimension: int, seed: int, label: str) -> np.ndarray:
    """Standard normal numbers, (n, dimension) float64, that depend on seed and label alone.

    Philox's raw stream is fixed across NumPy releases, its normal distribution is not; hence Box–Muller here.
    """
    key = np.frombuffer(sha256(f"{seed}\0{label}".encode()).digest()[:16], dtype="<u8")
    stream, found = np.random.Philox(key=key), np.empty((n, dimension))
    # in parts of about a million numbers, each of which takes some fifty bytes on its way
    most = max(1, (1 << 20) // dimension)
    for start in range(0, n, most):
        part = found[start : start + most]
        uniform = ((stream.random_raw(2 * part.size) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
        part[:] = (radius * np.cos(angle)).reshape(part.shape)
    return found


def augmentation_checksums(basis: Basis) -> Float[Tensor, " n_extra"]:
    """One number for each augmented row, float32: what a machine compares after it has rebuilt them."""
    return basis.augmented.to(torch.float64).sum(dim=1).float()


def dual_components(basis: Basis) -> Float[Tensor, "k d"]:
    """The float64 rows that `project` multiplies with: the components but for the rounding of their stored dtype."""
    return linalg.dual_rows(basis.components.to(torch.float64))


def project(
    rows: Float[Tensor, "n d"], basis: Basis, dual_rows: Float[Tensor, "k d"] | None = None
) -> Float[Tensor, "n k"]:
    """Least-squares coefficients of each row in the basis as it is stored, float64.

    dual_rows: `dual(basis)`, where many calls share one basis.
    """
    check_width(rows.shape[1], basis)
    return rows.to(torch.float64) @ (dual_components(basis) if dual_rows is None else dual_rows).mT


def check_width(width: int, basis: Basis) -> None:
    """`ShapeError` unless rows so wide can be projected on the basis."""
    if width != basis.dimension:
        raise ShapeError(f"rows of width {width} cannot be projected on a basis of width {basis.dimension}.")


def reconstruct(coefficients: Float[Tensor, "n j"], basis: Basis) -> Float[Tensor, "n d"]:
    """The rows that the coefficients stand for, float64. Those of a time when the basis had fewer rows are zero on the
    later ones, and give what they gave then, to the bit."""
    width = coefficients.shape[1]
    if width > basis.k:
        raise ShapeError(f"{width} coefficients a row do not fit a basis of {basis.k} components.")
    return coefficients.to(torch.float64) @ basis.components[:width].to(torch.float64)
