"""Errors and bytes of alternatives to the pack: fits without an adapter, baselines, and other sizes."""

import math
import statistics
from collections.abc import Mapping, Sequence

from ..codec.storage.table import storage_by_name
from ..core.coefficients import Coefficients
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..pack.summary import lora_numbers
from . import chance, spreads
from .analysis import bytes as costs
from .analysis import losses
from .comparison_data import Baseline, Bytes, LeftOut, Null, SizePoint
from .data import AdapterFigures
from .measured import Measured
from .originals import Originals


def left_out(measured: Measured | None, pack: Pack, seed: int, copies: set[str]) -> LeftOut | None:
    """Return leave-one-out errors: the error of each sampled adapter in a fit without it.

    Args:
        measured: Measurements with the original adapters; None if there are no originals.
        pack: The pack.
        seed: Seed with which the adapters were sampled.
        copies: Names of adapters that have a copy in the fit. They are not counted, because the copy is still in the
            fit without them.

    Returns:
        The errors, or None if no adapter was left out.
    """
    if measured is None:
        return None
    rows = _without_copies(measured, copies)
    names = [measured.names[measured.fitted[measured.chosen[row]]] for row in rows]
    if not names:
        return None
    total = measured.total[[measured.fitted[measured.chosen[row]] for row in rows]]
    kept, expected = measured.left_out_kept[rows], measured.chance[rows]
    errors = dict(zip(names, spreads.relative(total - kept, total), strict=True))
    spread, in_fit = (
        spreads.summarise(errors),
        spreads.summarise({name: pack.records[name].delta_error for name in errors}),
    )
    by_chance = spreads.summarise(dict(zip(names, spreads.relative(total - expected, total), strict=True)))
    assert spread is not None
    assert in_fit is not None
    assert by_chance is not None
    shared = chance.sharing(kept, expected, measured.null.left_out[:, rows], total, measured.null)
    n = len(errors)
    return LeftOut(
        sampled=n,
        of=len(measured.fitted),
        seed=seed,
        method=(
            "refitted without the adapter, including sweeps"
            if measured.exact
            else "refitted without the adapter, and without sweeps for modules with many rows"
        ),
        errors=spread,
        standard_error=statistics.stdev(errors.values()) / math.sqrt(n) if n > 1 else None,
        in_fit=in_fit,
        chance=by_chance.mean,
        kept=spreads.beyond_chance(spread.rms, by_chance.rms),
        kept_spread=chance.null_std_of_kept(measured.null, rows, expected, total),
        kept_standard_error=0.0,
        sharing=[name for name, shares in zip(names, shared, strict=True) if shares],
    )


def _without_copies(measured: Measured, copies: set[str]) -> list[int]:
    """Return the indices in `measured.chosen` of adapters without a copy in the fit."""
    return [row for row, index in enumerate(measured.chosen) if measured.names[measured.fitted[index]] not in copies]


def null(measured: Measured | None, pack: Pack, seed: int) -> Null | None:
    """Return the null model of the adapters of the fit; None if it was not measured."""
    if measured is None or not measured.null.modules:
        return None
    total = {measured.names[index]: float(measured.total[index]) for index in measured.fitted}
    trained = [
        bases
        for module, bases in pack.subspace.modules.items()
        if module in measured.sides and measured.sides[module][0].null_energy is not None
    ]
    return chance.figures(
        measured.null, total, ([bases.down for bases in trained], [bases.up for bases in trained]), seed
    )


