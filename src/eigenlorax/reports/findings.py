"""Findings beside the main answer: starts, groups, large errors, bytes, and better baselines, each with advice."""

from ..codec.storage.table import storage_by_name
from ..core.printable import first_names
from . import history_findings, size_advice
from .comparison_data import Baseline, Frontier
from .data import Finding, ReportData
from .frontier import at_equal_error, cheapest, coded_within, other_methods
from .numbers import error, estimate, plural, ratio, share, share_estimate
from .size_advice import LARGE_ERROR, is_coded, is_for_storage

NO_ERROR = 1e-3
"""Delta error below which an error counts as zero."""
_COMMON_MEAN = 0.25
"""Minimum share of squared norm for a common mean to be reported."""
_ACCURACY_TOLERANCE = 0.01
_GOOD_AGREEMENT = 0.95


def collect(report: ReportData, main: Finding) -> list[Finding]:
    """Return all findings except the main one, the most important first.

    Args:
        report: The figures.
        main: The answer to the main question.
    """
    return [
        *history_findings.collect(report),
        *_starts(report),
        *_mean(report),
        *_clusters(report, main),
        *_outliers(report, main),
        *_duplicates(report),
        *_untrained(report),
        *_task(report),
        *_losses(report),
        # of a pack for storage, they are the main answer
        *([] if is_for_storage(report) else [_bytes(report, main)]),
        *_baselines(report),
        *_rounding(report),
        *_cores(report),
    ]


def keeps_factors(report: ReportData) -> bool:
    """Return whether coefficients span the adapters' own factors, as in the null model; diagonal cores do not."""
    return not storage_by_name(report.collection.coefficient_dtype).pairs_components


def _starts(report: ReportData) -> list[Finding]:
    if report.starts is None:
        return []
    in_runs = history_findings.in_runs(report)
    energies = {row.who: row for row in report.starts.energies}
    findings = []
    for number, group in enumerate(report.starts.groups, 1):
        # versions of one run have one start, and more than that in common
        if in_runs.issuperset(group.adapters):
            continue
        energy, kept = energies.get(f"group {number}"), ""
        if energy is not None:
            kept = (
                f" {energy.k} components keep {share(energy.factors_down)} of the energy of their A and "
                f"{share(energy.factors_up)} of B; with random singular vectors {share(energy.null_down)} and "
                f"{share(energy.null_up)}."
            )
        findings.append(
            Finding(
                "start",
                f"{len(group.adapters):,} adapters were trained from the same random A (mean cosine "
                f"{group.cosine_down:.2f}; of their B {group.cosine_up:.2f}). On that side they share their "
                f"initialisation, not a result of training.{kept}",
                "A steep spectrum of A does not show that the tasks share a structure: look at B, and at adapters left "
                "out.",
                adapters=group.adapters,
            )
        )
    return findings


def _mean(report: ReportData) -> list[Finding]:
    similarity = report.similarity
    if similarity is None or similarity.mean_energy is None or similarity.mean_energy < _COMMON_MEAN:
        return []
    if history_findings.in_runs(report).issuperset(similarity.names):
        return []
    return [
        Finding(
            "mean",
            f"They have a strong common mean: the mean of the others explains "
            f"{share_estimate(similarity.mean_energy, similarity.mean_energy_error)} of an "
            f"adapter's squared norm (mean cosine between updates {similarity.mean_cosine:.2f}).",
            "Compare the pack with the mean adapter on your task: `eigenlorax merge ADAPTER… -o mean/` makes it.",
        )
    ]


def _clusters(report: ReportData, main: Finding) -> list[Finding]:
    if report.similarity is None or not report.similarity.clusters:
        return []
    if history_findings.in_runs(report).issuperset(report.similarity.names):
        return []
    clusters, chance = report.similarity.clusters, report.similarity.chance_overlap
    sizes = " and ".join(", ".join(f"{len(cluster.adapters):,}" for cluster in clusters).rsplit(", ", 1))
    inside = max(cluster.overlap for cluster in clusters)
    outside = max(cluster.overlap_with_others for cluster in clusters)
    by_chance = f" (random adapters: {share(chance)})" if chance is not None else ""
    advice = "Fit each group separately: then fewer components have the same error."
    if is_coded(report):
        advice = "A fit gives groups bases of their own where that saves bytes."
    elif main.kind == "not-shared":
        advice = "Adapters share components within these groups only."
    return [
        Finding(
            "clusters",
            f"They form {len(clusters)} groups, of {sizes} adapters: the mean overlap within a group is at most "
            f"{share(inside)}, with the other groups at most {share(outside)}{by_chance}. "
            f"{'; '.join(first_names(cluster.adapters, 4) for cluster in clusters)}.",
            advice,
        )
    ]


