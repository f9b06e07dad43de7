"""What the records say of adapters in as many bytes as a pack takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

from eigenlorax.train import demo

from . import records
from .pages import table
from .records import Json, percent
from .size_rivals import PACK, WAYS

NAMES = {PACK: "**pack, `--ratio`**", "shared basis, float16": "pack, `-k`, float16", "vlora": "vlora-dev"}
OUT_OF_REACH, NOT_RUN = "–", ""


@dataclass(frozen=True, slots=True)
class Lost:
    """What a way costs, over the adapters of a collection; scores are shares of rows.

    drop: mean of the scores before less those after; half_width: of its interval of 95 %, for the choice of rows.
    worst: the largest drop of an adapter, and name whose. kl: nats.
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


def lost(one: Json) -> Lost | None:
    """Of one record; None where the way does not become so small."""
    found = one["test"]
    adapters: Mapping[str, Json] = found["adapters"]
    if not adapters:
        return None
    drops = {name: row["before"] - row["score"] for name, row in adapters.items()}
    variances = [
        ((row["lost"] + row["won"]) / row["rows"] - drops[name] ** 2) / row["rows"] for name, row in adapters.items()
    ]
    worst = max(drops, key=lambda name: drops[name])

    def mean(field: str) -> float:
        return sum(row[field] for row in adapters.values()) / len(adapters)

    return Lost(
        ratio=found["lora_bytes"] / found["bytes"],
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
    """Ratio and way → record."""
    return {
        (records.config_of(one)["ratio"], records.config_of(one)["way"]): one for one in records.of(f"bytes/{stage}")
    }


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    shown = config["demo"]["shown"]
    return {
        "same-bytes": partial(at_one_size, "demo", shown),
        "same-bytes-sizes": partial(at_every_size, "demo", sorted(config["demo"]["ratios"])),
        "same-bytes-adapters": partial(by_adapter, "demo", shown),
        "same-bytes-text": partial(at_one_size, "text", config["text"]["ratios"][0]),
        "same-bytes-short": partial(in_short, shown),
    }


def changed(drop: float) -> str:
    """A drop as a change in points."""
    return f"{round(-100 * drop, 1) + 0.0:+.1f}"


def name_of(way: str) -> str:
    return NAMES.get(way, way)


def at_one_size(stage: str, ratio: float) -> str:
    """All ways in the bytes of one pack."""
    found = by_way(stage)
    rows = [("as trained", "1", percent(before(stage)), "", "", "", "", "")]
    for way in [way for way in WAYS if (ratio, way) in found]:
        one = lost(found[ratio, way])
        if one is None:
            rows.append((name_of(way), OUT_OF_REACH, *[""] * 6))
            continue
        rows.append(
            (
                name_of(way),
                f"{one.ratio:.1f}",
                percent(one.score),
                f"{changed(one.drop)} ± {100 * one.half_width:.1f}",
                f"{changed(one.worst)} ({one.name})",
                percent(one.agreement),
                f"{one.kl:.4f}",
                f"{one.mean_error:.2f}, {one.worst_error:.2f}",
            )
        )
    header = ("", "times smaller", "accuracy", "change", "worst", "same answer", "KL, nats", "delta error: mean, worst")
    return f"{table(header, rows)}\n\n{note(stage)}"


def at_every_size(stage: str, ratios: Sequence[float]) -> str:
    """Mean and worst change of every way at every ratio."""
    found = by_way(stage)

    def cell(ratio: float, way: str) -> str:
        if (ratio, way) not in found:
            return NOT_RUN
        one = lost(found[ratio, way])
        return f"{changed(one.drop)}, {changed(one.worst)}" if one is not None else OUT_OF_REACH

    header = ("asked for", *(f"ratio {ratio:g}" for ratio in ratios))
    rows = [(name_of(way), *(cell(ratio, way) for ratio in ratios)) for way in WAYS]
    return f"{table(header, rows)}\n\nMean and worst change of accuracy, in points; empty: not run. {note(stage)}"


def by_adapter(stage: str, ratio: float) -> str:
    """What the pack of one ratio does to each adapter."""
    found: Mapping[str, Json] = by_way(stage)[ratio, PACK]["test"]["adapters"]
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
        for name, row in found.items()
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
    """The line of docs/results.md."""
    found = by_way("demo")
    ours = lost(found[ratio, PACK])
    others = {
        way: one
        for (size, way), record in found.items()
        if size == ratio and way != PACK and (one := lost(record)) is not None
    }
    assert ours is not None
    best = min(others, key=lambda way: others[way].drop)
    nearest = others[best]

    def said(one: Lost) -> str:
        return f"{changed(one.drop)} ± {100 * one.half_width:.1f} points on average, {changed(one.worst)} at worst"

    return (
        f"Sixteen adapters in a pack {ours.ratio:.1f} times smaller: {said(ours)} ({ours.name}), "
        f"{percent(ours.agreement)} % of answers as before. The rival that loses least in as many bytes "
        f"({name_of(best)}, {nearest.ratio:.1f} times smaller): {said(nearest)}, {percent(nearest.agreement)} %."
    )


def first(stage: str) -> Json:
    """A record that has adapters: the originals and their rows are those of all."""
    return next(one for one in records.of(f"bytes/{stage}") if one["test"]["adapters"])


def before(stage: str) -> float:
    rows = list(first(stage)["test"]["adapters"].values())
    return sum(float(row["before"]) for row in rows) / len(rows)


def note(stage: str) -> str:
    found = first(stage)
    rows = sum(row["rows"] for row in found["test"]["adapters"].values())
    most = records.config_of(found)["recipe"]["test_rows"]
    return (
        f"{len(found['test']['adapters'])} adapters, up to {most} test rows of each one's task, {rows:,} in all. "
        f"{OUT_OF_REACH}: does not become so small. {records.source_line(f'bytes/{stage}')}"
    )
