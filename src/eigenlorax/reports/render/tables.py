"""The tables of a report as data, for Markdown and the page. Columns without any value are left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import numbers
from ..data import (
    AdapterFigures,
    Baseline,
    Bytes,
    Evaluation,
    FrontierPoint,
    ModuleFigures,
    ReportData,
    SizePoint,
    StartEnergy,
    StartGroup,
    TaskFrontier,
    TaskPoint,
    TaskRun,
)
from ..frontier import FIT, METHODS, TASK_METHODS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. text: what is printed. exact: the exact value, or "" if the text is exact."""

    text: str
    exact: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column. label: the heading. meaning: its explanation, or "". numeric: whether the cells are numbers."""

    label: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A table. caption: describes the rows. rows: one cell for each of `columns`."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class _Field(Generic[T]):
    """A column and how to fill it from a row.

    value: None where nothing was measured. exact: whether cells are bytes whose exact number is a tooltip.
    """

    label: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str
    meaning: str = ""
    numeric: bool = True
    exact: bool = False


def adapters(report: ReportData, most: int | None = None) -> Table:
    """Return errors and nearest neighbours of every adapter, the worst first, or of the first `most`."""
    fields: list[_Field[AdapterFigures]] = [
        _Field("adapter", lambda a: a.name, numeric=False),
        _Field("delta error", lambda a: None if a.untrained else a.delta_error, numbers.error, "‖D − D̂‖ / ‖D‖"),
        _Field("left out", lambda a: a.left_out_error, numbers.error, "its error in the subspace of all the others"),
        _Field(
            "mean ×", lambda a: a.mean_scaled_error, numbers.error, "error of the best multiple of the mean adapter"
        ),
        _Field("random", lambda a: a.random_error, numbers.error, "error in random bases of equal k"),
        _Field(
            "cut", lambda a: a.truncated_error, numbers.error, "error of the adapter alone, cut by SVD to equal bytes"
        ),
        _Field("int8", lambda a: a.int8_error, numbers.error, "error of its factors in int8"),
        _Field("int4", lambda a: a.int4_error, numbers.error, "error of its factors in int4"),
        _Field("nearest", lambda a: a.nearest, meaning="the adapter of the largest |cosine|", numeric=False),
        _Field("cosine", lambda a: a.nearest_cosine, numbers.cosine, "with the nearest"),
        _Field("overlap", lambda a: a.overlap, numbers.share, "how much of its directions the others have, on average"),
        _Field("cluster", lambda a: None if a.cluster is None else a.cluster + 1, str),
        _Field("state", _state, numeric=False),
    ]
    return _table("All adapters, the worst first", fields, report.adapters[:most])


def weights(report: ReportData, most: int | None = None) -> Table:
    """Return bytes, norms and errors of factors of the same adapters, in the same order."""
    fields: list[_Field[AdapterFigures]] = [
        _Field("adapter", lambda a: a.name, numeric=False),
        _Field("LoRA", lambda a: a.lora_bytes, numbers.size, "tensor bytes of its factors", exact=True),
        _Field("here", lambda a: a.coefficient_bytes, numbers.size, "bytes of its coefficients", exact=True),
        _Field("rounding", lambda a: None if a.untrained else a.rounding_error, numbers.error, "the share of rounding"),
        _Field("A alone", lambda a: a.factor_error_down, numbers.error, "error of the down factor"),
        _Field("B alone", lambda a: a.factor_error_up, numbers.error, "error of the up factor"),
        _Field("norm", lambda a: a.norm, numbers.norm, "‖D‖"),
        _Field("rank", lambda a: ", ".join(map(str, a.ranks))),
        _Field("modules", lambda a: a.modules, numbers.count),
        _Field(
            "carried", lambda a: a.carried_bytes or None, numbers.size, "bytes the subspace cannot hold", exact=True
        ),
        _Field("head", lambda a: a.head_bytes or None, numbers.size, "bytes of heads, kept as they are", exact=True),
    ]
    return _table("Bytes and factors of all adapters", fields, report.adapters[:most])


def modules(report: ReportData) -> Table:
    """Return the errors in every module, in the order of the model."""
    fields: list[_Field[ModuleFigures]] = [
        _Field("module", lambda m: m.name, numeric=False),
        _Field("delta error", lambda m: m.delta_error, numbers.error),
        _Field("worst", lambda m: m.worst_error, numbers.error, "the largest error of an adapter there"),
        _Field("adapter", lambda m: m.worst, meaning="which one that is", numeric=False),
        _Field("A alone", lambda m: m.factor_error_down, numbers.error, "error of the down factors"),
        _Field("B alone", lambda m: m.factor_error_up, numbers.error, "error of the up factors"),
        _Field("adapters", lambda m: m.adapters, numbers.count, "of the fit that have it"),
    ]
    return _table("All modules", fields, report.modules)


def sides(report: ReportData) -> Table:
    """Return sizes, energies and overlaps of both sides of every module, in the same order."""
    fields: list[_Field[ModuleFigures]] = [_Field("module", lambda m: m.name, numeric=False)]
    for side, label in (("down", "down"), ("up", "up")):
        fields += [
            _Field(f"k, {label}", _side_field(side, "k"), numbers.count),
            _Field(
                f"rank, {label}",
                _side_field(side, "rank"),
                numbers.count,
                "directions that the adapters have, numerically",
            ),
            _Field(f"of, {label}", _side_field(side, "dimension"), numbers.count, "dimension"),
            _Field(
                f"energy, {label}", _side_field(side, "energy"), numbers.share, "share of squared norm that the k keep"
            ),
            _Field(
                f"chance, {label}", _side_field(side, "null_energy"), numbers.share, "the same in random directions"
            ),
            _Field(
                f"halves, {label}",
                _side_field(side, "halves_overlap"),
                numbers.share,
                "overlap of two halves' subspaces",
            ),
            _Field(
                f"random, {label}",
                _side_field(side, "null_halves_overlap"),
                numbers.share,
                "overlap of random subspaces",
            ),
        ]
    return _table("Directions of all modules", fields, report.modules)


def baselines(report: ReportData) -> Table:
    """Return errors and bytes of the pack and of its baselines."""
    lora = report.bytes.lora
    fields: list[_Field[Baseline]] = [
        _Field("instead", lambda b: b.label, numeric=False),
        _Field("mean error", lambda b: b.errors.mean, numbers.error),
        _Field("worst error", lambda b: b.errors.worst, numbers.error),
        _Field("worst adapter", lambda b: b.errors.worst_adapter, numeric=False),
        _Field("bytes", lambda b: b.stored_bytes, numbers.size, "of all of them together", exact=True),
        _Field(
            "smaller", lambda b: lora / b.stored_bytes if b.stored_bytes else None, numbers.ratio, "LoRA bytes ÷ these"
        ),
    ]
    return _table("What else could be done with these adapters", fields, report.baselines)


def frontier(report: ReportData) -> Table:
    """Return bytes and errors of the pack and of the tuned baselines."""
    lora = report.frontier.lora_float16 if report.frontier is not None else 0
    fields: list[_Field[FrontierPoint]] = [
        _Field("way", lambda p: METHODS[p.way], numeric=False),
        _Field("tuned to", lambda p: p.settings or None, numeric=False),
        _Field("worst error", lambda p: p.worst, numbers.error),
        _Field("mean error", lambda p: p.mean, numbers.error),
        _Field("bytes", lambda p: p.stored_bytes, numbers.size, "of all adapters together", exact=True),
        _Field(
            "smaller",
            lambda p: lora / p.stored_bytes if p.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes in 16 bits ÷ these",
        ),
    ]
    points = report.frontier.points if report.frontier is not None else []
    return _table("Bytes at an error, by every way", fields, points)


def bytes_(report: ReportData) -> Table:
    """Return the bytes of the collection as LoRAs and as a pack."""
    b: Bytes = report.bytes
    stored = b.basis + b.coefficients + b.carried
    rows: list[tuple[str, int | None, float | None]] = [
        ("LoRAs, at the pack's dtype", b.lora, 1.0),
        ("LoRAs, as they came", b.lora_stored, None),
        ("LoRAs, in two bytes a number", b.lora_float16, None),
        ("LoRAs, their files", b.lora_files, None),
        ("basis", b.basis, None),
        ("coefficients", b.coefficients, None),
        ("carried: what the subspace cannot hold", b.carried or None, None),
        ("this pack, together", stored, b.ratio),
        ("heads, beside both", b.heads or None, None),
    ]
    fields: list[_Field[tuple[str, int | None, float | None]]] = [
        _Field("what", lambda row: row[0], numeric=False),
        _Field("bytes", lambda row: row[1], numbers.size, exact=True),
        _Field("ratio", lambda row: row[2], numbers.ratio, "LoRA bytes ÷ these"),
    ]
    return _table("Tensor bytes, heads aside", fields, [row for row in rows if row[1] is not None])


def sizes(report: ReportData) -> Table:
    """Return errors and bytes of the collection with other numbers of components."""
    fields: list[_Field[SizePoint]] = [
        _Field("k", lambda p: p.k, numbers.count),
        _Field("mean error", lambda p: p.mean, numbers.error),
        _Field("worst error", lambda p: p.worst, numbers.error),
        _Field("left out", lambda p: p.left_out, numbers.error, "mean error of adapters left out of the fit"),
        _Field("random", lambda p: p.random, numbers.error, "mean error of these in as many random directions"),
        _Field(
            "nothing shared",
            lambda p: p.null,
            numbers.error,
            "mean error of the same singular values in random directions, fitted alike",
        ),
        _Field("bytes", lambda p: p.stored_bytes, numbers.size, "basis, coefficients and carried", exact=True),
        _Field("ratio", lambda p: p.ratio, numbers.ratio, "LoRA bytes ÷ these"),
    ]
    return _table("The same adapters at another k", fields, report.sizes)


def evaluations(report: ReportData) -> dict[str, Table]:
    """Return by task the scores of the original and reconstructed adapters, and without an update."""
    return {task: _scores(group) for task, group in by_task(report).items()}


def by_task(report: ReportData) -> dict[str, list[Evaluation]]:
    """Group the evaluations by task, in order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in report.evaluations:
        groups.setdefault(evaluation.task, []).append(evaluation)
    return groups


