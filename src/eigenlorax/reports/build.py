"""Make the report of a pack, with or without the adapters that it was fitted to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import threads
from ..core.options import to_int
from ..core.progress import Progress
from ..errors import OptionError
from ..formats.sources import Sources
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..version import __version__
from . import (
    alternatives,
    frontier,
    histories,
    measure,
    module_sample,
    originals,
    relations,
    rows,
    sampling_errors,
    spreads,
    verdict,
)
from .comparison_data import Baseline, Null
from .data import AdapterFigures, Collection, Verdict
from .files import Report
from .measured import SampledMeasurements
from .module_sample import ModuleSample
from .originals import Originals
from .related import Related, ReportSources, find_related
from .task_data import Evaluation, TaskFrontier

HISTORIES_ONLY = (
    "The pack has histories only, which the report measures as they are stored. Remove adapters (--adapters)."
)


def report(
    pack: Pack | str | Path,
    adapters: Sources | Originals | None = None,
    *,
    left_out: int | None = None,
    full: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Measure whether the adapters of a pack share a subspace, and their errors in the pack.

    Of histories, the report shows the path of the versions, their bytes and metrics, and the error of a version in a
    subspace of the others.

    Args:
        pack: The pack, or its folder or Hub id.
        adapters: The original adapters, in any form that `fit` takes. They are recognised by their content. Without
            them, most figures cannot be measured.
        left_out: Number of adapters to leave out of the fit in turn. Default: all, or a random sample of at most 32,
            and of 8 if they take long.
        full: Measure all modules, and leave out each adapter. Default: False, which measures as many modules of a
            large collection as take about half the time of the fit, and states the standard errors.
        seed: Seed of these samples, of random components and of the division into halves, from 0 to 2**63 - 1.
        progress: Callback with the arguments (stage, done, total).
        **options: Options of `read_adapter`, such as `allow_pickle`.

    Returns:
        The report; `Report.save` writes it as HTML, Markdown or JSON.

    Raises:
        OptionError: An option is out of range, an adapter of the fit is not among `adapters`, or these are passed for a
            pack of histories only.
        TypeError: An option is unknown.

    Example:
        >>> report = eigenlorax.report(pack, "adapters/")
        >>> report.verdict.headline.startswith("These 3 adapters")
        True
    """
    originals.check_options(options)
    seed = to_int("seed", seed)
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed}.")
    if left_out is not None and to_int("left_out", left_out) < 1:
        raise OptionError(f"left_out must be at least 1, got {left_out}.")
    for option, is_given in {"left_out": left_out is not None, "full": full}.items():
        if adapters is None and is_given:
            raise OptionError(f"{option} needs the original adapters. Pass them as `adapters`.")
    pack = pack if isinstance(pack, Pack) else Pack.from_pretrained(pack)
    progress = progress or (lambda stage, done, total: None)
    if not pack.names:
        return _report_on_histories(pack, adapters, progress)
    matched = None
    if adapters is not None:
        listed = originals.listed(adapters)
        matched = listed if isinstance(listed, Originals) else originals.find(pack, listed, progress, **options)
    packed = {}
    for done, name in enumerate(pack.names):
        progress("reading the pack", done, len(pack))
        packed[name] = pack.packed(name)
    progress("reading the pack", len(pack), len(pack))
    with threads.suited_to(measure.largest(pack, packed)):
        sampled = None
        if matched is not None:
            sample = _sample(pack, packed, left_out, full, seed)
            sampled = measure.measure(pack, packed, matched, seed, sample, progress)
        return _assemble(ReportSources(pack, packed, matched, sampled, seed, progress))


def _sample(
    pack: Pack, packed: Mapping[str, PackedAdapter], left_out: int | None, full: bool, seed: int
) -> ModuleSample:
    """Choose the modules to measure, and the number of adapters to leave out of the fit."""
    sizes, k = measure.module_sizes(pack, packed), measure.largest_k(pack)
    if left_out is not None:
        left_out = min(left_out, len(pack))
    if full:
        return ModuleSample.whole(sizes, k, len(pack) if left_out is None else left_out)
    return module_sample.choose(sizes, k, left_out, seed)


