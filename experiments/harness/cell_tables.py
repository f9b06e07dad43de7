"""What the records of the text experiment say where one thing was changed at a time."""

from collections.abc import Callable, Mapping, Sequence

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
    return list(dict.fromkeys(records.asked(one)["method"] for one in records.of(stage)))


def by_task(found: Scores, tasks: Sequence[str]) -> list[str]:
    return [percent(statistics.mean(list(found[task].values())).value) if task in found else "–" for task in tasks]


def gap_table(config: Json) -> str:
    """Every cell on the development tasks, beside LoRA."""
    asked, rows = config["gap"], []
    reference = records.scores("text/gap", asked["beside"])
    for name, cell in asked["cells"].items():
        found = records.scores("text/gap", name)
        if not records.complete(found, asked["tasks"], asked["seeds"]):
            continue
        info = records.first("text/gap", name)
        rows.append(
            [
                cell["label"],
                f"{info['train_info']['num_trainable_params']:,}",
                f"{records.asked(info)['learning_rate']:g}",
                *by_task(found, asked["tasks"]),
                points(records.overall(found)),
                "–" if name == asked["beside"] else signed(records.apart(found, reference)),
            ]
        )
    label = asked["cells"][asked["beside"]]["label"]
    header = ("", "trained numbers", "rate", *asked["tasks"], "mean", f"against {label}")
    return f"{table(header, rows)}\n\nDevelopment tasks, none of them a target. {records.source_line('text/gap')}"


def variations_table(config: Json) -> str:
    """Each beside the reference cell, on the same tasks and seeds."""
    asked, rows = config["variations"], []
    for name in asked["of"]:
        reference = records.scores("text/targets", name)
        for cell in cells("text/variations"):
            if cell.startswith(f"{name}-"):
                found = records.scores("text/variations", cell)
                same = {task: {seed: reference[task][seed] for seed in runs} for task, runs in found.items()}
                info = records.first("text/variations", cell)["train_info"]
                rows.append(
                    [
                        config["methods"][name]["label"],
                        cell.removeprefix(f"{name}-"),
                        f"{info['num_trainable_params']:,}",
                        str(sum(len(runs) for runs in found.values())),
                        points(records.overall(found)),
                        signed(records.apart(found, same)),
                    ]
                )
    header = (
        "method",
        "what differs",
        "trained numbers",
        "runs",
        "mean",
        "against k = 32, start zero, weighting delta",
    )
    tasks = ", ".join(config["targets"]["four"])
    return f"{table(header, rows)}\n\nMean over {tasks}. {records.source_line('text/variations')}"


def low_table(config: Json) -> str:
    """Bases of few sources, and with further directions; beside each, random directions as many."""
    asked, rank, rows = config["low"], config["sources"]["rank"], []
    name = asked["method"]
    for n in asked["sources"]:
        for n_extra in asked["n_extra"]:
            found = records.scores("text/low", f"{name}-n{n}-extra{n_extra}")
            k = min(asked["k"], n * rank) + n_extra
            random = records.scores("text/low", f"{name}-random-k{k}")
            if found and random:
                rows.append(
                    [
                        str(n),
                        str(n_extra),
                        str(k),
                        points(records.overall(found)),
                        points(records.overall(random)),
                        signed(records.apart(found, random)),
                    ]
                )
    header = ("sources", "further directions", "k in all", "mean", "random basis as large", "difference")
    n = len(asked["seeds"])
    return (
        f"{table(header, rows)}\n\nMean over {', '.join(asked['tasks'])}, {n} draw{'s' if n > 1 else ''} of sources; "
        f"{config['methods'][name]['label']}. {records.source_line('text/low')}"
    )


def few_table(config: Json) -> str:
    """Scores with few training rows."""
    asked, rows = config["few"], []
    for name in asked["methods"]:
        cells_ = []
        for n in asked["rows"]:
            found = records.scores("text/few", name, rows=n)
            cells_.append(points(records.overall(found)) if found else "–")
        rows.append([config["methods"][name]["label"], *cells_])
    header = ("training rows", *(str(n) for n in asked["rows"]))
    return (
        f"{table(header, rows)}\n\nMean over {', '.join(asked['tasks'])} and {len(config['targets']['seeds'])} seeds, "
        f"{asked['recipe']['steps']} steps each. {records.source_line('text/few')}"
    )


def count_table(config: Json) -> str:
    """New-task scores and left-out errors over the number of sources."""
    asked, rows = config["count"], []
    for n in asked["sources"]:
        cells_: list[str] = []
        for one in asked["sets"]:
            found = [
                item for item in records.of("text/count") if records.asked(item)["method"].startswith(f"{one}-n{n}-")
            ]
            errors = [error for item in found for error in item["subspace"]["left_out"].values()]
            ks = [k for item in found for k in item["subspace"]["k"]]
            scores = [item["test"]["score"] for item in found]
            cells_ += [
                str(max(ks)) if ks else "–",
                percent(sum(scores) / len(scores)) if scores else "–",
                f"{sum(errors) / len(errors):.3f}" if errors else "–",
            ]
        rows.append([str(n), *cells_])
    header = ["sources"]
    for one in asked["sets"]:
        named = {"shared": "one start"}.get(one, "own starts")
        header += [f"k, {named}", "score", "left-out error"]
    return (
        f"{table(header, rows)}\n\nMean over {', '.join(asked['tasks'])} and {len(asked['draws'])} draws of sources. "
        f"The error is that of the set's adapters which were not drawn. {records.source_line('text/count')}"
    )
