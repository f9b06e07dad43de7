"""Tables of merges: seconds of ours beside full matrices, mergekit and KnOTS' own code."""

from typing import Any

from markdown_table import table

Json = dict[str, Any]
_NAMES = {"ties": "TIES", "tsv": "TSV"}
# Number of adapted modules of a layer of Llama
_LAYER = 7


def markdown(merging: Json, references: Json) -> str:
    """Return both tables, with the commands that measured them."""
    methods = merging["methods"]
    rows = [row for method, measured in methods.items() for row in _method_rows(_NAMES[method], measured)]
    header = ("method", "module", "ours, s", "full matrices, s", "ratio", "difference")
    peaks = [max(each[peak] for each in methods.values()) for peak in ("peak_mib", "full_peak_mib")]
    where = merging["environment"]
    others = [
        [
            name,
            f"`{module}`",
            f"{each['ours']:.2f}",
            f"{each['reference']:.1f}",
            f"{each['reference'] / each['ours']:.0f}×",
            f"{each['difference']:.0e}",
        ]
        for module, programs in references["modules"].items()
        for name, each in programs.items()
    ]
    return (
        f"{table(header, rows)}\n\n{merging['adapters']} random adapters of rank {merging['rank']} in the shapes of "
        "Llama-3.1-8B, processor time of one thread, the comparison with random adapters included; relative difference "
        f"of the results. Peak memory {peaks[0]:.0f} MiB, with full matrices {peaks[1]:,.0f} MiB. "
        f"`{merging['command']}`; {where['processor']}, torch {where['torch']}.\n\n"
        f"{table(('program', *header[1:3], 'theirs, s', 'ratio', 'difference'), others)}\n\n"
        f"{references['adapters']} adapters; theirs from the product of the factors to the cut. "
        f"mergekit {references['mergekit']}. `{references['command']}`."
    )


def _method_rows(name: str, measured: Json) -> list[list[str]]:
    """Return a row for each module, and one for all of them."""
    rows = [
        [
            name,
            f"`{module}`",
            f"{each['ours']:.2f}",
            f"{each['full']:.1f}",
            f"{each['full'] / each['ours']:.0f}×",
            f"{each['difference']:.0e}",
        ]
        for module, each in measured["modules"].items()
    ]
    full, ours, n = sum(each["full"] for each in measured["modules"].values()), measured["layer"], len(rows)
    if n == _LAYER:
        return [*rows, [f"**{name}**", "all seven", f"{ours:.2f}", f"{full:.0f}", f"**{full / ours:.0f}×**", ""]]
    return [
        *rows,
        [f"**{name}**", f"all seven; full: {n}", f"{ours:.2f}", f"{full:.0f}", f"over {full / ours:.0f}×", ""],
    ]
