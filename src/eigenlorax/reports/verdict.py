"""The verdict of a report, in sentences with advice: first of all the answer for the purpose of the pack.

A pack for storage answers with its bytes and errors, another one with whether the adapters share a subspace.

That is based on adapters that were left out of the fit. The measure is the share of such an adapter's squared norm that
the components of the others keep, beyond what equally many random components keep. From three quarters on (an error of
about 0.5), the collection shares a subspace; below one quarter it does not. A difference within the standard deviation
of the null model counts as zero. Errors in the fit are compared with the null model: adapters with the same singular
values and random singular vectors.
"""

from dataclasses import dataclass, replace

from . import findings, history_findings, size_advice, spreads
from .chance import is_above
from .comparison_data import LeftOut, SizePoint, Spread
from .data import Finding, ReportData, Verdict
from .findings import keeps_factors
from .numbers import error, estimate, ratio, share_estimate
from .size_advice import LARGE_ERROR, is_coded, larger_sizes

SHARED, NOT_SHARED = 0.75, 0.25
"""Thresholds of the share of squared norm that is kept beyond chance, of adapters that were left out."""
CHANCE = 0.7
"""Error with random components below which there is no answer: half of the squared norm is kept by chance."""
_NEARLY_ALL = 0.8
"""Minimum share of the adapters that are clearly inside or clearly outside of a subspace, to report a division."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Answer to the main question.

    Attributes:
        headline: One sentence for the top of the report.
        finding: The answer with figures and advice.
    """

    headline: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Errors on which the answer is based.

    Attributes:
        report: The report.
        in_fit: Errors of the adapters in the fit.
        left_out: Errors of adapters in a fit without them.
    """

    report: ReportData
    in_fit: Spread
    left_out: LeftOut

    @property
    def subject(self) -> str:
        return f"These {self.in_fit.adapters:,} adapters"

    @property
    def measured(self) -> str:
        return f"an adapter that is left out of the fit has a mean error of {self.left_out_mean}"

    @property
    def left_out_mean(self) -> str:
        """Mean error of adapters left out, with its standard error if modules were sampled."""
        standard_error = self.left_out.standard_error if self.report.sampling is not None else 0.0
        return estimate(self.left_out.errors.mean, standard_error)

    @property
    def against_chance(self) -> str:
        return f"{self.measured} in the components of the others (in random components: {error(self.left_out.chance)})"

    @property
    def at_best_size(self) -> SizePoint | None:
        """Number of components with which adapters left out have the smallest mean error; None if none was measured.

        A coded pack has few components or none, so that errors with its own tell nothing.
        """
        points = [point for point in self.report.sizes if point.left_out is not None and (point.random or 0) >= CHANCE]
        return min(points, key=lambda point: point.left_out or 0.0, default=None)

    @property
    def is_beyond_chance(self) -> bool:
        return is_above(self.left_out.kept, 0.0, self.left_out.kept_spread)

    @property
    def kept_of_each(self) -> dict[str, float]:
        """Share of squared norm kept beyond chance, by adapter that was left out and has no copy in the fit."""
        return {name: spreads.beyond_chance(value, self.left_out.chance) for name, value in self.errors.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Leave-one-out error, by adapter that was left out and has no copy in the fit."""
        copies = {name for group in self.report.duplicates for name in group}
        return {
            adapter.name: adapter.left_out_error
            for adapter in self.report.adapters
            if adapter.left_out_error is not None and adapter.name not in copies
        }

    @property
    def is_sample(self) -> bool:
        return self.left_out.sampled < self.left_out.of


def conclude(report: ReportData) -> Verdict:
    """Return the verdict on a report's figures."""
    if not report.adapters:
        return Verdict(history_findings.headline(report), history_findings.collect(report))
    answer = _answer(report)
    others = findings.collect(report, answer.finding)
    if size_advice.is_for_storage(report):
        # for storage, a shared subspace is neither needed nor missed
        sharing = replace(answer.finding, good=None)
        return Verdict(size_advice.storage_headline(report), [size_advice.storage_finding(report), sharing, *others])
    return Verdict(answer.headline, [answer.finding, *others])


def _answer(report: ReportData) -> _Answer:
    if report.in_fit is None:
        text = "No adapter of the fit is left in this pack."
        return _Answer(text, Finding("unknown", text))
    if report.left_out is None:
        return _unknown(report)
    evidence = _Evidence(report, report.in_fit, report.left_out)
    # the first rule that applies; _not_shared always does
    rules = (_too_many_components, _shared, _divided, _more_components, _emerging, _partly_shared, _not_shared)
    return next(answer for rule in rules if (answer := rule(evidence)) is not None)


