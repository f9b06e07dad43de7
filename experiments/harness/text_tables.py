"""What tables of methods on targets are made of: which runs count, and their means."""

from . import rates, records, statistics, text
from .pages import table
from .records import Json, points

LORA, SOAP_LORA = "lora-r8", "lora-soap"


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
    return [name for name in config["methods"] if name in spec["methods"] and seeds_of(config, name)]


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
        best = rates.best(means) if means else None
        cells = [
            f"{'**' if rate == best else ''}{rate:g}: {records.percent(means[rate])}{'**' if rate == best else ''}"
            for rate in means
        ]
        rows.append([method["label"], *cells])
    tasks = " and ".join(config["development"]["rates"])
    most = max(len(row) for row in rows)
    rows = [[*row, *[""] * (most - len(row))] for row in rows]
    return (
        f"{table(('method', *['rate: score'] * (most - 1)), rows)}\n\nRate and mean score on {tasks}, seed "
        f"{config['development']['seed']}. In bold, the best, which was chosen. "
        f"{records.source_line(stage(config, 'rates'))}"
    )


def by_task_table(config: Json) -> str:
    tasks = config["targets"]["tasks"]
    rows = []
    for name in shown(config):
        by_task = scores(config, name)
        means = [statistics.mean(list(by_task[task].values())) for task in tasks]
        rows.append([label(config, name), *(points(mean) for mean in means)])
    return table(("", *tasks), rows)


def in_short(config: Json, name: str, epochs: int) -> records.Scores | None:
    """Return the runs of a method with fewer epochs, or None as long as one is missing."""
    spec = config["targets"]
    return records.cell(stage(config, "short"), text.in_short(name, epochs), spec["tasks"], spec["seeds"])
