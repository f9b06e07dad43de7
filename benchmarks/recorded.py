"""The cases of a result of `run.py`: those of a section, by method, and their figures in words."""

import statistics
from collections.abc import Sequence
from typing import Any

import growth

Json = dict[str, Any]

MIB, GIB = 2**20, 2**30
NAMES = {
    "delta": "ours",
    "factors": "ours, factors",
    "lorashare": "lorashare",
    "vlora": "vlora-dev",
    "authors": "authors' algorithm",
}


def section(result: Json, name: str) -> list[Json]:
    """The cases of a section, in the order of their keys."""
    return [case for _, case in sorted(result["cases"].items()) if case["section"] == name]


def by_method(cases: Sequence[Json]) -> dict[str, list[Json]]:
    """Cases by their method, in the order of `NAMES`."""
    found = {method: [case for case in cases if case["options"]["method"] == method] for method in NAMES}
    return {method: each for method, each in found.items() if each}


def median_seconds(cases: Sequence[Json], part: str = "total") -> float:
    return statistics.median(case["seconds"][part] for case in cases)


def words_of(shape: Json) -> str:
    plural = "" if shape["modules"] == 1 else "s"
    return f"{shape['adapters']} × r={shape['rank']}, d={shape['dimension']}, {shape['modules']} module{plural}"


def exponent_of(fitted: growth.Growth | None) -> str:
    if fitted is None:
        return "–"
    return f"{fitted.exponent:.2f} ({', '.join(f'{size:g}' for size in fitted.sizes)})"
