"""Tables of the experiment on images."""

from collections.abc import Callable, Mapping

from . import records, statistics
from .pages import table
from .records import Json, Scores, percent, points, signed
from .recycled_tables import mean
from .statistics import Run

LORA = "lora-r8"


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "vision-targets": lambda: targets_table(config),
        "vision-recycled": lambda: recycled_table("vision/recycled", "source adapters"),
        "vision-zero-shot": lambda: recycled_table("vision/zero_shot", "LoRAs of targets, which no basis has seen"),
    }


def runs(name: str) -> Scores:
    """Return the runs of one method on targets. Names of records are METHOD--TASK--SEED."""
    by_task: Scores = {}
    for run in records.of("vision/targets"):
        method, task, seed = run["run_info"]["experiment_name"].rsplit("/", 1)[-1].split("--")
        if method == name:
            by_task.setdefault(task, {})[int(seed)] = Run(run["test"]["score"], tuple(run["test"]["resampled"]))
    return by_task


def targets_table(config: Json) -> str:
    """Write means over targets, and differences to LoRA r = 8, run by run."""
    seeds, lora, rows = config["targets"]["seeds"], runs(LORA), []
    tasks = sorted(lora)
    for name, method in config["methods"].items():
        by_task = runs(name)
        if not records.complete(by_task, tasks, seeds):
            continue
        info = next(
            run["train_info"]
            for run in records.of("vision/targets")
            if run["run_info"]["experiment_name"].rsplit("/", 1)[-1].startswith(f"{name}--")
        )
        difference = signed(records.mean_difference(by_task, lora)) if name != LORA else "–"
        means = [percent(statistics.mean(list(by_task[task].values())).value) for task in tasks]
        rows.append(
            [
                method["label"],
                f"{info['num_trainable_params']:,}",
                *means,
                points(records.mean_over_tasks(by_task)),
                difference,
            ]
        )
    header = ("", "trained numbers", *tasks, "mean", "against LoRA r = 8")
    return f"{table(header, rows)}\n\n{len(seeds)} seeds. {records.source_line('vision/targets')}"


def recycled_table(stage: str, adapters: str) -> str:
    """Write accuracies of adapters by the way to store them."""
    rows_of: dict[str, list[Json]] = {}
    runs = records.of(stage)
    for run in runs:
        for row in run["test"]["ways"]:
            name = {"original": "as trained", "base": "no adapter", "truncated": "SVD truncation to as much as"}
            text = name.get(row["way"], row["way"])
            if row["k"] is not None:
                text += f" k = {row['k']}" if row["way"] == "truncated" else f", k = {row['k']}"
            if row["bits"] is not None:
                text += f" to {row['bits']} bits"
            rows_of.setdefault(text, []).append(row)

    rows = [
        [
            name,
            smaller(runs[0]["test"]["numbers"], cells),
            percent(mean(cells, "score")),
            percent(mean(cells, "agreement")),
            f"{mean(cells, 'delta_error'):.2f}",
        ]
        for name, cells in rows_of.items()
        if len(cells) == len(runs)
    ]
    header = ("", "times smaller", "accuracy", "same answer", "delta error")
    return f"{table(header, rows)}\n\nMean over {len(runs)} {adapters}. {records.source_line(stage)}"


def smaller(full: int, cells: list[Json]) -> str:
    """Return the ratio to the LoRA, with 16 bits a number and the basis counted, or "" if it is not known."""
    if "numbers_an_adapter" in cells[0]:
        return f"{full / mean(cells, 'numbers_an_adapter'):.1f}"
    return f"{2 * full / mean(cells, 'bytes'):.1f}" if "bytes" in cells[0] else ""