def _report_on_histories(pack: Pack, adapters: Sources | Originals | None, progress: Progress) -> Report:
    """Return the report of a pack that has no adapters beside histories."""
    if not pack.histories:
        raise OptionError("The pack has no adapter to report on. Add some with `eigenlorax add`.")
    if adapters is not None:
        raise OptionError(HISTORIES_ONLY)
    report = Report(
        eigenlorax_version=__version__,
        collection=_collection(pack, False),
        verdict=Verdict("", []),
        adapters=[],
        modules=[],
        module_errors=[],
        in_fit=None,
        projected=None,
        left_out=None,
        null=None,
        baselines=[],
        frontier=None,
        starts=None,
        similarity=None,
        duplicates=[],
        outliers=[],
        untrained=[],
        runs=[],
        histories=histories.measure(pack, progress),
        bytes=alternatives.weights(pack, {}, None),
        sizes=[],
        evaluations=[],
        task_frontiers=[],
        sampling=None,
        notes=[],
    )
    return replace(report, verdict=verdict.conclude(report))


def _assemble(sources: ReportSources) -> Report:
    pack, packed, matched, measured = sources.pack, sources.packed, sources.originals, sources.measured
    sampled = sources.sampled
    related = find_related(sources)
    figures = _adapter_figures(sources, related)
    replicated = _fields_of_replicates(sources)
    users = Counter(module for adapter in packed.values() for module in adapter.subspace_names.values())
    modules = [rows.module(pack, measured, name, users[name]) for name in pack.info.modules]
    null = sampling_errors.null(sampled, lambda each: alternatives.null(each, pack, sources.seed))
    trained = {name: record for name, record in pack.records.items() if not record.untrained}
    report = Report(
        eigenlorax_version=__version__,
        collection=_collection(pack, measured is not None),
        verdict=Verdict("", []),
        adapters=figures,
        modules=modules,
        module_errors=rows.module_errors(figures, measured, [module.name for module in modules]),
        in_fit=spreads.summarise({name: record.delta_error for name, record in trained.items() if record.in_fit}),
        projected=spreads.summarise(
            {name: record.delta_error for name, record in trained.items() if not record.in_fit}
        ),
        left_out=sampling_errors.left_out(
            sampled, lambda each: alternatives.left_out(each, pack, sources.seed, related.copies)
        ),
        null=null,
        baselines=_baselines(sources, figures, null, replicated),
        frontier=(
            frontier.frontier(pack, packed, matched, sources.seed, sources.progress) if matched is not None else None
        ),
        starts=relations.starts(pack, packed, matched, measured, sources.seed, sources.progress),
        similarity=related.similarity,
        duplicates=related.duplicates,
        outliers=related.outliers,
        untrained=[name for name, record in pack.records.items() if record.untrained],
        runs=related.runs,
        histories=histories.measure(pack, sources.progress),
        bytes=alternatives.weights(pack, packed, matched),
        sizes=sampling_errors.sizes(sampled, lambda each: alternatives.sizes(pack, packed, each, related.copies)),
        evaluations=[],
        task_frontiers=[],
        sampling=sampling_errors.sampling(sampled, replicated, sources.seed),
        notes=_notes(pack, matched, sampled),
    )
    return replace(report, verdict=verdict.conclude(report))


def _adapter_figures(sources: ReportSources, related: Related) -> list[AdapterFigures]:
    """Return the figures of every adapter, the largest delta error first."""
    measured = (
        {}
        if sources.sampled is None
        else rows.measured_fields(sources.pack, sources.sampled.whole, sources.sampled.norms)
    )
    clusters = {name: number for number, cluster in enumerate(related.similarity.clusters) for name in cluster.adapters}
    lora_width = spreads.width(sources.pack)
    figures = [
        rows.adapter(
            name,
            adapter.record,
            lora_width,
            {**related.neighbours.get(name, {}), **measured.get(name, {})},
            clusters.get(name),
            related.positions.get(name),
        )
        for name, adapter in sources.packed.items()
    ]
    return sorted(figures, key=lambda figures: (-figures.delta_error, figures.name))


