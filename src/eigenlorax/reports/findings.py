"""Findings beside the main answer: starts, groups, losses, bytes, and baselines that do better, each with advice."""

from collections.abc import Sequence

from ..codec.storage.table import CODED, storage_by_name
from .comparison_data import Baseline
from .data import Finding, ReportData
from .frontier import at_equal_error, cheapest
from .numbers import error, plural, ratio, share

LARGE_ERROR = 0.5
"""Delta error above which an adapter is named as one that lost much."""
NO_ERROR = 1e-3
"""Delta error below which nothing is lost."""
_COMMON_MEAN = 0.25
"""Share of squared norm from which on a common mean is mentioned."""
_ACCURACY_TOLERANCE = 0.01
_GOOD_AGREEMENT = 0.95


def collect(report: ReportData, main: Finding) -> list[Finding]:
    """Return all findings but the main one, the most important first. main: the answer to the main question."""
    return [
        *_starts(report),
        *_mean(report),
        *_clusters(report, main),
        *_outliers(report, main),
        *_duplicates(report),
        *_untrained(report),
        *_task(report),
        *_losses(report),
        _bytes(report, main),
        *_baselines(report),
        *_rounding(report),
        *_cores(report),
    ]


def is_coded(report: ReportData) -> bool:
    """Return whether the pack is coded at an error bound, with residuals beside the coefficients."""
    return report.collection.coefficient_dtype == CODED.name


def keeps_factors(report: ReportData) -> bool:
    """Return whether coefficients span the adapters' own factors, as in the null model; diagonal cores do not."""
    return not storage_by_name(report.collection.coefficient_dtype).pairs_components


def _starts(report: ReportData) -> list[Finding]:
    if report.starts is None:
        return []
    energies = {row.who: row for row in report.starts.energies}
    findings = []
    for number, group in enumerate(report.starts.groups, 1):
        energy, kept = energies.get(f"group {number}"), ""
        if energy is not None:
            kept = (
                f" {energy.k} directions hold {share(energy.factors_down)} of their A and {share(energy.factors_up)} "
                f"of B; in random directions {share(energy.null_down)} and {share(energy.null_up)}."
            )
        findings.append(
            Finding(
                "start",
                f"{len(group.adapters):,} adapters began from the same random A (mean cosine {group.cosine_down:.2f}; "
                f"of their B {group.cosine_up:.2f}). What they share on that side is what training left of the start, "
                f"not what it found.{kept}",
                "Do not take a steep spectrum of A for a structure of the tasks: look at B, and at adapters left out.",
                adapters=group.adapters,
            )
        )
    return findings


def _mean(report: ReportData) -> list[Finding]:
    similarity = report.similarity
    if similarity is None or similarity.mean_energy is None or similarity.mean_energy < _COMMON_MEAN:
        return []
    return [
        Finding(
            "mean",
            f"They have a strong common mean: the mean of the others explains {share(similarity.mean_energy)} of an "
            f"adapter's squared norm (mean cosine between updates {similarity.mean_cosine:.2f}).",
            "Compare with the mean adapter on your task before crediting the subspace.",
        )
    ]


def _clusters(report: ReportData, main: Finding) -> list[Finding]:
    if report.similarity is None or not report.similarity.clusters:
        return []
    clusters, chance = report.similarity.clusters, report.similarity.chance_overlap
    sizes = " and ".join(", ".join(f"{len(cluster.adapters):,}" for cluster in clusters).rsplit(", ", 1))
    inside = max(cluster.overlap for cluster in clusters)
    outside = max(cluster.overlap_with_others for cluster in clusters)
    by_chance = f" (random ones: {share(chance)})" if chance is not None else ""
    return [
        Finding(
            "clusters",
            f"They fall into {len(clusters)} groups, of {sizes} adapters: within a group directions overlap up to "
            f"{share(inside)}, between groups at most {share(outside)} on average{by_chance}. "
            f"{'; '.join(_first_names(cluster.adapters) for cluster in clusters)}.",
            "What they share lies within these groups."
            if main.kind == "not-shared"
            else "Fit each group by itself: fewer directions then do the same.",
        )
    ]


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _outliers(report: ReportData, main: Finding) -> list[Finding]:
    if not report.outliers or main.kind == "not-shared":
        return []
    several = len(report.outliers) > 1
    return [
        Finding(
            "outlier",
            f"{plural(len(report.outliers), 'adapter')} {'have' if several else 'has'} far less in common with the "
            "rest than those have with one another.",
            f"Leave {'them' if several else 'it'} out of the fit (`exclude_adapters=`, `--exclude-adapter`), and keep "
            f"{'those LoRAs as they are' if several else 'that LoRA as it is'}.",
            good=False,
            adapters=report.outliers,
        )
    ]


def _duplicates(report: ReportData) -> list[Finding]:
    if not report.duplicates:
        return []
    listed = "; ".join(" = ".join(group[:4]) + " = …" * (len(group) > 4) for group in report.duplicates[:3])
    remaining = len(report.duplicates) - 3
    more = f"; and {plural(remaining, 'group')} more" if remaining > 0 else ""
    return [
        Finding(
            "duplicate",
            f"The same update under several names: {listed}{more}.",
            "Keep one of each: a duplicate counts twice in the fit.",
        )
    ]