def _scores(evaluations: Sequence[Evaluation]) -> Table:
    fields: list[_Field[Evaluation]] = [
        _Field("adapter", lambda e: e.name, numeric=False),
        _Field("rows from", lambda e: e.data, numeric=False),
        _Field("rows", lambda e: e.rows, numbers.count),
        _Field("tokens", lambda e: e.tokens, numbers.count),
        _Field("accuracy: original", lambda e: e.original_accuracy, numbers.share),
        _Field("accuracy: recycled", lambda e: e.recycled_accuracy, numbers.share, "accuracy as it comes back"),
        _Field("accuracy: no update", lambda e: e.without_accuracy, numbers.share, "accuracy with the head alone"),
        _Field("perplexity: original", lambda e: e.original_perplexity, numbers.plain),
        _Field("perplexity: recycled", lambda e: e.recycled_perplexity, numbers.plain, "perplexity as it comes back"),
        _Field("perplexity: no update", lambda e: e.without_perplexity, numbers.plain, "perplexity of the base model"),
        _Field(
            "agreement",
            lambda e: e.agreement,
            numbers.share,
            "share of predictions that are equal, original and recycled",
        ),
        _Field(
            "agreement: no update", lambda e: e.without_agreement, numbers.share, "the same, original and no update"
        ),
        _Field("KL", lambda e: e.kl, numbers.error, "of the recycled from the original, nats a row or token"),
        _Field("KL: no update", lambda e: e.without_kl, numbers.error, "the same, original and no update"),
    ]
    return _table("Adapters on their task", fields, evaluations)