def baselines(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    figures: Sequence[AdapterFigures],
    measured: Measured | None,
    null_model: Null | None,
) -> list[Baseline]:
    """Return errors and bytes of the pack and of other methods, for the trained adapters of the fit.

    Args:
        pack: The pack.
        packed: Its adapters, by name.
        figures: Figures of all adapters, which contain the errors of most methods.
        measured: Measurements with the original adapters; None if there are no originals.
        null_model: The null model; None if it was not measured.

    Returns:
        The pack itself first, then the methods that were measured; empty without originals.
    """
    if measured is None or not measured.fitted:
        return []
    fitted = [adapter for adapter in figures if adapter.in_fit and not adapter.untrained]
    coefficients = sum(record.coefficient_bytes for record in pack.records.values())
    pack_bytes = pack.info.stored_bytes + coefficients
    mean_bytes = spreads.width(pack) * sum(math.prod(bases.shape) for bases in pack.subspace.modules.values())
    eight_bits, four_bits = (_rounded_bytes(pack, packed, bits) for bits in (8, 4))
    # key, label, bytes, and the field of `AdapterFigures` with the error
    methods = [
        ("pack", "this pack", pack_bytes, "delta_error"),
        ("left-out", "fit without the adapter", None, "left_out_error"),
        ("mean", "mean of the adapters", mean_bytes, "mean_error"),
        ("mean-scaled", "best multiple of their mean", mean_bytes, "mean_scaled_error"),
        ("random", "random bases of the same k", coefficients, "random_error"),
        ("null", "null model: same singular values, random singular vectors", None, None),
        ("truncated", "each LoRA truncated by SVD to the same bytes", pack_bytes, "truncated_error"),
        ("int8", "each LoRA rounded to 8 bits", eight_bits, "int8_error"),
        ("int4", "each LoRA rounded to 4 bits", four_bits, "int4_error"),
    ]
    measured_methods = []
    for key, label, stored_bytes, field in methods:
        if field is None:
            errors = null_model.errors if null_model is not None else None
        else:
            by_adapter = {adapter.name: getattr(adapter, field) for adapter in fitted}
            errors = spreads.summarise({name: error for name, error in by_adapter.items() if error is not None})
        if errors is not None:
            measured_methods.append(Baseline(key, label, errors, stored_bytes))
    return measured_methods


def _rounded_bytes(pack: Pack, packed: Mapping[str, PackedAdapter], bits: int) -> int:
    """Return the bytes of all adapters' LoRA factors, rounded to this number of bits."""
    return sum(
        losses.rounded_bytes(
            _lora_rank(adapter, coefficients), *pack.subspace.modules[adapter.subspace_names[module]].shape, bits
        )
        for adapter in packed.values()
        for module, coefficients in adapter.coefficients.items()
    )


def weights(pack: Pack, packed: Mapping[str, PackedAdapter], originals: Originals | None) -> Bytes:
    """Return the bytes of the collection as LoRAs and as a pack."""
    summary, records = pack.summary.bytes, pack.records
    lora_stored = None
    adapters = originals.adapters if originals is not None else {}
    if len(adapters) == sum(not record.untrained for record in records.values()):
        lora_stored = summary.carried + sum(
            adapter.specs[module].numbers * adapter.specs[module].dtype.itemsize
            for name, adapter in adapters.items()
            for module in packed[name].subspace_names
        )
    n = max(len(records), 1)
    lora, packed_bytes = summary.lora / n, (summary.coefficients + summary.carried) / n
    return Bytes(
        lora_files=summary.lora_files,
        lora_stored=lora_stored,
        lora=summary.lora,
        lora_float16=2 * lora_numbers(records) + summary.carried,
        basis=summary.basis,
        coefficients=summary.coefficients,
        carried=summary.carried,
        heads=summary.heads,
        ratio=summary.ratio,
        limit=summary.ratio_without_basis,
        break_even=costs.break_even(lora, summary.basis, packed_bytes),
        over_n=costs.over_n(lora, summary.basis, packed_bytes, len(records)),
    )


def _lora_rank(adapter: PackedAdapter, coefficients: Coefficients) -> int:
    """Return the rank of the original adapter in a module; an upper bound for diagonal cores, whose rank is larger."""
    return min(coefficients.rank, max(adapter.record.ranks))


