"""Codes of several updates of a module in narrow integers, as they are sent between processes and kept in files."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from .adapter_codes import NO_INTEGERS, ModuleCodes, SideCodes
from .narrow_integers import narrow
from .side_codes import BatchSideCodes
from .singular_codes import UpdateCodes


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Codes of n updates; attributes as those of `singular_codes.UpdateCodes`, in narrow integers.

    Attributes:
        counts: Numbers of components, (n,).
        scales: Scales of the components, (n, r).
        cores: Codes of the cores, (n, k_up, k_down).
        core_levels: Levels of the cores, (n,).
        down_coefficients: Coefficients on the down side, (n, r, k_down).
        down_coefficient_levels: Levels of these coefficients, (n, r).
        down_residuals: Residuals on the down side, (n, r, in).
        down_residual_levels: Levels of these residuals, (n, r).
        up_coefficients: The same for the up side, (n, r, k_up).
        up_coefficient_levels: The same for the up side, (n, r).
        up_residuals: The same for the up side, (n, r, out).
        up_residual_levels: The same for the up side, (n, r).
    """

    counts: np.ndarray
    scales: np.ndarray
    cores: np.ndarray
    core_levels: np.ndarray
    down_coefficients: np.ndarray
    down_coefficient_levels: np.ndarray
    down_residuals: np.ndarray
    down_residual_levels: np.ndarray
    up_coefficients: np.ndarray
    up_coefficient_levels: np.ndarray
    up_residuals: np.ndarray
    up_residual_levels: np.ndarray

    @classmethod
    def of(cls, batch: UpdateCodes) -> "PackedCodes":
        """Pack the updates of a batch."""
        arrays = {
            "counts": batch.counts,
            "scales": batch.scales,
            "cores": batch.cores,
            "core_levels": batch.core_levels,
            **_side_tensors("down", batch.down),
            **_side_tensors("up", batch.up),
        }
        return cls(**{name: narrow(tensor.numpy()) for name, tensor in arrays.items()})

    @classmethod
    def join(cls, batches: Sequence["PackedCodes"]) -> "PackedCodes":
        """Join at least one batch, one after the other."""
        return cls(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in cls.names()})

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the attributes."""
        return [field.name for field in fields(cls)]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the attributes by name."""
        return {name: getattr(self, name) for name in self.names()}

    def codes(self, row: int) -> ModuleCodes:
        """Return the codes of one update."""
        count, level = int(self.counts[row]), int(self.core_levels[row])
        sides = []
        for side in ("down", "up"):
            coefficient_levels = getattr(self, f"{side}_coefficient_levels")[row, :count].astype(np.int64)
            residual_levels = getattr(self, f"{side}_residual_levels")[row, :count].astype(np.int64)
            # rows of zeros are neither written nor kept
            sides.append(
                SideCodes(
                    coefficient_levels,
                    narrow(getattr(self, f"{side}_coefficients")[row, :count][coefficient_levels > 0]),
                    residual_levels,
                    narrow(getattr(self, f"{side}_residuals")[row, :count][residual_levels > 0]),
                )
            )
        scales = self.scales[row, :count].astype(np.int64)
        down, up = sides
        return ModuleCodes(scales, down, up, level, narrow(self.cores[row]) if level else NO_INTEGERS)


def _side_tensors(name: str, side: BatchSideCodes) -> dict[str, Tensor]:
    return {
        f"{name}_coefficients": side.coefficients,
        f"{name}_coefficient_levels": side.coefficient_levels,
        f"{name}_residuals": side.residuals,
        f"{name}_residual_levels": side.residual_levels,
    }
