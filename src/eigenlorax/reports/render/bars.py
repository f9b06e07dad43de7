"""Bar charts of errors and accuracies as data, the worst first. `macros.html` writes them as HTML of any width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .. import numbers
from ..data import ReportData
from ..task_data import Evaluation

MAX_BARS = 40
"""Maximum number of bars in a chart; the tables have all rows."""

_ROUND = (1.0, 1.2, 1.6, 2.0, 4.0, 8.0, 10.0)
"""Leading digits of the end of an axis, chosen so that its quarters are round numbers too."""

_MIN_END = 0.1
"""Smallest end of an axis, so that negligible errors and accuracies look negligible."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Shape and legend of a bar or a mark.

    Attributes:
        shape: CSS classes, such as "bar", "bar quiet", "diamond" or "stroke".
        label: Text of the legend.
    """

    shape: str
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A value on the axis.

    Attributes:
        kind: Shape and legend.
        value: The value.
        text: The value as it is printed.
    """

    kind: Kind
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a chart.

    Attributes:
        name: Label of the row.
        value: Value of the bar.
        marks: Further values on the same axis.
    """

    name: str
    value: Mark
    marks: list[Mark] = field(default_factory=list)

    @property
    def description(self) -> str:
        """Text of all values, for screen readers and tooltips."""
        return "; ".join(f"{mark.kind.label} {mark.text}" for mark in (self.value, *self.marks))


@dataclass(frozen=True, slots=True)
class Chart:
    """Bar chart.

    Attributes:
        label: Description for screen readers.
        bars: Bars from the top down.
    """

    label: str
    bars: list[Bar]

    @property
    def end(self) -> float:
        """End of the axis, which begins at 0."""
        return axis_end(max([_MIN_END, *(mark.value for bar in self.bars for mark in (bar.value, *bar.marks))]))

    @property
    def legend(self) -> list[Kind]:
        """Kinds of bars and marks; empty if there is only one."""
        kinds = list(dict.fromkeys(mark.kind for bar in self.bars for mark in (bar.value, *bar.marks)))
        return kinds if len(kinds) > 1 else []

    @property
    def ticks(self) -> list[tuple[int, str]]:
        """Pairs of position in per cent and label."""
        return [(25 * quarter, f"{self.end * quarter / 4:g}") for quarter in range(5)]

    def position(self, value: float) -> str:
        """Return a value's position on the axis, or a bar's length, as a CSS percentage."""
        return f"{100 * max(value, 0.0) / self.end:.2f}%"


def axis_end(largest: float) -> float:
    """Return the end of an axis from 0 that includes the largest value and has round quarters."""
    if largest <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(largest))
    return next(scale * digit for digit in _ROUND if largest <= scale * digit * (1 + 1e-9))


_PROJECTED = Kind("bar other", "delta error, not in the fit")
_ERROR = Kind("bar", "delta error")
_LEFT_OUT = Kind("diamond", "left out of the fit")
_MEAN = Kind("stroke", "best multiple of the mean adapter")
_BASELINE = Kind("bar quiet", "mean error, other method")
_THIS_PACK = Kind("bar", "mean error, this pack")
_WORST = Kind("stroke", "worst adapter")
_RECYCLED = Kind("bar", "stored")
_ORIGINAL = Kind("stroke", "original")
_WITHOUT = Kind("diamond", "no update")


def _error(kind: Kind, error: float) -> Mark:
    return Mark(kind, error, numbers.error(error))


def _accuracy(kind: Kind, accuracy: float) -> Mark:
    return Mark(kind, accuracy, numbers.share(accuracy))


def adapters(report: ReportData) -> Chart:
    """Chart the worst adapters, with their errors when left out and those of the best multiple of the mean adapter."""
    bars = []
    for adapter in [adapter for adapter in report.adapters if not adapter.untrained][:MAX_BARS]:
        marks = [(_LEFT_OUT, adapter.left_out_error), (_MEAN, adapter.mean_scaled_error)]
        bars.append(
            Bar(
                adapter.name,
                _error(_ERROR if adapter.in_fit else _PROJECTED, adapter.delta_error),
                [_error(kind, error) for kind, error in marks if error is not None],
            )
        )
    return Chart("Delta error by adapter, the worst first", bars)


def modules(report: ReportData) -> Chart:
    """Chart the worst modules, for models without layers or with one kind of module."""
    errors = [(module.delta_error, module.name) for module in report.modules if module.delta_error is not None]
    errors = sorted(errors, key=lambda pair: -pair[0])[:MAX_BARS]
    return Chart("Delta error by module, the worst first", [Bar(name, _error(_ERROR, error)) for error, name in errors])


def baselines(report: ReportData) -> Chart:
    """Chart the mean errors of this pack and of the baselines, with the worst adapter of each."""
    bars = [
        Bar(
            baseline.label,
            _error(_THIS_PACK if baseline.key == "pack" else _BASELINE, baseline.errors.mean),
            [_error(_WORST, baseline.errors.worst)],
        )
        for baseline in report.baselines
    ]
    return Chart("Mean error of this pack and of other methods", bars)


def accuracies(evaluations: Sequence[Evaluation]) -> Chart:
    """Chart the accuracy of each labelled evaluation, the largest decrease first; no bars if none is labelled."""
    changes = [
        (evaluation.recycled_accuracy - evaluation.original_accuracy, evaluation)
        for evaluation in evaluations
        if evaluation.recycled_accuracy is not None and evaluation.original_accuracy is not None
    ]
    bars = []
    for _, evaluation in sorted(changes, key=lambda pair: pair[0])[:MAX_BARS]:
        marks = [(_ORIGINAL, evaluation.original_accuracy), (_WITHOUT, evaluation.without_accuracy)]
        bars.append(
            Bar(
                evaluation.name,
                _accuracy(_RECYCLED, evaluation.recycled_accuracy or 0.0),
                [_accuracy(kind, accuracy) for kind, accuracy in marks if accuracy is not None],
            )
        )
    return Chart("Accuracy by adapter, the largest decrease first", bars)
