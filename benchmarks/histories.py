"""Histories: bytes of the checkpoints of training runs, within an error bound and without loss, beside baselines.

    python benchmarks/histories.py --work FOLDER             # two hours; writes results/histories.json
    python benchmarks/histories.py --work FOLDER --again     # measures the histories again, and no baseline

The series are the public run in ../shared/zoo/lineages and the runs of `training_runs.py`, which are trained in the
folder, or found there. A result is written as it comes: a run that was interrupted goes on with the same command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import history_baselines as baselines
import history_scores
import torch
import training_runs
from history_files import SavedVersion, read_version, tensor_errors, update_error
from methods import versions
from run import commit, say, write

from eigenlorax.cli.env import collect

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "histories.json"
LINEAGES = HERE.parents[1] / "shared" / "zoo" / "lineages"
BOUNDS = (0.05, 0.1, 0.2)
SCORED = "MiniLM, linear decay"
SCORE_BOUND = 0.05
PARTS = ("baselines", "histories", "scores")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """The checkpoints of one run.

    Attributes:
        name: Its name in the result.
        folders: PEFT folders, in the order of their steps.
        training: How it was trained; empty for a public run.
    """

    name: str
    folders: Sequence[Path]
    training: Json = field(default_factory=dict)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result: Json = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"series": {}}
    result["run"] = describe_run()
    for series in all_series(options.work, options.series):
        record = result["series"].setdefault(series.name, {"cells": {}})
        if options.again:
            record["cells"] = {key: cell for key, cell in record["cells"].items() if not key.startswith("history")}
        saved = [read_version(folder) for folder in series.folders]
        record |= describe(series, saved)
        for key, measure in cells(series, saved, options):
            if key not in record["cells"]:
                record["cells"][key] = measure()
                say(f"{series.name}, {key}: {json.dumps(record['cells'][key])[:160]}")
                write(RESULTS, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument("--series", nargs="+", default=(), help="names of the series to measure (default: all)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--again", action="store_true", help="measure histories and their scores again")
    return parser.parse_args()


def describe_run() -> Json:
    """Return when, where and with what this process measures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "environment": collect(),
        "versions": versions(),
    }


def all_series(work: Path, names: Sequence[str]) -> Iterator[Series]:
    """Yield the public runs and those of `training_runs.py`, trained where they are not complete.

    Args:
        work: Folder of the trained runs.
        names: Names of the series to yield; empty for all.
    """
    for folder in sorted(LINEAGES.glob("*")):
        if not names or folder.name in names:
            yield Series(folder.name, training_runs.checkpoints(folder))
    for name, run in training_runs.RUNS.items():
        if not names or name in names:
            yield Series(name, training_runs.train(run, work / name), asdict(run))


def describe(series: Series, saved: Sequence[SavedVersion]) -> Json:
    """Return sizes of a series. Bytes of the LoRA and of other tensors are those in the files, mostly float32."""
    return {
        "versions": len(saved),
        "modules": len(saved[0].updates),
        "ranks": sorted({down.shape[0] for version in saved for _, down in version.updates.values()}),
        "training": series.training,
        "lora_bytes": sum(version.lora_bytes for version in saved),
        "tensor_bytes": sum(version.tensor_bytes for version in saved),
        "file_bytes": sum(version.file_bytes for version in saved),
    }


def cells(
    series: Series, saved: Sequence[SavedVersion], options: argparse.Namespace
) -> list[tuple[str, Callable[[], Json]]]:
    """Return the measurements of a series, by key."""
    measures: list[tuple[str, Callable[[], Json]]] = []
    if "baselines" in options.only:
        measures += [
            (f"{name} | {bound:g}", measure) for bound in BOUNDS for name, measure in lossy(series, saved, bound)
        ]
        measures += [
            ("xz of float16 files", lambda: {"bytes": baselines.xz_of_float16_files(saved)}),
            ("xz of float16 differences", lambda: {"versions": baselines.xz_float16(saved, differences=True)}),
        ]
    if "histories" in options.only:
        # an AdaLoRA is converted to a LoRA when it is read, so that it has no lossless history
        lossless = () if series.training.get("method") == "adalora" else (None,)
        for bound in (*BOUNDS, *lossless):
            name = "lossless" if bound is None else f"{bound:g}"
            measures.append((f"history | {name}", partial(history, series, saved, bound, together=True)))
        # as a training run does, with a chain of versions to decode for each
        for bound in (BOUNDS[0], *lossless):
            name = "lossless" if bound is None else f"{bound:g}"
            measures.append((f"history one by one | {name}", partial(history, series, saved, bound, together=False)))
    if "scores" in options.only and series.name == SCORED:
        measures.append(("history scores", lambda: scores(series, options.work)))
    return measures