def _fields_of_replicates(sources: ReportSources) -> list[dict[str, dict[str, Any]]]:
    """Return the measured fields of every adapter, for each replicate of the sample of modules."""
    if sources.sampled is None:
        return []
    norms = sources.sampled.norms
    return [rows.measured_fields(sources.pack, replicate, norms) for replicate in sources.sampled.replicates()]


def _baselines(
    sources: ReportSources,
    figures: Sequence[AdapterFigures],
    null: Null | None,
    replicated: Sequence[Mapping[str, Mapping[str, Any]]],
) -> list[Baseline]:
    pack, packed, sampled = sources.pack, sources.packed, sources.sampled
    if sampled is None:
        return []
    others = []
    for replicate, fields in zip(sampled.replicates(), replicated, strict=True):
        of_replicate = [replace(each, **fields[each.name]) if each.name in fields else each for each in figures]
        null_of_replicate = alternatives.null(replicate, pack, sources.seed)
        others.append(alternatives.baselines(pack, packed, of_replicate, replicate, null_of_replicate))
    of_sample = alternatives.baselines(pack, packed, figures, sampled.whole, null)
    return sampling_errors.baselines(sampled, of_sample, others)


def with_evaluations(
    report: Report, evaluations: Sequence[Evaluation], task_frontiers: Sequence[TaskFrontier] = ()
) -> Report:
    """Return the report with scores on tasks, and a verdict that includes them."""
    evaluated = replace(report, evaluations=list(evaluations), task_frontiers=list(task_frontiers))
    return replace(evaluated, verdict=verdict.conclude(evaluated))


def _collection(pack: Pack, with_originals: bool) -> Collection:
    summary, fit = pack.summary, pack.fit_info
    return Collection(
        base_model=pack.base_model,
        revision=pack.revision,
        adapters=len(pack),
        modules=len(pack.info.modules),
        ranks=summary.ranks,
        # packs of formats before 7 do not state it
        purpose=fit.purpose or ("storage" if pack.is_coded else "training"),
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


def _notes(pack: Pack, matched: Originals | None, sampled: SampledMeasurements | None) -> list[str]:
    notes = []
    measured = sampled.whole if sampled is not None else None
    if measured is None:
        notes.append(
            "Made from the pack alone: similarity, clusters and the map are of the reconstructed adapters. To measure "
            "the other figures, pass the originals: `eigenlorax report PACK --adapters ADAPTER…`."
        )
    if matched is not None and matched.missing:
        notes.append(
            f"No originals were passed of these projected adapters: {', '.join(matched.missing)}. The report has only "
            "figures that the pack records."
        )
    if sampled is not None and not sampled.sample.is_whole:
        notes.append(
            f"{len(sampled.sample.modules):,} of {sampled.sample.of:,} modules were measured, drawn at random by kind; "
            "± is the standard error of this sample. `full=True` (`--full`) measures all modules."
        )
    if measured is not None and measured.chosen and len(measured.chosen) < len(measured.fitted):
        notes.append(
            f"{len(measured.chosen)} of {len(measured.fitted)} adapters were left out of the fit in turn, drawn at "
            "random; `left_out=` (`--left-out`) sets the number."
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
            f"{pack.info.n_extended:,} components were added for later adapters. Errors in the pack include these "
            "components; k, spectra and errors at other sizes do not."
        )
    carried = [name for name, record in pack.records.items() if record.carried_bytes]
    if carried:
        notes.append(
            f"{len(carried)} adapters have carried tensors, outside the subspace. The errors here do not include them."
        )
    return notes
