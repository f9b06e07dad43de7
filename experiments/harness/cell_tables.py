"""Tables of the text experiment in which one thing was changed at a time."""

from collections.abc import Callable, Mapping, Sequence

from . import records, statistics
from .pages import table
from .records import Json, Scores, percent, points, signed


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "low": lambda: low_table(config),
    }


def by_task(runs: Scores, tasks: Sequence[str]) -> list[str]:
    return [percent(statistics.mean(list(runs[task].values())).value) if task in runs else "–" for task in tasks]


def seeds_said(seeds: Sequence[int]) -> str:
    """Return the number of seeds in words, and what intervals cover if there is one seed."""
    return (
        f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so that intervals have only the choice of rows in them"
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
