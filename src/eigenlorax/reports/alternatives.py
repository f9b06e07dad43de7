"""What else could be done with the same adapters: left out, baselines, other sizes; and what all of it weighs."""

import math
import statistics
from collections.abc import Mapping, Sequence

from .. import storages
from ..analysis import bytes as costs
from ..analysis import losses
from ..pack import Pack
from ..packed import PackedAdapter
from ..subspace import Coefficients
from ..summary import lora_numbers
from . import spreads
from .data import AdapterFigures, Baseline, Bytes, LeftOut, SizePoint
from .measure import Measured
from .originals import Originals

HALF = 0.5
"""The share that an adapter keeps in the subspace of the others if it is one of those that share it."""


def left_out(measured: Measured | None, pack: Pack, seed: int, twins: set[str]) -> LeftOut | None:
    """Of adapters without a copy in the fit, in which they would not be left out."""
    if measured is None:
        return None
    at = [measured.fitted[place] for place in measured.chosen]
    total = measured.total[at]
    errors = dict(
        zip((measured.names[i] for i in at), spreads.relative(total - measured.left_out_kept, total), strict=True)
    )
    errors = {name: lost for name, lost in errors.items() if name not in twins}
    if not errors:
        return None
    spread, in_fit = spreads.of(errors), spreads.of({name: pack.records[name].delta_error for name in errors})
    assert spread is not None
    assert in_fit is not None
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
    )


def baselines(
    pack: Pack, packed: Mapping[str, PackedAdapter], rows: Sequence[AdapterFigures], measured: Measured | None
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
    null = dict(
        zip(
            (measured.names[place] for place in measured.fitted),
            spreads.relative(measured.null_lost, measured.total[measured.fitted]),
            strict=True,
        )
    )

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
        baseline("null", "Gaussian adapters of the same ranks and norms, fitted alike", None, null),
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
    of_basis, of_own = (storages.by_name(name).number_bytes for name in (pack.storage, pack.coefficient_storage))
    alone = [row for row, place in enumerate(measured.chosen) if names[place] not in twins]
    chosen = [measured.fitted[measured.chosen[row]] for row in alone]
    found = []
    for index, k in enumerate(measured.grid):
        errors = dict(zip(names, spreads.relative(total - measured.by_k[:, index], total), strict=True))
        spread = spreads.of(errors)
        assert spread is not None
        random = spreads.relative(total - measured.random_by_k[:, index], total)
        kept = measured.left_out_by_k[alone, index]
        without = zip(chosen, spreads.relative(measured.total[chosen] - kept, measured.total[chosen]), strict=True)
        left = {measured.names[place]: lost for place, lost in without if not math.isnan(lost)}
        chance = statistics.fmean(random)
        stored = fixed + round(
            sum(min(k, most) * (dimension * of_basis + ranks[module] * of_own) for module, dimension, most in bases)
        )
        found.append(
            SizePoint(
                k=k,
                mean=spread.mean,
                worst=spread.worst,
                left_out=statistics.fmean(left.values()) if left else None,
                random=chance,
                stored_bytes=stored,
                ratio=b.lora / stored if stored else 1.0,
                sharing=[name for name, lost in left.items() if spreads.beyond_chance(lost, chance) >= HALF],
            )
        )
    return found