def _outliers(report: ReportData, main: Finding) -> list[Finding]:
    # the ends of a run are far from its other versions
    outliers = [name for name in report.outliers if name not in history_findings.in_runs(report)]
    if not outliers or main.kind == "not-shared":
        return []
    several = len(outliers) > 1
    advice = (
        f"Leave {'them' if several else 'it'} out of the fit (`exclude_adapters=`, `--exclude-adapter`), and keep "
        f"{'them as ordinary LoRAs' if several else 'it as an ordinary LoRA'}."
    )
    return [
        Finding(
            "outlier",
            f"{plural(len(outliers), 'adapter')} {'share' if several else 'shares'} far less with the other "
            "adapters than these share with one another.",
            size_advice.on_size(report) if is_coded(report) else advice,
            good=None if is_coded(report) else False,
            adapters=outliers,
        )
    ]


def _duplicates(report: ReportData) -> list[Finding]:
    in_runs = history_findings.in_runs(report)
    duplicates = [group for group in report.duplicates if not in_runs.issuperset(group)]
    if not duplicates:
        return []
    listed = "; ".join(" = ".join(group[:4]) + " = …" * (len(group) > 4) for group in duplicates[:3])
    remaining = len(duplicates) - 3
    more = f"; and {plural(remaining, 'group')} more" if remaining > 0 else ""
    return [
        Finding(
            "duplicate",
            f"The same update under several names: {listed}{more}.",
            "Keep one of each group: a duplicate counts twice in the fit.",
        )
    ]


def _untrained(report: ReportData) -> list[Finding]:
    if not report.untrained:
        return []
    return [
        Finding(
            "untrained",
            f"{plural(len(report.untrained), 'adapter')} {'are' if len(report.untrained) > 1 else 'is'} untrained: "
            "every update is zero. The pack contains them; the fit and all figures do not.",
            "Remove an adapter that was added by mistake: `eigenlorax remove`.",
            adapters=report.untrained,
        )
    ]


def _task(report: ReportData) -> list[Finding]:
    findings, evaluations = [], report.evaluations
    accuracies = [
        (evaluation.original_accuracy, evaluation.recycled_accuracy)
        for evaluation in evaluations
        if evaluation.original_accuracy is not None and evaluation.recycled_accuracy is not None
    ]
    if accuracies:
        original, recycled = (sum(column) / len(accuracies) for column in zip(*accuracies, strict=True))
        findings.append(
            Finding(
                "task",
                f"On {plural(len(accuracies), 'labelled task')}, accuracy is {original:.3f} with the original adapters "
                f"and {recycled:.3f} with the stored ones, on average.",
                good=recycled >= original - _ACCURACY_TOLERANCE,
            )
        )
    if evaluations:
        agreement = sum(evaluation.agreement for evaluation in evaluations) / len(evaluations)
        kl = sum(evaluation.kl for evaluation in evaluations) / len(evaluations)
        findings.append(
            Finding(
                "task",
                f"Original and stored adapters have equal predictions for {share(agreement)} of the rows or tokens; "
                f"the mean KL divergence is {error(kl)} nats.",
                good=agreement >= _GOOD_AGREEMENT,
            )
        )
    return findings


def _losses(report: ReportData) -> list[Finding]:
    lossy = [adapter for adapter in report.adapters if not adapter.untrained and adapter.delta_error > LARGE_ERROR]
    if not lossy:
        return []
    advice = "Fit the pack again with the adapters that were projected, or keep them as ordinary LoRAs."
    if is_coded(report) or any(adapter.in_fit for adapter in lossy):
        advice = size_advice.on_losses(report)
    several = len(lossy) > 1
    return [
        Finding(
            "loss",
            f"{plural(len(lossy), 'adapter')} {'have' if several else 'has'} a delta error above {LARGE_ERROR} (at "
            f"most {error(lossy[0].delta_error)}).",
            advice,
            good=False,
            adapters=[adapter.name for adapter in lossy],
        )
    ]


