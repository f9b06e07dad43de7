"""What else could be done with the same adapters: left out, baselines, other sizes; and what all of it weighs."""

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
from .data import AdapterFigures, Baseline, Bytes, LeftOut, Null, SizePoint
from .measure import Measured
from .originals import Originals


def left_out(measured: Measured | None, pack: Pack, seed: int, twins: set[str]) -> LeftOut | None:
    """Of adapters without a copy in the fit, in which they would not be left out."""
    if measured is None:
        return None
    rows = _alone(measured, twins)
    names = [measured.names[measured.fitted[measured.chosen[row]]] for row in rows]
    if not names:
        return None
    total = measured.total[[measured.fitted[measured.chosen[row]] for row in rows]]
    kept, expected = measured.left_out_kept[rows], measured.chance[rows]
    errors = dict(zip(names, spreads.relative(total - kept, total), strict=True))
    spread, in_fit = spreads.of(errors), spreads.of({name: pack.records[name].delta_error for name in errors})
    by_chance = spreads.of(dict(zip(names, spreads.relative(total - expected, total), strict=True)))
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
            "fitted again without the adapter, sweeps and all"
            if measured.exact
            else "fitted again without the adapter, and without sweeps where a module has many rows"
        ),
        errors=spread,
        standard_error=statistics.stdev(errors.values()) / math.sqrt(n) if n > 1 else 0.0,
        in_fit=in_fit,
        chance=by_chance.mean,
        kept=spreads.beyond_chance(spread.rms, by_chance.rms),
        kept_spread=chance.kept_by_strangers(measured.null, rows, expected, total),
        sharing=[name for name, shares in zip(names, shared, strict=True) if shares],
    )


def _alone(measured: Measured, twins: set[str]) -> list[int]:
    """Places in `measured.chosen` of those without a copy in the fit, in which they would not be left out."""
    return [row for row, place in enumerate(measured.chosen) if measured.names[measured.fitted[place]] not in twins]


def null(measured: Measured | None, pack: Pack, seed: int) -> Null | None:
    """The adapters of the fit if they shared nothing."""
    if measured is None or not measured.null.modules:
        return None
    total = {measured.names[place]: float(measured.total[place]) for place in measured.fitted}
    trained = [
        bases for module, bases in pack.subspace.modules.items() if measured.sides[module][0].null_energy is not None
    ]
    return chance.figures(measured.null, total, ([one.down for one in trained], [one.up for one in trained]), seed)


def baselines(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    rows: Sequence[AdapterFigures],
    measured: Measured | None,
    by_chance: Null | None,
) -> list[Baseline]:
    """Other ways to keep the adapters of the fit, on the same footing."""
    if measured is None or not measured.fitted:
        return []
    records = pack.records
    fitted = [row for row in rows if row.in_fit and not row.untrained]
    spent = pack.info.stored_bytes + sum(record.coefficient_bytes for record in records.values())
    width = spreads.width(pack)
    shapes = {module: bases.shape for module, bases in pack.subspace.modules.items()}
    at_bits = {
        bits: sum(
            losses.rounded_bytes(_rank(one, coefficients), *shapes[one.places[module]], bits)
            for one in packed.values()
            for module, coefficients in one.coefficients.items()
        )
        for bits in (8, 4)
    }
    mean_bytes = width * sum(n_in * n_out for n_out, n_in in shapes.values())
    random_bytes = sum(record.coefficient_bytes for record in records.values())

    def baseline(key: str, label: str, stored_bytes: int | None, errors: Mapping[str, float | None]) -> Baseline | None:
        spread = spreads.of({name: error for name, error in errors.items() if error is not None})
        return Baseline(key, label, spread, stored_bytes) if spread is not None else None

    def field(name: str) -> dict[str, float | None]:
        return {row.name: getattr(row, name) for row in fitted}

    found = [
        baseline("pack", "this pack", spent, field("delta_error")),
        baseline("left-out", "this subspace, fitted without the adapter", None, field("left_out_error")),
        baseline("mean", "the mean of the adapters in place of each", mean_bytes, field("mean_error")),
        baseline("mean-scaled", "the best multiple of their mean", mean_bytes, field("mean_scaled_error")),
        baseline("random", "random bases of the same k", random_bytes, field("random_error")),
        Baseline("null", "the same singular values in random directions, fitted alike", by_chance.errors, None)
        if by_chance is not None
        else None,
        baseline("truncated", "each LoRA cut by SVD to the same bytes", spent, field("truncated_error")),
        baseline("int8", "each LoRA rounded to 8 bits", at_bits[8], field("int8_error")),
        baseline("int4", "each LoRA rounded to 4 bits", at_bits[4], field("int4_error")),
    ]
    return [one for one in found if one is not None]


