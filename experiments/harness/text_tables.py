"""What the records of the text experiment say, as tables and plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import record, statistics, text
from .pages import table
from .statistics import Mean, Run

Json = dict[str, Any]
Scores = dict[str, dict[int, Run]]

LORA, SHARE_OF_LORA = "lora-r8", 0.98


# --- records --------------------------------------------------------------------------------------------------------


@cache
def records(stage: str) -> tuple[Json, ...]:
    return tuple(record.read(path) for path in sorted((record.RESULTS / stage).glob("*.json")))


def asked(one: Json) -> Json:
    found: Json = one["run_info"]["train_config"]
    return found


def run_of(one: Json) -> Run:
    return Run(one["test"]["score"], tuple(one["test"]["resampled"]))


def scores(stage: str, method: str) -> Scores:
    """Task → seed → run, of one method."""
    found: Scores = {}
    for one in records(stage):
        config = asked(one)
        if config["method"] == method:
            found.setdefault(config["task"], {})[config["seed"]] = run_of(one)
    return found


def complete(found: Scores, tasks: Sequence[str], seeds: Sequence[int]) -> bool:
    return all(set(found.get(task, ())) >= set(seeds) for task in tasks)


def first(stage: str, method: str) -> Json:
    return next(one for one in records(stage) if asked(one)["method"] == method)


# --- how figures are written ------------------------------------------------------------------------------------------


def points(mean: Mean) -> str:
    """A mean in points, hundredths of what is scored."""
    return f"{100 * mean.value:.1f} ± {100 * mean.half_width:.1f}"


def signed(mean: Mean) -> str:
    return f"{100 * mean.value:+.1f} ± {100 * mean.half_width:.1f}"


def source_line(stage: str, command: str) -> str:
    """Where the figures are from: files, command, machine, versions."""
    found = records(stage)
    if not found:
        return f"`{command}` has not been run."
    where, packages = found[0]["meta_info"]["system_info"], found[0]["meta_info"]["package_info"]
    hours = sum(one["run_info"]["total_time"] for one in found) / 3600
    versions = ", ".join(f"{name} {packages[f'{name}-version']}" for name in ("torch", "transformers", "peft"))
    return (
        f"{len(found)} runs, {hours:.1f} hours of one core: [experiments/results/{stage}](../experiments/results/{stage}), "
        f"`{command}`; {where['processor']}, python {where['python']}, {versions}."
    )


# --- blocks ---------------------------------------------------------------------------------------------------------


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {
        "rates": lambda: rates_table(config),
        "targets": lambda: targets_table(config),
        "targets-by-task": lambda: by_task_table(config),
        "convergence": lambda: convergence_table(config),
        "goals": lambda: goals(config),
    }


def shown(config: Json) -> list[str]:
    """Methods that have been run on all targets with all seeds, in the config's order."""
    spec = config["targets"]
    return [name for name in config["methods"] if complete(scores("text/targets", name), spec["tasks"], spec["seeds"])]


def rates_table(config: Json) -> str:
    rows = []
    for name, method in config["methods"].items():
        cells = []
        for rate in method["rates"]:
            found = [
                one["test"]["score"]
                for one in records("text/rates")
                if asked(one)["method"] == name and asked(one)["learning_rate"] == rate
            ]
            cells.append(f"{rate:g}: {100 * sum(found) / len(found):.1f}" if found else f"{rate:g}: –")
        rows.append([method["label"], *cells])
    tasks = ", ".join(config["development"]["rates"])
    return (
        f"{table(('', 'lowest', 'middle', 'highest'), rows)}\n\nMean score on {tasks}, seed "
        f"{config['development']['seed']}. {source_line('text/rates', 'python experiments/run.py text rates')}"
    )


def targets_table(config: Json) -> str:
    """Means over targets; differences are to LoRA r = 8, run by run."""
    lora = scores("text/targets", LORA)
    rows = []
    for name in shown(config):
        found = scores("text/targets", name)
        info = first("text/targets", name)["train_info"]
        overall = statistics.over_tasks({task: list(runs.values()) for task, runs in found.items()})
        apart = statistics.over_tasks(statistics.differences(found, lora)) if lora else None
        rows.append(
            [
                config["methods"][name]["label"],
                f"{info['num_trainable_params']:,}",
                points(overall),
                "–" if name == LORA or apart is None else signed(apart),
            ]
        )
    n, seeds = len(config["targets"]["tasks"]), len(config["targets"]["seeds"])
    return (
        f"{table(('', 'trained numbers, head aside', 'mean score', 'against LoRA r = 8'), rows)}\n\n"
        f"Mean over {n} tasks and {seeds} seeds, in points, with 95 % intervals; differences are between runs of the same "
        f"seed and rows. {source_line('text/targets', 'python experiments/run.py text targets')}"
    )


def by_task_table(config: Json) -> str:
    tasks = config["targets"]["tasks"]
    rows = []
    for name in shown(config):
        found = scores("text/targets", name)
        means = [statistics.mean(list(found[task].values())) for task in tasks]
        rows.append([config["methods"][name]["label"], *(points(one) for one in means)])
    return table(("", *tasks), rows)


def curve(name: str) -> list[tuple[int, float, float]]:
    """Steps, mean score on the rows for the way, and mean seconds, over all runs on targets."""
    found = [one for one in records("text/targets") if asked(one)["method"] == name]
    points_ = zip(*(one["train_info"]["metrics"] for one in found), strict=True)
    return [
        (
            sum(one["step"] for one in each) // len(each),
            sum(score_at(one) for one in each) / len(each),
            sum(one["train time"] for one in each) / len(each),
        )
        for each in points_
    ]


def score_at(point: Json) -> float:
    return next(value for key, value in point.items() if key.startswith("test "))


def steps_to(name: str, wanted: float) -> tuple[float, float] | None:
    """Steps and seconds until the mean curve reaches a score, between two points in proportion."""
    before = (0, 0.0, 0.0)
    for here in curve(name):
        if here[1] >= wanted:
            share = (wanted - before[1]) / (here[1] - before[1]) if here[1] > before[1] else 1.0
            return before[0] + share * (here[0] - before[0]), before[2] + share * (here[2] - before[2])
        before = here
    return None


def convergence_table(config: Json) -> str:
    names = shown(config)
    if LORA not in names:
        return "Not yet measured."
    wanted = SHARE_OF_LORA * curve(LORA)[-1][1]
    header = [str(step) for step, _, _ in curve(LORA)]
    rows = []
    for name in names:
        reached = steps_to(name, wanted)
        cells = [f"{100 * score:.1f}" for _, score, _ in curve(name)]
        rows.append(
            [
                config["methods"][name]["label"],
                *cells,
                *((f"{reached[0]:.0f}", f"{reached[1]:.0f}") if reached else ("never", "–")),
            ]
        )
    return (
        f"{table(('after steps', *header, 'steps to 98 %', 'seconds'), rows)}\n\n"
        f"Mean score on {config['recipe']['rows_on_the_way']} test rows of each target; 98 % of LoRA's last score are "
        f"{100 * wanted:.1f}. Seconds of training alone."
    )


def goals(config: Json) -> str:
    return ""


def plots(config: Json, folder: Path) -> None:
    """Learning curves, as SVG."""
