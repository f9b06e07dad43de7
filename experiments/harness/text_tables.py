"""What the records of the text experiment say of methods on targets: tables, and how far the goals were met."""

from collections.abc import Callable, Mapping
from pathlib import Path

from . import rates, records, recycled_tables, statistics, text
from .pages import table
from .records import Json, points, signed

LORA, SOAP_LORA, SHARE_OF_LORA = "lora-r8", "lora-soap", 0.98
STAGE = "text/targets"


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
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


def seeds_of(config: Json, name: str) -> list[int]:
    """Seeds that a method has been run with on all targets: of those, the ones that all methods have."""
    spec = config["targets"]

    def done(one: str) -> set[int]:
        found = records.scores(STAGE, one)
        return {seed for seed in spec["seeds"] if records.complete(found, spec["tasks"], [seed])}

    return sorted(done(name).intersection(*(done(one) for one in spec["methods"])))


def scores(config: Json, name: str) -> records.Scores:
    """Task → seed → run, of all targets."""
    return records.select(records.scores(STAGE, name), config["targets"]["tasks"], seeds_of(config, name))


def shown(config: Json) -> list[str]:
    """Methods that have been run on all targets, in the config's order."""
    spec = config["targets"]
    return [name for name in config["methods"] if name in spec["methods"] + spec["long"] and seeds_of(config, name)]


def label(config: Json, name: str) -> str:
    said: str = config["methods"][name]["label"]
    return f"**{said}**" if name == config["targets"]["ours"] else said


def numbers(name: str) -> int:
    found: int = records.first(STAGE, name)["train_info"]["num_trainable_params"]
    return found


def file_bytes(name: str) -> float:
    """Of the file that is saved, without the head in it (float32): the mean over runs."""
    infos = [one["train_info"] for one in records.of(STAGE) if records.config_of(one)["method"] == name]
    return sum(info["file_size"] - 4 * info["num_head_params"] for info in infos) / len(infos)


def between(config: Json, one: str, other: str) -> statistics.Mean:
    """The mean difference of two methods over targets, run by run."""
    return records.mean_difference(scores(config, one), scores(config, other))


def overall(config: Json, name: str) -> statistics.Mean:
    """The mean over targets."""
    return records.mean_over_tasks(scores(config, name))


def seeds_said(config: Json) -> str:
    """How many seeds there are; which methods have fewer."""
    every = len(seeds_of(config, LORA))
    fewer = [
        f"{config['methods'][name]['label']} has {len(seeds_of(config, name))}"
        for name in shown(config)
        if len(seeds_of(config, name)) < every
    ]
    return f"{every} seed{'s' if every > 1 else ''}{f' ({chr(59).join(fewer)})' if fewer else ''}"


def rates_table(config: Json) -> str:
    """Mean scores on the development tasks; what was chosen is bold."""
    rows = []
    for name, method in config["methods"].items():
        means = {}
        for rate in method["rates"]:
            found = [
                one["test"]["score"]
                for one in records.of("text/rates")
                if records.config_of(one)["method"] == name and records.config_of(one)["learning_rate"] == rate
            ]
            if found:
                means[rate] = sum(found) / len(found)
        best = rates.steadiest(means) if means else None
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
        f"{config['development']['seed']}. In bold, what was chosen: the lowest within {100 * rates.NEAR:g} points of "
        f"the best. {records.source_line('text/rates')}"
    )


def targets_table(config: Json) -> str:
    """Means over targets; differences are to LoRA r = 8, run by run."""
    rows = []
    for name in shown(config):
        apart = "–" if name == LORA else signed(between(config, name, LORA))
        median = (
            "–"
            if name == LORA
            else f"{100 * records.median_difference(scores(config, name), scores(config, LORA)):+.1f}"
        )
        size = f"{file_bytes(name) / 1000:,.0f}"
        rows.append([label(config, name), f"{numbers(name):,}", size, points(overall(config, name)), apart, median])
    n, seeds = len(config["targets"]["tasks"]), seeds_said(config)
    return (
        f"{table(('', 'trained numbers', 'kB of its file', 'mean score', 'against LoRA r = 8', 'median'), rows)}\n\n"
        f"Mean over {n} tasks and {seeds}, in points, with 95 % intervals; differences are between runs of the "
        "same seed and rows, and median is that of the tasks' differences. Numbers and files are those of the method: "
        "every one trains the task's head beside them. VeRA's file has its random matrices, as PEFT saves them by "
        "default. "
        f"{records.source_line(STAGE)}"
    )


