"""Tables of source adapters after projection."""

from collections.abc import Callable, Mapping

from . import records
from .pages import table
from .records import Json, percent
from .recycled import MANY

STAGE, SIZED = "text/recycled", "text/sized"
A_SIXTH = 6


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {"recycled": lambda: recycled_table(config)}


def ways() -> dict[tuple[str, int | None, int | None], list[Json]]:
    """Return a row for each adapter, by the way to store it, k and bits."""
    rows: dict[tuple[str, int | None, int | None], list[Json]] = {}
    for record in records.of(STAGE):
        for row in record["test"]["ways"]:
            rows.setdefault((row["way"], row["k"], row["bits"]), []).append(row)
    return rows


def sized() -> dict[float, list[Json]]:
    """Return a row for each adapter, by the error bound."""
    rows: dict[float, list[Json]] = {}
    for record in records.of(SIZED):
        for row in record["test"]["ways"]:
            if "max_error" in row:
                rows.setdefault(row["max_error"], []).append(row)
    return rows


def mean(rows: list[Json], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def full_numbers() -> int:
    """Return the number of parameters of an adapter without its head."""
    numbers: int = records.of(STAGE)[0]["test"]["numbers"]
    return numbers


def changed(lost: float) -> str:
    """Return a loss as a change in points."""
    return f"{round(-100 * lost, 1) + 0.0:+.1f}"


def recycled_table(config: Json) -> str:
    """Write scores, answers and errors of every way to store the source adapters."""
    rows_of = ways()
    original = mean(rows_of["original", None, None], "score")
    n = len(records.of(STAGE)[0]["run_info"]["train_config"]["sources"])
    left_out = [len(records.config_of(record)["left_out"]) for record in records.of(STAGE)]
    fewest, most = min(left_out), max(left_out)

    def row(name: str, rows: list[Json], ratio: str, many: str) -> tuple[str, ...]:
        lost = original - mean(rows, "score")
        pairs = zip(rows_of["original", None, None], rows, strict=True)
        worst = max(before["score"] - after["score"] for before, after in pairs)
        return (
            name,
            ratio,
            many,
            percent(mean(rows, "score")),
            changed(lost),
            changed(worst),
            percent(mean(rows, "agreement")),
            f"{mean(rows, 'delta_error'):.2f}",
        )

    def ratios(seen: list[Json]) -> tuple[str, ...]:
        return tuple(f"{full_numbers() / mean(seen, name):.1f}" for name in ("numbers_an_adapter", "numbers_at_100"))

    rows = [row("as trained", rows_of["original", None, None], "1", "1")]
    for k in config["recycled"]["k"]:
        seen = rows_of["seen", k, None]
        ratio, many = ratios(seen)
        rows.append(row(f"k = {k}, in the fit", seen, ratio, many))
        rows.append(row(f"k = {k}, left out", rows_of["left out", k, None], "", ""))
        rows.append(row(f"SVD truncation to the bytes of k = {k}", rows_of["truncated", k, None], ratio, ratio))
    for error, seen in sized().items():
        if len(seen) < len(records.of(STAGE)):
            continue
        rows.append(row(f"max_error = {error:g}, in the fit", seen, *ratios(seen)))
    for bits in (8, 4):
        rounded = rows_of["rounded", None, bits]
        ratio = f"{2 * full_numbers() / mean(rounded, 'bytes'):.1f}"
        rows.append(row(f"rounded to {bits} bits", rounded, ratio, ratio))
    rows.append(row("the mean of others", rows_of["mean of others", None, None], "–", "–"))
    rows.append(row("no adapter", rows_of["base", None, None], "–", "–"))
    header = (
        "",
        f"times smaller, {n} adapters",
        f"if {MANY} shared it",
        "score",
        "change",
        "worst",
        "same answer",
        "delta error",
    )
    return (
        f"{table(header, rows)}\n\n{len(records.of(STAGE))} source adapters, {config['recycled']['test_rows']} test "
        "rows of each, heads as trained. Sizes are of what adapts, in 16 bits a number, with the basis in them: shared "
        f"by the {n} of this fit; or by {MANY}, where the loss is still that of {n}: so many have more directions than "
        f"{n}, so that they would lose more. Left out: the basis is that of tasks of other groups, {fewest} to {most} "
        "adapters, which have at most 8 directions each. "
        "max_error: each side of each module has as many components as keep every adapter below that delta error. "
        f"{records.source_line(STAGE)}"
    )
