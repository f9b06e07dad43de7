"""Tables of a report as data, for Markdown and the page. Tables about tasks are in `task_tables`."""

from collections.abc import Callable
from typing import Any

from .. import numbers
from ..comparison_data import Baseline, Bytes, FrontierPoint, SizePoint
from ..data import AdapterFigures, ModuleFigures, ReportData, StartEnergy, StartGroup
from ..frontier import METHODS
from ..history_data import HistoryFigures, VersionFigures
from .table import Field, Table, make_table

_STANDARD_ERROR = "standard error of the mean error, from the sample of modules"


def adapters(report: ReportData, max_rows: int | None = None) -> Table:
    """Return errors and nearest neighbours of all adapters, or of the `max_rows` worst, the worst first."""
    fields: list[Field[AdapterFigures]] = [
        Field("adapter", lambda a: a.name, numeric=False),
        Field("delta error", lambda a: None if a.untrained else a.delta_error, numbers.error, "‖D − D̂‖ / ‖D‖"),
        Field("left out", lambda a: a.left_out_error, numbers.error, "error in the subspace of all other adapters"),
        Field("mean ×", lambda a: a.mean_scaled_error, numbers.error, "error of the best multiple of the mean adapter"),
        Field("random", lambda a: a.random_error, numbers.error, "error in random bases of equal k"),
        Field(
            "truncated",
            lambda a: a.truncated_error,
            numbers.error,
            "error of the adapter truncated by SVD to equal bytes",
        ),
        Field("int8", lambda a: a.int8_error, numbers.error, "error of its factors rounded to 8 bits"),
        Field("int4", lambda a: a.int4_error, numbers.error, "error of its factors rounded to 4 bits"),
        Field("nearest", lambda a: a.nearest, meaning="adapter with the largest |cosine|", numeric=False),
        Field("cosine", lambda a: a.nearest_cosine, numbers.cosine, "with the nearest adapter"),
        Field("overlap", lambda a: a.overlap, numbers.share, "mean overlap with the other adapters"),
        Field("cluster", lambda a: None if a.cluster is None else a.cluster + 1, str),
        Field("state", _state, numeric=False),
    ]
    return make_table("All adapters, the worst first", fields, report.adapters[:max_rows])


def weights(report: ReportData, max_rows: int | None = None) -> Table:
    """Return bytes, norms and errors of factors of the same adapters, in the same order."""
    fields: list[Field[AdapterFigures]] = [
        Field("adapter", lambda a: a.name, numeric=False),
        Field("LoRA", lambda a: a.lora_bytes, numbers.size, "tensor bytes of its factors", exact=True),
        Field("in the pack", lambda a: a.coefficient_bytes, numbers.size, "bytes of its coefficients", exact=True),
        Field(
            "rounding", lambda a: None if a.untrained else a.rounding_error, numbers.error, "error from rounding alone"
        ),
        Field("A alone", lambda a: a.factor_error_down, numbers.error, "error of the down factor"),
        Field("B alone", lambda a: a.factor_error_up, numbers.error, "error of the up factor"),
        Field("norm", lambda a: a.norm, numbers.norm, "‖D‖"),
        Field("rank", lambda a: ", ".join(map(str, a.ranks))),
        Field("modules", lambda a: a.modules, numbers.count),
        Field(
            "carried",
            lambda a: a.carried_bytes or None,
            numbers.size,
            "bytes of carried tensors, outside the subspace",
            exact=True,
        ),
        Field("head", lambda a: a.head_bytes or None, numbers.size, "bytes of heads, as they are stored", exact=True),
    ]
    return make_table("Bytes and factors of all adapters", fields, report.adapters[:max_rows])


