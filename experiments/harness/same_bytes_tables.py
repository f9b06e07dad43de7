"""Tables of adapters stored in as many bytes as a pack takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

from eigenlorax.train import demo

from . import records
from .pages import table
from .records import Json, percent
from .size_methods import METHODS, PACK

NAMES = {PACK: "**pack, `--ratio`**", "shared basis, float16": "pack, `-k`, float16", "vlora": "vlora-dev"}
OUT_OF_REACH, NOT_RUN = "–", ""


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of a method to store adapters, over a collection. Scores are fractions of rows.

    drop: mean decrease of the score, and half_width of its 95 % interval, for the choice of rows. worst: largest
    decrease of an adapter, whose name is name. kl: in nats.
    """

    ratio: float
    score: float
    drop: float
    half_width: float
    worst: float
    name: str
    agreement: float
    kl: float
    mean_error: float
    worst_error: float


def losses_of(record: Json) -> Losses | None:
    """Return the losses of one record, or None if the method does not reach the size."""
    test = record["test"]
    adapters: Mapping[str, Json] = test["adapters"]
    if not adapters:
        return None
    drops = {name: row["before"] - row["score"] for name, row in adapters.items()}
    variances = [
        ((row["lost"] + row["won"]) / row["rows"] - drops[name] ** 2) / row["rows"] for name, row in adapters.items()
    ]
    worst = max(drops, key=lambda name: drops[name])

    def mean(field: str) -> float:
        return sum(row[field] for row in adapters.values()) / len(adapters)

    return Losses(
        ratio=test["lora_bytes"] / test["bytes"],
        score=mean("score"),
        drop=sum(drops.values()) / len(drops),
        half_width=1.96 * sqrt(sum(variances)) / len(drops),
        worst=drops[worst],
        name=worst,
        agreement=mean("agreement"),
        kl=mean("kl"),
        mean_error=mean("delta_error"),
        worst_error=max(row["delta_error"] for row in adapters.values()),
    )


def by_way(stage: str) -> dict[tuple[float, str], Json]:
    """Return the records by ratio and method."""
    return {
        (records.config_of(record)["ratio"], records.config_of(record)["way"]): record
        for record in records.of(f"bytes/{stage}")
    }


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    shown = config["demo"]["shown"]
    return {
        "same-bytes": partial(at_one_size, "demo", shown),
        "same-bytes-sizes": partial(at_every_size, "demo", sorted(config["demo"]["ratios"])),
        "same-bytes-adapters": partial(by_adapter, "demo", shown),
        "same-bytes-text": partial(at_one_size, "text", config["text"]["ratios"][0]),
        "same-bytes-short": partial(in_short, shown),
    }


def changed(drop: float) -> str:
    """Return a decrease as a change in points."""
    return f"{round(-100 * drop, 1) + 0.0:+.1f}"


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def at_one_size(stage: str, ratio: float) -> str:
    """Write all methods in the bytes of one pack."""
    runs = by_way(stage)
    rows = [("as trained", "1", percent(before(stage)), "", "", "", "", "")]
    for method in [method for method in METHODS if (ratio, method) in runs]:
        losses = losses_of(runs[ratio, method])
        if losses is None:
            rows.append((name_of(method), OUT_OF_REACH, *[""] * 6))
            continue
        rows.append(
            (
                name_of(method),
                f"{losses.ratio:.1f}",
                percent(losses.score),
                f"{changed(losses.drop)} ± {100 * losses.half_width:.1f}",
                f"{changed(losses.worst)} ({losses.name})",
                percent(losses.agreement),
                f"{losses.kl:.4f}",
                f"{losses.mean_error:.2f}, {losses.worst_error:.2f}",
            )
        )
    header = ("", "times smaller", "accuracy", "change", "worst", "same answer", "KL, nats", "delta error: mean, worst")
    return f"{table(header, rows)}\n\n{note(stage)}"


def at_every_size(stage: str, ratios: Sequence[float]) -> str:
    """Write mean and worst change of every method at every ratio."""
    runs = by_way(stage)

    def cell(ratio: float, method: str) -> str:
        if (ratio, method) not in runs:
            return NOT_RUN
        losses = losses_of(runs[ratio, method])
        return f"{changed(losses.drop)}, {changed(losses.worst)}" if losses is not None else OUT_OF_REACH

    header = ("asked for", *(f"ratio {ratio:g}" for ratio in ratios))
    rows = [(name_of(method), *(cell(ratio, method) for ratio in ratios)) for method in METHODS]
    return f"{table(header, rows)}\n\nMean and worst change of accuracy, in points; empty: not run. {note(stage)}"


def by_adapter(stage: str, ratio: float) -> str:
    """Write the losses of each adapter in the pack of one ratio."""
    adapters: Mapping[str, Json] = by_way(stage)[ratio, PACK]["test"]["adapters"]
    rows = [
        (
            name,
            demo.descriptions()[name]["kind"],
            f"{row['rows']}",
            percent(row["before"]),
            percent(row["score"]),
            f"{row['lost']}, {row['won']}",
            percent(row["agreement"]),
            f"{row['kl']:.4f}",
            f"{row['delta_error']:.2f}",
        )
        for name, row in adapters.items()
    ]
    header = (
        "adapter",
        "task",
        "rows",
        "as trained",
        f"ratio {ratio:g}",
        "rows lost, won",
        "same answer",
        "KL, nats",
        "delta error",
    )
    return table(header, rows)


def in_short(ratio: float) -> str:
    """Write the sentence of docs/results.md."""
    runs = by_way("demo")
    ours = losses_of(runs[ratio, PACK])
    baselines = {
        method: losses
        for (size, method), record in runs.items()
        if size == ratio and method != PACK and (losses := losses_of(record)) is not None
    }
    assert ours is not None
    best = min(baselines, key=lambda method: baselines[method].drop)
    nearest = baselines[best]

    def describe(losses: Losses) -> str:
        mean = f"{changed(losses.drop)} ± {100 * losses.half_width:.1f}"
        return f"{mean} points on average, {changed(losses.worst)} at worst"

    return (
        f"Sixteen adapters in a pack {ours.ratio:.1f} times smaller: {describe(ours)} ({ours.name}), "
        f"{percent(ours.agreement)} % of answers as before. The best baseline of the same size "
        f"({name_of(best)}, {nearest.ratio:.1f} times smaller): {describe(nearest)}, {percent(nearest.agreement)} %."
    )


def first(stage: str) -> Json:
    """Return a record with adapters; the originals and their rows are the same in all records."""
    return next(record for record in records.of(f"bytes/{stage}") if record["test"]["adapters"])


def before(stage: str) -> float:
    rows = list(first(stage)["test"]["adapters"].values())
    return sum(float(row["before"]) for row in rows) / len(rows)


def note(stage: str) -> str:
    record = first(stage)
    rows = sum(row["rows"] for row in record["test"]["adapters"].values())
    most = records.config_of(record)["recipe"]["test_rows"]
    return (
        f"{len(record['test']['adapters'])} adapters, up to {most} test rows of each one's task, {rows:,} in all. "
        f"{OUT_OF_REACH}: does not become so small. {records.source_line(f'bytes/{stage}')}"
    )
