"""Consistency checks of a report that was read from JSON, so that rendering cannot fail."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ..core.fit_options import PURPOSES
from ..core.json_dataclasses import JsonTypeError
from .comparison_data import Spread
from .data import ReportData, SideFigures, Similarity
from .frontier import FIT, METHODS, TASK_METHODS
from .history_data import HistoryFigures
from .task_data import TaskFrontier

_MAX = 1e100
"""Maximum absolute value of a figure, so that its square is a finite float."""


def check(report: ReportData) -> None:
    """Raise `JsonTypeError` if a number is out of range, lists differ in length, or an unknown adapter is named."""
    _check_numbers(report, "report")
    _check_collection(report)
    known = {adapter.name for adapter in report.adapters}
    for where, name in _names(report):
        if name not in known:
            raise JsonTypeError(f"report.{where} names {name!r}, which is not among the adapters.")
    for index, module in enumerate(report.modules):
        for side in ("down", "up"):
            _check_side(getattr(module, side), f"report.modules[{index}].{side}")
    if report.similarity is not None:
        _check_similarity(report.similarity)
    if report.frontier is not None:
        _check_methods([point.way for point in report.frontier.points], METHODS, "report.frontier")
    _check_unique([history.name for history in report.histories], "report.histories")
    for index, history in enumerate(report.histories):
        _check_history(history, f"report.histories[{index}]")
    for index, frontier in enumerate(report.task_frontiers):
        _check_task_frontier(frontier, f"report.task_frontiers[{index}]")


def _check_numbers(value: Any, where: str) -> None:
    """Check that integers are counts, indices or seeds, and that floats can be drawn."""
    if is_dataclass(value):
        for field in fields(value):
            _check_numbers(getattr(value, field.name), f"{where}.{field.name}")
    elif isinstance(value, list | tuple):
        for index, element in enumerate(value):
            _check_numbers(element, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, element in value.items():
            _check_numbers(element, f"{where}.{key}")
    elif isinstance(value, float):
        # also false for NaN
        if not abs(value) <= _MAX:
            raise JsonTypeError(f"{where} must be a number of at most {_MAX:g}, got {value}.")
    elif isinstance(value, int) and not 0 <= value < 2**63:
        raise JsonTypeError(f"{where} must be an integer from 0 to 2**63 - 1, got {value}.")


def _check_collection(report: ReportData) -> None:
    about, adapters, modules = report.collection, report.adapters, report.modules
    if about.purpose not in PURPOSES:
        raise JsonTypeError(f"report.collection.purpose is {about.purpose!r}; expected one of {', '.join(PURPOSES)}.")
    for field, stated, listed in (("adapters", about.adapters, adapters), ("modules", about.modules, modules)):
        if stated != len(listed):
            raise JsonTypeError(f"report.collection.{field} is {stated}, but report.{field} has {len(listed)} items.")
        _check_unique([figures.name for figures in listed], f"report.{field}")
    if report.module_errors:
        _check_shape(report.module_errors, (len(adapters), len(modules)), "report.module_errors")
    clusters = 0 if report.similarity is None else len(report.similarity.clusters)
    for index, adapter in enumerate(adapters):
        if adapter.cluster is not None and adapter.cluster >= clusters:
            raise JsonTypeError(
                f"report.adapters[{index}].cluster is {adapter.cluster}, but there are {clusters} clusters."
            )


def _names(report: ReportData) -> Iterator[tuple[str, str]]:
    """Yield (field, name) for every name of an adapter outside report.adapters."""
    lists = [("duplicates", group) for group in report.duplicates]
    lists += [("outliers", report.outliers), ("untrained", report.untrained)]
    lists += [("verdict.findings", finding.adapters) for finding in report.verdict.findings]
    lists += [("sizes", point.sharing) for point in report.sizes]
    lists += [("evaluations", [evaluation.name for evaluation in report.evaluations])]
    lists += [("adapters", [adapter.nearest for adapter in report.adapters if adapter.nearest is not None])]
    lists += [("modules", [module.worst for module in report.modules if module.worst is not None])]
    lists += [
        ("task_frontiers", [run.name for point in frontier.points for run in point.runs])
        for frontier in report.task_frontiers
    ]
    lists += [("runs", run.adapters) for run in report.runs]
    if report.starts is not None:
        lists += [("starts.groups", group.adapters) for group in report.starts.groups]
    if report.similarity is not None:
        lists += [("similarity.names", report.similarity.names)]
        lists += [("similarity.clusters", cluster.adapters) for cluster in report.similarity.clusters]
    spreads: list[tuple[str, Spread | None]] = [("in_fit", report.in_fit), ("projected", report.projected)]
    spreads += [("baselines", baseline.errors) for baseline in report.baselines]
    if report.left_out is not None:
        spreads += [("left_out.errors", report.left_out.errors), ("left_out.in_fit", report.left_out.in_fit)]
    lists += [(where, [spread.worst_adapter]) for where, spread in spreads if spread is not None]
    return ((where, name) for where, names in lists for name in names)


def _check_side(side: SideFigures, where: str) -> None:
    if not side.dimension > 0:
        raise JsonTypeError(f"{where}.dimension must be positive, got 0.")
    if max(side.k, side.rank) > side.dimension:
        raise JsonTypeError(f"{where} has {max(side.k, side.rank)} components, but only {side.dimension} dimensions.")
    for name in ("spectrum", "null"):
        values = getattr(side, name)
        if any(value < 0 for value in values) or (values and not max(values) > 0):
            raise JsonTypeError(f"{where}.{name} must be non-negative and not all zero.")


def _check_similarity(similarity: Similarity) -> None:
    n = len(similarity.names)
    _check_unique(similarity.names, "report.similarity.names")
    # the JSON of many adapters has no matrices
    if similarity.cosine or similarity.overlap:
        _check_shape(similarity.cosine, (n, n), "report.similarity.cosine")
        _check_shape(similarity.overlap, (n, n), "report.similarity.overlap")
    where = "report.similarity.tree"
    _check_shape(similarity.tree, (max(n - 1, 0), 4), where)
    roots = set(range(n))
    for step, (first, second, height, _) in enumerate(similarity.tree):
        if first == second or not {first, second} <= roots or height < 0:
            raise JsonTypeError(f"{where}[{step}] joins {first:g} and {second:g} at {height:g}, which is impossible.")
        roots = roots - {first, second} | {n + step}


def _check_methods(methods: Sequence[str], known: Collection[str], where: str) -> None:
    """Check that the pack is the first point and no other, and that the other methods are known."""
    for index, method in enumerate(methods):
        if method not in known or (method == "pack") != (index == 0):
            raise JsonTypeError(
                f"{where}.points[{index}].way is {method!r}; expected the pack first, then any of {', '.join(known)}."
            )
    if not methods:
        raise JsonTypeError(f"{where}.points is empty; expected the pack first.")


def _check_history(history: HistoryFigures, where: str) -> None:
    if not history.versions:
        raise JsonTypeError(f"{where} has no versions.")
    _check_unique([version.version for version in history.versions], f"{where}.versions")
    for index, version in enumerate(history.versions):
        sampled = [field is not None for field in (version.x, version.y, version.to_final)]
        if any(sampled) != all(sampled):
            raise JsonTypeError(f"{where}.versions[{index}] has some of x, y and to_final; expected all or none.")
    if history.versions[0].x is None or history.versions[-1].x is None:
        raise JsonTypeError(f"{where}: the first and the last version have no position.")


def _check_task_frontier(frontier: TaskFrontier, where: str) -> None:
    _check_methods([point.way for point in frontier.points], TASK_METHODS, where)
    pack, *others = frontier.points
    fits = [point.ratio for point in others if point.way == FIT]
    baselines = [point.ratio for point in others if point.way != FIT]
    if pack.ratio is not None or None in fits or fits != baselines or len({*fits}) < len(fits):
        raise JsonTypeError(f"{where}.points has fits at ratios {fits}, but baselines at {baselines}.")
    runs = [(run.name, run.data) for run in pack.runs]
    for index, point in enumerate(frontier.points):
        if [(run.name, run.data) for run in point.runs] != runs:
            raise JsonTypeError(
                f"{where}.points[{index}].runs have other adapters or files than those of the first point."
            )


def _check_unique(names: Sequence[str], where: str) -> None:
    ((name, count),) = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise JsonTypeError(f"{where} contains {name!r} {count} times.")


def _check_shape(rows: Sequence[Sequence[object]], shape: tuple[int, int], where: str) -> None:
    lengths = {len(row) for row in rows}
    if len(rows) != shape[0] or not lengths <= {shape[1]}:
        raise JsonTypeError(
            f"{where} has {len(rows)} rows of {sorted(lengths)} items, expected {shape[0]} of {shape[1]}."
        )
