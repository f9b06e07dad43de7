"""Tables of a report about scores on tasks, for Markdown and the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import numbers
from ..data import ReportData
from ..frontier import FIT, TASK_METHODS
from ..task_data import Evaluation, TaskFrontier, TaskPoint, TaskRun
from .table import Field, Table, make_table


def evaluations(report: ReportData) -> dict[str, Table]:
    """Return the scores of the original and the stored adapters, and without an update, by task."""
    return {task: _scores(group) for task, group in by_task(report).items()}


def by_task(report: ReportData) -> dict[str, list[Evaluation]]:
    """Group the evaluations by task, in order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in report.evaluations:
        groups.setdefault(evaluation.task, []).append(evaluation)
    return groups


def _scores(evaluations: Sequence[Evaluation]) -> Table:
    fields: list[Field[Evaluation]] = [
        Field("adapter", lambda e: e.name, numeric=False),
        Field("rows from", lambda e: e.data, numeric=False),
        Field("rows", lambda e: e.rows, numbers.count),
        Field("tokens", lambda e: e.tokens, numbers.count),
        Field("accuracy: original", lambda e: e.original_accuracy, numbers.share),
        Field(
            "accuracy: stored", lambda e: e.recycled_accuracy, numbers.share, "accuracy of the reconstructed adapter"
        ),
        Field(
            "accuracy: no update",
            lambda e: e.without_accuracy,
            numbers.share,
            "accuracy of the base model with the adapter's head",
        ),
        Field("perplexity: original", lambda e: e.original_perplexity, numbers.plain),
        Field(
            "perplexity: stored",
            lambda e: e.recycled_perplexity,
            numbers.plain,
            "perplexity of the reconstructed adapter",
        ),
        Field("perplexity: no update", lambda e: e.without_perplexity, numbers.plain, "perplexity of the base model"),
        Field(
            "agreement",
            lambda e: e.agreement,
            numbers.share,
            "share of equal predictions of the original and the stored adapter",
        ),
        Field(
            "agreement: no update",
            lambda e: e.without_agreement,
            numbers.share,
            "the same for the original adapter and no update",
        ),
        Field(
            "KL",
            lambda e: e.kl,
            numbers.error,
            "divergence of the stored from the original predictions, nats per row or token",
        ),
        Field(
            "KL: no update", lambda e: e.without_kl, numbers.error, "the same for the original adapter and no update"
        ),
    ]
    return make_table("Adapters on their task", fields, evaluations)


@dataclass(frozen=True, slots=True)
class _TaskRow:
    """Row of the frontier on a task: a method of storing, the original adapters, or no update."""

    method: str
    stored_bytes: int
    accuracy: float | None
    perplexity: float | None
    kl: float
    ratio: float | None = None
    worst: float | None = None
    mean: float | None = None
    agreement: float | None = None


def task_frontier(frontier: TaskFrontier) -> Table:
    """Return bytes and scores of the original adapters, of every method, and of no update."""
    lora = frontier.lora_float16
    rows = [
        _TaskRow("original adapters, 16 bits", lora, frontier.original_accuracy, frontier.original_perplexity, 0.0),
        *(
            _TaskRow(
                TASK_METHODS[point.way],
                point.stored_bytes,
                point.accuracy,
                point.perplexity,
                point.kl,
                point.ratio,
                point.worst,
                point.mean,
                point.agreement,
            )
            for point in frontier.points
        ),
        _TaskRow("no update", 0, frontier.without_accuracy, frontier.without_perplexity, frontier.without_kl),
    ]
    fields: list[Field[_TaskRow]] = [
        Field("method", lambda row: row.method, numeric=False),
        Field(
            "ratio",
            lambda row: row.ratio,
            numbers.plain,
            "requested ratio; truncated LoRAs take at most the bytes of that fit",
        ),
        Field("bytes", lambda row: row.stored_bytes, numbers.size, "of all adapters together", exact=True),
        Field(
            "smaller",
            lambda row: lora / row.stored_bytes if row.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes in 16 bits ÷ these bytes",
        ),
        Field("worst error", lambda row: row.worst, numbers.error),
        Field("mean error", lambda row: row.mean, numbers.error),
        Field("accuracy", lambda row: row.accuracy, numbers.share, "mean over adapters whose rows have labels"),
        Field("perplexity", lambda row: row.perplexity, numbers.plain, "geometric mean over adapters"),
        Field(
            "agreement",
            lambda row: row.agreement,
            numbers.share,
            "share of predictions equal to those of the originals",
        ),
        Field(
            "KL",
            lambda row: row.kl,
            numbers.error,
            "divergence from the originals' predictions, nats per row or token, mean over adapters",
        ),
    ]
    return make_table("Bytes and scores on the task", fields, rows)


def task_runs(frontier: TaskFrontier, measure: str, max_rows: int | None = None) -> Table:
    """Return one score of every adapter with every method, the largest KL in the pack first.

    Args:
        frontier: Bytes against scores on a task.
        measure: "kl", "accuracy" or "perplexity".
        max_rows: Maximum number of rows; None for all. There are no rows if no adapter has this score.
    """
    shows = {"kl": ("KL", numbers.error), "accuracy": ("Accuracy", numbers.share)}
    title, show = shows.get(measure, ("Perplexity", numbers.plain))
    rows = list(zip(*(point.runs for point in frontier.points), strict=True))
    rows = [row for row in rows if getattr(row[0], measure) is not None]
    rows.sort(key=lambda row: -row[0].kl)
    fields: list[Field[tuple[TaskRun, ...]]] = [
        Field("adapter", lambda row: row[0].name, numeric=False),
        Field("rows from", lambda row: row[0].data, numeric=False),
        *(Field(_method_label(point), _score_at(index, measure), show) for index, point in enumerate(frontier.points)),
    ]
    return make_table(f"{title} of every adapter", fields, rows[:max_rows])


def _method_label(point: TaskPoint) -> str:
    if point.ratio is None:
        return TASK_METHODS[point.way]
    return f"ratio {point.ratio:g}" + ", truncated and rounded" * (point.way != FIT)


def _score_at(index: int, measure: str) -> Callable[[tuple[TaskRun, ...]], Any]:
    return lambda row: getattr(row[index], measure)
