"""The tables of a report as data, for Markdown and the page. Those about tasks are in `task_tables`."""

from collections.abc import Callable
from typing import Any

from .. import numbers
from ..comparison_data import Baseline, Bytes, FrontierPoint, SizePoint
from ..data import AdapterFigures, ModuleFigures, ReportData, StartEnergy, StartGroup
from ..frontier import METHODS
from .table import Field, Table, make_table


def adapters(report: ReportData, most: int | None = None) -> Table:
    """Return errors and nearest neighbours of every adapter, the worst first, or of the first `most`."""
    fields: list[Field[AdapterFigures]] = [
        Field("adapter", lambda a: a.name, numeric=False),
        Field("delta error", lambda a: None if a.untrained else a.delta_error, numbers.error, "‖D − D̂‖ / ‖D‖"),
        Field("left out", lambda a: a.left_out_error, numbers.error, "its error in the subspace of all the others"),
        Field("mean ×", lambda a: a.mean_scaled_error, numbers.error, "error of the best multiple of the mean adapter"),
        Field("random", lambda a: a.random_error, numbers.error, "error in random bases of equal k"),
        Field(
            "cut", lambda a: a.truncated_error, numbers.error, "error of the adapter alone, cut by SVD to equal bytes"
        ),
        Field("int8", lambda a: a.int8_error, numbers.error, "error of its factors in int8"),
        Field("int4", lambda a: a.int4_error, numbers.error, "error of its factors in int4"),
        Field("nearest", lambda a: a.nearest, meaning="the adapter of the largest |cosine|", numeric=False),
        Field("cosine", lambda a: a.nearest_cosine, numbers.cosine, "with the nearest"),
        Field("overlap", lambda a: a.overlap, numbers.share, "how much of its directions the others have, on average"),
        Field("cluster", lambda a: None if a.cluster is None else a.cluster + 1, str),
        Field("state", _state, numeric=False),
    ]
    return make_table("All adapters, the worst first", fields, report.adapters[:most])


def weights(report: ReportData, most: int | None = None) -> Table:
    """Return bytes, norms and errors of factors of the same adapters, in the same order."""
    fields: list[Field[AdapterFigures]] = [
        Field("adapter", lambda a: a.name, numeric=False),
        Field("LoRA", lambda a: a.lora_bytes, numbers.size, "tensor bytes of its factors", exact=True),
        Field("here", lambda a: a.coefficient_bytes, numbers.size, "bytes of its coefficients", exact=True),
        Field("rounding", lambda a: None if a.untrained else a.rounding_error, numbers.error, "the share of rounding"),
        Field("A alone", lambda a: a.factor_error_down, numbers.error, "error of the down factor"),
        Field("B alone", lambda a: a.factor_error_up, numbers.error, "error of the up factor"),
        Field("norm", lambda a: a.norm, numbers.norm, "‖D‖"),
        Field("rank", lambda a: ", ".join(map(str, a.ranks))),
        Field("modules", lambda a: a.modules, numbers.count),
        Field("carried", lambda a: a.carried_bytes or None, numbers.size, "bytes the subspace cannot hold", exact=True),
        Field("head", lambda a: a.head_bytes or None, numbers.size, "bytes of heads, kept as they are", exact=True),
    ]
    return make_table("Bytes and factors of all adapters", fields, report.adapters[:most])


def modules(report: ReportData) -> Table:
    """Return the errors in every module, in the order of the model."""
    fields: list[Field[ModuleFigures]] = [
        Field("module", lambda m: m.name, numeric=False),
        Field("delta error", lambda m: m.delta_error, numbers.error),
        Field("worst", lambda m: m.worst_error, numbers.error, "the largest error of an adapter there"),
        Field("adapter", lambda m: m.worst, meaning="which one that is", numeric=False),
        Field("A alone", lambda m: m.factor_error_down, numbers.error, "error of the down factors"),
        Field("B alone", lambda m: m.factor_error_up, numbers.error, "error of the up factors"),
        Field("adapters", lambda m: m.adapters, numbers.count, "of the fit that have it"),
    ]
    return make_table("All modules", fields, report.modules)


def sides(report: ReportData) -> Table:
    """Return sizes, energies and overlaps of both sides of every module, in the same order."""
    fields: list[Field[ModuleFigures]] = [Field("module", lambda m: m.name, numeric=False)]
    for side, label in (("down", "down"), ("up", "up")):
        fields += [
            Field(f"k, {label}", _side_field(side, "k"), numbers.count),
            Field(
                f"rank, {label}",
                _side_field(side, "rank"),
                numbers.count,
                "directions that the adapters have, numerically",
            ),
            Field(f"of, {label}", _side_field(side, "dimension"), numbers.count, "dimension"),
            Field(
                f"energy, {label}", _side_field(side, "energy"), numbers.share, "share of squared norm that the k keep"
            ),
            Field(f"chance, {label}", _side_field(side, "null_energy"), numbers.share, "the same in random directions"),
            Field(
                f"halves, {label}",
                _side_field(side, "halves_overlap"),
                numbers.share,
                "overlap of two halves' subspaces",
            ),
            Field(
                f"random, {label}",
                _side_field(side, "null_halves_overlap"),
                numbers.share,
                "overlap of random subspaces",
            ),
        ]
    return make_table("Directions of all modules", fields, report.modules)


