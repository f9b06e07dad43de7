"""The result of `bytes.py` in Markdown: bytes at each error, ours and those of the best baseline."""

from collections.abc import Iterable, Mapping
from typing import Any

from markdown_table import table

Json = dict[str, Any]

UNMEASURED = "Not measured yet: `python benchmarks/bytes.py`."
NAMES = {"vlora": "vlora-dev"}
ALL, WIDE = "baselines", "16 bits"
"""Baselines whose shared factors have as many bits as give the fewest bytes, and those that have 16 there."""
LABELS = {"strangers": "trained separately"}
"""Kinds of collections as they are shown, where the name in the result is another."""
ENOUGH = 1.02
"""How many times the best baseline's bytes a pack may take: its manifest of spectra and the like is small."""


def markdown(result: Json) -> str:
    """Environment, ratios, and the best baseline of each cell."""
    if not result["cells"]:
        return UNMEASURED
    return "\n\n".join(part for part in (environment(result), ratios(result), best_baselines(result)) if part)


def page(result: Json) -> str:
    """The ratios alone, and those beside baselines that share bases in 16 bits."""
    if not result["cells"]:
        return UNMEASURED
    return "\n\n".join(part for part in (ratios(result), ratios_in_16_bits(result)) if part)


def environment(result: Json) -> str:
    """Where, when and with what."""
    last = result["runs"][-1]
    where = last["environment"]
    days = sorted({run["date"] for run in result["runs"]})
    packages = ", ".join(f"{name} {version}" for name, version in sorted(last["versions"].items()))
    notes = "".join(f" {name}: {note}." for name, note in sorted(result["notes"].items()))
    return (
        f"`python benchmarks/bytes.py` on {' and '.join(days)}, commit {last['commit']}: {where['processor']}; "
        f"{packages}.{notes}"
    )


def collections(result: Json) -> list[str]:
    """In the order they were measured in: as sorted, but with numbers as numbers."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(", ")]

    return sorted({cell["collection"] for cell in result["cells"].values()}, key=key)


def label(collection: str) -> str:
    """Name of a collection in a table."""
    kind, comma, others = collection.partition(", ")
    return f"{LABELS.get(kind, kind)}{comma}{others}"


def errors(result: Json) -> list[float]:
    return sorted({cell["error"] for cell in result["cells"].values() if "error" in cell})


def baseline_points(result: Json, collection: str, error: float, who: str = ALL) -> dict[str, Json]:
    """The points of all baselines within the error, by method."""
    cell = result["cells"].get(f"{collection} | {who} | {error:g}", {"methods": {}})
    found = dict(cell["methods"])
    for package in ("lorashare", "vlora"):
        points = result["cells"].get(f"{collection} | {package}", {}).get("points", {})
        found[NAMES.get(package, package)] = points.get(f"{error:g}")
    return {method: point for method, point in found.items() if point is not None}


def best(result: Json, collection: str, error: float, who: str = ALL) -> tuple[str, Json] | None:
    """The baseline of the fewest bytes."""
    found = baseline_points(result, collection, error, who)
    return min(found.items(), key=lambda item: item[1]["bytes"], default=None)


def ratio(result: Json, collection: str, error: float, who: str = ALL) -> float | None:
    """Our bytes ÷ the best baseline's; None where one of the two is not there."""
    ours = result["cells"].get(f"{collection} | ours | {error:g}", {})
    found = best(result, collection, error, who)
    if found is None or "bytes" not in ours:
        return None
    return float(ours["bytes"] / found[1]["bytes"]) if found[1]["bytes"] else 1.0


def beyond(result: Json) -> list[tuple[str, float, float]]:
    """Where ours takes more than it may, or an adapter loses more: collection, error, ratio."""
    found = []
    for collection in collections(result):
        for error in errors(result):
            value = ratio(result, collection, error)
            ours = result["cells"].get(f"{collection} | ours | {error:g}", {})
            if value is not None and (value > ENOUGH or ours["worst"] > error):
                found.append((collection, error, value))
    return found


def ratios(result: Json) -> str:
    """Our bytes ÷ those of the best baseline, and the ratio to the LoRAs in 16 bits."""
    title = (
        "**Bytes of a pack ÷ those of the best baseline**, by the error bound of all adapters; in brackets, how many "
        f"times smaller the pack is than the LoRAs in 16 bits. ✗: above {ENOUGH}, or an adapter exceeds its bound."
    )
    return _ratios(result, ALL, title) or UNMEASURED


def ratios_in_16_bits(result: Json) -> str:
    """The same beside baselines that share bases in 16 bits; empty where none was measured."""
    title = (
        "**The same with shared bases in 16 bits, as in papers and packages**: joint diagonalisation, one basis, "
        "lorashare, vlora-dev; and each adapter truncated and rounded to any bits, as before."
    )
    return _ratios(result, WIDE, title)


def _ratios(result: Json, who: str, title: str) -> str:
    rows = []
    columns = sorted({cell["error"] for cell in result["cells"].values() if cell["who"] == who})
    for collection in collections(result):
        row = [label(collection)]
        for error in columns:
            value = ratio(result, collection, error, who)
            ours = result["cells"].get(f"{collection} | ours | {error:g}", {})
            if value is None or f"{collection} | {who} | {error:g}" not in result["cells"]:
                row.append("–")
                continue
            missed = " ✗" if value > ENOUGH or ours["worst"] > error else ""
            row.append(f"{value:.2f}{missed} ({ours['lora_bytes'] / max(ours['bytes'], 1):.3g}×)")
        if any(cell != "–" for cell in row[1:]):
            rows.append(row)
    return f"{title}\n\n{table(('', *(f'{error:g}' for error in columns)), rows)}" if rows else ""


def best_baselines(result: Json) -> str:
    """The best baseline of each cell."""
    rows = []
    for collection in collections(result):
        cells = [best(result, collection, error) for error in errors(result)]
        lora = next(cell["lora_bytes"] for cell in result["cells"].values() if cell["collection"] == collection)
        rows.append([label(collection), *(_words(cell, lora) for cell in cells)])
    header = ("", *(f"{error:g}" for error in errors(result)))
    title = "**The best baseline, and how many times smaller than the LoRAs in 16 bits it is.**"
    return f"{title}\n\n{table(header, rows)}"


def _words(found: tuple[str, Json] | None, lora: int) -> str:
    if found is None:
        return "–"
    method, point = found
    return f"{lora / max(point['bytes'], 1):.3g}× {method}{_settings(point['settings'])}"


def _settings(settings: Mapping[str, Any]) -> str:
    words: Iterable[str] = (
        f"k = {settings['k']}" if "k" in settings else "",
        "/".join(map(str, settings["bits"])) + " bits" if "bits" in settings else "",
    )
    there = [word for word in words if word]
    return f" ({', '.join(there)})" if there else ""