@dataclass(frozen=True, slots=True)
class _TaskRow:
    """A row of the frontier on a task: a method of storing, the original adapters, or no update."""

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
    """Return bytes and scores of every method, between those of the original adapters and of no update."""
    lora = frontier.lora_float16
    rows = [
        _TaskRow("the originals, 16 bits", lora, frontier.original_accuracy, frontier.original_perplexity, 0.0),
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
    fields: list[_Field[_TaskRow]] = [
        _Field("way", lambda row: row.method, numeric=False),
        _Field("ratio", lambda row: row.ratio, numbers.plain, "that was asked for; alone, in the bytes of that fit"),
        _Field("bytes", lambda row: row.stored_bytes, numbers.size, "of all adapters together", exact=True),
        _Field(
            "smaller",
            lambda row: lora / row.stored_bytes if row.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes in 16 bits ÷ these",
        ),
        _Field("worst error", lambda row: row.worst, numbers.error),
        _Field("mean error", lambda row: row.mean, numbers.error),
        _Field("accuracy", lambda row: row.accuracy, numbers.share, "mean over adapters whose rows have labels"),
        _Field("perplexity", lambda row: row.perplexity, numbers.plain, "geometric mean over adapters"),
        _Field("agreement", lambda row: row.agreement, numbers.share, "share of predictions that are the originals'"),
        _Field("KL", lambda row: row.kl, numbers.error, "from the originals', nats a row or token, mean over adapters"),
    ]
    return _table("Bytes, and what becomes of the task", fields, rows)


def task_runs(frontier: TaskFrontier, measure: str, most: int | None = None) -> Table:
    """Return the "kl", "accuracy" or "perplexity" of every adapter with every method, the largest KL in the pack first.

    most: maximum number of rows. No rows if no adapter has that score.
    """
    shows = {"kl": ("KL", numbers.error), "accuracy": ("Accuracy", numbers.share)}
    title, show = shows.get(measure, ("Perplexity", numbers.plain))
    rows = list(zip(*(point.runs for point in frontier.points), strict=True))
    rows = [row for row in rows if getattr(row[0], measure) is not None]
    rows.sort(key=lambda row: -row[0].kl)
    fields: list[_Field[tuple[TaskRun, ...]]] = [
        _Field("adapter", lambda row: row[0].name, numeric=False),
        _Field("rows from", lambda row: row[0].data, numeric=False),
        *(_Field(_method_label(point), _score_at(index, measure), show) for index, point in enumerate(frontier.points)),
    ]
    return _table(f"{title} of every adapter", fields, rows[:most])


def _method_label(point: TaskPoint) -> str:
    if point.ratio is None:
        return TASK_METHODS[point.way]
    return f"ratio {point.ratio:g}" + ", cut and rounded" * (point.way != FIT)


def _score_at(index: int, measure: str) -> Callable[[tuple[TaskRun, ...]], Any]:
    return lambda row: getattr(row[index], measure)


def start_groups(groups: list[StartGroup]) -> Table:
    """Return the groups of adapters that share a random start."""
    numbered = list(enumerate(groups, start=1))
    fields: list[_Field[tuple[int, StartGroup]]] = [
        _Field("group", lambda row: f"group {row[0]}", numeric=False),
        _Field("adapters", lambda row: len(row[1].adapters), numbers.count),
        _Field("cosine of A", lambda row: row[1].cosine_down, numbers.cosine, "mean over pairs"),
        _Field("cosine of B", lambda row: row[1].cosine_up, numbers.cosine, "mean over pairs"),
    ]
    return _table("Groups that share a start", fields, numbered)


def start_energies(energies: list[StartEnergy]) -> Table:
    """Return the energy that k directions keep, with and without adapters that share a start."""
    fields: list[_Field[StartEnergy]] = [
        _Field("of", lambda e: e.who, numeric=False),
        _Field("adapters", lambda e: e.adapters, numbers.count),
        _Field("A", lambda e: e.factors_down, numbers.share, "of the stacked A, each adapter of equal norm"),
        _Field("A by chance", lambda e: e.null_down, numbers.share, "of as many A in random directions"),
        _Field("B", lambda e: e.factors_up, numbers.share, "of the stacked B"),
        _Field("B by chance", lambda e: e.null_up, numbers.share, "of as many B in random directions"),
        _Field("updates, down", lambda e: e.delta_down, numbers.share),
        _Field("updates, up", lambda e: e.delta_up, numbers.share),
    ]
    return _table("Energy that k directions keep", fields, energies)


def _side_field(side: str, field: str) -> Callable[[ModuleFigures], Any]:
    return lambda module: getattr(getattr(module, side), field)


def _state(adapter: AdapterFigures) -> str:
    if adapter.untrained:
        return "untrained"
    return "in the fit" if adapter.in_fit else "projected"


def _table(caption: str, fields: Iterable[_Field[T]], rows: Sequence[T]) -> Table:
    shown = [field for field in fields if any(field.value(row) is not None for row in rows)]
    columns = [Column(field.label, field.meaning, field.numeric) for field in shown]
    return Table(caption, columns, [[_cell(field, field.value(row)) for field in shown] for row in rows])


def _cell(field: _Field[Any], value: Any) -> Cell:
    if value is None:
        return Cell(numbers.MISSING)
    return Cell(field.show(value), numbers.exact(value) if field.exact else "")
