"""From a pack, and the adapters that it was made of, to a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import threads
from ..core.options import to_int
from ..errors import OptionError
from ..fitting.fit import Progress
from ..formats.sources import Sources
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..version import __version__
from . import alternatives, frontier, measure, originals, relations, rows, spreads, verdict
from .analysis import groups
from .analysis.pairs import cosines
from .data import Collection, Evaluation, Frontier, TaskFrontier, Verdict
from .files import Report
from .measure import Measured
from .originals import Originals


def report(
    pack: Pack | str | Path,
    adapters: Sources | Originals | None = None,
    *,
    left_out: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Does this collection share a subspace, and what did recycling cost?

    pack: or the folder or Hub id of one. adapters: what it was made of, in any form that `fit` takes; they are
    recognised by their content. Without them, the report has what a pack alone can tell. left_out: how many adapters
    to leave out of the fit in turn; by default all, or a sample: 32 at most, and as many as can be done in a quarter of
    a minute. seed: of that sample, of random directions and of the division into halves. options: those of
    `read_adapter`.
    """
    originals.check_options(options)
    seed = to_int("seed", seed)
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed}.")
    if left_out is not None and to_int("left_out", left_out) < 1:
        raise OptionError(f"left_out must be at least 1, got {left_out}.")
    if adapters is None and left_out is not None:
        raise OptionError("left_out needs the original adapters: give them too, as `adapters`.")
    pack = pack if isinstance(pack, Pack) else Pack.from_pretrained(pack)
    adapters = None if adapters is None else originals.listed(adapters)
    say = progress or (lambda stage, done, total: None)
    found: Originals | None
    if adapters is None or isinstance(adapters, Originals):
        found = adapters
    else:
        found = originals.find(pack, adapters, say, **options)
    packed = {name: pack.packed(name) for name in pack.names}
    with threads.suited_to(measure.largest(pack, packed)):
        measured = measure.measure(pack, packed, found, seed, left_out, say) if found is not None else None
        beside = frontier.frontier(pack, packed, found, say) if found is not None else None
        return _assembled(pack, packed, found, measured, beside, seed, say)


def _assembled(
    pack: Pack,
    packed: Mapping[str, PackedAdapter],
    found: Originals | None,
    measured: Measured | None,
    beside: Frontier | None,
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
    copies = groups.duplicates(pairs)
    twins = {names[place] for group in copies for place in group}
    similarity, outlying, cosine, shared = relations.similarity(measured, pairs, names, copies, map_share)
    clusters = {name: number for number, one in enumerate(similarity.clusters) for name in one.adapters}
    alone = relations.neighbours(names, cosine, shared)
    if measured is not None:
        alone = {name: {**alone[name], **values} for name, values in rows.measured_of(pack, measured).items()}
    width, on_map = spreads.width(pack), dict(zip(trained, places.tolist(), strict=True))
    lines = [
        rows.adapter(name, one.record, width, alone.get(name, {}), clusters.get(name), on_map.get(name))
        for name, one in packed.items()
    ]
    lines.sort(key=lambda row: (-row.delta_error, row.name))
    owners = Counter(place for one in packed.values() for place in one.places.values())
    modules = [rows.module(pack, measured, name, owners[name]) for name in pack.info.modules]
    by_chance = alternatives.null(measured, pack, seed)
    empty = Report(
        eigenlorax_version=__version__,
        collection=_collection(pack, measured is not None),
        verdict=Verdict("", []),
        adapters=lines,
        modules=modules,
        module_errors=rows.module_errors(lines, measured, [module.name for module in modules]),
        in_fit=spreads.of({n: r.delta_error for n, r in pack.records.items() if r.in_fit and not r.untrained}),
        projected=spreads.of({n: r.delta_error for n, r in pack.records.items() if not r.in_fit and not r.untrained}),
        left_out=alternatives.left_out(measured, pack, seed, twins),
        null=by_chance,
        baselines=alternatives.baselines(pack, packed, lines, measured, by_chance),
        frontier=beside,
        starts=relations.starts(pack, packed, found, measured, seed, say),
        similarity=similarity,
        duplicates=[[names[place] for place in group] for group in copies],
        outliers=outlying,
        untrained=[name for name, record in pack.records.items() if record.untrained],
        bytes=alternatives.weights(pack, packed, found),
        sizes=alternatives.sizes(pack, packed, measured, twins),
        evaluations=[],
        task_frontiers=[],
        notes=_notes(pack, found, measured),
    )
    return replace(empty, verdict=verdict.of(empty))


def with_evaluations(
    one: Report, evaluations: Sequence[Evaluation], task_frontiers: Sequence[TaskFrontier] = ()
) -> Report:
    """The report with what became of the task, and a verdict that knows it."""
    more = replace(one, evaluations=list(evaluations), task_frontiers=list(task_frontiers))
    return replace(more, verdict=verdict.of(more))


def _collection(pack: Pack, with_originals: bool) -> Collection:
    summary, fit = pack.summary, pack.fit_info
    return Collection(
        base_model=pack.base_model,
        revision=pack.revision,
        adapters=len(pack),
        modules=len(pack.info.modules),
        ranks=summary.ranks,
        weighting=fit.weighting,
        sweeps=fit.sweeps,
        size=fit.size,
        dtype=summary.dtype,
        coefficient_dtype=summary.coefficient_dtype,
        fingerprint=pack.info.fingerprint,
        n_extra=pack.info.n_extra,
        excluded_modules=fit.excluded_modules,
        skipped=fit.skipped,
        with_originals=with_originals,
    )


def _notes(pack: Pack, found: Originals | None, measured: Measured | None) -> list[str]:
    notes = []
    if measured is None:
        notes.append(
            "Made from the pack alone: similarity, clusters and the map are of the adapters as they come back, and "
            "what needs the original adapters was not measured. `eigenlorax report PACK --adapters ADAPTER…` does."
        )
    if found is not None and found.missing:
        notes.append(
            f"No original was given of {', '.join(found.missing)}, which were projected: only what the pack knows of "
            "them is here."
        )
    if measured is not None and measured.chosen and len(measured.chosen) < len(measured.fitted):
        notes.append(
            f"{len(measured.chosen)} of {len(measured.fitted)} adapters were left out of the fit in turn, drawn at "
            "random; `left_out=` (`--left-out`) says how many."
        )
    measured_names = measured.names if measured is not None else []
    bounds = [name for name, record in pack.records.items() if record.bound and name not in measured_names]
    if bounds:
        notes.append(
            f"The delta errors of {', '.join(bounds)} are upper bounds: the pack was fitted again without their "
            "originals."
        )
    if pack.info.n_extended:
        notes.append(
            f"The subspace has grown by {pack.info.n_extended:,} directions of adapters that came later. Errors in the "
            "pack include them; k, spectra and what other sizes would lose are of the fit."
        )
    carried = [name for name, record in pack.records.items() if record.carried_bytes]
    if carried:
        notes.append(f"{len(carried)} adapters carry tensors as they are; those lose nothing and are in no error here.")
    return notes
