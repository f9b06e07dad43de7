"""Tables of the text experiment in which one thing was changed at a time."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from . import records, statistics
from .pages import table
from .records import Json, Scores, percent, points, signed


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "gap": lambda: gap_table(config),
        "variations": lambda: variations_table(config),
        "low": lambda: low_table(config),
        "few": lambda: few_table(config),
        "count": lambda: count_table(config),
    }


def cells(stage: str) -> list[str]:
    """Return the names of the methods of a stage, in the order of files."""
    return list(dict.fromkeys(records.config_of(run)["method"] for run in records.of(stage)))


def by_task(runs: Scores, tasks: Sequence[str]) -> list[str]:
    return [percent(statistics.mean(list(runs[task].values())).value) if task in runs else "–" for task in tasks]


def seeds_said(seeds: Sequence[int]) -> str:
    """Return the number of seeds in words, and what intervals cover if there is one seed."""
    return (
        f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so that intervals have only the choice of rows in them"
    )


def gap_table(config: Json) -> str:
    """Write every cell on the development tasks, compared with LoRA."""
    spec, rows = config["gap"], []
    reference = records.scores("text/gap", spec["beside"])
    for name, cell in spec["cells"].items():
        runs = records.cell("text/gap", name, spec["tasks"], spec["seeds"])
        if runs is None:
            continue
        info = records.first("text/gap", name)
        rows.append(
            [
                cell["label"],
                f"{info['train_info']['num_trainable_params']:,}",
                f"{records.config_of(info)['learning_rate']:g}",
                *by_task(runs, spec["tasks"]),
                points(records.mean_over_tasks(runs)),
                "–" if name == spec["beside"] else signed(records.mean_difference(runs, reference)),
            ]
        )
    label = spec["cells"][spec["beside"]]["label"]
    header = ("", "trained numbers", "rate", *spec["tasks"], "mean", f"against {label}")
    return (
        f"{table(header, rows)}\n\nDevelopment tasks, none of them a target; {seeds_said(spec['seeds'])}. "
        f"{records.source_line('text/gap')}"
    )


def variations_table(config: Json) -> str:
    """Write each variation, compared with the reference cell on the same tasks and seeds."""
    spec, tasks, rows = config["variations"], config["targets"]["four"], []
    for name in spec["of"]:
        same = records.cell("text/targets", name, tasks, spec["seeds"])
        for cell in cells("text/variations"):
            runs = records.cell("text/variations", cell, tasks, spec["seeds"])
            if cell.startswith(f"{name}-") and runs is not None and same is not None:
                info = records.first("text/variations", cell)["train_info"]
                rows.append(
                    [
                        cell.removeprefix(f"{name}-"),
                        f"{info['num_trainable_params']:,}",
                        *by_task(runs, tasks),
                        points(records.mean_over_tasks(runs)),
                        signed(records.mean_difference(runs, same)),
                    ]
                )
    header = ("what differs", "trained numbers", *tasks, "mean", "against k = 32, start zero, weighting delta")
    methods = ", ".join(config["methods"][name]["label"] for name in spec["of"])
    return (
        f"{table(header, rows)}\n\n{methods}; {seeds_said(spec['seeds'])}, and the rate that was chosen for k = 32. "
        f"{records.source_line('text/variations')}"
    )


def low_table(config: Json) -> str:
    """Write bases of few sources, with and without random components, compared with random bases of the same size."""
    spec, rank, rows = config["low"], config["sources"]["rank"], []
    name = spec["method"]
    for n in spec["sources"]:
        for n_extra in spec["n_extra"]:
            runs = records.cell("text/low", f"{name}-n{n}-extra{n_extra}", spec["tasks"], spec["seeds"])
            k = min(spec["k"], n * rank) + n_extra
            random = records.cell("text/low", f"{name}-random-k{k}", spec["tasks"], spec["seeds"])
            if runs is not None and random is not None:
                rows.append(
                    [
                        str(n),
                        str(n_extra),
                        str(k),
                        points(records.mean_over_tasks(runs)),
                        points(records.mean_over_tasks(random)),
                        signed(records.mean_difference(runs, random)),
                    ]
                )
    header = ("sources", "further directions", "k in all", "mean", "random basis as large", "difference")
    return (
        f"{table(header, rows)}\n\nMean over {' and '.join(spec['tasks'])}; {config['methods'][name]['label']}; every "
        f"seed draws sources of its own, and there is {seeds_said(spec['seeds'])}. {records.source_line('text/low')}"
    )


def few_table(config: Json) -> str:
    """Write scores with few training rows."""
    spec, rows = config["few"], []
    for name in spec["methods"]:
        cells_ = []
        for n in spec["rows"]:
            runs = records.cell("text/few", name, spec["tasks"], spec["seeds"], rows=n)
            cells_.append(points(records.mean_over_tasks(runs)) if runs else "–")
        rows.append([config["methods"][name]["label"], *cells_])
    header = ("training rows", *(str(n) for n in spec["rows"]))
    return (
        f"{table(header, rows)}\n\nMean over {', '.join(spec['tasks'])} and {len(spec['seeds'])} seeds, "
        f"{spec['recipe']['steps']} steps each. {records.source_line('text/few')}"
    )


def count_table(config: Json) -> str:
    """Write scores of new tasks and left-out errors over the number of sources."""
    spec, rows = config["count"], []
    for n in spec["sources"]:
        cells_: list[str] = []
        for source_set in spec["sets"]:
            runs = [
                run
                for run in records.of("text/count")
                if records.config_of(run)["method"].startswith(f"{source_set}-n{n}-")
            ]
            errors = [error for run in runs for error in run["subspace"]["left_out"].values()]
            ks = [k for run in runs for k in run["subspace"]["k"]]
            scores = [run["test"]["score"] for run in runs]
            cells_ += [
                str(max(ks)) if ks else "–",
                percent(fmean(scores)) if scores else "–",
                f"{100 * stdev(draws(runs)):.1f}" if len(draws(runs)) > 1 else "–",
                f"{fmean(errors):.3f}" if errors else "–",
            ]
        rows.append([str(n), *cells_])
    header = ["sources"]
    for source_set in spec["sets"]:
        set_label = {"shared": "one start"}.get(source_set, "own starts")
        header += [f"k, {set_label}", "score", "± of draws", "left-out error"]
    return (
        f"{table(header, rows)}\n\nMean over {' and '.join(spec['tasks'])}, and over {len(spec['draws'])} draws of "
        "sources where there is a choice; ± is the standard deviation of draws. "
        f"{config['methods'][spec['method']]['label']}, whose numbers grow with k. The error is that of the set's "
        f"adapters which were not drawn. {records.source_line('text/count')}"
    )


def draws(runs: Sequence[Json]) -> list[float]:
    """Return the mean score of each draw of sources."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        scores.setdefault(records.config_of(run)["method"], []).append(run["test"]["score"])
    return [fmean(of_draw) for of_draw in scores.values()]
