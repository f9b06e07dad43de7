"""What the records of recycled adapters say."""

from collections.abc import Callable, Mapping

from . import records
from .pages import table
from .records import Json, percent
from .recycled import MANY

STAGE, SIZED = "text/recycled", "text/sized"
A_SIXTH = 6


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {"recycled": lambda: recycled_table(config)}


def ways() -> dict[tuple[str, int | None, int | None], list[Json]]:
    """Way to keep an adapter, k and bits → what became of each adapter."""
    found: dict[tuple[str, int | None, int | None], list[Json]] = {}
    for one in records.of(STAGE):
        for row in one["test"]["ways"]:
            found.setdefault((row["way"], row["k"], row["bits"]), []).append(row)
    return found


def sized() -> dict[float, list[Json]]:
    """The error that was asked for → what became of each adapter."""
    found: dict[float, list[Json]] = {}
    for one in records.of(SIZED):
        for row in one["test"]["ways"]:
            if "max_error" in row:
                found.setdefault(row["max_error"], []).append(row)
    return found


def mean(rows: list[Json], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def full_numbers() -> int:
    """Numbers of an adapter as it was trained, its head aside."""
    found: int = records.of(STAGE)[0]["test"]["numbers"]
    return found


def at_a_sixth(config: Json) -> dict[str, float]:
    """The largest k, and the smallest error, whose basis and coefficients are a sixth of the adapters' bytes when there
    are 100: what was asked for, and the score that adapters in the fit lose there on average. Without what has not been
    run with all adapters."""
    found, n = ways(), len(config["sources"]["tasks"])
    by_k = {k: found.get(("seen", k, None), []) for k in config["recycled"]["k"]}
    by_error = {error: sized().get(error, []) for error in config["recycled"].get("max_error", ())}

    def fits(rows: list[Json]) -> bool:
        return len(rows) == n and mean(rows, "numbers_at_100") <= full_numbers() / A_SIXTH

    original = found.get(("original", None, None), [])
    kept: dict[str, list[Json]] = {}
    if small := [k for k, rows in by_k.items() if fits(rows)]:
        kept[f"k = {max(small)}"] = by_k[max(small)]
    if small_errors := [error for error, rows in by_error.items() if fits(rows)]:
        kept[f"max_error = {min(small_errors):g}"] = by_error[min(small_errors)]
    return {name: mean(original, "score") - mean(rows, "score") for name, rows in kept.items()}


def changed(lost: float) -> str:
    """A loss as a change in points."""
    return f"{round(-100 * lost, 1) + 0.0:+.1f}"


def recycled_table(config: Json) -> str:
    """Scores, answers and errors of every way, over all source adapters."""
    found = ways()
    original = mean(found["original", None, None], "score")
    n = len(records.of(STAGE)[0]["run_info"]["train_config"]["sources"])
    full = full_numbers()
    others = [len(records.config_of(one)["left_out"]) for one in records.of(STAGE)]
    fewest, most = min(others), max(others)

    def row(name: str, rows: list[Json], ratio: str, many: str) -> tuple[str, ...]:
        lost = original - mean(rows, "score")
        worst = max(
            one["score"] - other["score"] for one, other in zip(found["original", None, None], rows, strict=True)
        )
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
        return tuple(f"{full / mean(seen, name):.1f}" for name in ("numbers_an_adapter", "numbers_at_100"))

    rows = [row("as trained", found["original", None, None], "1", "1")]
    for k in config["recycled"]["k"]:
        seen = found["seen", k, None]
        ratio, many = ratios(seen)
        rows.append(row(f"k = {k}, in the fit", seen, ratio, many))
        rows.append(row(f"k = {k}, left out", found["left out", k, None], "", ""))
        rows.append(row(f"SVD truncation to the bytes of k = {k}", found["truncated", k, None], ratio, ratio))
    for error, seen in sized().items():
        if len(seen) < len(records.of(STAGE)):
            continue
        rows.append(row(f"max_error = {error:g}, in the fit", seen, *ratios(seen)))
    for bits in (8, 4):
        kept = found["rounded", None, bits]
        ratio = f"{2 * full / mean(kept, 'bytes'):.1f}"
        rows.append(row(f"rounded to {bits} bits", kept, ratio, ratio))
    rows.append(row("the mean of others", found["mean of others", None, None], "–", "–"))
    rows.append(row("no adapter", found["base", None, None], "–", "–"))
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
