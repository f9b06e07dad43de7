"""The table of `results/coded_fit.json`: fits for an error beside fits by components."""

from typing import Any

from markdown_table import release, table

Json = dict[str, Any]
LABELS = {
    "planted": "100 adapters of rank 8, 24 modules 768 wide",
    "llama": "8 adapters of rank 16, the 224 modules of Llama-3-8B",
}


def markdown(result: Json) -> str:
    """Seconds, memory, bytes and errors of each collection and case."""
    rows = []
    for name, label in LABELS.items():
        if name not in result["collections"]:
            continue
        collection = result["collections"][name]
        rows.append([f"**{label}, {collection['input_bytes'] / 1e6:,.0f} MB**", *[""] * 6])
        components = collection["cases"]["components"]["processor_seconds"]
        for case, figures in collection["cases"].items():
            seconds = figures["all_processor_seconds"]
            spread = f" ({min(seconds):.1f}–{max(seconds):.1f})" if len(seconds) > 1 else ""
            rows.append(
                [
                    case,
                    f"{figures['processor_seconds']:.1f}{spread}",
                    f"{figures['processor_seconds'] / components:.1f}",
                    f"{figures['wall_seconds']:.1f}",
                    f"{figures['peak_bytes'] / 1e6:,.0f}",
                    f"{figures['file_bytes'] / 1e6:.2f}",
                    f"{figures['worst_error']:.4f}",
                ]
            )
    header = ("", "processor seconds", "÷ components", "seconds", "memory, MB", "pack, MB", "worst error")
    loads = [case["load"] for collection in result["collections"].values() for case in collection["cases"].values()]
    where = result["environment"]
    return (
        f"{table(header, rows)}\n\n"
        f"`{result['command']}`, {release(result)}: error bound {result['error']:g}, components: 32 a side; "
        f"medians, and all rounds in brackets; {where['processor']}, one thread a process, at a "
        f"load of {min(loads):g} to {max(loads):g} on {where['cpus']} cores, torch {where['torch']}."
    )
