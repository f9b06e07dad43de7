"""Quantise the LoRA factors of a version within the error bound of its update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from ...core.adapter import LoRAFactors, delta_square
from ...errors import OptionError
from . import gauge
from .blocks import Block, Quantisation
from .decoded import LossyVersion, ModuleLayout, ModuleRows
from .gains import choose_gains
from .lattice import LatticeRows, step_sizes
from .search import SampledRows, SearchResult, search

_MAX_NOISE = 1e300
"""Largest noise of a row, where its weight is next to nothing."""
_CANCELLATION = 1e-10
"""Share of its terms below which a squared error in float64 has too few digits."""


@dataclass(frozen=True, slots=True)
class _Module:
    """A module in the gauge in which it is quantised.

    Attributes:
        factors: Its factors.
        layout: Shape, scaling and dtypes.
        blocks: Up and down rows.
        order: Rows of the reference that predict them; None for the same rows in their order, or no reference.
    """

    factors: LoRAFactors
    layout: ModuleLayout
    blocks: tuple[Block, Block]
    order: Int64[np.ndarray, " rank"] | None


@dataclass(frozen=True, slots=True)
class QuantisedModules:
    """The modules of a version as integers.

    Attributes:
        level: Level of rows of weight 1.
        modules: Rows by module name, without classes.
        orders: Rows of the reference that predict a module's rows, where these are not all of them in their order.
        error: Relative error of the update.
    """

    level: int
    modules: Mapping[str, ModuleRows]
    orders: Mapping[str, Int64[np.ndarray, " rank"]]
    error: float


def quantise_modules(
    modules: Mapping[str, LoRAFactors], max_error: float, reference: LossyVersion | None
) -> QuantisedModules:
    """Quantise factors as coarsely as the error bound allows, predicted from a reference if that takes fewer bits.

    Args:
        modules: Factors by module name, sorted.
        max_error: Bound of the relative error over all modules, after rounding to the dtypes of the factors.
        reference: Version that may predict them; None for none.

    Raises:
        OptionError: The bound cannot be met.
    """
    square = sum(delta_square(factors) for factors in modules.values())
    if not square:
        return _quantise_untrained(modules, max_error, has_reference=reference is not None)
    limit = max_error**2 * square
    if not limit:
        raise OptionError("the square of the error bound is below float64's range")
    prepared = {module: _prepare(factors, None, 0.0) for module, factors in modules.items()}
    earlier_level = None
    orders: dict[str, np.ndarray] = {}
    if reference is not None:
        noise = float(step_sizes(np.array([reference.level]))[0]) ** 2 / 12
        predicted = {
            module: _prepare(factors, reference.module_rows.get(module), noise) for module, factors in modules.items()
        }
        if _estimated_bits(predicted, limit, reference.level) < _estimated_bits(prepared, limit, None):
            prepared, earlier_level = predicted, reference.level
            orders = {name: module.order for name, module in prepared.items() if module.order is not None}
        else:
            orders = _no_prediction(prepared)
    blocks = [block for module in prepared.values() for block in module.blocks]
    coarsest = search(blocks, limit, earlier_level, lambda quantisation: _attempt(prepared, quantisation))
    return QuantisedModules(
        level=coarsest.quantisation.level,
        modules=coarsest.rows,
        orders=orders,
        error=math.sqrt(coarsest.square / square),
    )


def _quantise_untrained(
    modules: Mapping[str, LoRAFactors], max_error: float, *, has_reference: bool
) -> QuantisedModules:
    """Quantise the factors of an update of zero, as before the first step of a training, in their own gauge.

    The bound holds for the factors themselves, so that a training can start from them.

    Raises:
        OptionError: The factors of a module are not zero, and their product is.
    """
    prepared = {}
    for name, factors in modules.items():
        layout = ModuleLayout.of(factors)
        up, down = factors.up.to(torch.float64).numpy().T, factors.down.to(torch.float64).numpy()
        if up.any() and down.any() and factors.scaling:
            raise OptionError(f"the factors of module {name} cancel out, which integers would not")
        sides = Block(up, np.ones(layout.rank), None), Block(down, np.ones(layout.rank), None)
        prepared[name] = _Module(factors, layout, sides, None)
    blocks = [block for module in prepared.values() for block in module.blocks]
    limit = max_error**2 * sum(float(np.square(block.values).sum()) for block in blocks)

    def attempt(quantisation: Quantisation) -> tuple[dict[str, ModuleRows], float]:
        quantised, square = {}, 0.0
        for name, module in prepared.items():
            up, down = (block.quantise(quantisation) for block in module.blocks)
            quantised[name] = ModuleRows(module.layout, up.rows, down.rows)
            decoded = quantised[name].factors
            square += float((decoded.up.double() - module.factors.up.double()).square().sum())
            square += float((decoded.down.double() - module.factors.down.double()).square().sum())
        return quantised, square

    if limit:
        coarsest = search(blocks, limit, None, attempt)
    else:
        coarsest = SearchResult(attempt(Quantisation(0, 0.0))[0], Quantisation(0, 0.0), 0.0)
    orders = _no_prediction(prepared) if has_reference else {}
    # zeros are exact, so that the update is
    return QuantisedModules(coarsest.quantisation.level, coarsest.rows, orders, 0.0)


def _no_prediction(prepared: Mapping[str, _Module]) -> dict[str, Int64[np.ndarray, " rank"]]:
    """Return the orders of rows that a reference does not predict: a reader predicts them unless it is told so."""
    return {name: np.full(module.layout.rank, -1) for name, module in prepared.items()}


def _estimated_bits(prepared: Mapping[str, _Module], limit: float, earlier_level: int | None) -> float:
    sample = SampledRows([block for module in prepared.values() for block in module.blocks])
    return sample.bits(sample.choose(limit, earlier_level))


def _prepare(factors: LoRAFactors, reference: ModuleRows | None, noise: float) -> _Module:
    """Return a module in the gauge that is closest to its reference, or in that of its singular components."""
    layout = ModuleLayout.of(factors)
    up, down = factors.up.to(torch.float64).numpy().T, factors.down.to(torch.float64).numpy()
    order = up_reference = down_reference = aligned = None
    if reference is not None and reference.layout.widths == layout.widths:
        up_reference, down_reference = reference.up, reference.down
        if reference.layout.rank != layout.rank:
            order = gauge.match_rows(down, up_reference.values, down_reference.values)
            up_reference, down_reference = up_reference.reordered(order), down_reference.reordered(order)
        aligned = gauge.align(up, down, up_reference.values, down_reference.values, noise)
    if aligned is None:
        aligned = gauge.singular_gauge(up, down)
        if up_reference is not None and down_reference is not None:
            order = np.full(layout.rank, -1)
            up_reference, down_reference = up_reference.reordered(order), down_reference.reordered(order)
    up, down = aligned
    # the error of a row counts with the norm of the row that it is multiplied by
    scale = abs(layout.scaling)
    blocks = (
        _block(up, scale * np.linalg.norm(down, axis=1), up_reference, noise),
        _block(down, scale * np.linalg.norm(up, axis=1), down_reference, noise),
    )
    return _Module(factors, layout, blocks, order)


def _block(values: np.ndarray, weights: np.ndarray, reference: LatticeRows | None, noise: float) -> Block:
    gains = None
    if reference is not None:
        with np.errstate(over="ignore"):
            row_noise = np.minimum(noise / np.maximum(np.square(weights), 1e-300), _MAX_NOISE)
        gains = choose_gains(values, reference, row_noise)
    return Block(values, weights, reference, gains)


def _attempt(prepared: Mapping[str, _Module], quantisation: Quantisation) -> tuple[dict[str, ModuleRows], float]:
    """Quantise all modules, and return their rows and their squared error."""
    quantised, square = {}, 0.0
    for name, module in prepared.items():
        up, down = (block.quantise(quantisation) for block in module.blocks)
        square += _error_square(module.factors, module.layout.factors(up.rows.values, down.rows.values))
        quantised[name] = ModuleRows(module.layout, up.rows, down.rows)
    return quantised, square


def _error_square(factors: LoRAFactors, decoded: LoRAFactors) -> float:
    """Return the squared Frobenius norm of the difference of two updates, as the update of the joined factors.

    It is infinite or NaN if a number of the decoded factors is beyond its dtype.
    """
    up = np.hstack([factors.up.double().numpy(), -decoded.up.double().numpy()])
    down = np.vstack([factors.down.double().numpy(), decoded.down.double().numpy()])
    with np.errstate(over="ignore", invalid="ignore"):
        products = (up.T @ up) * (down @ down.T)
        square = float(products.sum())
        if square < _CANCELLATION * float(np.abs(products).sum()):
            # slower, with the digits that the sum has lost
            up_triangle, down_triangle = np.linalg.qr(up)[1], np.linalg.qr(down.T)[1]
            square = float(np.square(up_triangle @ down_triangle.T).sum())
    return factors.scaling**2 * square
