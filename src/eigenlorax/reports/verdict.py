"""The verdict: whether the adapters share a subspace, in plain words, with what to do about it.

The question is answered by adapters that were left out of the fit. The components of the others keep a share of such an
adapter's squared norm, beyond what as many random directions keep. From three quarters on (an error of about 0.5), the
collection shares a subspace; below one quarter it does not. A difference within the scatter of the null model counts
as none. Errors in the fit are compared with the null model: the same singular values in random directions.
"""

from dataclasses import dataclass

from . import findings, spreads
from .chance import is_above
from .comparison_data import LeftOut, SizePoint, Spread
from .data import Finding, ReportData, Verdict
from .findings import LARGE_ERROR, is_coded, keeps_factors
from .numbers import error, ratio, share

SHARED, NOT_SHARED = 0.75, 0.25
"""Shares of squared norm beyond chance, of adapters that were left out, at which the answer changes."""
CHANCE = 0.7
"""Error in random directions below which the question has no answer: half of the squared norm is kept by chance."""
SMALL_ERROR = 0.1
_NEARLY_ALL = 0.8
"""Share of the adapters that must be clearly inside or outside of a subspace for a division to be named."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to the main question. headline: one sentence for the top of the report."""

    headline: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The basis of the answer: errors of adapters in the fit, and of adapters left out of it."""

    report: ReportData
    in_fit: Spread
    left_out: LeftOut

    @property
    def subject(self) -> str:
        return f"These {self.in_fit.adapters:,} adapters"

    @property
    def measured(self) -> str:
        return f"left out of the fit, an adapter loses {error(self.left_out.errors.mean)} of its update"

    @property
    def against_chance(self) -> str:
        return f"{self.measured} in the directions of the others (in random ones: {error(self.left_out.chance)})"

    @property
    def is_beyond_chance(self) -> bool:
        return is_above(self.left_out.kept, 0.0, self.left_out.kept_spread)

    @property
    def kept_of_each(self) -> dict[str, float]:
        """The share of squared norm beyond chance of each adapter that was left out and has no copy in the fit."""
        return {name: spreads.beyond_chance(lost, self.left_out.chance) for name, lost in self.errors.items()}

    @property
    def errors(self) -> dict[str, float]:
        """The error of each adapter that was left out and has no copy in the fit."""
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
    answer = _answer(report)
    return Verdict(answer.headline, [answer.finding, *findings.collect(report, answer.finding)])


def _answer(report: ReportData) -> _Answer:
    if report.in_fit is None:
        text = "No adapter of the fit is left in this pack."
        return _Answer(text, Finding("unknown", text))
    if report.left_out is None:
        return _unknown(report)
    evidence = _Evidence(report, report.in_fit, report.left_out)
    # the first one that applies; _not_shared always does
    rules = (_too_many_components, _shared, _divided, _more_components, _emerging, _partly_shared, _not_shared)
    return next(answer for rule in rules if (answer := rule(evidence)) is not None)


def _unknown(report: ReportData) -> _Answer:
    """Answer where no adapter was left out of the fit."""
    if not report.collection.with_originals:
        text = "The pack alone does not tell whether its adapters share a subspace."
        advice = (
            "Name the original adapters (`adapters=`, `--adapters`): then each is left out of the fit in turn, which "
            "tells."
        )
    elif report.duplicates:
        text = "All of these adapters have copies of themselves in the fit, so that none can be left out of it."
        advice = "Keep one of each, and fit again."
    else:
        text, advice = "One adapter alone shares its subspace with nobody.", ""
    return _Answer(text, Finding("unknown", text, advice))


def _too_many_components(evidence: _Evidence) -> _Answer | None:
    chance = evidence.left_out.chance
    if chance >= CHANCE:
        return None
    return _Answer(
        f"{evidence.subject} were fitted with so many directions that any adapter would mostly fit in (an error of "
        f"{error(chance)} in random ones).",
        Finding(
            "unknown",
            f"Whether they share a subspace does not show at this k: {evidence.against_chance}.",
            "Fit with fewer directions to find out.",
        ),
    )


def _shared(evidence: _Evidence) -> _Answer | None:
    if not (evidence.is_beyond_chance and evidence.left_out.kept >= SHARED):
        return None
    return _Answer(
        f"{evidence.subject} share a subspace: {evidence.measured}.",
        Finding(
            "shared",
            f"They share a subspace: {evidence.against_chance}; in the fit, the same adapters lose "
            f"{error(evidence.left_out.in_fit.mean)}.",
            "Recycle them: a new adapter of this kind will mostly fit in as well.",
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
        f"{subject} share a subspace: left out of the fit, they lose {error(mean_inside)} of their updates, the others "
        f"{error(mean_outside)}.",
        Finding(
            "partly-shared",
            f"A part of them shares a subspace: left out of the fit, {len(inside):,} of {len(kept):,} lose "
            f"{error(mean_inside)} of their updates on average in the directions of the others, and "
            f"{len(outside):,} lose {error(mean_outside)} (in random directions: {error(evidence.left_out.chance)}).",
            "Fit those that share by themselves (`exclude_adapters=`, `--exclude-adapter`), and keep the others as "
            "they are.",
            adapters=sorted(inside),
        ),
    )


def _more_components(evidence: _Evidence) -> _Answer | None:
    """Answer where the adapters share a subspace of more components than the pack has, and such a pack still pays."""
    point = _first_shared_size(evidence.report)
    if point is None or point.ratio <= 1:
        return None
    return _Answer(
        f"{evidence.subject} share a subspace of more directions than were kept: {evidence.measured}, and "
        f"{error(point.left_out)} with k = {point.k}.",
        Finding(
            "partly-shared",
            f"They share a subspace, but k is too small for it: {evidence.against_chance}.",
            f"Fit again with `n_components={point.k}` (`-k {point.k}`): an adapter left out then loses "
            f"{error(point.left_out)}, and the pack is {ratio(point.ratio)} smaller than the LoRAs, basis counted.",
        ),
    )


def _first_shared_size(report: ReportData) -> SizePoint | None:
    """Return the fewest components, more than the pack's, that keep adapters left out, and not by chance."""
    for point in _larger_sizes(report):
        chance = point.random or 1.0
        if point.left_out is None or chance < CHANCE:
            continue
        if spreads.beyond_chance(point.left_out, chance) >= SHARED:
            return point
    return None