def lossy(series: Series, saved: Sequence[SavedVersion], bound: float) -> list[tuple[str, Callable[[], Json]]]:
    """Return the lossy baselines at an error bound. Bytes of the LoRA; `tensors` has those of all others."""

    def in_scratch(measure: Callable[[Sequence[Path], float, Path], Json | None]) -> Callable[[], Json]:
        def measure_in_scratch() -> Json:
            with tempfile.TemporaryDirectory() as scratch:
                return measure(series.folders, bound, Path(scratch)) or {"lora": None}

        return measure_in_scratch

    return [
        ("rounded", lambda: {"lora": sum(baselines.rounded(version, bound) for version in saved)}),
        ("truncated", lambda: {"lora": sum(baselines.truncated(version, bound) for version in saved)}),
        ("rounded tensors", lambda: {"tensors": sum(baselines.rounded_tensors(version, bound) for version in saved)}),
        ("shared basis", in_scratch(baselines.shared_basis)),
        ("components in 8 bits", in_scratch(baselines.components_in_8_bits)),
    ]


def history(series: Series, saved: Sequence[SavedVersion], bound: float | None, *, together: bool) -> Json:
    """Measure a history in a process of its own, and the errors of its versions from the folders that it exports.

    Args:
        series: The series.
        saved: Its versions, as they were saved.
        bound: The error bound; None for a lossless history.
        together: If true, all versions are passed at once, otherwise one by one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        figures = run_child(series, bound, Path(scratch), together=together)
        exported = [read_version(Path(folder)) for folder in figures.pop("exported")]
    figures |= errors(saved, exported)
    if bound is None:
        figures["is_equal"] = all(equal(old, new) for old, new in zip(saved, exported, strict=True))
    return figures


def run_child(series: Series, bound: float | None, scratch: Path, *, together: bool) -> Json:
    """Make a history in a process of its own, and return its figures and the folders that it exports to `scratch`."""
    job = {
        "folders": [str(folder) for folder in series.folders],
        "max_error": bound,
        "together": together,
        "scratch": str(scratch),
    }
    command = [sys.executable, str(HERE / "history_child.py"), json.dumps(job)]
    figures: Json = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return figures


def errors(saved: Sequence[SavedVersion], exported: Sequence[SavedVersion]) -> Json:
    """Return the relative errors of all exported versions, computed from the files."""
    pairs = list(zip(saved, exported, strict=True))
    of_tensors = [dict(tensor_errors(old, new)) for old, new in pairs]
    worst: Mapping[str, float] = {key: max(each[key] for each in of_tensors) for key in of_tensors[0]}
    return {"update_errors": [update_error(old, new) for old, new in pairs], "worst_tensor_errors": worst}


def equal(version: SavedVersion, other: SavedVersion) -> bool:
    """Return whether all tensors of the files are equal to the bit."""
    return version.raw.keys() == other.raw.keys() and all(
        tensor.dtype == other.raw[key].dtype
        and tensor.shape == other.raw[key].shape
        and tensor.tobytes() == other.raw[key].tobytes()
        for key, tensor in version.raw.items()
    )


def scores(series: Series, work: Path) -> Json:
    """Return accuracies, in per cent, of all versions and of what a history at `SCORE_BOUND` decodes to."""
    task, cache = series.training["task"], work / "answers"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        figures = run_child(series, SCORE_BOUND, Path(scratch), together=True)
        for folder, exported in zip(series.folders, figures["exported"], strict=True):
            original, answers = history_scores.accuracy(folder, task, cache)
            decoded, decoded_answers = history_scores.accuracy(Path(exported), task, cache)
            changed = sum(a != b for a, b in zip(answers, decoded_answers, strict=True)) / len(answers)
            rows.append({"original": original, "decoded": decoded, "changed_answers": changed})
    return {"task": task, "rows": len(answers), "max_error": SCORE_BOUND, "versions": rows}


if __name__ == "__main__":
    main()
