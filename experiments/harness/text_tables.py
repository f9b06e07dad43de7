"""Tables of methods on the targets of the text experiment, and of the goals."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from . import rates, records, recycled_tables, statistics, text
from .pages import table
from .records import Json, points, signed

LORA, SOAP_LORA, SHARE_OF_LORA = "lora-r8", "lora-soap", 0.98
CHOICES = {"steadiest": f"the lowest within {100 * rates.NEAR:g} points of the best", "best": "the best"}
Goal = tuple[str, str, str]
"""A goal, what was measured, and whether it was reached."""


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "rates": lambda: rates_table(config),
        "targets": lambda: targets_table(config),
        "targets-by-task": lambda: by_task_table(config),
        "convergence": lambda: convergence_table(config),
        "short": lambda: short_table(config),
        "heads": lambda: heads_table(config),
        "goals": lambda: goals_table(config),
        "summary": lambda: summary_table(config),
    }


def stage(config: Json, name: str = "targets") -> str:
    """Return the folder of a stage's records."""
    return f"{config['name']}/{name}"


def seeds_of(config: Json, name: str) -> list[int]:
    """Return the seeds that a method, and every other method, has been run with on all targets."""
    spec = config["targets"]

    def done(method: str) -> set[int]:
        by_task = records.scores(stage(config), method)
        return {seed for seed in spec["seeds"] if records.complete(by_task, spec["tasks"], [seed])}

    return sorted(done(name).intersection(*(done(one) for one in spec["methods"])))


def scores(config: Json, name: str) -> records.Scores:
    """Return the runs of a method on all targets."""
    return records.select(records.scores(stage(config), name), config["targets"]["tasks"], seeds_of(config, name))


def shown(config: Json) -> list[str]:
    """Return the methods that have been run on all targets, in the config's order."""
    spec = config["targets"]
    return [name for name in config["methods"] if name in spec["methods"] + spec["long"] and seeds_of(config, name)]


def label(config: Json, name: str) -> str:
    title: str = config["methods"][name]["label"]
    return f"**{title}**" if name == config["targets"]["ours"] else title


def numbers(config: Json, name: str) -> int:
    n_trained: int = records.first(stage(config), name)["train_info"]["num_trainable_params"]
    return n_trained


def file_bytes(config: Json, name: str) -> float:
    """Return the mean size of the saved file without the head in it, which is float32."""
    infos = [run["train_info"] for run in records.of(stage(config)) if records.config_of(run)["method"] == name]
    return sum(info["file_size"] - 4 * info["num_head_params"] for info in infos) / len(infos)


def between(config: Json, method: str, baseline: str) -> statistics.Mean:
    """Return the mean difference of two methods over targets, run by run."""
    return records.mean_difference(scores(config, method), scores(config, baseline))


def overall(config: Json, name: str) -> statistics.Mean:
    """Return the mean over targets."""
    return records.mean_over_tasks(scores(config, name))


def seeds_said(config: Json) -> str:
    """Return the number of seeds in words, and the methods that have fewer."""
    every = len(seeds_of(config, LORA))
    fewer = [
        f"{config['methods'][name]['label']} has {len(seeds_of(config, name))}"
        for name in shown(config)
        if len(seeds_of(config, name)) < every
    ]
    return f"{every} seed{'s' if every > 1 else ''}{f' ({chr(59).join(fewer)})' if fewer else ''}"


def rates_table(config: Json) -> str:
    """Write mean scores on the development tasks, with the chosen rate in bold."""
    rows = []
    for name, method in config["methods"].items():
        means = {}
        for rate in method["rates"]:
            run_scores = [
                run["test"]["score"]
                for run in records.of(stage(config, "rates"))
                if records.config_of(run)["method"] == name and records.config_of(run)["learning_rate"] == rate
            ]
            if run_scores:
                means[rate] = sum(run_scores) / len(run_scores)
        best = rates.RULES[config["development"]["choose"]](means) if means else None
        cells = [
            f"{'**' if rate == best else ''}{rate:g}: {records.percent(means[rate])}{'**' if rate == best else ''}"
            for rate in means
        ]
        rows.append([method["label"], *cells])
    tasks = " and ".join(config["development"]["rates"])
    most = max(len(row) for row in rows)
    rows = [[*row, *[""] * (most - len(row))] for row in rows]
    return (
        f"{table(('', 'rate: score', *[''] * (most - 2)), rows)}\n\nRate and mean score on {tasks}, seed "
        f"{config['development']['seed']}. In bold, what was chosen: {CHOICES[config['development']['choose']]}. "
        f"{records.source_line(stage(config, 'rates'))}"
    )


