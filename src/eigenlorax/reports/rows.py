"""Figures of each adapter and each module, from measurements and the pack's records."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core import module_names
from ..pack.pack import Pack
from ..pack.record import Record
from ..pack.summary import lora_numbers
from . import spreads
from .analysis import groups, losses
from .data import SPECTRUM, AdapterFigures, ModuleFigures, SideFigures
from .measured import Measured
from .refits import Side


def measured_fields(pack: Pack, measured: Measured, norms: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return the fields of `AdapterFigures` that need the originals, by adapter.

    Args:
        pack: The pack.
        measured: Measurements with the originals.
        norms: Norm of each adapter of `measured.names` over all modules of the subspace.
    """
    total, fitted = measured.total, measured.fitted
    keeps_factors = storage_by_name(pack.coefficient_storage).keeps_factors
    down = spreads.relative(measured.down_squared_error, measured.down_total)
    up = spreads.relative(measured.up_squared_error, measured.up_total)
    random = spreads.relative(total - measured.random, total)
    rounded = {bits: spreads.relative(squares, total) for bits, squares in measured.rounded.items()}
    truncated = _truncated(pack, measured)
    mean_errors: dict[int, tuple[float | None, float | None]] = {}
    if fitted:
        plain, scaled, _ = groups.mean_errors(measured.pairs.subset(fitted))
        pairs = zip(_without_nan(plain), _without_nan(scaled), strict=True)
        mean_errors = dict(zip(fitted, pairs, strict=True))
    chosen = [fitted[row] for row in measured.chosen]
    left_out = dict(zip(chosen, spreads.relative(total[chosen] - measured.left_out_kept, total[chosen]), strict=True))
    figures = {}
    for index, name in enumerate(measured.names):
        mean_error, mean_scaled_error = mean_errors.get(index, (None, None))
        figures[name] = {
            "norm": norms[index],
            "factor_error_down": down[index] if keeps_factors else None,
            "factor_error_up": up[index] if keeps_factors else None,
            "left_out_error": left_out.get(index),
            "mean_error": mean_error,
            "mean_scaled_error": mean_scaled_error,
            "random_error": random[index],
            "truncated_error": truncated[index],
            "int8_error": rounded[8][index],
            "int4_error": rounded[4][index],
        }
    return figures


def _without_nan(errors: Tensor) -> list[float | None]:
    return [None if math.isnan(error) else error for error in errors.tolist()]


_MEASURED = (
    "norm",
    "factor_error_down",
    "factor_error_up",
    "left_out_error",
    "mean_error",
    "mean_scaled_error",
    "random_error",
    "truncated_error",
    "int8_error",
    "int4_error",
    "nearest",
    "nearest_cosine",
    "overlap",
)
"""Fields of `AdapterFigures` that are None unless they were measured."""


def adapter(
    name: str,
    record: Record,
    lora_width: int,
    measured: Mapping[str, Any],
    cluster: int | None,
    position: Sequence[float] | None,
) -> AdapterFigures:
    """Return the figures of one adapter.

    Args:
        name: Name of the adapter.
        record: Its record in the pack.
        lora_width: Bytes per number of its LoRA factors.
        measured: Fields that were measured, by name.
        cluster: Index of its cluster; None if it is in no cluster.
        position: Coordinates (x, y) on the map; None if it is not on the map.
    """
    return AdapterFigures(
        name=name,
        in_fit=record.in_fit,
        untrained=record.untrained,
        ranks=record.ranks,
        modules=record.modules,
        delta_error=record.delta_error,
        rounding_error=record.rounding_error,
        energy_kept=1 - record.delta_error**2,
        cluster=cluster,
        x=position[0] if position is not None else None,
        y=position[1] if position is not None else None,
        lora_bytes=lora_width * record.lora_numbers,
        file_bytes=record.source_file_bytes,
        coefficient_bytes=record.coefficient_bytes,
        carried_bytes=record.carried_bytes,
        head_bytes=record.head_bytes,
        **{field: measured.get(field) for field in _MEASURED},
    )


