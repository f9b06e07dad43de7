"""What the records of the text experiment say where one thing was changed at a time."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from . import records, statistics
from .pages import table
from .records import Json, Scores, percent, points, signed


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {
        "gap": lambda: gap_table(config),
        "variations": lambda: variations_table(config),
        "low": lambda: low_table(config),
        "few": lambda: few_table(config),
        "count": lambda: count_table(config),
    }


def cells(stage: str) -> list[str]:
    """Names of what was run in a stage, in the order of files."""
    return list(dict.fromkeys(records.config_of(one)["method"] for one in records.of(stage)))


def by_task(found: Scores, tasks: Sequence[str]) -> list[str]:
    return [percent(statistics.mean(list(found[task].values())).value) if task in found else "–" for task in tasks]


def seeds_said(seeds: Sequence[int]) -> str:
    """How many seeds, and what is in the intervals of one."""
    return (
        f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so that intervals have only the choice of rows in them"
    )


def gap_table(config: Json) -> str:
    """Every cell on the development tasks, beside LoRA."""
    asked, rows = config["gap"], []
    reference = records.scores("text/gap", asked["beside"])
    for name, cell in asked["cells"].items():
        found = records.cell("text/gap", name, asked["tasks"], asked["seeds"])
        if found is None:
            continue
        info = records.first("text/gap", name)
        rows.append(
            [
                cell["label"],
                f"{info['train_info']['num_trainable_params']:,}",
                f"{records.config_of(info)['learning_rate']:g}",
                *by_task(found, asked["tasks"]),
                points(records.mean_over_tasks(found)),
                "–" if name == asked["beside"] else signed(records.mean_difference(found, reference)),
            ]
        )
    label = asked["cells"][asked["beside"]]["label"]
    header = ("", "trained numbers", "rate", *asked["tasks"], "mean", f"against {label}")
    return (
        f"{table(header, rows)}\n\nDevelopment tasks, none of them a target; {seeds_said(asked['seeds'])}. "
        f"{records.source_line('text/gap')}"
    )


def variations_table(config: Json) -> str:
    """Each beside the reference cell, on the same tasks and seeds."""
    asked, tasks, rows = config["variations"], config["targets"]["four"], []
    for name in asked["of"]:
        same = records.cell("text/targets", name, tasks, asked["seeds"])
        for cell in cells("text/variations"):
            found = records.cell("text/variations", cell, tasks, asked["seeds"])
            if cell.startswith(f"{name}-") and found is not None and same is not None:
                info = records.first("text/variations", cell)["train_info"]
                rows.append(
                    [
                        cell.removeprefix(f"{name}-"),
                        f"{info['num_trainable_params']:,}",
                        *by_task(found, tasks),
                        points(records.mean_over_tasks(found)),
                        signed(records.mean_difference(found, same)),
                    ]
                )
    header = ("what differs", "trained numbers", *tasks, "mean", "against k = 32, start zero, weighting delta")
    methods = ", ".join(config["methods"][name]["label"] for name in asked["of"])
    return (
        f"{table(header, rows)}\n\n{methods}; {seeds_said(asked['seeds'])}, and the rate that was chosen for k = 32. "
        f"{records.source_line('text/variations')}"
    )


def low_table(config: Json) -> str:
    """Bases of few sources, and with further directions; beside each, random directions as many."""
    asked, rank, rows = config["low"], config["sources"]["rank"], []
    name = asked["method"]
    for n in asked["sources"]:
        for n_extra in asked["n_extra"]:
            found = records.cell("text/low", f"{name}-n{n}-extra{n_extra}", asked["tasks"], asked["seeds"])
            k = min(asked["k"], n * rank) + n_extra
            random = records.cell("text/low", f"{name}-random-k{k}", asked["tasks"], asked["seeds"])
            if found is not None and random is not None:
                rows.append(
                    [
                        str(n),
                        str(n_extra),
                        str(k),
                        points(records.mean_over_tasks(found)),
                        points(records.mean_over_tasks(random)),
                        signed(records.mean_difference(found, random)),
                    ]
                )
    header = ("sources", "further directions", "k in all", "mean", "random basis as large", "difference")
    return (
        f"{table(header, rows)}\n\nMean over {' and '.join(asked['tasks'])}; {config['methods'][name]['label']}; every "
        f"seed draws sources of its own, and there is {seeds_said(asked['seeds'])}. {records.source_line('text/low')}"
    )


def few_table(config: Json) -> str:
    """Scores with few training rows."""
    asked, rows = config["few"], []
    for name in asked["methods"]:
        cells_ = []
        for n in asked["rows"]:
            found = records.cell("text/few", name, asked["tasks"], asked["seeds"], rows=n)
            cells_.append(points(records.mean_over_tasks(found)) if found else "–")
        rows.append([config["methods"][name]["label"], *cells_])
    header = ("training rows", *(str(n) for n in asked["rows"]))
    return (
        f"{table(header, rows)}\n\nMean over {', '.join(asked['tasks'])} and {len(asked['seeds'])} seeds, "
        f"{asked['recipe']['steps']} steps each. {records.source_line('text/few')}"
    )


def count_table(config: Json) -> str:
    """New-task scores and left-out errors over the number of sources."""
    asked, rows = config["count"], []
    for n in asked["sources"]:
        cells_: list[str] = []
        for one in asked["sets"]:
            found = [
                item
                for item in records.of("text/count")
                if records.config_of(item)["method"].startswith(f"{one}-n{n}-")
            ]
            errors = [error for item in found for error in item["subspace"]["left_out"].values()]
            ks = [k for item in found for k in item["subspace"]["k"]]
            scores = [item["test"]["score"] for item in found]
            cells_ += [
                str(max(ks)) if ks else "–",
                percent(fmean(scores)) if scores else "–",
                f"{100 * stdev(draws(found)):.1f}" if len(draws(found)) > 1 else "–",
                f"{fmean(errors):.3f}" if errors else "–",
            ]
        rows.append([str(n), *cells_])
    header = ["sources"]
    for one in asked["sets"]:
        named = {"shared": "one start"}.get(one, "own starts")
        header += [f"k, {named}", "score", "± of draws", "left-out error"]
    return (
        f"{table(header, rows)}\n\nMean over {' and '.join(asked['tasks'])}, and over {len(asked['draws'])} draws of "
        "sources where there is a choice; ± is the standard deviation of draws. "
        f"{config['methods'][asked['method']]['label']}, whose numbers grow with k. The error is that of the set's "
        f"adapters which were not drawn. {records.source_line('text/count')}"
    )


def draws(found: Sequence[Json]) -> list[float]:
    """The mean score of each draw of sources."""
    scores: dict[str, list[float]] = {}
    for one in found:
        scores.setdefault(records.config_of(one)["method"], []).append(one["test"]["score"])
    return [fmean(each) for each in scores.values()]
