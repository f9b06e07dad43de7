"""The result of `find.py` in Markdown."""

from typing import Any

from markdown_table import table

Json = dict[str, Any]


def markdown(result: Json) -> str:
    """Milliseconds of queries, seconds to make and to load an index, and how often the best ten are found."""
    words, similar = result["words"], result["similarity"]
    rows = [
        row("words", words, words["query"], None),
        row("an adapter of the pack", similar, similar["query_in_pack"], similar["recall_in_pack"]),
        row("another adapter", similar, similar["query_outside"], similar["recall_outside"]),
    ]
    header = ("query", "ms, median", "ms, processor", "index made, s", "from the cache, s", "best ten found")
    where, (n_out, n_in) = result["environment"], result["shape"]
    return (
        f"{table(header, rows)}\n\n{result['adapters']:,} planted adapters, {result['modules']} modules "
        f"{n_out} × {n_in}, r = {result['rank']}, in a pack of k = {result['k']}. To open the pack takes "
        f"{seconds(result['open_manifest'])} s more. Seconds are of the processor. "
        f"`python benchmarks/find.py`; {where['processor']}, one thread, torch {where['torch']}, load at the start "
        f"{result['load_at_start']:.1f}."
    )


def row(label: str, index: Json, query: Json, recall: float | None) -> list[str]:
    return [
        label,
        f"{query['median_ms']:.1f}",
        f"{query['median_processor_ms']:.1f}",
        seconds(index["build"]),
        seconds(index["from_cache"]),
        "–" if recall is None else f"{100 * recall:.0f} %",
    ]


def seconds(timed: Json) -> str:
    return f"{timed['processor_seconds']:.1f}"
