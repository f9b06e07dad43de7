"""Task scores against size, on the same rows.

The original adapters are fitted again at several compression ratios. The baseline of each fit truncates and rounds
every original adapter by itself, to the same total number of bytes.
"""

import glob
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from ..core import module_names
from ..core.adapter import Adapter, LazyMapping
from ..core.batch import ModuleBatch, pad_factors
from ..core.options import to_float
from ..core.progress import Progress
from ..errors import OptionError
from ..fitting import fit as fitting
from ..pack.pack import Pack
from ..pack.summary import lora_numbers
from ..reports.analysis import per_adapter
from ..reports.analysis.per_adapter import Cut
from ..reports.frontier import FIT
from ..reports.measure import own_name
from ..reports.task_data import Evaluation, TaskFrontier, TaskPoint, TaskRun
from . import figures, recycled_evaluation
from .adapter_versions import ORIGINAL, WITHOUT_UPDATE
from .recycled_evaluation import RECYCLED, EvaluationJob, EvaluationPlan, JobScores

TRUNCATED = per_adapter.BOTH
"""Method of the baseline: each adapter truncated by SVD and rounded, without a shared basis."""

ScoredJobs = Sequence[tuple[EvaluationJob, JobScores]]
"""Jobs of one task with their scores."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One method of storing all original adapters, at one size.

    Attributes:
        method: Method, as in `TaskPoint.way`.
        ratio: Compression ratio that was requested; None for the pack itself. For a baseline, ratio of its fit.
        stored_bytes: Bytes of all adapters with carried tensors, without heads.
        worst: Largest relative error of an adapter.
        mean: Mean relative error of the adapters.
        adapter: Function that returns a stored adapter by its name.
    """

    method: str
    ratio: float | None
    stored_bytes: int
    worst: float
    mean: float
    adapter: Callable[[str], Adapter]

    @property
    def label(self) -> str:
        """Name of the version in evaluations; no two versions have the same."""
        if self.ratio is None:
            return RECYCLED
        return f"ratio {self.ratio:.12g}" + (", cut and rounded" if self.method == TRUNCATED else "")


@dataclass(frozen=True, slots=True)
class StoredVersions:
    """The pack, the new fits, and their baselines.

    Attributes:
        adapters: Number of adapters whose bytes are counted.
        lora_float16: Bytes of the LoRA factors at two bytes per number, with carried tensors.
        versions: The pack first, then each fit followed by its baseline.
    """

    adapters: int
    lora_float16: int
    versions: Sequence[StoredVersion]


def check(ratios: Sequence[int | float]) -> list[float]:
    """Return the ratios in ascending order without duplicates.

    Args:
        ratios: Compression ratios, at least 1 each.

    Raises:
        OptionError: There is no ratio, or a ratio is below 1 or not a number.
    """
    checked = [to_float("ratio", ratio) for ratio in ratios]
    for ratio in checked:
        if not 1 <= ratio < math.inf:
            raise OptionError(f"a ratio is the size of the LoRAs divided by that of the pack, 1 or more, got {ratio}.")
    if not checked:
        raise OptionError("the frontier needs at least one ratio. Pass some, such as 5, 20 and 50.")
    return sorted(set(checked))


def prepare(
    pack: Pack,
    originals: Mapping[str, Adapter],
    plan: EvaluationPlan,
    ratios: Sequence[int | float],
    progress: Progress | None = None,
) -> StoredVersions:
    """Fit the original adapters again at each ratio, and make the baseline of each fit.

    Modules that the pack's fit excluded stay excluded.

    Args:
        pack: Pack of the adapters.
        originals: Name in the pack → original adapter.
        plan: Result of `recycled_evaluation.prepare`.
        ratios: Compression ratios, at least 1 each.
        progress: Function that is called with (stage, done, total). The first stage describes all work to come.

    Raises:
        OptionError: A ratio is invalid or cannot be reached.
    """
    ratios = check(ratios)
    report = progress or (lambda stage, done, total: None)
    stage = _describe_work(plan.jobs, len(ratios))
    # heads would take the bytes of small LoRAs, and all versions have the originals' heads
    adapters = [replace(adapter, name=name, heads={}) for name, adapter in originals.items()]
    excluded = _excluded_patterns(pack, adapters)
    packs: list[Pack] = []
    for done, ratio in enumerate(ratios):
        report(stage, done, len(ratios))
        packs.append(
            fitting.fit(
                adapters,
                ratio=ratio,
                head_error=0,
                exclude_modules=excluded,
                same_base=True,
                warn_above=1.0,
                progress=report,
            )
        )
    report(stage, len(ratios), len(ratios))
    own = _pack_version("pack", None, pack, originals)
    fits = [_pack_version(FIT, ratio, fitted, originals) for ratio, fitted in zip(ratios, packs, strict=True)]
    records = packs[0].records
    carried = sum(record.carried_bytes for record in records.values())
    lora_float16 = 2 * lora_numbers(records) + carried
    truncated = _truncated_versions(originals, packs[0], fits, carried, report)
    return StoredVersions(len(adapters), lora_float16, [own, *chain.from_iterable(zip(fits, truncated, strict=True))])


