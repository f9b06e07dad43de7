"""The result of `histories.py` in Markdown: bytes of histories beside baselines, errors, seconds and scores."""

import statistics
from collections.abc import Iterator
from typing import Any

from markdown_table import table

Json = dict[str, Any]

UNMEASURED = "Not measured yet: `python benchmarks/histories.py --work FOLDER`."
BASELINES = ("rounded", "truncated", "components in 8 bits")
BOUNDS = (0.05, 0.1, 0.2)


def markdown(result: Json) -> str:
    """Return all tables."""
    if not is_measured(result):
        return UNMEASURED
    parts = (environment, runs, bytes_table, baselines_table, lossless_table, seconds_table, scores_table)
    return "\n\n".join(text for part in parts if (text := part(result)))


def page(result: Json) -> str:
    """Return the tables of docs/histories.md."""
    if not is_measured(result):
        return UNMEASURED
    return "\n\n".join(part(result) for part in (bytes_table, baselines_table, lossless_table, scores_table))


def is_measured(result: Json) -> bool:
    """Return whether all series were measured."""
    needed = (f"history one by one | {BOUNDS[0]:g}", "xz of float16 differences")
    measured = [all(key in series["cells"] for key in needed) for series in result["series"].values()]
    return bool(measured) and all(measured)


def environment(result: Json) -> str:
    run, where = result["run"], result["run"]["environment"]
    return (
        f"`python benchmarks/histories.py --work FOLDER` on {run['date']}, commit {run['commit']}: "
        f"{where['processor']}, 1 thread; peft {where['peft']}, torch {where['torch']}, "
        f"transformers {where['transformers']}."
    )


def runs(result: Json) -> str:
    """Return what the series are."""
    rows = []
    for name, series in result["series"].items():
        training = series["training"]
        how = "public" if not training else f"{training['task']}, {training['learning_rate']:g}, {training['schedule']}"
        ranks = series["ranks"]
        rows.append(
            [
                name,
                how,
                str(series["versions"]),
                str(series["modules"]),
                f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
                megabytes(series["lora_bytes"]),
                megabytes(series["tensor_bytes"]),
            ]
        )
    header = ("series", "task, learning rate", "versions", "modules", "rank", "LoRA, MB", "other tensors, MB")
    return f"**Series.** MB in all versions' files.\n\n{table(header, rows)}"


def bytes_table(result: Json) -> str:
    """Return bytes and errors of histories at each bound."""
    rows = []
    for name, series, bound in points(result):
        own = series["cells"][f"history | {bound:g}"]
        one_by_one = series["cells"].get(f"history one by one | {bound:g}")
        rows.append(
            [
                name,
                f"{bound:g}",
                f"{max(own['update_errors']):.4f}",
                kilobytes(own["lora"]),
                f"{series['lora_bytes'] / 2 / own['lora']:.1f}",
                kilobytes(own["tensors"]),
                kilobytes(own["files"]),
                f"{series['file_bytes'] / own['files']:.1f}",
                f"{one_by_one['files'] / own['files']:.2f}" if one_by_one else "",
            ]
        )
    header = (
        "series",
        "bound",
        "largest error",
        "LoRA, kB",
        "ratio to 16 bits",
        "other tensors, kB",
        "all files, kB",
        "ratio to the source's files",
        "one by one ÷ all at once",
    )
    return (
        "**Bytes of a history.** The largest error of a version is computed in float64 from exported files.\n\n"
        f"{table(header, rows)}"
    )