def _untrained(report: ReportData) -> list[Finding]:
    if not report.untrained:
        return []
    return [
        Finding(
            "untrained",
            f"{plural(len(report.untrained), 'adapter')} {'are' if len(report.untrained) > 1 else 'is'} untrained: "
            "every update is zero. Kept in the pack, left out of the fit and of all figures.",
            "Remove what was added by mistake: `eigenlorax remove`.",
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
                f"and {recycled:.3f} with the recycled ones, on average.",
                good=recycled >= original - _ACCURACY_TOLERANCE,
            )
        )
    if evaluations:
        agreement = sum(evaluation.agreement for evaluation in evaluations) / len(evaluations)
        kl = sum(evaluation.kl for evaluation in evaluations) / len(evaluations)
        findings.append(
            Finding(
                "task",
                f"Original and recycled adapters give the same answer on {share(agreement)} of the rows, or tokens; "
                f"the mean divergence is {error(kl)} nats.",
                good=agreement >= _GOOD_AGREEMENT,
            )
        )
    return findings


def _losses(report: ReportData) -> list[Finding]:
    lossy = [adapter for adapter in report.adapters if not adapter.untrained and adapter.delta_error > LARGE_ERROR]
    if not lossy:
        return []
    advice = "Fit the pack again with those that were projected, or keep those LoRAs as they are."
    if is_coded(report):
        advice = f"Ask for less (`max_error={LARGE_ERROR}`, `--max-error {LARGE_ERROR}`), or for more bytes."
    elif any(adapter.in_fit for adapter in lossy):
        advice = _advice_on_losses(report)
    several = len(lossy) > 1
    return [
        Finding(
            "loss",
            f"{plural(len(lossy), 'adapter')} {'lose' if several else 'loses'} more than half of "
            f"{'their updates' if several else 'its update'} ({error(lossy[0].delta_error)} at worst).",
            advice,
            good=False,
            adapters=[adapter.name for adapter in lossy],
        )
    ]


def _advice_on_losses(report: ReportData) -> str:
    by_error = f"`max_error={LARGE_ERROR}` (`--max-error {LARGE_ERROR}`) finds the smallest"
    point = next((point for point in report.sizes if point.worst <= LARGE_ERROR), None)
    if point is None:
        return f"{by_error} pack that keeps them; or keep those LoRAs as they are."
    smaller = f"{ratio(point.ratio)} smaller" if point.ratio > 1 else "no smaller"
    return (
        f"`n_components={point.k}` (`-k {point.k}`) would bring every adapter of the fit to {error(point.worst)} or "
        f"less, in a pack {smaller} than the LoRAs; {by_error} one."
    )


def _bytes(report: ReportData, main: Finding) -> Finding:
    gain, in_fit = report.bytes, report.in_fit
    cost = ""
    if in_fit is not None:
        cost = f"Recycling costs {error(in_fit.mean)} of an update on average, {error(in_fit.worst)} at worst. "
    break_even = "it never pays at this k"
    if gain.break_even is not None:
        break_even = f"if others fit this basis, it pays from {plural(gain.break_even, 'such adapter')} on"
    if gain.ratio < 1:
        return Finding(
            "bytes",
            f"{cost}The pack is {ratio(1 / gain.ratio)} larger than the LoRAs with the basis counted; {break_even}.",
            "Gather more adapters of this base model, or fit with a smaller k.",
            good=False,
        )
    outlook = f", {ratio(gain.limit)} in the limit of many adapters; {break_even}"
    return Finding(
        "bytes",
        f"{cost}The pack is {ratio(gain.ratio)} smaller than the LoRAs with the basis counted"
        # others would not fit the basis of adapters that share nothing
        f"{'' if main.kind == 'not-shared' else outlook}.",
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
                f"Cutting each LoRA by SVD to the same bytes loses less: {error(truncated.errors.mean)} on average, "
                f"against {error(pack.errors.mean)} here.",
                "A shared basis does not pay for these adapters at this k.",
                good=False,
            )
        )
    for key, bits in (("int4", 4), ("int8", 8)):
        rounded = by_key.get(key)
        if rounded is not None and _is_better(rounded, pack):
            findings.append(
                Finding(
                    "baseline",
                    f"Rounding each LoRA to {bits} bits takes fewer bytes and loses less: "
                    f"{error(rounded.errors.mean)} on average.",
                    "For storage alone, round; a pack is for serving and training in one subspace.",
                    good=False,
                )
            )
            break
    if report.frontier is not None:
        best = cheapest(report.frontier)
        if best is not None and best.stored_bytes < report.frontier.points[0].stored_bytes:
            findings.append(Finding("baseline", at_equal_error(report.frontier), good=False))
    return findings


def _is_better(baseline: Baseline, pack: Baseline) -> bool:
    if baseline.stored_bytes is None or pack.stored_bytes is None:
        return False
    return baseline.errors.mean <= pack.errors.mean and baseline.stored_bytes <= pack.stored_bytes


def _cores(report: ReportData) -> list[Finding]:
    """Say which figures were measured without the cores that the pack has."""
    storage = storage_by_name(report.collection.coefficient_dtype)
    if storage.core_kind is None or not report.collection.with_originals:
        return []
    figures = {
        "full": "Figures at other k are",
        "diagonal": "Figures of adapters left out, of random directions, of the null model and at other k are",
    }
    text = f"The pack keeps {storage.core_kind} cores. {figures[storage.core_kind]} those of packs without cores."
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
            f"Rounding to {report.collection.dtype} is most of what is lost: {error(worst.rounding_error)} of "
            f"{worst.name}'s update.",
            "`dtype='float32'` (`--dtype float32`) stores it in full.",
            adapters=[worst.name],
        )
    ]