def run(
    originals: Mapping[str, Adapter], plan: EvaluationPlan, stored: StoredVersions, progress: Progress | None = None
) -> tuple[list[Evaluation], list[TaskFrontier]]:
    """Evaluate all versions. The predictions of the original adapters are computed once for all versions.

    Args:
        originals: Name in the pack → original adapter.
        plan: Result of `recycled_evaluation.prepare`.
        stored: Result of `prepare`.
        progress: Function that is called with (stage, done, total).

    Returns:
        One evaluation of the pack per job, as `recycled_evaluation.run` returns, and one frontier per task.

    Raises:
        FormatError: PEFT cannot load an adapter on the base model.
        NonFiniteError: Predictions are NaN or Inf.
    """
    adapters = {version.label: version.adapter for version in stored.versions}
    scores = recycled_evaluation.score_versions(originals, adapters, plan, progress)
    scored_jobs = list(zip(plan.jobs, scores, strict=True))
    by_task: dict[str, list[tuple[EvaluationJob, JobScores]]] = {}
    for job, job_scores in scored_jobs:
        by_task.setdefault(job.task, []).append((job, job_scores))
    evaluations = [recycled_evaluation.evaluation(job, job_scores) for job, job_scores in scored_jobs]
    return evaluations, [_frontier(task, task_jobs, stored) for task, task_jobs in by_task.items()]


def _describe_work(jobs: Sequence[EvaluationJob], ratios: int) -> str:
    """Return a description of the work: the numbers of fits, versions, adapters and predictions."""
    # two versions for each ratio, and three others: the original, the pack and the head alone
    rows, versions = sum(len(job.rows) for job in jobs), 2 * ratios + 3
    adapters = len({job.name for job in jobs})
    return (
        f"frontier: {ratios} {'fit' if ratios == 1 else 'fits'}, then {versions} versions of {adapters} "
        f"{'adapter' if adapters == 1 else 'adapters'}, {versions * rows:,} predictions"
    )


def _excluded_patterns(pack: Pack, originals: Sequence[Adapter]) -> list[str]:
    """Return glob patterns of the modules that the pack's fit excluded and the originals have."""
    modules = set(module_names.canonical_names(adapter.specs for adapter in originals).values())
    return [glob.escape(name) for name in pack.fit_info.excluded_modules if name in modules]


def _pack_version(method: str, ratio: float | None, pack: Pack, originals: Mapping[str, Adapter]) -> StoredVersion:
    """Return the adapters of a pack, with the heads of the originals, as a version.

    Args:
        method: Name of the method.
        ratio: Compression ratio that was asked for; None for the pack itself.
        pack: The pack.
        originals: Adapters whose bytes and errors are counted.
    """
    records = [pack.records[name] for name in originals]
    errors = [record.delta_error for record in records]

    def with_heads(name: str) -> Adapter:
        return replace(pack.adapter(name), heads=originals[name].heads if name in originals else {})

    stored = (
        pack.info.stored_bytes
        - pack.info.reference_bytes
        + sum(record.coefficient_bytes + record.carried_bytes for record in records)
    )
    return StoredVersion(method, ratio, stored, max(errors), statistics.fmean(errors), with_heads)