def weights(pack: Pack, packed: Mapping[str, PackedAdapter], found: Originals | None) -> Bytes:
    """What the collection weighs."""
    b, records = pack.summary.bytes, pack.records
    stored = None
    originals = found.adapters if found is not None else {}
    if len(originals) == sum(not record.untrained for record in records.values()):
        stored = b.carried + sum(
            one.specs[module].numbers * one.specs[module].dtype.itemsize
            for name, one in originals.items()
            for module in packed[name].places
        )
    n = max(len(records), 1)
    lora, each = b.lora / n, (b.coefficients + b.carried) / n
    return Bytes(
        lora_files=b.lora_files,
        lora_stored=stored,
        lora=b.lora,
        lora_float16=2 * lora_numbers(records) + b.carried,
        basis=b.basis,
        coefficients=b.coefficients,
        carried=b.carried,
        heads=b.heads,
        ratio=b.ratio,
        limit=b.ratio_without_basis,
        break_even=costs.break_even(lora, b.basis, each),
        over_n=costs.over_n(lora, b.basis, each, len(records)),
    )


def _rank(one: PackedAdapter, coefficients: Coefficients) -> int:
    """The rank that an adapter had in a module. Diagonal cores have more: then at most that, by all its modules."""
    return min(coefficients.rank, max(one.record.ranks))


def sizes(
    pack: Pack, packed: Mapping[str, PackedAdapter], measured: Measured | None, twins: set[str]
) -> list[SizePoint]:
    """The same collection at other k, with coefficients of the adapters' ranks. twins: those with a copy in the fit, in
    which they would not be left out."""
    if measured is None or not measured.fitted:
        return []
    total = measured.total[measured.fitted]
    names = [measured.names[place] for place in measured.fitted]
    bases = [
        (module, dimension, side.most)
        for module, pair in pack.subspace.modules.items()
        for dimension, side in zip(reversed(pair.shape), measured.sides[module], strict=True)
    ]
    ranks: dict[str, int] = dict.fromkeys(pack.info.modules, 0)
    for one in packed.values():
        for own, coefficients in one.coefficients.items():
            ranks[one.places[own]] += _rank(one, coefficients)
    b = pack.summary.bytes
    fixed = b.carried + sum(
        basis.singular_values.nbytes + 4 * basis.n_extra
        for pair in pack.subspace.modules.values()
        for basis in (pair.down, pair.up)
    )
    of_basis, of_own = (storage_by_name(name).number_bytes for name in (pack.storage, pack.coefficient_storage))
    alone = _alone(measured, twins)
    found = []
    for index, k in enumerate(measured.grid):
        errors = dict(zip(names, spreads.relative(total - measured.by_k[:, index], total), strict=True))
        spread = spreads.of(errors)
        assert spread is not None
        left, random, sharing = _left_out_at(measured, alone, index)
        by_chance = chance.relative(measured.null.by_k[:, :, index], total).mean(1)
        stored = fixed + round(
            sum(min(k, most) * (dimension * of_basis + ranks[module] * of_own) for module, dimension, most in bases)
        )
        found.append(
            SizePoint(
                k=k,
                mean=spread.mean,
                worst=spread.worst,
                null=float(by_chance.mean()),
                null_spread=measured.null.spread(by_chance),
                left_out=left,
                random=random,
                stored_bytes=stored,
                ratio=b.lora / stored if stored else 1.0,
                sharing=sharing,
            )
        )
    return found


def _left_out_at(measured: Measured, alone: Sequence[int], index: int) -> tuple[float | None, float, list[str]]:
    """At one of the sizes, the mean error of adapters that were left out, that of the same ones in as many random
    directions, and those that share a subspace. Where nobody was left out: None, and all in random directions."""
    rows = [row for row in alone if not bool(measured.left_out_by_k[row, index].isnan())]
    if not rows:
        total = measured.total[measured.fitted]
        return None, statistics.fmean(spreads.relative(total - measured.random_by_k[:, index], total)), []
    places = [measured.fitted[measured.chosen[row]] for row in rows]
    total, kept, expected = (
        measured.total[places],
        measured.left_out_by_k[rows, index],
        measured.chance_by_k[rows, index],
    )
    shared = chance.sharing(kept, expected, measured.null.left_out_by_k[:, rows, index], total, measured.null)
    return (
        statistics.fmean(spreads.relative(total - kept, total)),
        statistics.fmean(spreads.relative(total - expected, total)),
        [measured.names[place] for place, shares in zip(places, shared, strict=True) if shares],
    )
