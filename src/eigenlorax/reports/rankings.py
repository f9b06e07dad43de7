"""The report's rows of bars, the worst first: adapters, modules, what else could be done, and tasks."""

from . import bars, numbers
from .bars import Bar, Kind
from .data import Evaluation, Report

MOST = 40
"""Rows at most; the tables have them all."""

_PROJECTED = Kind("bar other", "delta error, not in the fit")
_ERROR = Kind("bar", "delta error")
_LEFT_OUT = Kind("diamond", "left out of the fit")
_MEAN = Kind("stroke", "best multiple of the mean adapter")
_OTHER_WAY = Kind("bar quiet", "mean error, otherwise")
_THIS_PACK = Kind("bar", "mean error, this pack")
_WORST = Kind("stroke", "worst adapter")
_RECYCLED = Kind("bar", "recycled")
_ORIGINAL = Kind("stroke", "original")
_WITHOUT = Kind("diamond", "no update")


def adapters(report: Report) -> str:
    """The worst adapters, with their error when left out, and that of the mean adapter's best multiple."""
    rows = []
    for one in [one for one in report.adapters if not one.untrained][:MOST]:
        marks = [(_LEFT_OUT, one.left_out_error), (_MEAN, one.mean_scaled_error)]
        rows.append(
            Bar(
                one.name,
                one.delta_error,
                numbers.error(one.delta_error),
                _ERROR if one.in_fit else _PROJECTED,
                [(kind, value, numbers.error(value)) for kind, value in marks if value is not None],
            )
        )
    return bars.render(rows, "Delta error by adapter, the worst first")


def modules(report: Report) -> str:
    """The worst modules: for models without layers, or with one kind of module."""
    known = [(module.delta_error, module.name) for module in report.modules if module.delta_error is not None]
    known = sorted(known, key=lambda pair: -pair[0])[:MOST]
    rows = [Bar(name, error, numbers.error(error), _ERROR) for error, name in known]
    return bars.render(rows, "Delta error by module, the worst first")


def baselines(report: Report) -> str:
    """Mean errors of what else could be done, in the table's order, with the worst adapter's."""
    rows = [
        Bar(
            one.label,
            one.errors.mean,
            numbers.error(one.errors.mean),
            _THIS_PACK if one.key == "pack" else _OTHER_WAY,
            [(_WORST, one.errors.worst, numbers.error(one.errors.worst))],
        )
        for one in report.baselines
    ]
    return bars.render(rows, "Mean error of this pack, and of what else could be done")


def accuracies(evaluations: list[Evaluation]) -> str:
    """Accuracy of each labelled evaluation, the largest loss first; "" if none is labelled."""
    scored = [
        (one.recycled_accuracy - one.original_accuracy, one)
        for one in evaluations
        if one.recycled_accuracy is not None and one.original_accuracy is not None
    ]
    rows = []
    for _, one in sorted(scored, key=lambda pair: pair[0])[:MOST]:
        marks = [(_ORIGINAL, one.original_accuracy), (_WITHOUT, one.without_accuracy)]
        rows.append(
            Bar(
                one.name,
                one.recycled_accuracy or 0.0,
                numbers.share(one.recycled_accuracy),
                _RECYCLED,
                [(kind, value, numbers.share(value)) for kind, value in marks if value is not None],
            )
        )
    return bars.render(rows, "Accuracy by adapter, the largest loss first") if rows else ""
