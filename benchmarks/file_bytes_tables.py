"""The result of `file_bytes.py` in Markdown."""

from typing import Any

from markdown_table import table

Json = dict[str, Any]

KINDS = ("manifest", "card", "configs", "headers", "adapters", "bases", "heads")
BESIDE_TENSORS = ("manifest", "card", "configs", "headers")


def markdown(result: Json) -> str:
    """Bytes by kind of each collection at each error, all files before and after, and the Gaussian bound."""
    rows = []
    for key, cell in result["cells"].items():
        name, error = key.split(" | ")
        after, before = cell["after"], cell.get("before", {})
        tensors = after.get("adapters", 0) + after.get("bases", 0)
        rows.append(
            [
                f"{name} ({cell['adapters']})" if "," not in name else name,
                error,
                *(f"{after.get(kind, 0):,}" for kind in KINDS),
                f"{_beside(before):,} → {_beside(after):,}",
                f"{sum(before.values()):,} → {sum(after.values()):,}",
                f"{tensors / cell['bound']:.2f}",
            ]
        )
    header = (
        "collection (adapters)",
        "error",
        *KINDS,
        "beside tensors, before → after",
        "all files, before → after",
        "(adapters + bases) ÷ bound",
    )
    where = result["environment"]
    source = f"`{result['command']}`, commit {result['commit']}; {where['processor']}, torch {where['torch']}."
    return f"{table(header, rows)}\n\n{source}"


def _beside(sizes: Json) -> int:
    return sum(sizes.get(kind, 0) for kind in BESIDE_TENSORS)
