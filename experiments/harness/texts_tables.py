"""Tables of the experiment `texts`, and of its preregistered hypotheses."""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, stdev

from scipy.stats import t

from . import records
from .cell_tables import seeds_said
from .pages import table
from .records import Json, Scores, percent, points, signed
from .statistics import Mean
from .task_tables import Goal, verdict

OURS, RANDOM, LORAS = "factors", "random", ("lora-r8", "lora-soap")
NATS, POINTS = 0.05, 0.02
"""How far ours may be behind the better LoRA in T2 and T3: nats a token, and a fraction of the rows."""


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "texts-targets": lambda: targets_table(config),
        "texts-generation": lambda: generation_table(config),
        "texts-goals": lambda: table(("hypothesis", "measured", "outcome"), list(goals(config))),
    }


def losses(config: Json, name: str) -> dict[tuple[str, int], float]:
    """Return the losses of a method on the targets, in nats a token, by kind of text and seed."""
    settings = [(records.config_of(run), run) for run in records.of(f"{config['name']}/targets")]
    return {(job["task"], job["seed"]): run["test"]["loss"] for job, run in settings if job["method"] == name}


def base_loss(config: Json, kind: str) -> float:
    """Return the loss of the base model on a kind of text, in nats a token."""
    runs = records.of(f"{config['name']}/base")
    loss: float = next(run["test"]["loss"] for run in runs if records.config_of(run)["task"] == kind)
    return loss


def difference(runs: Mapping[tuple[str, int], float], baseline: Mapping[tuple[str, int], float]) -> Mean:
    """Return the mean difference of losses of the same kind and seed, with the 95 % interval of Student's t."""
    apart = [runs[key] - baseline[key] for key in runs]
    return Mean(fmean(apart), float(t.ppf(0.975, len(apart) - 1)) * stdev(apart) / math.sqrt(len(apart)))


def targets_table(config: Json) -> str:
    """Write perplexities on the targets, and losses beside those of both LoRAs."""
    kinds, folder = config["targets"]["kinds"], f"{config['name']}/targets"
    perplexities = [f"{math.exp(base_loss(config, kind)):.2f}" for kind in kinds]
    rows = [["no training", "–", "–", "–", *perplexities, *("",) * len(LORAS)]]
    for name, method in config["methods"].items():
        first, runs = records.first(folder, name), losses(config, name)
        info = first["train_info"]
        means = [fmean(loss for (task, _), loss in runs.items() if task == kind) for kind in kinds]
        apart = [difference(runs, losses(config, lora)) for lora in LORAS]
        rows.append(
            [
                method["label"],
                f"{info['num_trainable_params']:,}",
                f"{info['file_size'] / 1000:,.0f}",
                f"{records.config_of(first)['learning_rate']:g}",
                *(f"{math.exp(mean):.2f}" for mean in means),
                *("–" if lora == name else nats(mean) for lora, mean in zip(LORAS, apart, strict=True)),
            ]
        )
    against = [f"against {config['methods'][lora]['label']}" for lora in LORAS]
    header = ("", "trained numbers", "kB of its file", "rate", *(f"perplexity, {kind}" for kind in kinds), *against)
    return (
        f"{table(header, rows)}\n\nPerplexity of the mean loss of {seeds_said(config['targets']['seeds'])}; "
        "differences are in nats a token, between runs of the same kind and seed, with 95 % intervals. "
        f"{records.source_line(folder)}"
    )


def nats(mean: Mean) -> str:
    """Return a difference in nats."""
    return f"{mean.value:+.3f} ± {mean.half_width:.3f}"


def generation_scores(config: Json) -> dict[str, Scores]:
    """Return the runs of each method on the generation task."""
    folder, tasks, seeds = f"{config['name']}/generation", [config["generation"]["task"]], config["targets"]["seeds"]
    return {name: records.select(records.scores(folder, name), tasks, seeds) for name in config["methods"]}


def generation_table(config: Json) -> str:
    """Write the share of answers that the model writes as they are, and differences to both LoRAs."""
    spec, seeds, folder = config["generation"], config["targets"]["seeds"], f"{config['name']}/generation"
    runs = generation_scores(config)
    rows = []
    for name, method in config["methods"].items():
        differences = [
            "–" if name == lora else signed(records.mean_difference(runs[name], runs[lora])) for lora in LORAS
        ]
        rate = records.config_of(records.first(folder, name))["learning_rate"]
        rows.append([method["label"], f"{rate:g}", points(records.mean_over_tasks(runs[name])), *differences])
    header = ("", "rate", "exact match", *(f"against {config['methods'][lora]['label']}" for lora in LORAS))
    return (
        f"{table(header, rows)}\n\nIn per cent and points, {spec['recipe']['test_rows']} rows of {spec['task']}, "
        f"{seeds_said(seeds)}; 95 % intervals. {records.source_line(folder)}"
    )


def goals(config: Json) -> Iterator[Goal]:
    """Yield the hypotheses, as PREREGISTRATION.md computes them."""
    runs = {name: losses(config, name) for name in config["methods"]}
    apart = difference(runs[OURS], runs[RANDOM])
    yield "T1: a lower loss than over a random basis, by more than the interval", nats(apart), verdict(apart.high < 0)
    lora = min(LORAS, key=lambda name: fmean(runs[name].values()))
    apart, label = difference(runs[OURS], runs[lora]), config["methods"][lora]["label"]
    goal = f"T2: at most {NATS} nats a token above the better LoRA"
    yield goal, f"{nats(apart)} against {label}", verdict(apart.value <= NATS)
    scores = {name: records.mean_over_tasks(runs) for name, runs in generation_scores(config).items()}
    lora = max(LORAS, key=lambda name: scores[name].value)
    behind, label = scores[lora].value - scores[OURS].value, config["methods"][lora]["label"]
    goal = f"T3: exact match at most {100 * POINTS:g} points below the better LoRA"
    measured = f"{percent(scores[OURS].value)} % against {percent(scores[lora].value)} % of {label}"
    yield goal, measured, verdict(behind <= POINTS)
