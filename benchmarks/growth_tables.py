"""The tables of `results/growth.json`: exponents of fits, reports and opening, with intervals."""

import statistics
from collections.abc import Sequence
from typing import Any

import growth
from markdown_table import release, table

Json = dict[str, Any]
Points = list[tuple[float, float]]

AXES = {"adapters": "N", "dimension": "d", "rank": "r", "k": "k", "modules": "modules"}
VERBS = {
    "fit_components": "`fit -k`",
    "fit_error_bound": "`fit --max-error`",
    "report": "`report`",
    "open": "open a pack, decode an adapter",
}
MIB = 2**20
SMALLEST_MEMORY = 1.0
"""MiB below which memory has no exponent: the process had as much at hand."""


def curves(result: Json) -> dict[str, dict[str, list[tuple[int, list[Json]]]]]:
    """The measurements of each verb by size, ascending, for each axis: the other sizes are those of the base."""
    base = result["base"]
    by_verb: dict[str, dict[str, list[tuple[int, list[Json]]]]] = {}
    for axis in AXES:
        cases = [
            case
            for case in result["collections"].values()
            if all(case["sizes"][name] == base[name] for name in AXES if name != axis)
        ]
        cases.sort(key=lambda case: case["sizes"][axis])
        for verb in VERBS:
            line = [(case["sizes"][axis], case["verbs"][verb]) for case in cases if verb in case["verbs"]]
            if len(line) > 1:
                by_verb.setdefault(verb, {})[axis] = line
    return by_verb


def points_of(line: Sequence[tuple[int, list[Json]]], figure: str) -> Points:
    """Sizes with processor seconds, or MiB, of every round."""
    if figure == "seconds":
        return [(size, sample["seconds"]) for size, rounds in line for sample in rounds]
    points = [(size, sample["peak_bytes"] / MIB) for size, rounds in line for sample in rounds]
    return [(size, mib if mib >= SMALLEST_MEMORY else 0.0) for size, mib in points]


def markdown(result: Json) -> str:
    """The picture, and exponents with intervals of every verb and axis."""
    by_verb = curves(result)
    rows = [
        [
            VERBS[verb],
            AXES[axis],
            ", ".join(str(size) for size, _ in line),
            ", ".join(in_digits(median(rounds, "seconds")) for _, rounds in line),
            interval(growth.fitted(points_of(line, "seconds"))),
            ", ".join(f"{median(rounds, 'peak_bytes') / MIB:.0f}" for _, rounds in line),
            interval(growth.fitted(points_of(line, "memory"))),
        ]
        for verb, axes in by_verb.items()
        for axis, line in axes.items()
    ]
    base, where = result["base"], result["environment"]
    samples = [
        sample for case in result["collections"].values() for rounds in case["verbs"].values() for sample in rounds
    ]
    rounds = max(len(each) for case in result["collections"].values() for each in case["verbs"].values())
    loads = [sample["load"] for sample in samples]
    sizes = ", ".join(f"{AXES[axis]} = {base[axis]}" for axis in AXES)
    header = ("", "grows", "sizes", "seconds", "exponent", "memory, MiB", "exponent")
    return (
        "![Processor time and memory of fits, reports and opening as one size grows](benchmarks-growth-verbs.svg)\n\n"
        f"{table(header, rows)}\n\n"
        f"Around {sizes}; medians of {rounds} rounds. `{result['command']}`, {release(result)}; {where['processor']}, "
        f"one thread, at a load of {min(loads):g} to {max(loads):g} on {where['cpus']} cores, torch {where['torch']}."
    )


def median(rounds: Sequence[Json], figure: str) -> float:
    return statistics.median(sample[figure] for sample in rounds)


def interval(fitted: growth.Growth | None) -> str:
    """An exponent ± two standard errors of the regression."""
    if fitted is None or fitted.standard_error is None:
        return "–"
    return f"{fitted.exponent:.2f} ± {2 * fitted.standard_error:.2f}"


def in_digits(seconds: float) -> str:
    """Seconds with two digits, or all before the point."""
    for least, decimals in ((9.95, 0), (0.995, 1), (0.0995, 2)):
        if seconds >= least:
            return f"{seconds:.{decimals}f}"
    return f"{seconds:.3f}"