def targets_table(config: Json) -> str:
    """Write means over targets, and differences to LoRA r = 8, run by run."""
    rows = []
    for name in shown(config):
        apart = "–" if name == LORA else signed(between(config, name, LORA))
        median = (
            "–"
            if name == LORA
            else f"{100 * records.median_difference(scores(config, name), scores(config, LORA)):+.1f}"
        )
        size = f"{file_bytes(config, name) / 1000:,.0f}"
        rows.append(
            [label(config, name), f"{numbers(config, name):,}", size, points(overall(config, name)), apart, median]
        )
    n, seeds = len(config["targets"]["tasks"]), seeds_said(config)
    return (
        f"{table(('', 'trained numbers', 'kB of its file', 'mean score', 'against LoRA r = 8', 'median'), rows)}\n\n"
        f"Mean over {n} tasks and {seeds}, in points, with 95 % intervals; differences are between runs of the "
        "same seed and rows, and median is that of the tasks' differences. Numbers and files are those of the method: "
        "every one trains the task's head beside them. VeRA's file has its random matrices, as PEFT saves them by "
        "default. "
        f"{records.source_line(stage(config))}"
    )


def summary_table(config: Json) -> str:
    """Write a short version of `targets_table` for other pages."""
    rows = []
    for name in (method for method in shown(config) if method in config["targets"]["in_short"]):
        apart = "–" if name == LORA else signed(between(config, name, LORA))
        rows.append([label(config, name), f"{numbers(config, name):,}", points(overall(config, name)), apart])
    n, seeds = len(config["targets"]["tasks"]), seeds_said(config)
    soap = "coefficients and the random basis with SOAP, the others with AdamW unless they say so"
    header = ("a new task, trained by", "trained numbers, head aside", "mean score", "against LoRA r = 8")
    return (
        f"{table(header, rows)}\n\nMiniLM, a basis of {len(config['sources']['tasks'])} adapters of other tasks; "
        f"{n} tasks, {seeds}, 95 % intervals; {soap}. `python experiments/run.py text targets`."
    )


def by_task_table(config: Json) -> str:
    tasks = config["targets"]["tasks"]
    rows = []
    for name in shown(config):
        by_task = scores(config, name)
        means = [statistics.mean(list(by_task[task].values())) for task in tasks]
        rows.append([label(config, name), *(points(mean) for mean in means)])
    return table(("", *tasks), rows)


def curve(config: Json, name: str) -> list[tuple[int, float, float]]:
    """Return (steps, epochs, mean score on validation rows) during training, over all runs on targets.

    Tasks with fewer rows have fewer steps, so that a point is an equal fraction of each training; its steps are those
    of the longest one.
    """
    seeds = seeds_of(config, name)
    runs = [
        run
        for run in records.of(stage(config))
        if records.config_of(run)["method"] == name and records.config_of(run)["seed"] in seeds
    ]
    return [
        (
            max(point["step"] for point in points_of_runs),
            max(point["epoch"] for point in points_of_runs),
            sum(score_at(point) for point in points_of_runs) / len(points_of_runs),
        )
        for points_of_runs in zip(*(run["train_info"]["metrics"] for run in runs), strict=True)
    ]


def score_at(point: Json) -> float:
    return next(value for key, value in point.items() if key.startswith("test "))


def share_to(config: Json, name: str, target_score: float) -> float | None:
    """Return the fraction of the training until the mean curve reaches a score, interpolated, or None."""
    before, last = (0.0, 0.0), curve(config, name)[-1][0]
    for step, _, score in curve(config, name):
        if score >= target_score:
            fraction = (target_score - before[1]) / (score - before[1])
            return (before[0] + fraction * (step - before[0])) / last
        before = (step, score)
    return None


