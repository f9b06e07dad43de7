"""The report's tables as data: what the page and Markdown both print. Columns without a single figure are left out."""

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
    """What is printed, and the exact value where that is more."""

    text: str
    exact: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, what it means where the words do not say, and whether its cells are numbers."""

    label: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """caption: what the rows are. rows: as long as `columns`."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True, slots=True)
class _Field(Generic[T]):
    label: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str
    meaning: str = ""
    numeric: bool = True
    exact: bool = False


def adapters(report: ReportData, most: int | None = None) -> Table:
    """Errors of every adapter, the worst first, and whom it is like; or those of the first `most`."""
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
    """Bytes, norms and factors of the same adapters, in the same order."""
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
    """What is lost in every module, in the model's order."""
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
    """The directions of every module, by side, in the same order."""
    fields: list[_Field[ModuleFigures]] = [_Field("module", lambda m: m.name, numeric=False)]
    for side, label in (("down", "down"), ("up", "up")):
        fields += [
            _Field(f"k, {label}", _of(side, "k"), numbers.count),
            _Field(
                f"rank, {label}", _of(side, "rank"), numbers.count, "directions that the adapters have, numerically"
            ),
            _Field(f"of, {label}", _of(side, "dimension"), numbers.count, "dimension"),
            _Field(f"energy, {label}", _of(side, "energy"), numbers.share, "share of squared norm that the k keep"),
            _Field(f"chance, {label}", _of(side, "null_energy"), numbers.share, "the same in random directions"),
            _Field(f"halves, {label}", _of(side, "halves_overlap"), numbers.share, "overlap of two halves' subspaces"),
            _Field(f"random, {label}", _of(side, "null_halves_overlap"), numbers.share, "overlap of random subspaces"),
        ]
    return _table("Directions of all modules", fields, report.modules)


def baselines(report: ReportData) -> Table:
    """What else could be done with the same adapters."""
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
    """Bytes and errors of everything that could be done, tuned."""
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
    """What the collection weighs, as LoRAs and here."""
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
    """The collection at other k."""
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
    """By task, the adapters on it: as they were, as they come back, and without an update."""
    return {task: _evaluated(group) for task, group in by_task(report).items()}


def by_task(report: ReportData) -> dict[str, list[Evaluation]]:
    """The evaluations by their task, in order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for one in report.evaluations:
        groups.setdefault(one.task, []).append(one)
    return groups


def _evaluated(found: Sequence[Evaluation]) -> Table:
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
    return _table("Adapters on their task", fields, found)


@dataclass(frozen=True, slots=True)
class _OnTask:
    """A row of the frontier on a task: a way of storing, or what there is without one."""

    what: str
    stored_bytes: int
    accuracy: float | None
    perplexity: float | None
    kl: float
    ratio: float | None = None
    worst: float | None = None
    mean: float | None = None
    agreement: float | None = None


def task_frontier(found: TaskFrontier) -> Table:
    """Bytes and what becomes of the task, of every way, between the originals and no update at all."""
    lora = found.lora_float16
    rows = [
        _OnTask("the originals, 16 bits", lora, found.original_accuracy, found.original_perplexity, 0.0),
        *(
            _OnTask(
                TASK_METHODS[one.way],
                one.stored_bytes,
                one.accuracy,
                one.perplexity,
                one.kl,
                one.ratio,
                one.worst,
                one.mean,
                one.agreement,
            )
            for one in found.points
        ),
        _OnTask("no update", 0, found.without_accuracy, found.without_perplexity, found.without_kl),
    ]
    fields: list[_Field[_OnTask]] = [
        _Field("way", lambda row: row.what, numeric=False),
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


def task_runs(found: TaskFrontier, measure: str, most: int | None = None) -> Table:
    """Every adapter in every version: its "kl", "accuracy" or "perplexity". Those of the first `most`, the largest KL
    in the pack first; no rows where none has that figure."""
    shows = {"kl": ("KL", numbers.error), "accuracy": ("Accuracy", numbers.share)}
    title, show = shows.get(measure, ("Perplexity", numbers.plain))
    rows = list(zip(*(point.runs for point in found.points), strict=True))
    rows = [row for row in rows if getattr(row[0], measure) is not None]
    rows.sort(key=lambda row: -row[0].kl)
    fields: list[_Field[tuple[TaskRun, ...]]] = [
        _Field("adapter", lambda row: row[0].name, numeric=False),
        _Field("rows from", lambda row: row[0].data, numeric=False),
        *(_Field(_version(point), _of_version(place, measure), show) for place, point in enumerate(found.points)),
    ]
    return _table(f"{title} of every adapter", fields, rows[:most])


def _version(point: TaskPoint) -> str:
    if point.ratio is None:
        return TASK_METHODS[point.way]
    return f"ratio {point.ratio:g}" + ", cut and rounded" * (point.way != FIT)


def _of_version(place: int, measure: str) -> Callable[[tuple[TaskRun, ...]], Any]:
    return lambda row: getattr(row[place], measure)


def start_groups(groups: list[StartGroup]) -> Table:
    """Adapters that began alike."""
    numbered = list(enumerate(groups, start=1))
    fields: list[_Field[tuple[int, StartGroup]]] = [
        _Field("group", lambda row: f"group {row[0]}", numeric=False),
        _Field("adapters", lambda row: len(row[1].adapters), numbers.count),
        _Field("cosine of A", lambda row: row[1].cosine_down, numbers.cosine, "mean over pairs"),
        _Field("cosine of B", lambda row: row[1].cosine_up, numbers.cosine, "mean over pairs"),
    ]
    return _table("Groups that share a start", fields, numbered)


def start_energies(energies: list[StartEnergy]) -> Table:
    """What a shared start does to the energy that k directions keep."""
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


def _of(side: str, field: str) -> Callable[[ModuleFigures], Any]:
    return lambda module: getattr(getattr(module, side), field)


def _state(one: AdapterFigures) -> str:
    return "untrained" if one.untrained else "in the fit" if one.in_fit else "projected"


def _table(caption: str, fields: Iterable[_Field[T]], rows: Sequence[T]) -> Table:
    kept = [field for field in fields if any(field.value(row) is not None for row in rows)]
    columns = [Column(field.label, field.meaning, field.numeric) for field in kept]
    return Table(caption, columns, [[_cell(field, field.value(row)) for field in kept] for row in rows])


def _cell(field: _Field[Any], value: Any) -> Cell:
    if value is None:
        return Cell(numbers.MISSING)
    return Cell(field.show(value), numbers.exact(value) if field.exact else "")
