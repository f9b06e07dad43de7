"""The picture of docs/benchmarks.md: seconds and memory of a fit as one size grows, out of the result of `run.py`.

    python benchmarks/plot.py

The same result gives the same bytes, by the same matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import growth
import matplotlib as mpl
import measured
import recorded

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "run.json"
PICTURE = ROOT / "docs" / "benchmarks-growth.svg"
COLOURS = {"delta": "#0b6e4f", "lorashare": "#c8553d", "vlora": "#3d5a98", "authors": "#8a6d1f"}
STYLE = {"svg.hashsalt": "eigenlorax", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(result: dict[str, Any], target: Path) -> None:
    """One column an axis; above seconds, below memory. Dashed: the fitted power, on the sizes it is fitted on."""
    found = measured.curves(result)
    if not found:
        raise SystemExit("the result has no growth to draw: python benchmarks/run.py --only growth")
    with mpl.rc_context(STYLE):
        figure, rows = plt.subplots(
            2, len(found), figsize=(3.1 * len(found), 5.6), squeeze=False, sharex="col", layout="constrained"
        )
        for column, (axis, methods) in enumerate(found.items()):
            for row, points_of in enumerate((measured.seconds_of, measured.memory_of)):
                for method, curve in methods.items():
                    _line(rows[row][column], points_of(curve), method)
                rows[row][column].set(xscale="log", yscale="log")
                rows[row][column].legend(frameon=False, fontsize=7.5)
            rows[1][column].set_xlabel(measured.GROWN[axis])
            ticks = sorted({size for curve in methods.values() for size, _ in curve})
            rows[1][column].set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
            rows[1][column].minorticks_off()
        rows[0][0].set_ylabel("seconds")
        rows[1][0].set_ylabel("memory, MiB")
        figure.savefig(target, metadata={"Date": None, "Creator": "benchmarks/plot.py"})
        plt.close(figure)


def _line(panel: Any, points: list[tuple[float, float]], method: str) -> None:
    seen = [point for point in points if point[1] > 0]
    fitted = growth.fitted(points)
    label = recorded.NAMES[method] + (f", {fitted.exponent:.2f}" if fitted else "")
    panel.plot(*zip(*seen, strict=True) if seen else ([], []), "o-", ms=3, lw=1.2, color=COLOURS[method], label=label)
    if fitted:
        panel.plot(
            fitted.sizes, [fitted.at(size) for size in fitted.sizes], "--", lw=2.4, alpha=0.4, color=COLOURS[method]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args()
    draw(json.loads(given.result.read_text("utf-8")), given.output)


if __name__ == "__main__":
    main()
