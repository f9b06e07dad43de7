"""Tables of the language experiment."""

from collections.abc import Callable, Mapping

from . import records
from .pages import table
from .records import Json


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {
        "language-recycled": lambda: recycled_table(config),
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
