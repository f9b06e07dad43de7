"""Fitting one module: `ModuleFitter`, the updates that it takes, and the bytes of its components."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..codec.storage.base import Storage
from ..core.adapter import LoRAFactors, ModuleSpec
from ..core.exact_fit import ExactFit, SidePair, fit_module
from ..core.fit_options import FitOptions
from ..core.subspace import ModuleBases

ComponentCounts = tuple[int, int]
"""Numbers of components (down, up) of a module."""
Report = Callable[[str, int, int], None]
"""Progress callback with the arguments (stage, done, total)."""


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """One adapter's update of a module, in memory.

    Attributes:
        adapter: Name of the adapter.
        factors: The LoRA factors.
        trained: True if the update is not zero.
    """

    adapter: str
    factors: LoRAFactors
    trained: bool


LoadModule = Callable[[], Sequence[ModuleUpdate]]
"""Function that reads all updates of a module from their files, at each call."""


@dataclass(frozen=True, slots=True)
class ModuleFitter:
    """Options with which every module is fitted and stored.

    Attributes:
        options: Weighting, sweeps and size of the fit.
        weights: 1 / ‖update‖ over all modules, by name, of each adapter that is fitted.
        storage: Storage of the components.
        coefficient_storage: Storage of the coefficients.
        device: Device on which bases are fitted.
    """

    options: FitOptions
    weights: Mapping[str, float]
    storage: Storage
    coefficient_storage: Storage
    device: torch.device

    def fit(self, updates: Sequence[ModuleUpdate], counts: ComponentCounts | None) -> ModuleBases:
        """Fit the bases of a module to its trained updates.

        Args:
            updates: Updates of the module. Untrained ones are ignored.
            counts: Numbers of components (down, up); None for the numbers that the options give.

        Returns:
            The bases, in float64, before rounding to their storage.
        """
        return fit_module(*self._trained(updates), self.options, counts)

    def stack(self, updates: Sequence[ModuleUpdate]) -> ExactFit:
        """Return the trained updates of a module, stacked and weighted as in `fit`."""
        return ExactFit.stack(*self._trained(updates), self.options)

    def component_bytes(self, specs: Sequence[ModuleSpec]) -> tuple[int, int]:
        """Return the bytes (down, up) of one more component of a module, with its coefficients in all adapters.

        Args:
            specs: Shapes of the factors of all adapters that have the module.
        """
        coefficients = sum(spec.rank for spec in specs) * self.coefficient_storage.number_bytes
        widths = specs[0].in_features, specs[0].out_features
        down, up = (round(width * self.storage.number_bytes + coefficients) for width in widths)
        return down, up

    def lora_bytes(self, specs: Sequence[ModuleSpec]) -> int:
        """Return the bytes of a module's factors as LoRAs, in the narrower of the two storages' dtypes."""
        itemsize = min(self.storage.lora_itemsize, self.coefficient_storage.lora_itemsize)
        return itemsize * sum(spec.rank * (spec.in_features + spec.out_features) for spec in specs)

    def _trained(self, updates: Sequence[ModuleUpdate]) -> tuple[list[LoRAFactors], list[float]]:
        trained = [update for update in updates if update.trained]
        factors = [
            replace(u.factors, down=u.factors.down.to(self.device), up=u.factors.up.to(self.device)) for u in trained
        ]
        return factors, [self.weights[update.adapter] for update in trained]


@dataclass(frozen=True, slots=True)
class CapturedNorms:
    """Squared norm ‖U D Vᵀ‖² of one update D in k_down leading components V and k_up leading components U, for all k.

    Attributes:
        down: Gram matrix (r, r) of the down factor projected on the first 0, 1, …, k components, flat: (k + 1, r²).
        up: The same for the up factor.
        scaling: Scaling of the update.
    """

    down: np.ndarray
    up: np.ndarray
    scaling: float

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scaling: float) -> "CapturedNorms":
        """Compute the norms from projected factors.

        Args:
            down: Rows of the down factor, projected on the components, (r, k_down).
            up: Columns of the up factor, projected on the components, (r, k_up).
            scaling: Scaling of the update.
        """
        return cls(_cumulative_grams(down), _cumulative_grams(up), scaling)

    def table(self, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return the squared norms for each number of components in `down` with each in `up`."""
        squares: np.ndarray = self.scaling**2 * (self.down[down] @ self.up[up].T)
        return squares

    def pairwise(self, down: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return the squared norms for the first number in `down` with the first in `up`, and so on."""
        squares: np.ndarray = self.scaling**2 * (self.down[down] * self.up[up]).sum(axis=1)
        return squares


def _cumulative_grams(rows: Tensor) -> np.ndarray:
    zero = torch.zeros(1, rows.shape[0] ** 2, dtype=torch.float64)
    outer_products = torch.einsum("ik,jk->kij", rows, rows).flatten(1)
    grams: np.ndarray = torch.cat([zero, outer_products.cumsum(0)]).numpy()
    return grams


def captured_norms(
    updates: Sequence[ModuleUpdate], stack: ExactFit, leading: SidePair
) -> Iterator[tuple[ModuleUpdate, CapturedNorms]]:
    """Yield each trained update with its squared norms in the leading components.

    Args:
        updates: Updates of one module.
        stack: `ModuleFitter.stack` of these updates.
        leading: Leading components (down, up) of the stack.
    """
    trained = [update for update in updates if update.trained]
    for update, *blocks in zip(trained, stack.down.blocks, stack.up.blocks, strict=True):
        down, up = (side.projection[block].cpu() for side, block in zip(leading, blocks, strict=True))
        yield update, CapturedNorms.of(down, up, update.factors.scaling)