def modules(report: ReportData) -> Table:
    """Return the errors in every module, in the order of the model."""
    fields: list[Field[ModuleFigures]] = [
        Field("module", lambda m: m.name, numeric=False),
        Field("delta error", lambda m: m.delta_error, numbers.error),
        Field("worst", lambda m: m.worst_error, numbers.error, "largest error of an adapter in this module"),
        Field("adapter", lambda m: m.worst, meaning="adapter with this error", numeric=False),
        Field("A alone", lambda m: m.factor_error_down, numbers.error, "error of the down factors"),
        Field("B alone", lambda m: m.factor_error_up, numbers.error, "error of the up factors"),
        Field("adapters", lambda m: m.adapters, numbers.count, "number of adapters that have the module"),
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
                "numerical rank of the stacked updates",
            ),
            Field(f"of, {label}", _side_field(side, "dimension"), numbers.count, "dimension"),
            Field(
                f"energy, {label}",
                _side_field(side, "energy"),
                numbers.share,
                "share of squared norm in the k components",
            ),
            Field(f"chance, {label}", _side_field(side, "null_energy"), numbers.share, "the same for the null model"),
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
    return make_table("Components of all modules", fields, report.modules)


def baselines(report: ReportData) -> Table:
    """Return errors and bytes of the pack and of its baselines."""
    lora = report.bytes.lora
    fields: list[Field[Baseline]] = [
        Field("method", lambda b: b.label, numeric=False),
        Field("mean error", lambda b: b.errors.mean, numbers.error),
        Field("±", lambda b: b.errors.standard_error or None, numbers.error, _STANDARD_ERROR),
        Field("worst error", lambda b: b.errors.worst, numbers.error),
        Field("worst adapter", lambda b: b.errors.worst_adapter, numeric=False),
        Field("bytes", lambda b: b.stored_bytes, numbers.size, "of all adapters together", exact=True),
        Field(
            "smaller",
            lambda b: lora / b.stored_bytes if b.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes ÷ these bytes",
        ),
    ]
    return make_table("Other methods for these adapters", fields, report.baselines)


def frontier(report: ReportData) -> Table:
    """Return bytes and errors of the pack and of the tuned baselines."""
    lora = report.frontier.lora_float16 if report.frontier is not None else 0
    fields: list[Field[FrontierPoint]] = [
        Field("method", lambda p: METHODS[p.way], numeric=False),
        Field("settings", lambda p: p.settings or None, numeric=False),
        Field("worst error", lambda p: p.worst, numbers.error),
        Field("mean error", lambda p: p.mean, numbers.error),
        Field("bytes", lambda p: p.stored_bytes, numbers.size, "of all adapters together", exact=True),
        Field(
            "smaller",
            lambda p: lora / p.stored_bytes if p.stored_bytes else None,
            numbers.ratio,
            "LoRA bytes in 16 bits ÷ these bytes",
        ),
    ]
    points = report.frontier.points if report.frontier is not None else []
    return make_table("Bytes at an error, by method", fields, points)


def bytes_(report: ReportData) -> Table:
    """Return the bytes of the collection as LoRAs and as a pack."""
    b: Bytes = report.bytes
    stored = b.basis + b.coefficients + b.carried
    rows: list[tuple[str, int | None, float | None]] = [
        ("LoRAs, at the pack's dtype", b.lora, 1.0),
        ("LoRAs, in their own dtypes", b.lora_stored, None),
        ("LoRAs, at two bytes per number", b.lora_float16, None),
        ("LoRAs, files", b.lora_files, None),
        ("basis", b.basis, None),
        ("coefficients", b.coefficients, None),
        ("carried tensors", b.carried or None, None),
        ("this pack, total", stored, b.ratio),
        ("heads, not counted", b.heads or None, None),
    ]
    fields: list[Field[tuple[str, int | None, float | None]]] = [
        Field("contents", lambda row: row[0], numeric=False),
        Field("bytes", lambda row: row[1], numbers.size, exact=True),
        Field("ratio", lambda row: row[2], numbers.ratio, "LoRA bytes ÷ these bytes"),
    ]
    return make_table("Tensor bytes, without heads", fields, [row for row in rows if row[1] is not None])


