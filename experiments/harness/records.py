"""Records of runs: scores by task and seed, and how figures are written."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from . import record, statistics
from .statistics import Mean, Run

Json = dict[str, Any]
Scores = dict[str, dict[int, Run]]
"""Task → seed → run."""


@cache
def of(stage: str) -> tuple[Json, ...]:
    """Read all records of a stage."""
    return tuple(record.read(path) for path in sorted((record.RESULTS / stage).glob("*.json")))


def check_bases(stages: Sequence[str]) -> None:
    """Exit if runs on the same sources had different bases, because the sources were trained anew in between."""
    first_runs: dict[str, tuple[str, str]] = {}
    for run in (run for stage in stages for run in of(stage) if "subspace" in run):
        name, fingerprint = run["run_info"]["experiment_name"], run["subspace"]["fingerprint"]
        experiment = name.split("/")[0]
        first_name, first = first_runs.setdefault(f"{experiment} {config_of(run)['pack']}", (name, fingerprint))
        if fingerprint != first:
            raise SystemExit(
                f"{name} had another basis than {first_name}, of the same sources: they were trained anew in between. "
                "Delete the records of the one or of the other, and run them again."
            )


def config_of(run: Json) -> Json:
    """Return the config that a record was made with."""
    config: Json = run["run_info"]["train_config"]
    return config


def scores(stage: str, method: str, **fields: Any) -> Scores:
    """Return the scores of a method. fields: other fields that the configs must have."""
    by_task: Scores = {}
    for run in of(stage):
        config = config_of(run)
        if config["method"] == method and all(config[name] == value for name, value in fields.items()):
            score = Run(run["test"]["score"], tuple(run["test"]["resampled"]))
            by_task.setdefault(config["task"], {})[config["seed"]] = score
    return by_task


def complete(by_task: Scores, tasks: Sequence[str], seeds: Sequence[int]) -> bool:
    """Return whether no run of these tasks and seeds is missing."""
    return all(set(by_task.get(task, ())) >= set(seeds) for task in tasks)


def select(by_task: Scores, tasks: Sequence[str], seeds: Sequence[int]) -> Scores:
    """Return the runs of these tasks and seeds."""
    return {task: {seed: by_task[task][seed] for seed in seeds} for task in tasks}


def cell(stage: str, method: str, tasks: Sequence[str], seeds: Sequence[int], **fields: Any) -> Scores | None:
    """Return the runs of a cell of a table, or None as long as one of them is missing."""
    by_task = scores(stage, method, **fields)
    return select(by_task, tasks, seeds) if complete(by_task, tasks, seeds) else None


def mean_over_tasks(by_task: Scores) -> Mean:
    """Return the mean over tasks."""
    return statistics.over_tasks({task: list(runs.values()) for task, runs in by_task.items()})


def mean_difference(by_task: Scores, baseline: Scores) -> Mean:
    """Return the mean difference over tasks, run by run."""
    return statistics.over_tasks(statistics.differences(by_task, baseline))


def median_difference(by_task: Scores, baseline: Scores) -> float:
    """Return the median over tasks of mean differences."""
    return statistics.median_task(statistics.differences(by_task, baseline))


def first(stage: str, method: str) -> Json:
    """Return the first record of a method."""
    return next(run for run in of(stage) if config_of(run)["method"] == method)


def points(mean: Mean) -> str:
    """Return a mean in points, hundredths of the score."""
    return f"{100 * mean.value:.1f} ± {100 * mean.half_width:.1f}"


def signed(mean: Mean) -> str:
    """Return a difference in points."""
    return f"{100 * mean.value:+.1f} ± {100 * mean.half_width:.1f}"


def percent(value: float) -> str:
    """Return a fraction in per cent, without the sign."""
    return f"{100 * value:.1f}"


def source_line(stage: str) -> str:
    """Return a sentence that says where figures come from: files, command, machine and versions."""
    experiment, _, stage_name = stage.partition("/")
    command = f"python experiments/run.py {experiment} {stage_name}"
    runs = of(stage)
    system, packages = runs[0]["meta_info"]["system_info"], runs[0]["meta_info"]["package_info"]
    hours = sum(run["run_info"]["total_time"] for run in runs) / 3600
    versions = ", ".join(f"{name} {packages[f'{name}-version']}" for name in ("torch", "transformers", "peft"))
    return (
        f"{len(runs)} runs, {hours:.1f} hours of one thread: "
        f"[experiments/results/{stage}](../experiments/results/{stage}), `{command}`; {system['processor']}, "
        f"python {system['python']}, {versions}."
    )