def seconds(config: Json, name: str) -> float:
    """Return the mean duration of a training over targets.

    Of each target, the fastest seed counts, which other processes have disturbed least.
    """
    fastest: dict[str, float] = {}
    seeds = seeds_of(config, name)
    for run in records.of(stage(config)):
        if records.config_of(run)["method"] == name and records.config_of(run)["seed"] in seeds:
            task, took = records.config_of(run)["task"], run["train_info"]["metrics"][-1]["train time"]
            fastest[task] = min(fastest.get(task, took), took)
    return sum(fastest.values()) / len(fastest)


def wanted_score(config: Json, baseline: str = LORA) -> float:
    return SHARE_OF_LORA * curve(config, baseline)[-1][2]


def convergence_table(config: Json, baseline: str = LORA) -> str:
    target_score = wanted_score(config, baseline)
    of_baseline = (
        "LoRA's last score" if baseline == LORA else f"the last score of {config['methods'][baseline]['label']}"
    )
    header = [f"{epoch:g}" for _, epoch, _ in curve(config, LORA)]
    rows = []
    for name in shown(config):
        reached = share_to(config, name, target_score)
        ends = (f"{reached:.2f}", f"{reached * seconds(config, name):.1f}") if reached else ("never", "–")
        rows.append([label(config, name), *(records.percent(score) for _, _, score in curve(config, name)), *ends])
    return (
        f"{table(('score after epochs', *header, 'share of steps to 98 %', 'seconds'), rows)}\n\n"
        f"Mean score on {config['recipe']['rows_on_the_way']} test rows of each target, which nothing is chosen by; "
        f"98 % of {of_baseline} are {records.percent(target_score)}. A training has {curve(config, LORA)[-1][0]} "
        "steps at most. Seconds are of that share of a training, of each task's fastest seed: threads share cores, and "
        "are not always as fast."
    )


def in_short(config: Json, name: str, epochs: int) -> records.Scores | None:
    """Return the runs of a method with fewer epochs, or None as long as one is missing."""
    spec = config["targets"]
    return records.cell(stage(config, "short"), text.in_short(name, epochs), spec["tasks"], spec["seeds"])


def short_table(config: Json) -> str:
    """Write trainings with fewer steps, compared with LoRA after all of them."""
    spec, whole, rows = config["short"], config["recipe"]["epochs"], []
    for epochs in spec["epochs"]:
        for name in spec["methods"]:
            runs = in_short(config, name, epochs)
            if runs is None:
                continue
            mean = records.mean_over_tasks(runs)
            share = f"{100 * mean.value / overall(config, LORA).value:.1f} %"
            rows.append([str(epochs), label(config, name), points(mean), share])
    header = ("epochs", "", "mean score", f"share of LoRA's score after {whole}")
    return (
        f"{table(header, rows)}\n\nMean over all targets and test rows, {len(config['targets']['seeds'])} seeds; rates "
        f"are those that were chosen for {whole} epochs, LoRA's among them, to which a higher one may do good here. "
        f"{records.source_line(stage(config, 'short'))}"
    )


def heads_table(config: Json) -> str:
    """Write the same methods with two learning rates of heads."""
    spec, rows = config["heads"], []
    targets = config["targets"]
    rates_ = (config["recipe"]["head_learning_rate"], spec["learning_rate"])
    for rate, folder in zip(rates_, (stage(config), stage(config, "heads")), strict=True):
        lora = records.cell(folder, LORA, targets["tasks"], targets["seeds"])
        for name in spec["methods"]:
            runs = records.cell(folder, name, targets["tasks"], targets["seeds"])
            if runs is None or lora is None:
                continue
            difference, median = "–", "–"
            if name != LORA:
                difference, median = (
                    signed(records.mean_difference(runs, lora)),
                    f"{100 * records.median_difference(runs, lora):+.1f}",
                )
            means = [records.percent(statistics.mean(list(runs[task].values())).value) for task in targets["tasks"]]
            rows.append(
                [f"{rate:g}", label(config, name), *means, points(records.mean_over_tasks(runs)), difference, median]
            )
    header = ("rate of heads", "", *targets["tasks"], "mean", "against LoRA", "median")
    return f"{table(header, rows)}\n\n{len(targets['seeds'])} seeds. {records.source_line(stage(config, 'heads'))}"