def _emerging(evidence: _Evidence) -> _Answer | None:
    """Answer where some adapters share a subspace that shows with more components, in a pack that still pays."""
    report, left_out = evidence.report, evidence.left_out
    points = [point for point in _larger_sizes(report) if point.ratio > 1 and (point.random or 0.0) >= CHANCE]
    point = max(points, key=lambda point: len(point.sharing), default=None)
    if point is None or len(point.sharing) < 2:
        return None
    others = [kept for name, kept in evidence.kept_of_each.items() if name not in point.sharing]
    if not others or sum(kept < NOT_SHARED for kept in others) < _NEARLY_ALL * len(others):
        return None
    count, sampled = len(point.sharing), left_out.sampled
    which, turn = ("the", " that were left out in turn") if evidence.is_sample else ("these", "")
    return _Answer(
        f"{count:,} of {which} {sampled:,} adapters{turn} share a subspace of more directions than were kept: it shows "
        f"with k = {point.k}.",
        Finding(
            "partly-shared",
            "A part of them shares a subspace, but k is too small for it: left out of the fit, an adapter loses "
            f"{error(left_out.errors.mean)} of its update on average; with k = {point.k}, {count:,} of {sampled:,} "
            "keep half of their squared norm and more.",
            "Fit those by themselves (`exclude_adapters=`, `--exclude-adapter`), or again with "
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
            f"They share a part of their directions: {evidence.against_chance}; in the fit, the same adapters lose "
            f"{error(evidence.left_out.in_fit.mean)}.",
            f"{_size_advice(evidence.report)} An adapter that comes later is best put into a new fit.",
        ),
    )


def _not_shared(evidence: _Evidence) -> _Answer:
    report = evidence.report
    beyond_chance = "That is no more than chance keeps."
    if evidence.is_beyond_chance:
        beyond_chance = (
            f"Beyond chance it keeps {share(evidence.left_out.kept)} of its squared norm: they share a little, but no "
            "subspace."
        )
    later = "takes as many bytes as it would alone." if is_coded(report) else "will not fit in."
    return _Answer(
        f"{evidence.subject} do not share a subspace: {evidence.measured}.",
        Finding(
            "not-shared",
            f"They do not share a subspace: {evidence.against_chance}. {beyond_chance} {_in_the_fit(evidence)}",
            f"{_size_advice(report)} An adapter that comes later {later}",
            good=False,
        ),
    )


def _in_the_fit(evidence: _Evidence) -> str:
    """Say what adapters that share no subspace lose in the fit, and why."""
    report, lost, null = evidence.report, evidence.in_fit.mean, evidence.report.null
    loss = f"In the fit they lose {error(lost)}"
    if is_coded(report):
        return (
            f"{loss} too." if lost > LARGE_ERROR else f"{loss}, since what directions miss of each is kept beside it."
        )
    # the null model keeps coefficients of the adapters' own factors
    if null is None or not keeps_factors(report):
        return f"{loss}."
    of_null = f"with the same singular values in random directions they would lose {error(null.errors.mean)}"
    if lost > LARGE_ERROR:
        return f"{loss} too; {of_null}."
    is_better = is_above(-lost, -null.errors.mean, null.spread)
    if is_better and spreads.beyond_chance(lost, null.errors.mean) >= NOT_SHARED:
        return f"{loss}; {of_null}. What makes the difference is common to some of them."
    sizes = {side.k for module in report.modules for side in (module.down, module.up)}
    room = f"k = {max(sizes)} has" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)} directions have"
    structure = "next to no" if is_better else "no"
    return (
        f"{loss}, since {room} room to hold them side by side; {of_null}. That is compression, and {structure} common "
        "structure."
    )


def _size_advice(report: ReportData) -> str:
    """Advise a number of components that keeps the adapters well, or to keep them as they are."""
    if is_coded(report):
        return "Keep the pack for its size, which needs nothing in common."
    if report.in_fit is not None and report.in_fit.mean <= SMALL_ERROR:
        return "Keep the pack for its size." if report.bytes.ratio > 1 else "Keep them as they are."
    point = next((point for point in _larger_sizes(report) if point.mean <= SMALL_ERROR), None)
    if point is None:
        return "Keep them as they are."
    if point.ratio <= 1:
        return (
            f"Keep them as they are: a mean loss of {SMALL_ERROR} takes k = {point.k}, and then the pack is "
            f"{ratio(1 / point.ratio)} larger than the LoRAs."
        )
    return (
        f"Keep them as they are, or raise k to {point.k}: the mean loss is then {error(point.mean)}, and the pack "
        f"{ratio(point.ratio)} smaller than the LoRAs."
    )


def _larger_sizes(report: ReportData) -> list[SizePoint]:
    """Return the measured sizes with more components than any side of the pack."""
    largest = max((side.k for module in report.modules for side in (module.down, module.up)), default=0)
    return [point for point in report.sizes if point.k > largest]
