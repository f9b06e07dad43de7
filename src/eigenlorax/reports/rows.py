"""The figures of each adapter, and of each module."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..codec.storage.table import storage_by_name
from ..pack.pack import Pack
from ..pack.packed_adapter import Record
from ..pack.summary import lora_numbers
from . import spreads
from .analysis import groups, losses
from .analysis.pairs import Pairs
from .data import SPECTRUM, AdapterFigures, ModuleFigures, SideFigures
from .measure import Measured
from .refits import Side


def measured_of(pack: Pack, measured: Measured) -> dict[str, dict[str, Any]]:
    """What is measured of each adapter with its original, by its name and the fields of `AdapterFigures`."""
    total, names, pairs = measured.total, measured.names, measured.pairs
    random = spreads.relative(total - measured.random, total)
    down = spreads.relative(measured.down_lost, measured.down_total)
    up = spreads.relative(measured.up_lost, measured.up_total)
    own = storage_by_name(pack.coefficient_storage).keeps_factors
    eight, four = (spreads.relative(measured.rounded[bits], total) for bits in (8, 4))
    cut = _truncated(pack, measured)
    plain, scaled = [math.nan] * len(names), [math.nan] * len(names)
    if measured.fitted:
        for place, a, b in zip(measured.fitted, *_of_the_mean(pairs, measured.fitted), strict=True):
            plain[place], scaled[place] = a, b
    at = [measured.fitted[place] for place in measured.chosen]
    others = dict(zip(at, spreads.relative(total[at] - measured.left_out_kept, total[at]), strict=True))
    found = {}
    for place, name in enumerate(names):
        found[name] = {
            "norm": math.sqrt(float(total[place])),
            "factor_error_down": down[place] if own else None,
            "factor_error_up": up[place] if own else None,
            "left_out_error": others.get(place),
            "mean_error": _number(plain[place]),
            "mean_scaled_error": _number(scaled[place]),
            "random_error": random[place],
            "truncated_error": cut[place],
            "int8_error": eight[place],
            "int4_error": four[place],
        }
    return found


def _of_the_mean(pairs: Pairs, fitted: list[int]) -> tuple[list[float], list[float]]:
    plain, scaled, _ = groups.mean_losses(pairs.of_some(fitted))
    return plain.tolist(), scaled.tolist()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def adapter(
    name: str, record: Record, width: int, alone: Mapping[str, Any], cluster: int | None, place: Sequence[float] | None
) -> AdapterFigures:
    """One adapter's line. alone: what was measured of it; place: where it is on the map."""
    unknown = {
        "norm": None,
        "factor_error_down": None,
        "factor_error_up": None,
        "left_out_error": None,
        "mean_error": None,
        "mean_scaled_error": None,
        "random_error": None,
        "truncated_error": None,
        "int8_error": None,
        "int4_error": None,
        "nearest": None,
        "nearest_cosine": None,
        "overlap": None,
    }
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
        x=place[0] if place is not None else None,
        y=place[1] if place is not None else None,
        lora_bytes=width * record.lora_numbers,
        file_bytes=record.source_file_bytes,
        coefficient_bytes=record.coefficient_bytes,
        carried_bytes=record.carried_bytes,
        head_bytes=record.head_bytes,
        **{**unknown, **alone},
    )


def _truncated(pack: Pack, measured: Measured) -> list[float]:
    """Errors of the adapters cut by SVD, each to its share of the pack's bytes."""
    records = pack.records
    spent = pack.info.stored_bytes + sum(record.coefficient_bytes for record in records.values())
    numbers = lora_numbers(records)
    width = spreads.width(pack)
    kept = []
    for place, name in enumerate(measured.names):
        budget = spent * records[name].lora_numbers / numbers
        values = [squares[place] for _, squares in measured.singular]
        kept.append(losses.truncated(values, [width * cost for cost, _ in measured.singular], budget))
    return spreads.relative(measured.total - torch.tensor(kept, dtype=torch.float64), measured.total)


_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


def module(pack: Pack, measured: Measured | None, name: str, adapters: int) -> ModuleFigures:
    """One module's line. adapters: how many have it."""
    bases, info = pack.subspace.modules[name], pack.info.modules[name]
    sides = {}
    for index, side in enumerate(("down", "up")):
        basis = bases.side(side)
        values = basis.singular_values.to(torch.float64)
        other = measured.sides[name][index] if measured is not None else Side()
        total = basis.square
        sides[side] = SideFigures(
            dimension=basis.dimension,
            k=basis.n_fitted,
            rank=spreads.rank(basis),
            energy=info[side].energy,
            spectrum=(values.square()[:SPECTRUM] / total).tolist() if total > 0 else [],
            null=list(other.null),
            null_energy=other.null_energy,
            angles=list(other.angles),
            null_angles=list(other.null_angles),
            halves_overlap=other.halves_overlap,
            null_halves_overlap=other.null_halves_overlap,
        )
    layer = _NUMBER.search(name)
    errors = {}
    if measured is not None:
        errors = {
            adapter: error
            for adapter, error in zip(measured.names, measured.errors[name], strict=True)
            if error is not None
        }
    lost = measured.weighted.get(name) if measured is not None else None
    factor_errors = measured.factor_errors.get(name, (None, None)) if measured is not None else (None, None)
    worst = max(errors, key=lambda adapter: (errors[adapter], adapter)) if errors else None
    return ModuleFigures(
        name=name,
        layer=int(layer[0]) if layer else None,
        kind=_NUMBER.sub("*", name),
        adapters=adapters,
        down=sides["down"],
        up=sides["up"],
        delta_error=lost,
        energy_kept=1 - lost**2 if lost is not None else None,
        factor_error_down=factor_errors[0],
        factor_error_up=factor_errors[1],
        worst=worst,
        worst_error=errors[worst] if worst is not None else None,
    )


def module_errors(
    rows: Sequence[AdapterFigures], measured: Measured | None, modules: Sequence[str]
) -> list[list[float | None]]:
    """The delta error of each adapter in each module."""
    if measured is None:
        return []
    places = {name: place for place, name in enumerate(measured.names)}
    return [
        [measured.errors[module][places[row.name]] if row.name in places else None for module in modules]
        for row in rows
    ]