def sizes(report: ReportData) -> Table:
    """Return errors and bytes of the collection with other numbers of components."""
    fields: list[Field[SizePoint]] = [
        Field("k", lambda p: p.k, numbers.count),
        Field("mean error", lambda p: p.mean, numbers.error),
        Field("± mean", lambda p: p.standard_error or None, numbers.error, _STANDARD_ERROR),
        Field("worst error", lambda p: p.worst, numbers.error),
        Field("left out", lambda p: p.left_out, numbers.error, "mean error of adapters left out of the fit"),
        Field(
            "± left out",
            lambda p: p.left_out_standard_error or None,
            numbers.error,
            "standard error of this mean, from the sample of modules",
        ),
        Field(
            "random",
            lambda p: p.random,
            numbers.error,
            "mean error of these adapters in equally many random components",
        ),
        Field(
            "null model",
            lambda p: p.null,
            numbers.error,
            "mean error of adapters with the same singular values and random singular vectors",
        ),
        Field("bytes", lambda p: p.stored_bytes, numbers.size, "basis, coefficients and carried tensors", exact=True),
        Field("ratio", lambda p: p.ratio, numbers.ratio, "LoRA bytes ÷ these bytes"),
    ]
    return make_table("The same adapters with other numbers of components", fields, report.sizes)


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
    """Return the energy that k components keep, with and without adapters that share a start."""
    fields: list[Field[StartEnergy]] = [
        Field("group", lambda e: e.who, numeric=False),
        Field("adapters", lambda e: e.adapters, numbers.count),
        Field("A", lambda e: e.factors_down, numbers.share, "energy of the stacked A, each adapter at equal norm"),
        Field("A by chance", lambda e: e.null_down, numbers.share, "the same with random singular vectors"),
        Field("B", lambda e: e.factors_up, numbers.share, "energy of the stacked B, each adapter at equal norm"),
        Field("B by chance", lambda e: e.null_up, numbers.share, "the same with random singular vectors"),
        Field("updates, down", lambda e: e.delta_down, numbers.share),
        Field("updates, up", lambda e: e.delta_up, numbers.share),
    ]
    return make_table("Energy that k components keep", fields, energies)


def versions(history: HistoryFigures, max_rows: int | None = None) -> Table:
    """Return steps, errors, distances and bytes of all versions, or of the last `max_rows`, the latest last."""
    fields: list[Field[VersionFigures]] = [
        Field("version", lambda v: v.version, numeric=False),
        Field("step", lambda v: v.step, numbers.count),
        Field("delta error", lambda v: v.delta_error, numbers.error, "‖D − D̂‖ / ‖D‖ against the original"),
        Field("change", lambda v: v.change, numbers.error, "distance to the previous version ÷ its norm"),
        Field("to the last", lambda v: v.to_final, numbers.error, "distance to the last version ÷ its norm"),
        Field("left out", lambda v: v.left_out_error, numbers.error, "error in components of the other versions"),
        Field("LoRA", lambda v: v.lora_stored, numbers.size, "bytes of the LoRA factors", exact=True),
        Field("others", lambda v: v.tensors_stored or None, numbers.size, "bytes of all other tensors", exact=True),
        Field("file", lambda v: v.source_bytes, numbers.size, "bytes of the version's own file", exact=True),
    ]
    names = sorted({name for version in history.versions for name in version.metrics})
    fields += [Field(name, _metric(name), numbers.plain) for name in names]
    shown = history.versions if max_rows is None else history.versions[-max_rows:]
    return make_table(f"Versions of {history.name}", fields, shown)


def _metric(name: str) -> Callable[[VersionFigures], float | None]:
    return lambda version: version.metrics.get(name)


def _side_field(side: str, field: str) -> Callable[[ModuleFigures], Any]:
    return lambda module: getattr(getattr(module, side), field)


def _state(adapter: AdapterFigures) -> str:
    if adapter.untrained:
        return "untrained"
    return "in the fit" if adapter.in_fit else "projected"
