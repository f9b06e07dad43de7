"""From a pack, and the adapters that it was made of, to a report."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..analysis import bytes as costs
from ..analysis import groups, losses
from ..analysis.pairs import Pairs, cosines, overlap
from ..basis import Basis
from ..errors import OptionError
from ..fitting import Progress
from ..formats.sources import Sources
from ..options import integer
from ..pack import Pack
from ..packed import PackedAdapter, Record
from ..version import __version__
from . import measure, originals, verdict
from .data import (
    SPECTRUM,
    AdapterFigures,
    Baseline,
    Bytes,
    Cluster,
    Collection,
    Evaluation,
    LeftOut,
    ModuleFigures,
    Report,
    SideFigures,
    Similarity,
    SizePoint,
    Spread,
    StartEnergy,
    StartGroup,
    Starts,
    Verdict,
)
from .measure import Measured
from .originals import Originals


def report(
    pack: Pack,
    adapters: Sources | Originals | None = None,
    *,
    left_out: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Does this collection share a subspace, and what did recycling cost?

    adapters: what the pack was made of, in any form that `fit` takes; they are recognised by their content. Without
    them, the report has what a pack alone can tell. left_out: how many adapters to leave out of the fit in turn; by
    default all, or a sample of as many as can be done in about a minute. seed: of that sample, of random bases and of
    the division into halves. options: those of `read_adapter`.
    """
    seed = integer("seed", seed)
    if left_out is not None and integer("left_out", left_out) < 1:
        raise OptionError(f"left_out must be at least 1, got {left_out}.")
    say = progress or (lambda stage, done, total: None)
    found = adapters
    if adapters is not None and not isinstance(adapters, Originals):
        found = originals.find(pack, adapters, say, **options)
    packed = {name: pack.packed(name) for name in pack.names}
    measured = measure.measure(pack, packed, found, seed, left_out, say) if found is not None else None
    return _assembled(pack, packed, found, measured, seed, say)


def _assembled(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    found: Originals | None,
    measured: Measured | None,
    seed: int,
    say: Progress,
) -> Report:
    trained = [name for name, one in packed.items() if not one.record.untrained]
    members = [packed[name] for name in trained]
    if measured is not None:
        names, pairs = measured.names, measured.pairs
        recycled = measure.products_as_packed(pack, members, say)
    else:
        names, pairs = trained, measure.as_packed(pack, members, say)
        recycled = pairs.delta
    places, map_share = groups.on_a_map(cosines(recycled))
    similarity, cosine, shared = _similarity(measured, pairs, names, map_share)
    clusters = {name: number for number, one in enumerate(similarity.clusters) for name in one.adapters}
    grouped = [names.index(name) for name in clusters]
    outlying = [names[place] for place in groups.outliers(shared, grouped)]
    twins = [[names[place] for place in group] for group in groups.duplicates(pairs)]
    alone = _neighbours(names, cosine, shared)
    if measured is not None:
        alone = {name: {**alone[name], **values} for name, values in _alone(pack, measured).items()}
    width, on_map = _width(pack), dict(zip(trained, places.tolist(), strict=True))
    rows = [
        _adapter(name, one.record, width, alone.get(name, {}), clusters.get(name), on_map.get(name))
        for name, one in packed.items()
    ]
    rows.sort(key=lambda row: (-row.delta_error, row.name))
    owners = Counter(place for one in packed.values() for place in one.places.values())
    modules = [_module(pack, measured, name, owners[name]) for name in pack.info.modules]
    empty = Report(
        eigenlorax_version=__version__,
        collection=_collection(pack, measured is not None),
        verdict=Verdict("", []),
        adapters=rows,
        modules=modules,
        module_errors=_module_errors(rows, measured, [module.name for module in modules]),
        in_fit=_spread({n: r.delta_error for n, r in pack.records.items() if r.in_fit and not r.untrained}),
        projected=_spread({n: r.delta_error for n, r in pack.records.items() if not r.in_fit and not r.untrained}),
        left_out=_left_out(measured, pack, seed),
        baselines=_baselines(pack, packed, rows, measured),
        starts=_starts(pack, packed, found, measured, say),
        similarity=similarity,
        duplicates=twins,
        outliers=outlying,
        untrained=[name for name, record in pack.records.items() if record.untrained],
        bytes=_bytes(pack, packed, found),
        sizes=_sizes(pack, packed, measured),
        evaluations=[],
        notes=_notes(pack, found, measured),
    )
    return replace(empty, verdict=verdict.of(empty))


def with_evaluations(one: Report, evaluations: Sequence[Evaluation]) -> Report:
    """The report with what became of the task, and a verdict that knows it."""
    more = replace(one, evaluations=list(evaluations))
    return replace(more, verdict=verdict.of(more))


