"""The table of `results/profile.json`: processor time of each verb by part, next to the limits of the machine."""

from typing import Any

from markdown_table import release, table

Json = dict[str, Any]
COLLECTIONS = ("demo", "planted", "llama")
VERBS = ("fit -k 32", "fit", "refit -k 16", "append", "export", "inspect", "report")
PARTS = ("reading", "mathematics", "coding", "writing", "other")


def markdown(result: Json) -> str:
    """Processor time of each verb and collection, and the limits of disk and processor."""
    machine, where = result["machine"], result["environment"]
    collections = [result["collections"][name] for name in COLLECTIONS if name in result["collections"]]
    rows = []
    for collection in collections:
        size = f"{collection['bytes'] / 1e6:,.0f} MB"
        rows.append([f"**{collection['label']}, {size}**", *[""] * (len(PARTS) + 4)])
        rows += [row(verb, collection["verbs"][verb], machine) for verb in VERBS if verb in collection["verbs"]]
    header = ("", "seconds", *PARTS, "disk", "products", "times the limits")
    rates = " and ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in sorted(machine["operations"].items())
    )
    loads = [figures["load"] for collection in collections for figures in collection["verbs"].values()]
    return (
        f"{table(header, rows)}\n\n"
        f"Disk: {machine['read'] / 1e6:,.0f} MB/s of reading and {machine['write'] / 1e6:,.0f} MB/s of writing. "
        f"Products: {rates}.\n\n"
        f"`{result['command']}`, {release(result)}; {where['processor']}, one thread, at a load of {min(loads):g} to "
        f"{max(loads):g} on {where['cpus']} cores, torch {where['torch']}."
    )


def row(verb: str, figures: Json, machine: Json) -> list[str]:
    """The line of a verb."""
    disk = figures["read_bytes"] / machine["read"] + figures["written_bytes"] / machine["write"]
    products = sum(number / machine["operations"][dtype] for dtype, number in figures["operations"].items())
    seconds = figures["processor_seconds"]
    parts = [figures["parts"][part] for part in PARTS]
    return [
        f"`{verb}`",
        *(in_digits(each) for each in (seconds, *parts, disk, products)),
        in_digits(seconds / (disk + products)),
    ]


def in_digits(number: float) -> str:
    """A number with two digits, or all before the point."""
    for least, decimals in ((9.95, 0), (0.995, 1), (0.0995, 2)):
        if number >= least:
            return f"{number:,.{decimals}f}"
    return f"{number:.3f}" if number >= 0.0005 else "0"