def summary_table(config: Json) -> str:
    """The same in small, for pages about something else."""
    rows = []
    for name in (one for one in shown(config) if one in config["targets"]["in_short"]):
        apart = "–" if name == LORA else signed(between(config, name, LORA))
        rows.append([label(config, name), f"{numbers(name):,}", points(overall(config, name)), apart])
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
        found = scores(config, name)
        means = [statistics.mean(list(found[task].values())) for task in tasks]
        rows.append([label(config, name), *(points(one) for one in means)])
    return table(("", *tasks), rows)


def curve(config: Json, name: str) -> list[tuple[int, float, float]]:
    """Steps, epochs, and mean score on the rows for the way: over all runs on targets, with most steps.

    Tasks with fewer rows have fewer steps, so that points are those of equal parts of a training.
    """
    seeds = seeds_of(config, name)
    found = [
        one
        for one in records.of(STAGE)
        if records.config_of(one)["method"] == name and records.config_of(one)["seed"] in seeds
    ]
    parts = zip(*(one["train_info"]["metrics"] for one in found), strict=True)
    return [
        (
            max(one["step"] for one in each),
            max(one["epoch"] for one in each),
            sum(score_at(one) for one in each) / len(each),
        )
        for each in parts
    ]


def score_at(point: Json) -> float:
    return next(value for key, value in point.items() if key.startswith("test "))


def share_to(config: Json, name: str, wanted: float) -> float | None:
    """The share of the training until the mean curve reaches a score: between two points in proportion."""
    before, last = (0.0, 0.0), curve(config, name)[-1][0]
    for step, _, score in curve(config, name):
        if score >= wanted:
            part = (wanted - before[1]) / (score - before[1])
            return (before[0] + part * (step - before[0])) / last
        before = (step, score)
    return None


def seconds(config: Json, name: str) -> float:
    """Of a training, the mean over targets: of each, that of the fastest seed, which other processes have disturbed
    least."""
    found: dict[str, float] = {}
    seeds = seeds_of(config, name)
    for one in records.of(STAGE):
        if records.config_of(one)["method"] == name and records.config_of(one)["seed"] in seeds:
            task, took = records.config_of(one)["task"], one["train_info"]["metrics"][-1]["train time"]
            found[task] = min(found.get(task, took), took)
    return sum(found.values()) / len(found)


def wanted_score(config: Json) -> float:
    return SHARE_OF_LORA * curve(config, LORA)[-1][2]


def convergence_table(config: Json) -> str:
    wanted = wanted_score(config)
    header = [f"{epoch:g}" for _, epoch, _ in curve(config, LORA)]
    rows = []
    for name in shown(config):
        reached = share_to(config, name, wanted)
        ends = (f"{reached:.2f}", f"{reached * seconds(config, name):.1f}") if reached else ("never", "–")
        rows.append([label(config, name), *(records.percent(score) for _, _, score in curve(config, name)), *ends])
    return (
        f"{table(('score after epochs', *header, 'share of steps to 98 %', 'seconds'), rows)}\n\n"
        f"Mean score on {config['recipe']['rows_on_the_way']} test rows of each target, which nothing is chosen by; "
        f"98 % of LoRA's last score are {records.percent(wanted)}. A training has {curve(config, LORA)[-1][0]} steps "
        "at most. Seconds are of that share of a training, of each task's fastest seed: threads share cores, and are "
        "not always as fast."
    )


def in_short(config: Json, name: str, epochs: int) -> records.Scores | None:
    """Task → seed → run of a method with fewer epochs; None as long as one is missing."""
    spec = config["targets"]
    return records.cell("text/short", text.in_short(name, epochs), spec["tasks"], spec["seeds"])


def short_table(config: Json) -> str:
    """Trainings with fewer steps, beside what LoRA scores after all of them."""
    asked, whole, rows = config["short"], config["recipe"]["epochs"], []
    for epochs in asked["epochs"]:
        for name in asked["methods"]:
            found = in_short(config, name, epochs)
            if found is None:
                continue
            mean = records.mean_over_tasks(found)
            share = f"{100 * mean.value / overall(config, LORA).value:.1f} %"
            rows.append([str(epochs), label(config, name), points(mean), share])
    header = ("epochs", "", "mean score", f"share of LoRA's score after {whole}")
    return (
        f"{table(header, rows)}\n\nMean over all targets and test rows, {len(config['targets']['seeds'])} seeds; rates "
        f"are those that were chosen for {whole} epochs, LoRA's among them, to which a higher one may do good here. "
        f"{records.source_line('text/short')}"
    )


