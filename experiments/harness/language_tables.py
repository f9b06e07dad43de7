"""Tables of the language experiment."""

from collections.abc import Callable, Mapping
from statistics import fmean, stdev

from . import records
from .pages import table
from .records import Json


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "language-recycled": lambda: recycled_table(config),
        "language-seventh": lambda: seventh_table(config),
    }


def recycled_table(config: Json) -> str:
    """Write perplexities of sources, as trained and from packs."""
    kinds, runs = config["sources"]["kinds"], records.of("language/recycled")
    rows_of: dict[str, dict[str, Json]] = {}
    for run in runs:
        for row in run["test"]["ways"]:
            name = {"original": "as trained", "base": "no adapter"}.get(row["way"], f"k = {row['k']}, {row['way']}")
            rows_of.setdefault(name, {})[records.config_of(run)["task"]] = row
    original = rows_of["as trained"]
    rows = []
    for name, cells in rows_of.items():
        increase = sum(cells[kind]["loss"] - original[kind]["loss"] for kind in cells) / len(cells)
        error = sum(row["delta_error"] for row in cells.values()) / len(cells)
        rows.append([name, *(f"{cells[kind]['score']:.2f}" for kind in kinds), f"{increase:+.3f}", f"{error:.2f}"])
    header = ("perplexity on unseen text", *kinds, "nats a token", "delta error")
    source = records.source_line("language/recycled")
    return f"{table(header, rows)}\n\nNats a token: the mean change against the original. {source}"


def seventh_table(config: Json) -> str:
    """Write the methods on a kind of text that is no source."""
    kind, seeds = config["targets"]["kinds"][0], config["targets"]["seeds"]
    base = next(run for run in records.of("language/base") if records.config_of(run)["task"] == kind)
    rows = [["no training", "–", "–", f"{base['test']['score']:.2f}", ""]]
    for name, method in config["methods"].items():
        runs = [run for run in records.of("language/seventh") if records.config_of(run)["method"] == name]
        if {records.config_of(run)["seed"] for run in runs} >= set(seeds):
            info, scores = runs[0], [run["test"]["score"] for run in runs]
            rows.append(
                [
                    method["label"],
                    f"{info['train_info']['num_trainable_params']:,}",
                    f"{records.config_of(info)['learning_rate']:g}",
                    f"{fmean(scores):.2f}",
                    f"{stdev(scores):.2f}" if len(scores) > 1 else "–",
                ]
            )
    header = ("", "trained numbers", "rate", f"perplexity, {kind}", "± of seeds")
    source = records.source_line("language/seventh")
    return f"{table(header, rows)}\n\n{len(seeds)} seeds; ± is their standard deviation. {source}"