def goals_table(config: Json) -> str:
    """Write the goals of the project, and whether they were reached."""
    return table(("goal", "measured", ""), [*score_goals(config), *step_goals(config), *size_goals(config)])


def score_goals(config: Json) -> Iterator[Goal]:
    """Yield the goals for our method's score compared with other methods."""
    ours, random = config["targets"]["ours"], config["targets"]["random"]

    def compare(baseline: str) -> tuple[statistics.Mean, str] | None:
        if not {ours, baseline} <= set(shown(config)):
            return None
        difference = between(config, ours, baseline)
        median = 100 * records.median_difference(scores(config, ours), scores(config, baseline))
        return difference, f"{signed(difference)}, median task {median:+.1f}"

    if comparison := compare(LORA):
        (difference, measured), share = comparison, numbers(config, LORA) / numbers(config, ours)
        goal = "at most 0.5 points below LoRA r = 8, with at most 1/12 of its numbers"
        yield goal, f"{measured}, with 1/{share:.1f}", verdict(difference, -0.005) if share >= 12 else "missed"
    if comparison := compare(SOAP_LORA):
        yield "the same, where LoRA has our optimizer too", comparison[1], verdict(comparison[0], -0.005)
    for baseline in ("vera", "vblora", "lora-xs"):
        if comparison := compare(baseline):
            difference, measured = comparison
            goal = f"2 points above {config['methods'][baseline]['label']}, with no more numbers"
            sizes = f"{numbers(config, ours):,} to {numbers(config, baseline):,}"
            smaller = numbers(config, ours) <= numbers(config, baseline)
            yield goal, f"{measured}, {sizes}", verdict(difference, 0.02) if smaller else "missed"
    if comparison := compare(random):
        difference, measured = comparison
        yield "above a random basis of equal size, by more than the interval", measured, plain(difference.low > 0)


def step_goals(config: Json) -> Iterator[Goal]:
    """Yield the goals for the steps that our method needs."""
    ours = config["targets"]["ours"]
    if not {ours, LORA} <= set(shown(config)):
        return
    own_share, lora_share = (share_to(config, name, wanted_score(config)) for name in (ours, LORA))
    assert lora_share is not None
    yield (
        "98 % of LoRA's last score in half of the steps that LoRA needs",
        f"{own_share / lora_share:.2f} of them" if own_share else "not reached",
        plain(own_share is not None and own_share <= lora_share / 2),
    )
    half = in_short(config, ours, config["recipe"]["epochs"] // 2)
    if half is not None:
        fraction = records.mean_over_tasks(half).value / overall(config, LORA).value
        goal = "the same where each has a schedule of its own: ours trained for half of the steps"
        yield goal, f"{100 * fraction:.1f} % of LoRA's score", plain(fraction >= SHARE_OF_LORA)


def size_goals(config: Json) -> Iterator[Goal]:
    """Yield the goal for adapters in packs."""
    for size, loss in recycled_tables.at_a_sixth(config).items():
        goal = "recycled at a sixth of the bytes, basis counted as if 100 shared it: 0.5 points lost at most"
        yield goal, f"{size}: {100 * loss:.1f} lost", plain(loss <= 0.005)


def verdict(difference: statistics.Mean, goal: float) -> str:
    """Return whether a difference is at least the goal. An interval that reaches below leaves it open."""
    if difference.value < goal:
        return "missed"
    return "reached" if difference.low >= goal else "reached, not surely: the interval has less in it"


def plain(met: bool) -> str:
    return "reached" if met else "missed"


def plots(config: Json, folder: Path) -> None:
    """Draw learning curves as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "eigenlorax", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for n, name in enumerate(shown(config)):
            drawn = curve(config, name)
            wide = 2.5 if name in (config["targets"]["ours"], LORA) else 1.0
            axes.plot(
                [epoch for _, epoch, _ in drawn],
                [100 * score for _, _, score in drawn],
                label=config["methods"][name]["label"],
                linewidth=wide,
                # there are ten colours
                linestyle="-" if n < 10 else "--",
            )
        axes.set_xlabel("epochs")
        axes.set_ylabel("mean score on targets")
        axes.legend(fontsize=7, ncols=2)
        figure.savefig(folder / "curves.svg", metadata={"Date": None})
        plt.close(figure)