def baselines_table(result: Json) -> str:
    """Return bytes of the LoRA by all methods."""
    rows = []
    for name, series, bound in points(result):
        own = series["cells"][f"history | {bound:g}"]["lora"]
        sizes = {method: series["cells"][f"{method} | {bound:g}"]["lora"] for method in BASELINES}
        sizes["xz"] = sum(each["lora"] for each in series["cells"]["xz of float16 differences"]["versions"])
        joint = series["cells"][f"shared basis | {bound:g}"]["lora"]
        best = min(size for size in sizes.values() if size)
        row = [kilobytes(size) if size else "–" for size in (own, *sizes.values(), joint)]
        rows.append([name, f"{bound:g}", *row, f"{best / own:.1f}", f"{joint / own:.2f}"])
    header = (
        "series",
        "bound",
        "history",
        "rounded",
        "truncated by SVD",
        "`fit -k` in 8 bits",
        "xz of float16 differences",
        "`fit --max-error`",
        "best of the four ÷ history",
        "`fit --max-error` ÷ history",
    )
    return (
        "**Bytes of the LoRA, kB**, by method, at the same bound. `fit --max-error` needs all versions at once.\n\n"
        f"{table(header, rows)}"
    )


def lossless_table(result: Json) -> str:
    """Return bytes of lossless histories."""
    rows = []
    for name, series in result["series"].items():
        own = series["cells"].get("history | lossless")
        if own is None:
            continue
        differences = series["cells"]["xz of float16 differences"]["versions"]
        rows.append(
            [
                name,
                megabytes(series["file_bytes"]),
                megabytes(own["files"]),
                f"{series['file_bytes'] / own['files']:.2f}",
                megabytes(series["cells"]["xz of float16 files"]["bytes"]),
                megabytes(sum(each["lora"] + each["tensors"] for each in differences)),
            ]
        )
    header = ("series", "source", "lossless history", "ratio", "float16, xz", "float16 differences, xz")
    return (
        "**Bytes of a lossless history, MB.** Consecutive checkpoints differ in all low bits of the mantissa, which no "
        f"method makes smaller. The last two columns lose what float16 does not hold.\n\n{table(header, rows)}"
    )


def seconds_table(result: Json) -> str:
    """Return seconds and memory of histories that are written one version at a time."""
    rows = []
    for name, series in result["series"].items():
        for bound in (f"{BOUNDS[0]:g}", "lossless"):
            if (own := series["cells"].get(f"history one by one | {bound}")) is None:
                continue
            at_once = series["cells"][f"history | {bound}"]
            rows.append(
                [
                    name,
                    bound,
                    seconds(own["append_seconds"]),
                    f"{at_once['seconds']:.1f}",
                    seconds(own["read_seconds"]),
                    f"{own['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in own else "–",
                ]
            )
    header = ("series", "bound", "append, s", "all at once, s", "read, s", "memory, MiB")
    return (
        "**Seconds** of the processor for one version, median and largest: appending opens the pack, encodes, saves; "
        f"reading begins with the files. Memory is beyond the imports.\n\n{table(header, rows)}"
    )


def scores_table(result: Json) -> str:
    """Return how task scores change."""
    sentences = []
    for name, series in result["series"].items():
        cell = series["cells"].get("history scores")
        if cell is None:
            continue
        changes = [row["decoded"] - row["original"] for row in cell["versions"]]
        answers = statistics.mean(row["changed_answers"] for row in cell["versions"])
        originals = [row["original"] for row in cell["versions"]]
        sentences.append(
            f"**Scores.** {name}, {cell['task']}, {cell['rows']:,} test rows, bound "
            f"{cell['max_error']:g}: accuracy of {len(changes)} versions, {min(originals):.1f} to {max(originals):.1f} "
            f"%, changes by {min(changes):+.2f} to {max(changes):+.2f} points, {statistics.mean(changes):+.2f} on "
            f"average; one answer in {1 / answers:,.0f} changes."
        )
    return "\n\n".join(sentences)


def points(result: Json) -> Iterator[tuple[str, Json, float]]:
    """Yield the name, the record and a bound, for each series and bound."""
    for name, series in result["series"].items():
        for bound in BOUNDS:
            yield name, series, bound


def seconds(measured: list[float]) -> str:
    return f"{statistics.median(measured):.2f}, {max(measured):.2f}"


def kilobytes(size: float) -> str:
    return f"{size / 1e3:,.0f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}"
