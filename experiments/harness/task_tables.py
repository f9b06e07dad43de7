"""Tables of the experiment `tasks`, and of its preregistered hypotheses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from . import records, statistics, text_tables
from .cell_tables import by_task, seeds_said
from .pages import table
from .records import Json, Scores, percent, points, signed
from .text_tables import LORA, SOAP_LORA, stage

SHARE = 0.98
Goal = tuple[str, str, str]
"""A hypothesis, what was measured, and whether it was reached."""


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "tasks-rates": lambda: text_tables.rates_table(config),
        "tasks-targets": lambda: targets_table(config),
        "tasks-by-task": lambda: text_tables.by_task_table(config),
        "tasks-short": lambda: short_table(config),
        "tasks-ablation": lambda: ablation_table(config),
        "tasks-goals": lambda: table(("hypothesis", "measured", "outcome"), list(goals(config))),
    }


def better_lora(config: Json) -> str:
    """Return the LoRA with the higher mean over targets, of that with AdamW and that with SOAP."""
    return max((LORA, SOAP_LORA), key=lambda name: text_tables.overall(config, name).value)


def macro_f1(config: Json, name: str) -> float:
    """Return the mean macro-F1 over the targets that are classifications: over seeds first, over tasks then."""
    seeds = text_tables.seeds_of(config, name)
    by_task: dict[str, list[float]] = {}
    for run in records.of(stage(config)):
        settings = records.config_of(run)
        if settings["method"] == name and settings["seed"] in seeds and "macro_f1" in run["test"]:
            by_task.setdefault(settings["task"], []).append(run["test"]["macro_f1"])
    return fmean(fmean(scores) for scores in by_task.values())


def targets_table(config: Json) -> str:
    """Write means over targets, macro-F1, and differences to both LoRAs, run by run."""
    rows = []
    for name in text_tables.shown(config):
        differences = [
            "–" if name == baseline else signed(text_tables.between(config, name, baseline))
            for baseline in (LORA, SOAP_LORA)
        ]
        rows.append(
            [
                text_tables.label(config, name),
                f"{text_tables.numbers(config, name):,}",
                f"{text_tables.file_bytes(config, name) / 1000:,.0f}",
                points(text_tables.overall(config, name)),
                percent(macro_f1(config, name)),
                *differences,
            ]
        )
    labels = [f"against {config['methods'][baseline]['label']}" for baseline in (LORA, SOAP_LORA)]
    return (
        f"{table(('', 'trained numbers', 'kB of its file', 'mean score', 'macro-F1', *labels), rows)}\n\n"
        f"Mean over {len(config['targets']['tasks'])} tasks and {text_tables.seeds_said(config)}, in points, with 95 % "
        "intervals; differences are between runs of the same seed and rows. Macro-F1 is the mean over the "
        "classification tasks. Numbers and files are those of the method, without the task's head. "
        f"{records.source_line(stage(config))}"
    )


def short_table(config: Json) -> str:
    """Write trainings with fewer steps, as shares of what both LoRAs have after all steps."""
    whole, rows = config["recipe"]["epochs"], []
    for epochs in config["short"]["epochs"]:
        for name in config["short"]["methods"]:
            runs = text_tables.in_short(config, name, epochs)
            if runs is not None:
                mean = records.mean_over_tasks(runs)
                shares = [mean.value / text_tables.overall(config, lora).value for lora in (LORA, SOAP_LORA)]
                cells = [f"{percent(share)} %" for share in shares]
                rows.append([str(epochs), text_tables.label(config, name), points(mean), *cells])
    labels = [f"share of {config['methods'][lora]['label']} after {whole}" for lora in (LORA, SOAP_LORA)]
    return (
        f"{table(('epochs', 'method', 'mean score', *labels), rows)}\n\nMean over all targets, "
        f"{len(config['targets']['seeds'])} seeds; rates are those that were chosen for {whole} epochs. "
        f"{records.source_line(stage(config, 'short'))}"
    )


def ablation_table(config: Json) -> str:
    """Write every cell on the development tasks: trained numbers, bytes, rate, scores, difference to the baseline."""
    spec, folder, rows = config["ablation"], stage(config, "ablation"), []
    baseline = records.scores(folder, spec["beside"])
    for name, cell in spec["cells"].items():
        runs = records.cell(folder, name, spec["tasks"], spec["seeds"])
        if runs is not None:
            rows.append(ablation_row(folder, name, cell, runs, spec["tasks"]))
            apart = "–" if name == spec["beside"] else signed(records.mean_difference(runs, baseline))
            rows[-1].append(apart)
    label = spec["cells"][spec["beside"]]["label"]
    header = ("", "trained numbers", "bytes of its file", "rate", *spec["tasks"], "mean", f"against {label}")
    return (
        f"{table(header, rows)}\n\nDevelopment tasks, none of them a target; {seeds_said(spec['seeds'])}; 95 % "
        f"intervals. Numbers and bytes are without the head. {records.source_line(folder)}"
    )


def ablation_row(folder: str, name: str, cell: Json, runs: Scores, tasks: Sequence[str]) -> list[str]:
    info = records.first(folder, name)["train_info"]
    # heads differ by task, and are float32 in the file
    infos = [run["train_info"] for run in records.of(folder) if records.config_of(run)["method"] == name]
    file_bytes = fmean(entry["file_size"] - 4 * entry["num_head_params"] for entry in infos)
    return [
        cell["label"],
        f"{info['num_trainable_params']:,}",
        f"{file_bytes:,.0f}",
        f"{cell['learning_rate']:g}",
        *by_task(runs, tasks),
        points(records.mean_over_tasks(runs)),
    ]


def goals(config: Json) -> Iterator[Goal]:
    """Yield the hypotheses on scores and on steps, as PREREGISTRATION.md computes them."""
    ours, random, shown = config["targets"]["ours"], config["targets"]["random"], text_tables.shown(config)
    if not {ours, random, LORA, SOAP_LORA} <= set(shown):
        return
    lora = better_lora(config)
    label = config["methods"][lora]["label"]
    difference = text_tables.between(config, ours, lora)
    share = text_tables.numbers(config, lora) / text_tables.numbers(config, ours)
    yield (
        "H1: above −0.5 points against the better LoRA, the interval above −1.0, at most 1/12 of its trained numbers",
        f"{signed(difference)} against {label}, with 1/{share:.1f}",
        verdict(is_equivalent(difference) and share >= 12),
    )
    difference = text_tables.between(config, ours, random)
    yield "H2: above a random basis by more than the interval", signed(difference), verdict(difference.low > 0)
    half = text_tables.in_short(config, ours, config["recipe"]["epochs"] // 2)
    if half is not None:
        fraction = records.mean_over_tasks(half).value / text_tables.overall(config, lora).value
        goal = "H3: 98 % of the better LoRA's score after half of its steps"
        yield goal, f"{percent(fraction)} % of {label}", verdict(fraction >= SHARE)


def is_equivalent(difference: statistics.Mean) -> bool:
    """Return whether a difference is above −0.5 points, and its interval above −1.0."""
    return difference.value > -0.005 and difference.low > -0.01


def verdict(met: bool) -> str:
    return "reached" if met else "missed"