def _unknown(report: ReportData) -> _Answer:
    """Answer where no adapter was left out of the fit."""
    if not report.collection.with_originals:
        text = "The pack alone does not tell whether its adapters share a subspace."
        advice = (
            "Pass the original adapters (`adapters=`, `--adapters`): then each is left out of the fit in turn, which "
            "answers the question."
        )
    elif report.duplicates:
        text = "Every adapter has a copy in the fit, so none can be left out of it."
        advice = "Keep one of each, and fit again."
    else:
        text, advice = "A single adapter cannot share a subspace.", ""
    return _Answer(text, Finding("unknown", text, advice))


def _too_many_components(evidence: _Evidence) -> _Answer | None:
    chance = evidence.left_out.chance
    if chance >= CHANCE:
        return None
    return _Answer(
        f"{evidence.subject} were fitted with so many components that any adapter would mostly fit (an error of "
        f"{error(chance)} in random components).",
        Finding(
            "unknown",
            f"Whether they share a subspace cannot be decided at this k: {evidence.against_chance}.",
            "Fit with fewer components to find out.",
        ),
    )


def _shared(evidence: _Evidence) -> _Answer | None:
    if not (evidence.is_beyond_chance and evidence.left_out.kept >= SHARED):
        return None
    return _Answer(
        f"{evidence.subject} share a subspace: {evidence.measured}.",
        Finding(
            "shared",
            f"They share a subspace: {evidence.against_chance}; in the fit, the same adapters have a mean error of "
            f"{error(evidence.left_out.in_fit.mean)}.",
            "New adapters of this kind will mostly fit in their basis as well, and new tasks can be trained on it "
            "(purpose='training', --for training).",
            good=True,
        ),
    )


def _divided(evidence: _Evidence) -> _Answer | None:
    """Answer where some adapters share a subspace and nearly all others have no part in it."""
    kept, errors = evidence.kept_of_each, evidence.errors
    inside = [name for name in kept if name in evidence.left_out.sharing]
    outside = [name for name in kept if kept[name] < NOT_SHARED and name not in inside]
    if len(inside) < 2 or len(outside) < 1 or len(inside) + len(outside) < _NEARLY_ALL * len(kept):
        return None
    mean_inside, mean_outside = (sum(errors[name] for name in group) / len(group) for group in (inside, outside))
    subject = f"{len(inside):,} of {'the' if evidence.is_sample else 'these'} {len(kept):,} adapters"
    if evidence.is_sample:
        subject += " that were left out in turn"
    return _Answer(
        f"{subject} share a subspace: left out of the fit, they have a mean error of {error(mean_inside)}, the others "
        f"of {error(mean_outside)}.",
        Finding(
            "partly-shared",
            f"Some of them share a subspace: left out of the fit, {len(inside):,} of {len(kept):,} have a mean error "
            f"of {error(mean_inside)} in the components of the others, and {len(outside):,} of {error(mean_outside)} "
            f"(in random components: {error(evidence.left_out.chance)}).",
            size_advice.on_partial_sharing(evidence.report)
            or "Fit these adapters separately (`exclude_adapters=`, `--exclude-adapter`), and keep the others as "
            "ordinary LoRAs.",
            adapters=sorted(inside),
        ),
    )


def _more_components(evidence: _Evidence) -> _Answer | None:
    """Answer if the adapters share a subspace with more components, in a pack still smaller than the LoRAs."""
    point = _first_shared_size(evidence)
    if point is None or point.ratio <= 1:
        return None
    return _Answer(
        f"{evidence.subject} share a subspace with more components than the pack has: {evidence.measured}, and of "
        f"{_left_out_at(point)} with k = {point.k}.",
        Finding(
            "partly-shared",
            f"They share a subspace, but k is too small for it: {evidence.against_chance}.",
            size_advice.on_partial_sharing(evidence.report)
            or f"Fit again with `n_components={point.k}` (`-k {point.k}`): an adapter left out then has a mean error "
            f"of {_left_out_at(point)}, and the pack is {ratio(point.ratio)} smaller than the LoRAs, basis counted.",
        ),
    )


def _first_shared_size(evidence: _Evidence) -> SizePoint | None:
    """Return the smallest size above the pack's at which adapters left out are kept, beyond chance; None if none is.

    In as many components as a module has dimensions, random ones keep everything as well.
    """
    for point in larger_sizes(evidence.report):
        if point.left_out is None or point.random is None or point.random < CHANCE:
            continue
        is_significant = 2 * len(point.sharing) >= evidence.left_out.sampled
        if is_significant and spreads.beyond_chance(point.left_out, point.random) >= SHARED:
            return point
    return None


