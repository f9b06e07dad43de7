"""What the records of the language experiment say."""

from collections.abc import Callable, Mapping
from statistics import fmean, stdev

from . import records
from .pages import table
from .records import Json


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Name of a block → its Markdown."""
    return {
        "language-recycled": lambda: recycled_table(config),
        "language-seventh": lambda: seventh_table(config),
    }


def recycled_table(config: Json) -> str:
    """Perplexities of sources, as trained and out of packs."""
    kinds, found = config["sources"]["kinds"], records.of("language/recycled")
    ways: dict[str, dict[str, Json]] = {}
    for one in found:
        for row in one["test"]["ways"]:
            name = {"original": "as trained", "base": "no adapter"}.get(row["way"], f"k = {row['k']}, {row['way']}")
            ways.setdefault(name, {})[records.config_of(one)["task"]] = row
    first = ways["as trained"]
    rows = []
    for name, cells in ways.items():
        more = sum(cells[kind]["loss"] - first[kind]["loss"] for kind in cells) / len(cells)
        error = sum(row["delta_error"] for row in cells.values()) / len(cells)
        rows.append([name, *(f"{cells[kind]['score']:.2f}" for kind in kinds), f"{more:+.3f}", f"{error:.2f}"])
    header = ("perplexity on unseen text", *kinds, "nats a token", "delta error")
    source = records.source_line("language/recycled")
    return f"{table(header, rows)}\n\nNats a token: the mean change against the original. {source}"


def seventh_table(config: Json) -> str:
    """Methods on a kind of text that is no source."""
    kind, seeds = config["target"]["kind"], config["target"]["seeds"]
    base = next(one for one in records.of("language/base") if records.config_of(one)["task"] == kind)
    rows = [["no training", "–", "–", f"{base['test']['score']:.2f}", ""]]
    for name, method in config["methods"].items():
        found = [one for one in records.of("language/seventh") if records.config_of(one)["method"] == name]
        if {records.config_of(one)["seed"] for one in found} >= set(seeds):
            info, scores = found[0], [one["test"]["score"] for one in found]
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
