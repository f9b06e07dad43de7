"""One adapter as integers, as its bytes have it, and the coefficients that the integers stand for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.coefficients import Coefficients
from . import singular_codes
from .quantised_basis import QuantisedBasis

NO_INTEGERS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class SideCodes:
    """Singular components of one update on one side, as integers of the narrowest dtype.

    Attributes:
        coefficient_levels: Levels as in `singular_codes.BatchSideCodes`, (r,).
        coefficients: Codes (rows, k) of the components that have a coefficient level, in order.
        residual_levels: Levels of the residuals, (r,).
        residuals: Codes (rows, d) of the components that have a residual level, in order.
    """

    coefficient_levels: np.ndarray
    coefficients: np.ndarray
    residual_levels: np.ndarray
    residuals: np.ndarray

    @property
    def has_residual(self) -> bool:
        return bool((self.residual_levels > 0).any())


@dataclass(frozen=True, slots=True)
class ModuleCodes:
    """One update as integers.

    Attributes:
        scales: Scales of its singular components, (r,), as in `singular_codes.UpdateCodes`.
        down: Codes of the components on the down side.
        up: Codes of the components on the up side.
        core_level: Level of the core, or 0 if the update is written as components.
        core: Codes of the core, (k_up, k_down); empty if `core_level` is 0.
    """

    scales: np.ndarray
    down: SideCodes
    up: SideCodes
    core_level: int
    core: np.ndarray

    @property
    def count(self) -> int:
        """The number of singular components."""
        return len(self.scales)


_NO_SIDE = SideCodes(NO_INTEGERS, NO_INTEGERS, NO_INTEGERS, NO_INTEGERS)
UNTRAINED = ModuleCodes(NO_INTEGERS, _NO_SIDE, _NO_SIDE, 0, NO_INTEGERS)
"""The codes of an update that is 0."""


@dataclass(frozen=True, slots=True)
class AdapterCodes:
    """One adapter as integers.

    Attributes:
        step_size: Quantisation step size of the adapter, absolute.
        cluster: Cluster whose bases the adapter uses.
        modules: Codes of its updates, by the modules' names in the subspace.
    """

    step_size: float
    cluster: int
    modules: Mapping[str, ModuleCodes]

    @property
    def n_integers(self) -> int:
        """Number of coefficients, residuals and core entries."""
        sides = [side for module in self.modules.values() for side in (module.down, module.up)]
        cores = sum(module.core.size for module in self.modules.values())
        return cores + sum(side.coefficients.size + side.residuals.size for side in sides)


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """Sizes and profiles of a module's bases, with which the codes of an adapter in one cluster are read.

    Attributes:
        profiles: `QuantisedBasis.profile` of the cluster's bases, (down, up).
        shape: Shape of the update, (out, in).
        widths: Numbers of rows, (down, up), of the bases of all clusters together.
        offsets: First rows, (down, up), of this cluster's bases among those of all clusters.
    """

    profiles: tuple[np.ndarray, np.ndarray]
    shape: tuple[int, int]
    widths: tuple[int, int]
    offsets: tuple[int, int]

    @classmethod
    def of(cls, bases: tuple[QuantisedBasis, QuantisedBasis], cluster: int) -> "ModuleLayout":
        """Return the layout of a cluster, from the bases (down, up) of all clusters."""
        down, up = bases
        return cls(
            (down.block(cluster).profile, up.block(cluster).profile),
            (up.dimension, down.dimension),
            (down.k, up.k),
            (down.span(cluster).start, up.span(cluster).start),
        )

    def dimension(self, side: int) -> int:
        """Return the width of rows on the down side (0) or the up side (1)."""
        return self.shape[1 - side]


def dequantise_module(
    codes: ModuleCodes,
    step_size: float,
    layout: ModuleLayout,
    *,
    rank: int,
    scaling: float,
    kernel: tuple[int, ...] = (),
) -> Coefficients:
    """Return the coefficients and residuals that codes stand for, float32.

    Args:
        codes: Codes of one update.
        step_size: Quantisation step size of the adapter.
        layout: Layout of the module for the adapter's cluster.
        rank: Rank of the adapter's factors; rows of zeros fill the coefficients up to it.
        scaling: Scaling of the adapter, by which the up side is divided.
        kernel: (height, width) of a convolution.
    """
    # encoded updates contain the scaling; an adapter whose scaling is 0 has the update 0, whatever it is divided by
    up_divisor = scaling or 1.0
    if codes.core_level:
        # the factors of a core are its truncated SVD, which the encoder has measured its error with
        core = torch.from_numpy(codes.core.astype(np.float64))[None]
        step_sizes = torch.tensor([step_size], dtype=torch.float64)
        left, right = singular_codes.core_factors(core, step_sizes, torch.tensor([rank]))
        down = _in_all_clusters(right[0], rank, layout.widths[0], layout.offsets[0])
        up = _in_all_clusters(left[0].mT / up_divisor, rank, layout.widths[1], layout.offsets[1])
        return Coefficients(down, up.mT.contiguous(), scaling, kernel)
    # half of a component's weight on each side keeps the factors of an adapter at about the same norm
    weight = np.sqrt(step_size * 2.0 ** (-codes.scales / singular_codes.SCALES))
    coefficients, residuals = [], []
    for side, (rows, row_weight) in enumerate(((codes.down, weight), (codes.up, weight / up_divisor))):
        shape, offset = (rank, layout.widths[side]), layout.offsets[side]
        coefficients.append(_weighted_rows(rows.coefficients, rows.coefficient_levels, row_weight, shape, offset))
        shape = rank, layout.dimension(side)
        residual = (
            _weighted_rows(rows.residuals, rows.residual_levels, row_weight, shape) if rows.has_residual else None
        )
        residuals.append(residual)
    down, up = coefficients
    down_residual, up_residual = residuals
    if up_residual is not None:
        up_residual = up_residual.mT.contiguous()
    return Coefficients(down, up.mT.contiguous(), scaling, kernel, down_residual, up_residual)


def _weighted_rows(
    codes: np.ndarray, levels: np.ndarray, weight: np.ndarray, shape: tuple[int, int], offset: int = 0
) -> Tensor:
    """Return codes times their weights, float32, as the rows of the components with a level among zeros.

    Args:
        codes: Codes of the components that have a level, (rows, n).
        levels: Levels of all components, (r,).
        weight: Weights of all components, (r,) float64.
        shape: Shape of the returned rows.
        offset: First column of the codes among those of the returned rows.
    """
    rows = np.zeros(shape, dtype=np.float32)
    if len(codes):
        (coded,) = (levels > 0).nonzero()
        rows[coded, offset : offset + codes.shape[1]] = codes * weight[coded, None]
    return torch.from_numpy(rows)


def _in_all_clusters(rows: Tensor, rank: int, width: int, offset: int) -> Tensor:
    """Return coefficients on the components of one cluster as coefficients on those of all, (rank, width) float32."""
    coefficients = torch.zeros(rank, width, dtype=torch.float32)
    coefficients[: len(rows), offset : offset + rows.shape[1]] = rows
    return coefficients