def sizes(
    pack: Pack, packed: Mapping[str, PackedAdapter], measured: Measured | None, copies: set[str]
) -> list[SizePoint]:
    """Return errors and bytes of the collection with other numbers of components.

    Args:
        pack: The pack.
        packed: Its adapters, by name.
        measured: Measurements with the original adapters; None if there are no originals.
        copies: Names of adapters that have a copy in the fit, as in `left_out`.
    """
    if measured is None or not measured.fitted:
        return []
    total = measured.total[measured.fitted]
    names = [measured.names[index] for index in measured.fitted]
    rows = _without_copies(measured, copies)
    lora_bytes, stored_bytes = pack.summary.bytes.lora, _bytes_by_size(pack, packed, measured)
    points = []
    for column, k in enumerate(measured.grid):
        spread = spreads.summarise(
            dict(zip(names, spreads.relative(total - measured.by_k[:, column], total), strict=True))
        )
        assert spread is not None
        mean_left_out, random, sharing = _left_out_at(measured, rows, column)
        null_errors = chance.relative(measured.null.by_k[:, :, column], total).mean(1)
        points.append(
            SizePoint(
                k=k,
                mean=spread.mean,
                worst=spread.worst,
                null=float(null_errors.mean()),
                null_spread=measured.null.spread(null_errors),
                left_out=mean_left_out,
                random=random,
                stored_bytes=stored_bytes[column],
                ratio=lora_bytes / stored_bytes[column] if stored_bytes[column] else 1.0,
                sharing=sharing,
            )
        )
    return points


def _bytes_by_size(pack: Pack, packed: Mapping[str, PackedAdapter], measured: Measured) -> list[int]:
    """Return the bytes of the pack for each number of components of the grid, at the original ranks."""
    ranks: dict[str, int] = dict.fromkeys(pack.info.modules, 0)
    for adapter in packed.values():
        for own, coefficients in adapter.coefficients.items():
            ranks[adapter.subspace_names[own]] += _lora_rank(adapter, coefficients)
    sides = []
    for module, bases in pack.subspace.modules.items():
        for side, dimension in enumerate(reversed(bases.shape)):
            # the rank of the stack is known of measured modules only
            max_components = min(ranks[module], dimension)
            if module in measured.sides:
                max_components = measured.sides[module][side].max_components
            sides.append((module, dimension, max_components))
    fixed = pack.summary.bytes.carried + sum(
        basis.singular_values.nbytes + 4 * basis.n_extra
        for bases in pack.subspace.modules.values()
        for basis in (bases.down, bases.up)
    )
    basis_width, coefficient_width = (
        storage_by_name(name).number_bytes for name in (pack.storage, pack.coefficient_storage)
    )
    return [
        fixed
        + round(
            sum(
                min(k, max_components) * (dimension * basis_width + ranks[module] * coefficient_width)
                for module, dimension, max_components in sides
            )
        )
        for k in measured.grid
    ]


def _left_out_at(measured: Measured, rows: Sequence[int], column: int) -> tuple[float | None, float, list[str]]:
    """Return leave-one-out figures for one number of components of the grid.

    Args:
        measured: Measurements with the original adapters.
        rows: Indices in `measured.chosen` of the adapters to count.
        column: Index in the grid.

    Returns:
        The mean error of the adapters left out, their mean error in equally many random components, and the names of
        those that share a subspace. If none was left out at this size: None, the mean error of all adapters in random
        components, and no names.
    """
    rows = [row for row in rows if not bool(measured.left_out_by_k[row, column].isnan())]
    if not rows:
        total = measured.total[measured.fitted]
        return None, statistics.fmean(spreads.relative(total - measured.random_by_k[:, column], total)), []
    indices = [measured.fitted[measured.chosen[row]] for row in rows]
    total, kept, expected = (
        measured.total[indices],
        measured.left_out_by_k[rows, column],
        measured.chance_by_k[rows, column],
    )
    shared = chance.sharing(kept, expected, measured.null.left_out_by_k[:, rows, column], total, measured.null)
    return (
        statistics.fmean(spreads.relative(total - kept, total)),
        statistics.fmean(spreads.relative(total - expected, total)),
        [measured.names[index] for index, shares in zip(indices, shared, strict=True) if shares],
    )