def _bytes(report: ReportData, main: Finding) -> Finding:
    gain, in_fit = report.bytes, report.in_fit
    cost = ""
    if in_fit is not None:
        cost = f"The mean error of an adapter is {error(in_fit.mean)}, the largest {error(in_fit.worst)}. "
    break_even = "at this k, no number of adapters makes it smaller"
    if gain.break_even is not None:
        break_even = f"it is smaller from {plural(gain.break_even, 'adapter')} on, if others fit this basis as well"
    if gain.ratio < 1:
        return Finding(
            "bytes",
            f"{cost}The pack is {ratio(1 / gain.ratio)} larger than the LoRAs with the basis counted; {break_even}.",
            size_advice.for_storage(report)
            or "Gather more adapters of this base model, or fit with a smaller number of components.",
            good=False,
        )
    outlook = f", {ratio(gain.limit)} in the limit of many adapters; {break_even}"
    return Finding(
        "bytes",
        f"{cost}The pack is {ratio(gain.ratio)} smaller than the LoRAs with the basis counted"
        # other adapters would not fit the basis of adapters that share nothing, or little
        f"{'' if main.kind in ('not-shared', 'partly-shared') else outlook}.",
        good=True if in_fit is None or in_fit.mean <= LARGE_ERROR else None,
    )


def _baselines(report: ReportData) -> list[Finding]:
    """Name the baselines that have a smaller error in no more bytes."""
    by_key = {baseline.key: baseline for baseline in report.baselines}
    pack = by_key.get("pack")
    if pack is None or pack.stored_bytes is None or pack.errors.mean < NO_ERROR:
        return []
    findings = []
    truncated = by_key.get("truncated")
    if truncated is not None and truncated.errors.mean <= pack.errors.mean:
        findings.append(
            Finding(
                "baseline",
                f"Truncating each LoRA by SVD to the same bytes has a smaller mean error: "
                f"{_mean_error(truncated)}, against {error(pack.errors.mean)} in the pack.",
                "At this k, a shared basis has no advantage for these adapters.",
                good=False,
            )
        )
    for key, bits in (("int4", 4), ("int8", 8)):
        rounded = by_key.get(key)
        if rounded is not None and _is_better(rounded, pack):
            findings.append(
                Finding(
                    "baseline",
                    f"Rounding each LoRA to {bits} bits takes fewer bytes and has a smaller mean error: "
                    f"{_mean_error(rounded)}.",
                    size_advice.for_storage(report, rounded.errors.worst)
                    or "For storage alone, round the LoRAs; a pack is for serving and training in one subspace.",
                    good=False,
                )
            )
            break
    if report.frontier is not None:
        findings += _frontier(report, report.frontier)
    return findings


def _frontier(report: ReportData, frontier: Frontier) -> list[Finding]:
    """Compare the pack with other methods at its worst error: in its favour if it is the smallest."""
    own, best, coded = frontier.points[0], cheapest(frontier), coded_within(frontier, frontier.points[0].worst)
    # the main finding on a pack for storage has the Gaussian bound
    text = other_methods(frontier) if is_for_storage(report) else at_equal_error(frontier)
    if best is not None and best.stored_bytes < own.stored_bytes:
        return [Finding("baseline", text, good=False)]
    if coded is not None and coded.stored_bytes < own.stored_bytes:
        # the codec is smaller than the pack, which is smaller than everything else
        return [Finding("baseline", text)]
    return [Finding("baseline", text, good=True)] if best is not None and best.stored_bytes > own.stored_bytes else []


def _mean_error(baseline: Baseline) -> str:
    return estimate(baseline.errors.mean, baseline.errors.standard_error)


def _is_better(baseline: Baseline, pack: Baseline) -> bool:
    if baseline.stored_bytes is None or pack.stored_bytes is None:
        return False
    return baseline.errors.mean <= pack.errors.mean and baseline.stored_bytes <= pack.stored_bytes


def _cores(report: ReportData) -> list[Finding]:
    """Name the figures that were measured without the cores that the pack has."""
    storage = storage_by_name(report.collection.coefficient_dtype)
    if storage.core_kind is None or not report.collection.with_originals:
        return []
    figures = {
        "full": "Figures at other k are",
        "diagonal": "Figures of adapters left out, of random components, of the null model and at other k are",
    }
    text = f"The pack stores {storage.core_kind} cores. {figures[storage.core_kind]} measured without cores."
    return [Finding("cores", text)]


def _rounding(report: ReportData) -> list[Finding]:
    # a coded pack rounds everything, as coarsely as its error bound allows
    if is_coded(report):
        return []
    trained = [adapter for adapter in report.adapters if not adapter.untrained]
    worst = max(trained, key=lambda adapter: adapter.rounding_error, default=None)
    if worst is None or worst.rounding_error < NO_ERROR or worst.rounding_error < worst.delta_error / 2:
        return []
    return [
        Finding(
            "rounding",
            f"Most of the error is from rounding to {report.collection.dtype}: {error(worst.rounding_error)} for "
            f"{worst.name}.",
            "Store float32 numbers: `dtype='float32'` (`--dtype float32`).",
            adapters=[worst.name],
        )
    ]