def _collection(pack: Pack, with_originals: bool) -> Collection:
    summary, fit = pack.summary, pack.fit_info
    if fit.max_error is not None:
        size = f"as many components as keep every delta error at most {fit.max_error:g}"
    elif fit.energy is not None:
        size = f"as many components as keep energy {fit.energy:g}"
    else:
        size = f"at most {fit.n_components} components" + (", chosen by held-out error" if fit.auto else "")
    return Collection(
        base_model=pack.base_model,
        revision=pack.revision,
        adapters=len(pack),
        modules=len(pack.info.modules),
        ranks=summary.ranks,
        weighting=fit.weighting,
        sweeps=fit.sweeps,
        size=size,
        dtype=summary.dtype,
        coefficient_dtype=summary.coefficient_dtype,
        fingerprint=pack.info.fingerprint,
        n_extra=pack.info.n_extra,
        excluded_modules=fit.excluded_modules,
        skipped=fit.skipped,
        with_originals=with_originals,
    )


def _spread(errors: Mapping[str, float]) -> Spread | None:
    if not errors:
        return None
    values = list(errors.values())
    worst = max(errors, key=lambda name: (errors[name], name))
    rms = math.sqrt(math.fsum(value**2 for value in values) / len(values))
    return Spread(len(values), statistics.fmean(values), rms, errors[worst], worst)


def _relative(lost: Tensor, total: Tensor) -> list[float]:
    tiny = torch.finfo(total.dtype).tiny
    found: list[float] = (lost.clamp_min(0) / total.clamp_min(tiny)).sqrt().tolist()
    return found


