"""Fitting one module: the updates of its adapters, the options of the fit, and the bytes that components cost."""

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


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """One adapter's update of a module, in memory. trained: whether it is not zero."""

    adapter: str
    factors: LoRAFactors
    trained: bool


ReadModule = Callable[[], Sequence[ModuleUpdate]]
"""Reads the updates of a module, anew at each call."""


@dataclass(frozen=True, slots=True)
class ModuleFitter:
    """The options with which every module is fitted and stored.

    weights: 1 / ‖update‖ over all modules, by name, of the adapters that are fitted.
    """

    options: FitOptions
    weights: Mapping[str, float]
    storage: Storage
    coefficient_storage: Storage
    device: torch.device

    def fit(self, updates: Sequence[ModuleUpdate], counts: ComponentCounts | None) -> ModuleBases:
        """Fit the bases of a module to its trained updates. counts: of components; None: as the options say."""
        return fit_module(*self._trained(updates), self.options, counts)

    def stack(self, updates: Sequence[ModuleUpdate]) -> ExactFit:
        """Return the trained updates of a module, stacked as `fit` does it."""
        return ExactFit.of(*self._trained(updates), self.options)

    def component_bytes(self, specs: Sequence[ModuleSpec]) -> tuple[int, int]:
        """Return the bytes of one more component (down, up) of a module, with its coefficients in all adapters.

        specs: of all adapters of the module.
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
    """‖U D Vᵀ‖² of one update D for any number of leading components: k_down rows of V and k_up rows of U.

    down, up: Gram matrices (r, r) of the factors projected on the first 0, 1, …, k components, flat: (k + 1, r²).
    """

    down: np.ndarray
    up: np.ndarray
    scaling: float

    @classmethod
    def of(cls, down: Tensor, up: Tensor, scaling: float) -> "CapturedNorms":
        """Compute them from the coordinates of the factors' rows in each component, (r, k) of both sides."""
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
    """Yield what the leading components of each side keep of every trained update. stack: of these updates."""
    trained = [update for update in updates if update.trained]
    for update, *blocks in zip(trained, stack.down.blocks, stack.up.blocks, strict=True):
        down, up = (side.projection[block].cpu() for side, block in zip(leading, blocks, strict=True))
        yield update, CapturedNorms.of(down, up, update.factors.scaling)