def _truncated(pack: Pack, measured: Measured) -> list[float]:
    """Return the errors of the adapters if each is truncated by SVD to its share of the pack's bytes."""
    records = pack.records
    spent = pack.info.stored_bytes + sum(record.coefficient_bytes for record in records.values())
    numbers, lora_width = lora_numbers(records), spreads.width(pack)
    costs = [lora_width * numbers_per_component for numbers_per_component, _ in measured.singular]
    widths = [sum(bases.shape) for bases in pack.subspace.modules.values()]
    share = sum(numbers_per_component for numbers_per_component, _ in measured.singular) / max(sum(widths), 1)
    kept = []
    for index, name in enumerate(measured.names):
        budget = spent * records[name].lora_numbers / numbers
        squares = [values[index] for _, values in measured.singular]
        if share < 1:
            # bytes that buy no further component of all modules buy none in the sample either
            budget -= budget % (lora_width * min(widths))
            kept.append(losses.truncated_in_sample(squares, costs, share * budget))
        else:
            kept.append(losses.truncated(squares, costs, budget))
    return spreads.relative(measured.total - torch.tensor(kept, dtype=torch.float64), measured.total)


def module(pack: Pack, measured: Measured | None, name: str, adapters: int) -> ModuleFigures:
    """Return the figures of one module, which `adapters` adapters have."""
    layer, kind = module_names.layer_and_kind(name)
    errors: dict[str, float] = {}
    error: float | None = None
    factor_errors: tuple[float | None, float | None] = None, None
    if measured is not None:
        by_adapter = zip(measured.names, measured.errors.get(name, [None] * len(measured.names)), strict=True)
        errors = {adapter: error for adapter, error in by_adapter if error is not None}
        error = measured.weighted.get(name)
        factor_errors = measured.factor_errors.get(name, (None, None))
    worst = max(errors, key=lambda adapter: (errors[adapter], adapter)) if errors else None
    down, up = (_side(pack, measured, name, side) for side in ("down", "up"))
    return ModuleFigures(
        name=name,
        layer=layer,
        kind=kind,
        adapters=adapters,
        down=down,
        up=up,
        delta_error=error,
        energy_kept=1 - error**2 if error is not None else None,
        factor_error_down=factor_errors[0],
        factor_error_up=factor_errors[1],
        worst=worst,
        worst_error=errors[worst] if worst is not None else None,
    )


def _side(pack: Pack, measured: Measured | None, module: str, side: str) -> SideFigures:
    basis = pack.subspace.modules[module].side(side)
    refit = Side()
    if measured is not None and module in measured.sides:
        refit = measured.sides[module][("down", "up").index(side)]
    sigmas, total = basis.singular_values.to(torch.float64), basis.square
    return SideFigures(
        dimension=basis.dimension,
        k=basis.n_fitted,
        rank=spreads.rank(basis),
        energy=pack.info.modules[module][side].energy,
        spectrum=(sigmas.square()[:SPECTRUM] / total).tolist() if total > 0 else [],
        null=list(refit.null),
        null_energy=refit.null_energy,
        angles=list(refit.angles),
        null_angles=list(refit.null_angles),
        halves_overlap=refit.halves_overlap,
        null_halves_overlap=refit.null_halves_overlap,
    )


def module_errors(
    adapters: Sequence[AdapterFigures], measured: Measured | None, modules: Sequence[str]
) -> list[list[float | None]]:
    """Return the delta error of each adapter in each module; an empty list if nothing was measured."""
    if measured is None:
        return []
    indices = {name: index for index, name in enumerate(measured.names)}
    return [
        [
            measured.errors[module][indices[adapter.name]]
            if module in measured.errors and adapter.name in indices
            else None
            for module in modules
        ]
        for adapter in adapters
    ]