def _alone(pack: Pack, measured: Measured) -> dict[str, dict[str, Any]]:
    """What is measured of each adapter with its original, by its name and the fields of `AdapterFigures`."""
    total, names, pairs = measured.total, measured.names, measured.pairs
    random = _relative(total - measured.random, total)
    down, up = _relative(measured.down_lost, measured.down_total), _relative(measured.up_lost, measured.up_total)
    eight, four = (_relative(measured.rounded[bits], total) for bits in (8, 4))
    cut = _truncated(pack, measured)
    plain, scaled = [math.nan] * len(names), [math.nan] * len(names)
    if measured.fitted:
        for place, a, b in zip(measured.fitted, *_of_the_mean(pairs, measured.fitted), strict=True):
            plain[place], scaled[place] = a, b
    others = {}
    for row, place in enumerate(measured.chosen):
        at = measured.fitted[place]
        others[at] = _relative(total[at] - measured.left_out_kept[row], total[at])
    found = {}
    for place, name in enumerate(names):
        found[name] = {
            "norm": math.sqrt(float(total[place])),
            "factor_error_down": down[place],
            "factor_error_up": up[place],
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


def _neighbours(names: Sequence[str], cosine: Tensor, shared: Tensor) -> dict[str, dict[str, Any]]:
    """Of each adapter, who is nearest to it, and how much the others have of its directions."""
    n = len(names)
    if n < 2:
        return {name: {} for name in names}
    others = cosine.clone().fill_diagonal_(0.0)
    # an adapter is not its own neighbour, also where it has nothing in common with anybody
    nearest = others.abs().fill_diagonal_(-1.0).argmax(1).tolist()
    common = ((shared.sum(1) - shared.diagonal()) / (n - 1)).tolist()
    return {
        name: {"nearest": names[near], "nearest_cosine": float(others[place, near]), "overlap": common[place]}
        for place, (name, near) in enumerate(zip(names, nearest, strict=True))
    }


def _adapter(
    name: str, record: Record, width: int, alone: Mapping[str, Any], cluster: int | None, place: Sequence[float] | None
) -> AdapterFigures:
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
    numbers = sum(record.lora_numbers for record in records.values())
    width = _width(pack)
    kept = []
    for place, name in enumerate(measured.names):
        budget = spent * records[name].lora_numbers / numbers
        values = [squares[place] for _, squares in measured.singular]
        kept.append(losses.truncated(values, [width * cost for cost, _ in measured.singular], budget))
    return _relative(measured.total - torch.tensor(kept, dtype=torch.float64), measured.total)


def _width(pack: Pack) -> int:
    """Bytes of a number of the LoRAs that ratios are taken of: the pack's narrower dtype."""
    return min(pack.dtype.itemsize, pack.coefficient_dtype.itemsize)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _module(pack: Pack, measured: Measured | None, name: str, adapters: int) -> ModuleFigures:
    bases, info = pack.subspace.modules[name], pack.info.modules[name]
    sides = {}
    for index, side in enumerate(("down", "up")):
        basis = bases.side(side)
        values = basis.singular_values.to(torch.float64)
        other = measured.sides[name][index] if measured is not None else measure.Side([], [], None)
        total = values.square().sum()
        sides[side] = SideFigures(
            dimension=basis.dimension,
            k=basis.k - basis.n_extra,
            rank=_rank(basis),
            energy=info[side].energy,
            spectrum=(values.square()[:SPECTRUM] / total).tolist() if total > 0 else [],
            null=other.null,
            angles=other.angles,
            halves_overlap=other.halves_overlap,
        )
    layer = _NUMBER.search(name)
    errors = {}
    if measured is not None:
        errors = {
            adapter: error
            for adapter, error in zip(measured.names, measured.errors[name], strict=True)
            if error is not None
        }
    worst = max(errors, key=lambda adapter: (errors[adapter], adapter)) if errors else None
    return ModuleFigures(
        name=name,
        layer=int(layer[0]) if layer else None,
        kind=_NUMBER.sub("*", name),
        adapters=adapters,
        down=sides["down"],
        up=sides["up"],
        delta_error=measured.weighted.get(name) if measured is not None else None,
        worst=worst,
        worst_error=errors[worst] if worst is not None else None,
    )


def _rank(basis: Basis) -> int:
    """Directions of the stack that was fitted; its spectrum is kept in float32."""
    values = basis.singular_values
    return linalg.numerical_rank(values, (basis.dimension, basis.dimension)) if len(values) else 0


def _module_errors(
    rows: Sequence[AdapterFigures], measured: Measured | None, modules: Sequence[str]
) -> list[list[float | None]]:
    if measured is None:
        return []
    places = {name: place for place, name in enumerate(measured.names)}
    return [
        [measured.errors[module][places[row.name]] if row.name in places else None for module in modules]
        for row in rows
    ]


def _left_out(measured: Measured | None, pack: Pack, seed: int) -> LeftOut | None:
    if measured is None or not measured.chosen:
        return None
    at = [measured.fitted[place] for place in measured.chosen]
    total = measured.total[at]
    errors = dict(zip((measured.names[i] for i in at), _relative(total - measured.left_out_kept, total), strict=True))
    spread, in_fit = _spread(errors), _spread({name: pack.records[name].delta_error for name in errors})
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


def _baselines(
    pack: Pack, packed: Mapping[str, PackedAdapter], rows: Sequence[AdapterFigures], measured: Measured | None
) -> list[Baseline]:
    if measured is None or not measured.fitted:
        return []
    records = pack.records
    fitted = [row for row in rows if row.in_fit and not row.untrained]
    spent = pack.info.stored_bytes + sum(record.coefficient_bytes for record in records.values())
    width = _width(pack)
    shapes = {module: bases.shape for module, bases in pack.subspace.modules.items()}
    at_bits = {
        bits: sum(
            losses.rounded_bytes(coefficients.rank, *shapes[one.places[module]], bits)
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
            _relative(measured.null_lost, measured.total[measured.fitted]),
            strict=True,
        )
    )

    def baseline(key: str, label: str, stored_bytes: int | None, errors: Mapping[str, float | None]) -> Baseline | None:
        spread = _spread({name: error for name, error in errors.items() if error is not None})
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


def _starts(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    found: Originals | None,
    measured: Measured | None,
    say: Progress,
) -> Starts | None:
    if found is None or measured is None:
        return None
    names, pairs = measured.names, measured.pairs
    members = groups.same_start(pairs)
    if not members:
        return Starts([], [])
    down, up = cosines(pairs.down), cosines(pairs.up)
    described = [
        StartGroup([names[i] for i in group], groups.within(down, group), groups.within(up, group)) for group in members
    ]
    inside = {name for group in described for name in group.adapters}
    sets = {"all": names} | {f"group {number}": group.adapters for number, group in enumerate(described, 1)}
    others = [name for name in names if name not in inside]
    if others:
        sets["others"] = others
    k = max(max(packed[name].record.ranks) for name in names)
    rows = measure.energies(pack, packed, found, sets, k, say)
    return Starts(described, [StartEnergy(who, len(sets[who]), k, *values) for who, values in rows.items()])


def _similarity(
    measured: Measured | None, pairs: Pairs, names: list[str], map_share: float
) -> tuple[Similarity, Tensor, Tensor]:
    cosine, shared = cosines(pairs.delta), overlap(pairs)
    found = groups.clustering(shared)
    order = found.order
    ordered = cosine[order][:, order]
    off = len(names) * (len(names) - 1)
    explained = groups.mean_losses(pairs)[2]
    # the order of leaves is that of the rows and columns: the tree speaks of places in it
    place = {leaf: rank for rank, leaf in enumerate(order)}
    tree = [
        [*(float(place.get(int(one), int(one))) for one in row[:2]), float(row[2]), float(row[3])] for row in found.tree
    ]
    return (
        Similarity(
            of="originals" if measured is not None else "pack",
            names=[names[leaf] for leaf in order],
            cosine=ordered.tolist(),
            overlap=shared[order][:, order].tolist(),
            tree=tree,
            clusters=[
                Cluster([names[i] for i in one], groups.within(shared, one), groups.between(shared, one))
                for one in found.clusters
            ],
            silhouette=found.silhouette,
            map_share=map_share if len(names) > 1 else None,
            mean_cosine=float((cosine.sum() - len(names)) / off) if off else None,
            mean_energy=float(explained.mean()) if len(names) > 1 else None,
        ),
        cosine,
        shared,
    )


def _bytes(pack: Pack, packed: Mapping[str, PackedAdapter], found: Originals | None) -> Bytes:
    b, records = pack.summary.bytes, pack.records
    numbers = sum(record.lora_numbers for record in records.values())
    stored = None
    if found is not None and not found.missing and len(found.adapters) == len(records):
        stored = b.carried + sum(
            one.specs[module].numbers * one.specs[module].dtype.itemsize
            for name, one in found.adapters.items()
            for module in packed[name].places
        )
    n = max(len(records), 1)
    lora, each = b.lora / n, (b.coefficients + b.carried) / n
    return Bytes(
        lora_files=b.lora_files,
        lora_stored=stored,
        lora=b.lora,
        lora_float16=2 * numbers + b.carried,
        basis=b.basis,
        coefficients=b.coefficients,
        carried=b.carried,
        heads=b.heads,
        ratio=b.ratio,
        limit=b.ratio_without_basis,
        break_even=costs.break_even(lora, b.basis, each),
        over_n=costs.over_n(lora, b.basis, each, len(records)),
    )


def _sizes(pack: Pack, packed: Mapping[str, PackedAdapter], measured: Measured | None) -> list[SizePoint]:
    if measured is None or not measured.fitted:
        return []
    total = measured.total[measured.fitted]
    names = [measured.names[place] for place in measured.fitted]
    bases = [
        (module, basis.dimension, _rank(basis))
        for module, pair in pack.subspace.modules.items()
        for basis in (pair.down, pair.up)
    ]
    ranks: dict[str, int] = dict.fromkeys(pack.info.modules, 0)
    for one in packed.values():
        for own, coefficients in one.coefficients.items():
            ranks[one.places[own]] += coefficients.rank
    b = pack.summary.bytes
    fixed = b.carried + sum(
        basis.singular_values.nbytes + 4 * basis.n_extra
        for pair in pack.subspace.modules.values()
        for basis in (pair.down, pair.up)
    )
    chosen = [measured.fitted[place] for place in measured.chosen]
    found = []
    for index, k in enumerate(measured.grid):
        errors = dict(zip(names, _relative(total - measured.by_k[:, index], total), strict=True))
        spread = _spread(errors)
        assert spread is not None
        random = _relative(total - measured.random_by_k[:, index], total)
        left = _relative(measured.total[chosen] - measured.left_out_by_k[:, index], measured.total[chosen])
        left = [value for value in left if not math.isnan(value)]
        stored = fixed + sum(
            min(k, rank) * (dimension * pack.dtype.itemsize + ranks[module] * pack.coefficient_dtype.itemsize)
            for module, dimension, rank in bases
        )
        found.append(
            SizePoint(
                k=k,
                mean=spread.mean,
                worst=spread.worst,
                left_out=statistics.fmean(left) if left else None,
                random=statistics.fmean(random),
                stored_bytes=stored,
                ratio=b.lora / stored if stored else 1.0,
            )
        )
    return found


def _notes(pack: Pack, found: Originals | None, measured: Measured | None) -> list[str]:
    notes = []
    if measured is None:
        notes.append(
            "Made from the pack alone: similarity, clusters and the map are of the adapters as they come back, and what "
            "needs the original adapters was not measured. `eigenlorax report PACK --adapters ADAPTER…` measures it."
        )
    if found is not None and found.missing:
        notes.append(
            f"No original was given of {', '.join(found.missing)}, which were projected: only what the pack knows of "
            "them is here."
        )
    if measured is not None and measured.chosen and len(measured.chosen) < len(measured.fitted):
        notes.append(
            f"{len(measured.chosen)} of {len(measured.fitted)} adapters were left out of the fit in turn, drawn at "
            "random; --left-out says how many."
        )
    carried = [name for name, record in pack.records.items() if record.carried_bytes]
    if carried:
        notes.append(f"{len(carried)} adapters carry tensors as they are; those lose nothing and are in no error here.")
    return notes
