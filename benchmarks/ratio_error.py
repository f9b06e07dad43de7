"""The picture of the README: how much smaller the demo's two collections become at each error bound.

    python benchmarks/ratio_error.py            # two minutes; writes results/ratio_error.json, and draws it
    python benchmarks/ratio_error.py --draw     # draws it again; the same matplotlib gives the same bytes

One collection is 5 checkpoints of a run, stored as a history; the other 16 adapters that were trained separately, in a
pack of an error bound. Beside each, every adapter by itself: truncated by SVD and rounded, tuned to the same bound.
Bytes are of tensors without heads, the basis counted; ratios are against LoRAs in 16 bits.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.core.adapter import Adapter
from eigenlorax.core.batch import pad_factors
from eigenlorax.formats.run_folders import read_run
from eigenlorax.reports.analysis import per_adapter
from eigenlorax.train import demo

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "ratio_error.json"
PICTURE = ROOT / "docs" / "ratio-error.svg"
ERRORS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
STYLE = {"svg.hashsalt": "eigenlorax", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
LABELS = {
    "versions": ("5 checkpoints of one run", "as a history", "#0b6e4f"),
    "separate": ("16 adapters trained separately", "in a pack", "#3d5a98"),
}

Json = dict[str, Any]


def lora_bytes(adapters: Mapping[str, Adapter]) -> int:
    """Return the bytes of the adapters' factors in 16 bits."""
    return sum(
        2 * (factors.down.numel() + factors.up.numel())
        for adapter in adapters.values()
        for factors in adapter.modules.values()
    )


def alone(adapters: Mapping[str, Adapter], error: float) -> int:
    """Return the bytes of the adapters, each truncated and rounded to the error bound in the best way there is."""
    first = next(iter(adapters.values()))
    modules = {
        module: pad_factors(
            [adapter.modules[module] for adapter in adapters.values()],
            first.modules[module].down.shape[1],
            first.modules[module].up.shape[0],
        )
        for module in first.specs
    }
    points = per_adapter.at_error(per_adapter.tables(modules), error).values()
    return min(point.stored_bytes for point in points if point is not None)


def history_bytes(checkpoints: Path, error: float) -> int:
    """Return the bytes of the checkpoints as versions of one history, heads aside."""
    history = ex.Pack.empty()
    for checkpoint in read_run(checkpoints).checkpoints:
        history.append(checkpoint.folder, name="run", step=checkpoint.step, max_error=error)
    return sum(record.lora_bytes for record in history.histories["run"])


def measure() -> Json:
    checkpoints = demo.checkpoints()
    versions = {str(each.step): ex.read_adapter(each.folder) for each in read_run(checkpoints).checkpoints}
    separate = {name: ex.read_adapter(folder) for name, folder in demo.shipped().items()}
    points: Json = {"versions": {}, "separate": {}}
    for error in ERRORS:
        points["versions"][error] = {"ours": history_bytes(checkpoints, error), "alone": alone(versions, error)}
        fitted = ex.fit(separate, max_error=error)
        points["separate"][error] = {"ours": fitted.summary.bytes.pack, "alone": alone(separate, error)}
    sizes = {"versions": lora_bytes(versions), "separate": lora_bytes(separate)}
    return {"environment": collect(), "command": "python benchmarks/ratio_error.py", "lora": sizes, "points": points}


def made_with() -> str:
    """Return the name and version of what draws the picture."""
    return f"matplotlib {mpl.__version__}"


def draw(result: Json, target: Path) -> None:
    """Draw both collections; dashed, each adapter alone."""
    with mpl.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        for name, (label, stored, colour) in LABELS.items():
            for method, line, said in (("ours", "o-", stored), ("alone", "o--", "each truncated and rounded")):
                errors = [float(error) for error in result["points"][name]]
                ratios = [result["lora"][name] / point[method] for point in result["points"][name].values()]
                weight = 1.0 if method == "ours" else 0.45
                panel.plot(errors, ratios, line, ms=4, lw=1.8, color=colour, alpha=weight, label=f"{label}, {said}")
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="error bound of each adapter, relative",
            ylabel="times smaller than in 16 bits",
        )
        panel.set_xticks(ERRORS, [f"{error:g}" for error in ERRORS])
        panel.set_yticks([2, 5, 10, 20, 50], ["2×", "5×", "10×", "20×", "50×"])
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=9)
        figure.savefig(target, metadata={"Date": None, "Creator": f"benchmarks/ratio_error.py, {made_with()}"})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw results/ratio_error.json")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the picture")
    options = parser.parse_args()
    if not options.draw:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULT.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
