"""The pictures of docs/benchmarks.md: time and memory as one size grows, from `run.py` and `growth_verbs.py`.

    python benchmarks/plot.py

The same results give the same bytes, by the same matplotlib.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import growth
import growth_tables
import matplotlib as mpl
import measured
import recorded

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
Json = dict[str, Any]
COLOURS = {
    "delta": "#0b6e4f",
    "lorashare": "#c8553d",
    "vlora": "#3d5a98",
    "authors": "#8a6d1f",
    "fit_components": "#0b6e4f",
    "fit_error_bound": "#c8553d",
    "report": "#3d5a98",
    "open": "#8a6d1f",
}
NAMES = {
    **recorded.NAMES,
    "fit_components": "fit -k",
    "fit_error_bound": "fit --max-error",
    "report": "report",
    "open": "open",
}
# of a name and axis: points of seconds and of memory
Curves = Mapping[str, Mapping[str, tuple[growth_tables.Points, growth_tables.Points]]]
STYLE = {"svg.hashsalt": "eigenlorax", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def method_curves(result: Json) -> Curves:
    """Points of each axis and method of a result of `run.py`."""
    return {
        axis: {method: (measured.seconds_of(curve), measured.memory_of(curve)) for method, curve in methods.items()}
        for axis, methods in measured.curves(result).items()
    }


def verb_curves(result: Json) -> Curves:
    """Points of each axis and verb of a result of `growth_verbs.py`."""
    curves = growth_tables.curves(result)
    return {
        axis: {
            verb: (growth_tables.points_of(axes[axis], "seconds"), growth_tables.points_of(axes[axis], "memory"))
            for verb, axes in curves.items()
            if axis in axes
        }
        for axis in growth_tables.AXES
        if any(axis in axes for axes in curves.values())
    }


def draw(curves: Curves, target: Path) -> None:
    """One column an axis; above seconds, below memory. Dashed: the fitted power, on the sizes it is fitted on."""
    with mpl.rc_context(STYLE):
        figure, rows = plt.subplots(
            2, len(curves), figsize=(3.1 * len(curves), 5.6), squeeze=False, sharex="col", layout="constrained"
        )
        for column, (axis, names) in enumerate(curves.items()):
            for row in range(2):
                for name, points in names.items():
                    _line(rows[row][column], points[row], name)
                rows[row][column].set(xscale="log", yscale="log")
                rows[row][column].legend(frameon=False, fontsize=7.5)
            rows[1][column].set_xlabel(growth_tables.AXES[axis])
            ticks = sorted({size for seconds, _ in names.values() for size, _ in seconds})
            rows[1][column].set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60)
            rows[1][column].minorticks_off()
        rows[0][0].set_ylabel("seconds")
        rows[1][0].set_ylabel("memory, MiB")
        figure.savefig(target, metadata={"Date": None, "Creator": "benchmarks/plot.py"})
        plt.close(figure)


def _line(panel: Any, points: growth_tables.Points, name: str) -> None:
    """Medians of each size, and the fitted power."""
    values: dict[float, list[float]] = {}
    for size, value in points:
        if value > 0:
            values.setdefault(size, []).append(value)
    fitted = growth.fitted(points)
    label = NAMES[name] + (f", {fitted.exponent:.2f}" if fitted else "")
    medians = [statistics.median(each) for each in values.values()]
    panel.plot(list(values), medians, "o-", ms=3, lw=1.2, color=COLOURS[name], label=label)
    if fitted:
        panel.plot(
            fitted.sizes, [fitted.at(size) for size in fitted.sizes], "--", lw=2.4, alpha=0.4, color=COLOURS[name]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of run.json and growth.json")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pictures")
    options = parser.parse_args()
    for name, curves_of, picture in (
        ("run", method_curves, "benchmarks-growth.svg"),
        ("growth", verb_curves, "benchmarks-growth-verbs.svg"),
    ):
        path = options.results / f"{name}.json"
        curves = curves_of(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
        if curves:
            draw(curves, options.output / picture)


if __name__ == "__main__":
    main()