def _emerging(evidence: _Evidence) -> _Answer | None:
    """Answer if some adapters share a subspace with more components, in a pack still smaller than the LoRAs."""
    report, left_out = evidence.report, evidence.left_out
    points = [point for point in larger_sizes(report) if point.ratio > 1 and (point.random or 0.0) >= CHANCE]
    point = max(points, key=lambda point: len(point.sharing), default=None)
    if point is None or len(point.sharing) < 2:
        return None
    others = [kept for name, kept in evidence.kept_of_each.items() if name not in point.sharing]
    if not others or sum(kept < NOT_SHARED for kept in others) < _NEARLY_ALL * len(others):
        return None
    count, sampled = len(point.sharing), left_out.sampled
    which, turn = ("the", " that were left out in turn") if evidence.is_sample else ("these", "")
    return _Answer(
        f"{count:,} of {which} {sampled:,} adapters{turn} share a subspace with more components than the pack has: it "
        f"is found with k = {point.k}.",
        Finding(
            "partly-shared",
            f"Some of them share a subspace, but k is too small for it: {evidence.measured}; with k = {point.k}, "
            f"{count:,} of {sampled:,} keep at least half of their squared norm.",
            size_advice.on_partial_sharing(report)
            or "Fit these adapters separately (`exclude_adapters=`, `--exclude-adapter`), or fit again with "
            f"`n_components={point.k}` (`-k {point.k}`).",
            adapters=sorted(point.sharing),
        ),
    )


def _partly_shared(evidence: _Evidence) -> _Answer | None:
    if not (evidence.is_beyond_chance and evidence.left_out.kept >= NOT_SHARED):
        return None
    return _Answer(
        f"{evidence.subject} share a part of their subspace: {evidence.measured}.",
        Finding(
            "partly-shared",
            f"They share some components: {evidence.against_chance}; in the fit, the same adapters have a mean error "
            f"of {error(evidence.left_out.in_fit.mean)}.",
            size_advice.on_partial_sharing(evidence.report)
            or f"{size_advice.on_size(evidence.report)} To add an adapter later, make a new fit.",
        ),
    )


def _not_shared(evidence: _Evidence) -> _Answer:
    report, point = evidence.report, evidence.at_best_size
    if is_coded(report) and point is not None:
        measured = (
            f"at best, with k = {point.k}, an adapter that is left out of the fit has a mean error of "
            f"{_left_out_at(point)}"
        )
        by_chance = f"{measured} (with random components: {error(point.random)})"
        return _Answer(
            f"{evidence.subject} do not share a subspace: {measured}.",
            Finding(
                "not-shared",
                f"They do not share a subspace: {by_chance}. {_in_the_fit(evidence)}",
                f"{size_advice.on_size(report)} An adapter that is added later takes as many bytes as it would alone.",
                good=False,
            ),
        )
    beyond_chance = "The components of the others keep no more of it than random components would."
    if evidence.is_beyond_chance:
        beyond_chance = (
            f"The components of the others keep {_kept(evidence.left_out)} of its squared norm beyond chance: too "
            "little for a shared subspace."
        )
    later = "These adapters give no basis for new ones, neither for training nor for serving from a shared basis."
    return _Answer(
        f"{evidence.subject} do not share a subspace: {evidence.measured}.",
        Finding(
            "not-shared",
            f"They do not share a subspace: {evidence.against_chance}. {beyond_chance} {_in_the_fit(evidence)}",
            f"{size_advice.on_size(report)} {later}",
            good=False,
        ),
    )


def _left_out_at(point: SizePoint) -> str:
    """Return the mean error of adapters left out at one size, with its standard error if modules were sampled."""
    return estimate(point.left_out or 0.0, point.left_out_standard_error or 0.0)


def _kept(left_out: LeftOut) -> str:
    return share_estimate(left_out.kept, left_out.kept_standard_error)


def _in_the_fit(evidence: _Evidence) -> str:
    """Return sentences on the mean error in the fit of adapters that share no subspace, and its cause."""
    report, mean_error, null = evidence.report, evidence.in_fit.mean, evidence.report.null
    measured = f"In the fit, their mean error is {error(mean_error)}"
    if is_coded(report):
        cause = "" if mean_error > LARGE_ERROR else ", because the pack stores a residual for each adapter"
        return f"{measured}{cause}."
    # the null model keeps coefficients of the adapters' own factors
    if null is None or not keeps_factors(report):
        return f"{measured}."
    null_mean = estimate(null.errors.mean, null.errors.standard_error)
    of_null = f"with the same singular values and random singular vectors it would be {null_mean}"
    if mean_error > LARGE_ERROR:
        return f"{measured}; {of_null}."
    is_better = is_above(-mean_error, -null.errors.mean, null.spread)
    if is_better and spreads.beyond_chance(mean_error, null.errors.mean) >= NOT_SHARED:
        return f"{measured}; {of_null}. Some of the adapters share components."
    sizes = {side.k for module in report.modules for side in (module.down, module.up)}
    components = f"k = {max(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    structure = "hardly any" if is_better else "no"
    return (
        f"{measured}, because {components} components per side can represent these adapters separately; {of_null}. "
        f"That is compression, and {structure} common structure."
    )
