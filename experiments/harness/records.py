"""Records of runs, read back: scores by task and seed, how figures are written. Nothing here knows a stage."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from . import record, statistics
from .statistics import Mean, Run

Json = dict[str, Any]
Scores = dict[str, dict[int, Run]]


@cache
def of(stage: str) -> tuple[Json, ...]:
    """All records of a stage."""
    return tuple(record.read(path) for path in sorted((record.RESULTS / stage).glob("*.json")))


def check_bases(stages: Sequence[str]) -> None:
    """Runs on the same sources must have had the same basis: sources that were trained anew may be others."""
    known: dict[str, tuple[str, str]] = {}
    for one in (one for stage in stages for one in of(stage) if "subspace" in one):
        name, fingerprint = one["run_info"]["experiment_name"], one["subspace"]["fingerprint"]
        experiment = name.split("/")[0]
        first_name, first = known.setdefault(f"{experiment} {asked(one)['pack']}", (name, fingerprint))
        if fingerprint != first:
            raise SystemExit(
                f"{name} had another basis than {first_name}, of the same sources: they were trained anew in between. "
                "Delete the records of the one or of the other, and run them again."
            )


def asked(one: Json) -> Json:
    found: Json = one["run_info"]["train_config"]
    return found


def scores(stage: str, method: str, **fields: Any) -> Scores:
    """Task → seed → run, of one method; fields: what else their configs must have."""
    found: Scores = {}
    for one in of(stage):
        config = asked(one)
        if config["method"] == method and all(config[name] == value for name, value in fields.items()):
            run = Run(one["test"]["score"], tuple(one["test"]["resampled"]))
            found.setdefault(config["task"], {})[config["seed"]] = run
    return found


def complete(found: Scores, tasks: Sequence[str], seeds: Sequence[int]) -> bool:
    return all(set(found.get(task, ())) >= set(seeds) for task in tasks)


def some(found: Scores, tasks: Sequence[str], seeds: Sequence[int]) -> Scores:
    """Those of some tasks and seeds."""
    return {task: {seed: found[task][seed] for seed in seeds} for task in tasks}


def cell(stage: str, method: str, tasks: Sequence[str], seeds: Sequence[int], **fields: Any) -> Scores | None:
    """The runs that a cell of a table is made of; None as long as one of them is missing."""
    found = scores(stage, method, **fields)
    return some(found, tasks, seeds) if complete(found, tasks, seeds) else None


def overall(found: Scores) -> Mean:
    """The mean over tasks."""
    return statistics.over_tasks({task: list(runs.values()) for task, runs in found.items()})


def apart(found: Scores, other: Scores) -> Mean:
    """The mean difference over tasks, run by run."""
    return statistics.over_tasks(statistics.differences(found, other))


def median_apart(found: Scores, other: Scores) -> float:
    """The median over tasks of mean differences."""
    return statistics.median_task(statistics.differences(found, other))


def first(stage: str, method: str) -> Json:
    return next(one for one in of(stage) if asked(one)["method"] == method)


def points(mean: Mean) -> str:
    """A mean in points, hundredths of what is scored."""
    return f"{100 * mean.value:.1f} ± {100 * mean.half_width:.1f}"


def signed(mean: Mean) -> str:
    return f"{100 * mean.value:+.1f} ± {100 * mean.half_width:.1f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def source_line(stage: str) -> str:
    """Where the figures are from: files, command, machine, versions."""
    experiment, _, part = stage.partition("/")
    command = f"python experiments/run.py {experiment} {part}"
    found = of(stage)
    where, packages = found[0]["meta_info"]["system_info"], found[0]["meta_info"]["package_info"]
    hours = sum(one["run_info"]["total_time"] for one in found) / 3600
    versions = ", ".join(f"{name} {packages[f'{name}-version']}" for name in ("torch", "transformers", "peft"))
    return (
        f"{len(found)} runs, {hours:.1f} hours of one thread: "
        f"[experiments/results/{stage}](../experiments/results/{stage}), `{command}`; {where['processor']}, "
        f"python {where['python']}, {versions}."
    )
