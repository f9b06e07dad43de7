"""What the records of the experiment on images say."""

from collections.abc import Callable, Mapping

from . import records, statistics
from .pages import table
from .records import Json, Scores, percent, points, signed
from .recycled_tables import mean
from .statistics import Run

LORA = "lora-r8"


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {
        "vision-targets": lambda: targets_table(config),
        "vision-recycled": lambda: recycled_table("vision/recycled", "source adapters"),
        "vision-zero-shot": lambda: recycled_table("vision/zero_shot", "LoRAs of targets, which no basis has seen"),
    }


def runs(name: str) -> Scores:
    """Task → seed → run, of one method on targets; names of records are METHOD--TASK--SEED."""
    found: Scores = {}
    for one in records.of("vision/targets"):
        method, task, seed = one["run_info"]["experiment_name"].rsplit("/", 1)[-1].split("--")
        if method == name:
            found.setdefault(task, {})[int(seed)] = Run(one["test"]["score"], tuple(one["test"]["resampled"]))
    return found


def targets_table(config: Json) -> str:
    """Means over targets; differences are to LoRA r = 8, run by run."""
    seeds, lora, rows = config["targets"]["seeds"], runs(LORA), []
    tasks = sorted(lora)
    for name, method in config["methods"].items():
        found = runs(name)
        if not records.complete(found, tasks, seeds):
            continue
        info = next(
            one["train_info"]
            for one in records.of("vision/targets")
            if one["run_info"]["experiment_name"].rsplit("/", 1)[-1].startswith(f"{name}--")
        )
        apart = signed(records.mean_difference(found, lora)) if name != LORA else "–"
        each = [percent(statistics.mean(list(found[task].values())).value) for task in tasks]
        rows.append(
            [method["label"], f"{info['num_trainable_params']:,}", *each, points(records.mean_over_tasks(found)), apart]
        )
    header = ("", "trained numbers", *tasks, "mean", "against LoRA r = 8")
    return f"{table(header, rows)}\n\n{len(seeds)} seeds. {records.source_line('vision/targets')}"


def recycled_table(stage: str, what: str) -> str:
    """Accuracies of adapters kept in every way."""
    ways: dict[str, list[Json]] = {}
    found = records.of(stage)
    for one in found:
        for row in one["test"]["ways"]:
            name = {"original": "as trained", "base": "no adapter", "truncated": "SVD truncation to as much as"}
            text = name.get(row["way"], row["way"])
            if row["k"] is not None:
                text += f" k = {row['k']}" if row["way"] == "truncated" else f", k = {row['k']}"
            if row["bits"] is not None:
                text += f" to {row['bits']} bits"
            ways.setdefault(text, []).append(row)

    rows = [
        [
            name,
            smaller(found[0]["test"]["numbers"], cells),
            percent(mean(cells, "score")),
            percent(mean(cells, "agreement")),
            f"{mean(cells, 'delta_error'):.2f}",
        ]
        for name, cells in ways.items()
        if len(cells) == len(found)
    ]
    header = ("", "times smaller", "accuracy", "same answer", "delta error")
    return f"{table(header, rows)}\n\nMean over {len(found)} {what}. {records.source_line(stage)}"


def smaller(full: int, cells: list[Json]) -> str:
    """How many times smaller than the LoRA, 16 bits a number and the basis counted, if that is known."""
    if "numbers_an_adapter" in cells[0]:
        return f"{full / mean(cells, 'numbers_an_adapter'):.1f}"
    return f"{2 * full / mean(cells, 'bytes'):.1f}" if "bytes" in cells[0] else ""