def _truncated_versions(
    originals: Mapping[str, Adapter], pack: Pack, fits: Sequence[StoredVersion], carried: int, report: Progress
) -> list[StoredVersion]:
    """Return the baseline of each fit: the original adapters, truncated and rounded to at most the bytes of the fit.

    Args:
        originals: Name in the pack → original adapter.
        pack: One of the fits. All have the same modules and adapters.
        fits: Versions of the fits.
        carried: Bytes of the carried tensors, which every version stores unchanged.
        report: Function that is called with (stage, done, total).
    """
    stage = "cutting and rounding each adapter"
    report(stage, 0, len(fits))
    packed = {name: pack.packed(name) for name in originals}
    module_names = {name: list(adapter.subspace_names.items()) for name, adapter in packed.items()}

    def stack_module(module: str) -> ModuleBatch:
        n_out, n_in = pack.subspace.modules[module].shape
        own_names = {name: own_name(adapter, module) for name, adapter in packed.items()}
        factors = [originals[name].modules[own] if own is not None else None for name, own in own_names.items()]
        return pad_factors(factors, n_in, n_out)

    modules = list(pack.subspace.modules)
    tables = per_adapter.tables(LazyMapping(dict.fromkeys(modules), stack_module))
    adapter_index = {name: index for index, name in enumerate(originals)}

    def truncated_adapter(cut: Cut, name: str) -> Adapter:
        factors = dict(originals[name].modules)
        index = adapter_index[name]
        for own, module in module_names[name]:
            rank = int(cut.ranks[modules.index(module), index])
            factors[own] = per_adapter.cut(factors[own], rank, int(cut.bits[index]))
        specs = {own: module_factors.spec for own, module_factors in factors.items()}
        return replace(originals[name], modules=factors, specs=specs)

    versions = []
    for done, fit in enumerate(fits, start=1):
        cut = per_adapter.at_size(tables, fit.stored_bytes - carried)
        point = cut.point
        versions.append(
            StoredVersion(
                method=TRUNCATED,
                ratio=fit.ratio,
                stored_bytes=point.stored_bytes + carried,
                worst=point.worst,
                mean=point.mean,
                adapter=partial(truncated_adapter, cut),
            )
        )
        report(stage, done, len(fits))
    return versions


def _frontier(task: str, scored_jobs: ScoredJobs, stored: StoredVersions) -> TaskFrontier:
    """Return the frontier of one task. scored_jobs: jobs of this task."""
    accuracy, perplexity, _, _ = _means(scored_jobs, ORIGINAL)
    without_accuracy, without_perplexity, _, without_kl = _means(scored_jobs, WITHOUT_UPDATE)
    return TaskFrontier(
        task=task,
        adapters=stored.adapters,
        lora_float16=stored.lora_float16,
        original_accuracy=accuracy,
        original_perplexity=perplexity,
        without_accuracy=without_accuracy,
        without_perplexity=without_perplexity,
        without_kl=without_kl,
        points=[_point(version, scored_jobs) for version in stored.versions],
    )


def _point(version: StoredVersion, scored_jobs: ScoredJobs) -> TaskPoint:
    accuracy, perplexity, agreement, kl = _means(scored_jobs, version.label)
    return TaskPoint(
        way=version.method,
        ratio=version.ratio,
        stored_bytes=version.stored_bytes,
        worst=version.worst,
        mean=version.mean,
        accuracy=accuracy,
        perplexity=perplexity,
        agreement=agreement,
        kl=kl,
        runs=[_run(job, job_scores, version.label) for job, job_scores in scored_jobs],
    )


def _run(job: EvaluationJob, job_scores: JobScores, version: str) -> TaskRun:
    score = job_scores.scores[version]
    return TaskRun(
        name=job.name,
        data=str(job.file),
        accuracy=score.accuracy if job.labelled else None,
        perplexity=figures.perplexity(score.loss) if job.classes is None else None,
        agreement=score.agreement,
        kl=score.kl,
    )


def _means(scored_jobs: ScoredJobs, version: str) -> tuple[float | None, float | None, float, float]:
    """Return a version's accuracy, perplexity, agreement and KL divergence: means over the jobs of one task.

    The perplexity is that of the mean loss. Accuracy is None without labelled jobs, perplexity without language models.
    """
    scores = [(job, job_scores.scores[version]) for job, job_scores in scored_jobs]
    accuracies = [score.accuracy for job, score in scores if job.labelled]
    losses = [score.loss for job, score in scores if job.classes is None]
    return (
        statistics.fmean(accuracies) if accuracies else None,
        figures.perplexity(statistics.fmean(losses)) if losses else None,
        statistics.fmean(score.agreement for _, score in scores),
        statistics.fmean(score.kl for _, score in scores),
    )
