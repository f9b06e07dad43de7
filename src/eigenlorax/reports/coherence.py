"""Whether the parts of a report that was read fit together, so that whatever shows it finds what it looks for."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ..core.json_dataclasses import JsonTypeError
from .data import ReportData, SideFigures, Similarity, Spread, TaskFrontier
from .frontier import FIT, METHODS, TASK_METHODS

_MOST = 1e100
"""No figure is as large, and its square is still a float."""


def check(report: ReportData) -> None:
    """Raise `UnfitError` where a number cannot be one, lists have other lengths than they should, or something is named
    that the report does not have."""
    _check_numbers(report, "report")
    _check_lengths(report)
    known = {one.name for one in report.adapters}
    for where, name in _named(report):
        if name not in known:
            raise JsonTypeError(f"report.{where} names {name!r}, which is not among the adapters.")
    for place, module in enumerate(report.modules):
        for side in ("down", "up"):
            _check_side(getattr(module, side), f"report.modules[{place}].{side}")
    if report.similarity is not None:
        _check_similarity(report.similarity)
    if report.frontier is not None:
        _check_ways([point.way for point in report.frontier.points], METHODS, "report.frontier")
    for place, found in enumerate(report.task_frontiers):
        _check_task_frontier(found, f"report.task_frontiers[{place}]")


def _check_numbers(value: Any, where: str) -> None:
    """Integers are counts, places and seeds; floats can be drawn."""
    if is_dataclass(value):
        for one in fields(value):
            _check_numbers(getattr(value, one.name), f"{where}.{one.name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check_numbers(item, f"{where}[{place}]")
    elif isinstance(value, float):
        if not abs(value) <= _MOST:
            raise JsonTypeError(f"{where} is {value}, where a number of at most {_MOST:g} belongs.")
    elif isinstance(value, int) and not 0 <= value < 2**63:
        raise JsonTypeError(f"{where} is {value}, where a whole number from 0 to 2**63 - 1 belongs.")


def _check_lengths(report: ReportData) -> None:
    about, adapters, modules = report.collection, report.adapters, report.modules
    for what, stated, found in (("adapters", about.adapters, adapters), ("modules", about.modules, modules)):
        if stated != len(found):
            raise JsonTypeError(f"report.collection.{what} is {stated}, and report.{what} has {len(found)} items.")
        _check_unique([one.name for one in found], f"report.{what}")
    if report.module_errors:
        _check_shape(report.module_errors, (len(adapters), len(modules)), "report.module_errors")
    clusters = 0 if report.similarity is None else len(report.similarity.clusters)
    for place, adapter in enumerate(adapters):
        if adapter.cluster is not None and adapter.cluster >= clusters:
            raise JsonTypeError(f"report.adapters[{place}].cluster is {adapter.cluster}, of {clusters} clusters.")


def _named(report: ReportData) -> Iterator[tuple[str, str]]:
    """Names of adapters outside their own list, each with its place."""
    lists = [("duplicates", group) for group in report.duplicates]
    lists += [("outliers", report.outliers), ("untrained", report.untrained)]
    lists += [("verdict.findings", one.adapters) for one in report.verdict.findings]
    lists += [("sizes", point.sharing) for point in report.sizes]
    lists += [("evaluations", [one.name for one in report.evaluations])]
    lists += [("adapters", [one.nearest for one in report.adapters if one.nearest is not None])]
    lists += [("modules", [one.worst for one in report.modules if one.worst is not None])]
    lists += [
        ("task_frontiers", [run.name for point in found.points for run in point.runs])
        for found in report.task_frontiers
    ]
    if report.starts is not None:
        lists += [("starts.groups", group.adapters) for group in report.starts.groups]
    if report.similarity is not None:
        lists += [("similarity.names", report.similarity.names)]
        lists += [("similarity.clusters", one.adapters) for one in report.similarity.clusters]
    spreads: list[tuple[str, Spread | None]] = [("in_fit", report.in_fit), ("projected", report.projected)]
    spreads += [("baselines", one.errors) for one in report.baselines]
    if report.left_out is not None:
        spreads += [("left_out.errors", report.left_out.errors), ("left_out.in_fit", report.left_out.in_fit)]
    lists += [(where, [one.worst_adapter]) for where, one in spreads if one is not None]
    return ((where, name) for where, names in lists for name in names)


def _check_side(side: SideFigures, where: str) -> None:
    if not side.dimension > 0:
        raise JsonTypeError(f"{where}.dimension is 0.")
    if max(side.k, side.rank) > side.dimension:
        raise JsonTypeError(f"{where} has {max(side.k, side.rank)} directions of {side.dimension} dimensions.")
    for name in ("spectrum", "null"):
        values = getattr(side, name)
        if any(value < 0 for value in values) or (values and not max(values) > 0):
            raise JsonTypeError(f"{where}.{name} holds shares that are negative, or zero throughout.")


def _check_similarity(found: Similarity) -> None:
    n = len(found.names)
    _check_unique(found.names, "report.similarity.names")
    for name in ("cosine", "overlap"):
        if found.cosine or found.overlap:
            _check_shape(getattr(found, name), (n, n), f"report.similarity.{name}")
    where = "report.similarity.tree"
    _check_shape(found.tree, (max(n - 1, 0), 4), where)
    free = set(range(n))
    for step, (first, second, height, _) in enumerate(found.tree):
        if first == second or not {first, second} <= free or height < 0:
            raise JsonTypeError(f"{where}[{step}] joins {first:g} and {second:g} at {height:g}, which cannot be.")
        free = free - {first, second} | {n + step}


def _check_ways(found: Sequence[str], known: Collection[str], where: str) -> None:
    """The pack is the first way, and there alone."""
    for place, way in enumerate(found):
        if way not in known or (way == "pack") != (place == 0):
            raise JsonTypeError(
                f"{where}.points[{place}].way is {way!r}; the pack comes first, then {', '.join(known)}."
            )
    if not found:
        raise JsonTypeError(f"{where}.points is empty, where the pack's belongs.")


def _check_task_frontier(found: TaskFrontier, where: str) -> None:
    _check_ways([point.way for point in found.points], TASK_METHODS, where)
    pack, *others = found.points
    fits = [point.ratio for point in others if point.way == FIT]
    alone = [point.ratio for point in others if point.way != FIT]
    if pack.ratio is not None or None in fits or fits != alone or len({*fits}) < len(fits):
        raise JsonTypeError(f"{where}.points has fits at ratios {fits}, and adapters alone at {alone}.")
    runs = [(run.name, run.data) for run in pack.runs]
    for place, point in enumerate(found.points):
        if [(run.name, run.data) for run in point.runs] != runs:
            raise JsonTypeError(f"{where}.points[{place}].runs are not of the adapters and rows of the first one's.")


def _check_unique(names: Sequence[str], where: str) -> None:
    ((name, count),) = Counter(names).most_common(1) or [("", 0)]
    if count > 1:
        raise JsonTypeError(f"{where} has {name!r} {count} times.")


def _check_shape(rows: Sequence[Sequence[object]], shape: tuple[int, int], where: str) -> None:
    found = {len(row) for row in rows}
    if len(rows) != shape[0] or not found <= {shape[1]}:
        raise JsonTypeError(f"{where} has {len(rows)} rows of {sorted(found)} items, not {shape[0]} of {shape[1]}.")
