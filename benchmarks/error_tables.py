"""Errors of real adapters in a result of `run.py`: at equal k, at equal bytes, of their scaling; what is claimed."""

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import table

Json = dict[str, Any]

MISSED = " ✗"
FIGURES = ("mean", "mean_square", "worst")


def found(result: Json, what: str) -> Any:
    """What was found of "collection", "equal k", "equal bytes" or "scaling"; None where that was not measured."""
    return result["cases"].get(f"errors: {what}", {}).get("found")


def tables(result: Json) -> list[str]:
    """The three tables, as far as they were measured."""
    collection, equal_k = found(result, "collection"), found(result, "equal k")
    equal_bytes, scaling = found(result, "equal bytes"), found(result, "scaling")
    return [
        equal_k_table(equal_k, collection) if equal_k and collection else "",
        equal_bytes_table(equal_bytes) if equal_bytes else "",
        scaling_table(scaling) if scaling else "",
    ]


def equal_k_table(rows: Sequence[Json], collection: Json) -> str:
    title = (
        f"**delta_error at equal k**: mean / mean square / worst of {len(collection['adapters'])} adapters "
        f"(`{collection['folder']}`, r = {', '.join(map(str, collection['ranks']))}, {collection['modules']} modules "
        f"of {', '.join(collection['shapes'])}); bytes are shares of the LoRAs' own."
    )
    header = ("k", "ours, delta", "ours, factors", "lorashare", "bytes, ours", "bytes, lorashare")
    cells = [
        [
            str(row["k"]),
            figures_of(row["methods"]["delta"]),
            *(
                figures_of(row["methods"][other], row["delta_no_higher_than"][other])
                for other in ("factors", "lorashare")
            ),
            *(
                f"{row['methods'][method]['stored_bytes'] / collection['lora_bytes']:.3f}"
                for method in ("delta", "lorashare")
            ),
        ]
        for row in rows
    ]
    return f"{title}\n\n{table(header, cells)}"


def equal_bytes_table(rows: Sequence[Json]) -> str:
    title = (
        "**delta_error at equal stored bytes**: mean / mean square / worst; ours with the most components that fit "
        "into vlora-dev's bytes. Rows in italics are above half of the LoRAs' bytes, outside the claim."
    )
    header = ("bytes ÷ LoRAs'", "vlora-dev's k", "our k", "ours, delta", "vlora-dev")
    cells = [
        [
            f"{row['share_of_lora_bytes']:.3f}" if row["within_half"] else f"*{row['share_of_lora_bytes']:.3f}*",
            str(row["k"]),
            str(row["n_components"]),
            figures_of(row["methods"]["delta"]),
            figures_of(row["methods"]["vlora"], row["delta_no_higher_than"]["vlora"]),
        ]
        for row in rows
    ]
    return f"{title}\n\n{table(header, cells)}"


def figures_of(figures: Json, ours_no_higher: Mapping[str, bool] | None = None) -> str:
    """The three figures of a method, each marked where ours is higher."""
    marks = {name: "" if ours_no_higher is None or ours_no_higher[name] else MISSED for name in FIGURES}
    return " / ".join(f"{figures[name]:.4f}{marks[name]}" for name in FIGURES)


def scaling_table(scaling: Json) -> str:
    title = (
        f"**Scaling of an adapter written as a PEFT LoRA again**: `{scaling['adapter']}`, whose own is "
        f"{scaling['source_scaling']:g}, at a k that loses little else."
    )
    header = ("", "k", "scaling written", "delta_error as written", "delta_error with the source's scaling")
    labels = {"delta": "ours, delta", "lorashare": "lorashare", "vlora": "vlora-dev"}
    cells = [
        [
            labels[name],
            str(row["k"]),
            f"{row['exported_scaling']:g}" + ("" if row["kept"] else MISSED),
            f"{row['error_as_exported']:.4f}",
            f"{row['error_with_source_scaling']:.4f}",
        ]
        for name, row in sorted(scaling["methods"].items())
    ]
    return f"{title}\n\n{table(header, cells)}"


def claims(result: Json) -> list[list[str]]:
    """What the project says of its errors, and where the figures do not bear it out."""
    cases: dict[str, dict[str, bool]] = {}
    for row in found(result, "equal k") or ():
        for other in ("factors", "lorashare"):
            for figure in FIGURES:
                words = f"equal k: {figure.replace('_', ' ')} of delta no higher than {other}"
                cases.setdefault(words, {})[f"k = {row['k']}"] = row["delta_no_higher_than"][other][figure]
    for row in found(result, "equal bytes") or ():
        for figure in FIGURES if row["within_half"] else ():
            words = (
                f"equal bytes, up to half of the LoRAs': {figure.replace('_', ' ')} of delta no higher than vlora-dev"
            )
            cases.setdefault(words, {})[f"k = {row['k']}"] = row["delta_no_higher_than"]["vlora"][figure]
    rows = []
    for words, holds in sorted(cases.items()):
        failing = [case for case, one in holds.items() if not one]
        rows.append([words, "**fails**" if failing else "holds", ", ".join(failing) or f"{len(holds)} of {len(holds)}"])
    return rows