def baselines(report: ReportData) -> Table:
    """Return errors and bytes of the pack and of its baselines."""
    lora = report.bytes.lora
    fields: list[Field[Baseline]] = [
        Field("instead", lambda b: b.label, numeric=False),
        Field("mean error", lambda b: b.errors.mean, numbers.error),
        Field("worst error", lambda b: b.errors.worst, numbers.error),
        Field("worst adapter", lambda b: b.errors.worst_adapter, numeric=False),
        Field("bytes", lambda b: b.stored_bytes, numbers.size, "of all of them together", exact=True),
        Field(
            "smaller", lambda b: lora / b.stored_bytes if b.stored_bytes else None, numbers.ratio, "LoRA bytes ÷ these"
        ),
    ]
    return make_table("What else could be done with these adapters", fields, report.baselines)


def frontier(report: ReportData) -> Table:
    """Return bytes and errors of the pack and of the tuned baselines."""
    lora = report.frontier.lora_float16 if report.frontier is not None else 0
    fields: list[Field[FrontierPoint]] = [
        Field("way", lambda p: METHODS[p.way], numeric=False),
        Field("tuned to", lambda p: p.settings or None, numeric=False),
        Field("worst error", lambda p: p.worst, numbers.error),
        Field("mean error", lambda p: p.mean, numbers.error),
        Field("bytes", lambda p: p.stored_bytes, numbers.size, "of all adapters together", exact=True),
        Field(
            "smaller",
            lambda p: lora / p.stored_bytes if p.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes in 16 bits ÷ these",
        ),
    ]
    points = report.frontier.points if report.frontier is not None else []
    return make_table("Bytes at an error, by every way", fields, points)


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
    fields: list[Field[tuple[str, int | None, float | None]]] = [
        Field("what", lambda row: row[0], numeric=False),
        Field("bytes", lambda row: row[1], numbers.size, exact=True),
        Field("ratio", lambda row: row[2], numbers.ratio, "LoRA bytes ÷ these"),
    ]
    return make_table("Tensor bytes, heads aside", fields, [row for row in rows if row[1] is not None])


def sizes(report: ReportData) -> Table:
    """Return errors and bytes of the collection with other numbers of components."""
    fields: list[Field[SizePoint]] = [
        Field("k", lambda p: p.k, numbers.count),
        Field("mean error", lambda p: p.mean, numbers.error),
        Field("worst error", lambda p: p.worst, numbers.error),
        Field("left out", lambda p: p.left_out, numbers.error, "mean error of adapters left out of the fit"),
        Field("random", lambda p: p.random, numbers.error, "mean error of these in as many random directions"),
        Field(
            "nothing shared",
            lambda p: p.null,
            numbers.error,
            "mean error of the same singular values in random directions, fitted alike",
        ),
        Field("bytes", lambda p: p.stored_bytes, numbers.size, "basis, coefficients and carried", exact=True),
        Field("ratio", lambda p: p.ratio, numbers.ratio, "LoRA bytes ÷ these"),
    ]
    return make_table("The same adapters at another k", fields, report.sizes)


def start_groups(groups: list[StartGroup]) -> Table:
    """Return the groups of adapters that share a random start."""
    numbered = list(enumerate(groups, start=1))
    fields: list[Field[tuple[int, StartGroup]]] = [
        Field("group", lambda row: f"group {row[0]}", numeric=False),
        Field("adapters", lambda row: len(row[1].adapters), numbers.count),
        Field("cosine of A", lambda row: row[1].cosine_down, numbers.cosine, "mean over pairs"),
        Field("cosine of B", lambda row: row[1].cosine_up, numbers.cosine, "mean over pairs"),
    ]
    return make_table("Groups that share a start", fields, numbered)


def start_energies(energies: list[StartEnergy]) -> Table:
    """Return the energy that k directions keep, with and without adapters that share a start."""
    fields: list[Field[StartEnergy]] = [
        Field("of", lambda e: e.who, numeric=False),
        Field("adapters", lambda e: e.adapters, numbers.count),
        Field("A", lambda e: e.factors_down, numbers.share, "of the stacked A, each adapter of equal norm"),
        Field("A by chance", lambda e: e.null_down, numbers.share, "of as many A in random directions"),
        Field("B", lambda e: e.factors_up, numbers.share, "of the stacked B"),
        Field("B by chance", lambda e: e.null_up, numbers.share, "of as many B in random directions"),
        Field("updates, down", lambda e: e.delta_down, numbers.share),
        Field("updates, up", lambda e: e.delta_up, numbers.share),
    ]
    return make_table("Energy that k directions keep", fields, energies)


def _side_field(side: str, field: str) -> Callable[[ModuleFigures], Any]:
    return lambda module: getattr(getattr(module, side), field)


def _state(adapter: AdapterFigures) -> str:
    if adapter.untrained:
        return "untrained"
    return "in the fit" if adapter.in_fit else "projected"