def heads_table(config: Json) -> str:
    """The same methods with two rates of heads."""
    asked, rows = config["heads"], []
    targets = config["targets"]
    rates_ = (config["recipe"]["head_learning_rate"], asked["learning_rate"])
    for rate, stage in zip(rates_, (STAGE, "text/heads"), strict=True):
        lora = records.cell(stage, LORA, targets["tasks"], targets["seeds"])
        for name in asked["methods"]:
            found = records.cell(stage, name, targets["tasks"], targets["seeds"])
            if found is None or lora is None:
                continue
            apart, median = "–", "–"
            if name != LORA:
                apart, median = (
                    signed(records.mean_difference(found, lora)),
                    f"{100 * records.median_difference(found, lora):+.1f}",
                )
            means = [records.percent(statistics.mean(list(found[task].values())).value) for task in targets["tasks"]]
            rows.append(
                [f"{rate:g}", label(config, name), *means, points(records.mean_over_tasks(found)), apart, median]
            )
    header = ("rate of heads", "", *targets["tasks"], "mean", "against LoRA", "median")
    return f"{table(header, rows)}\n\n{len(targets['seeds'])} seeds. {records.source_line('text/heads')}"


def goals_table(config: Json) -> str:
    """What the project set out to reach, and what came out."""
    ours, found = config["targets"]["ours"], shown(config)
    rows = []

    def median(other: str) -> str:
        return f", median task {100 * records.median_difference(scores(config, ours), scores(config, other)):+.1f}"

    if {ours, LORA} <= set(found):
        apart, share = between(config, ours, LORA), numbers(LORA) / numbers(ours)
        rows.append(
            (
                "at most 0.5 points below LoRA r = 8, with at most 1/12 of its numbers",
                f"{signed(apart)}{median(LORA)}, with 1/{share:.1f}",
                verdict(apart, -0.005) if share >= 12 else "missed",
            )
        )
    if {ours, SOAP_LORA} <= set(found):
        apart = between(config, ours, SOAP_LORA)
        said = f"{signed(apart)}{median(SOAP_LORA)}"
        rows.append(("the same, where LoRA has our optimizer too", said, verdict(apart, -0.005)))
    for other in ("vera", "vblora", "lora-xs"):
        if {ours, other} <= set(found):
            apart = between(config, ours, other)
            rows.append(
                (
                    f"2 points above {config['methods'][other]['label']}, with no more numbers",
                    f"{signed(apart)}{median(other)}, {numbers(ours):,} to {numbers(other):,}",
                    verdict(apart, 0.02) if numbers(ours) <= numbers(other) else "missed",
                )
            )
    random = config["targets"]["random"]
    if {ours, random} <= set(found):
        apart = between(config, ours, random)
        rows.append(
            (
                "above a random basis of equal size, by more than the interval",
                f"{signed(apart)}{median(random)}",
                plain(apart.low > 0),
            )
        )
    if {ours, LORA} <= set(found):
        mine, theirs = share_to(config, ours, wanted_score(config)), share_to(config, LORA, wanted_score(config))
        assert theirs is not None
        said = f"{mine / theirs:.2f} of them" if mine else "not reached"
        reached = mine is not None and mine <= theirs / 2
        rows.append(("98 % of LoRA's last score in half of the steps that LoRA needs", said, plain(reached)))
        half = in_short(config, ours, config["recipe"]["epochs"] // 2)
        if half is not None:
            part = records.mean_over_tasks(half).value / overall(config, LORA).value
            rows.append(
                (
                    "the same where each has a schedule of its own: ours trained for half of the steps",
                    f"{100 * part:.1f} % of LoRA's score",
                    plain(part >= SHARE_OF_LORA),
                )
            )
    for kept, lost in recycled_tables.at_a_sixth(config).items():
        rows.append(
            (
                "recycled at a sixth of the bytes, basis counted as if 100 shared it: 0.5 points lost at most",
                f"{kept}: {100 * lost:.1f} lost",
                plain(lost <= 0.005),
            )
        )
    return table(("goal", "measured", ""), rows)


def verdict(apart: statistics.Mean, wanted: float) -> str:
    """Of a difference that should be no less; an interval that reaches below leaves it open."""
    if apart.value < wanted:
        return "missed"
    return "reached" if apart.low >= wanted else "reached, not surely: the interval has less in it"


def plain(met: bool) -> str:
    return "reached" if met else "missed"


def plots(config: Json, folder: Path) -> None:
    """Learning curves, as SVG."""
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
