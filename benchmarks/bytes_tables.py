"""The result of `bytes.py` in Markdown: bytes at each error, ours beside the best of all rivals, and which that is."""

from collections.abc import Iterable, Mapping
from typing import Any

from markdown_table import table

Json = dict[str, Any]

UNMEASURED = "Not measured yet: `python benchmarks/bytes.py`."
NAMES = {"vlora": "vlora-dev"}
ALL, WIDE = "rivals", "16 bits"
"""Rivals whose shared factors are in as many bits as serve them best, and those that have 16 there."""
ENOUGH = 1.02
"""How many times the best rival's bytes a pack may take: its manifest of spectra and the like is small."""


def markdown(result: Json) -> str:
    """Everything: where, the ratios, and the rivals one by one."""
    if not result["cells"]:
        return UNMEASURED
    return "\n\n".join(part for part in (environment(result), ratios(result), ways(result)) if part)


def page(result: Json) -> str:
    """The ratios alone, and those where rivals share in 16 bits."""
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


def errors(result: Json) -> list[float]:
    return sorted({cell["error"] for cell in result["cells"].values() if "error" in cell})


def of_rivals(result: Json, collection: str, error: float, who: str = ALL) -> dict[str, Json]:
    """The points of all rivals that hold the error, by their names."""
    cell = result["cells"].get(f"{collection} | {who} | {error:g}", {"ways": {}})
    found = dict(cell["ways"])
    for package in ("lorashare", "vlora"):
        points = result["cells"].get(f"{collection} | {package}", {}).get("points", {})
        found[NAMES.get(package, package)] = points.get(f"{error:g}")
    return {way: point for way, point in found.items() if point is not None}


def best(result: Json, collection: str, error: float, who: str = ALL) -> tuple[str, Json] | None:
    """The rival of the fewest bytes."""
    found = of_rivals(result, collection, error, who)
    return min(found.items(), key=lambda item: item[1]["bytes"], default=None)


def ratio(result: Json, collection: str, error: float, who: str = ALL) -> float | None:
    """Our bytes beside the best rival's; None where one of the two is not there."""
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
    """Our bytes ÷ those of the best rival, and how many times smaller than the LoRAs in 16 bits we are."""
    title = (
        "**Bytes of a pack ÷ those of the best rival**, by the error that no adapter exceeds; in brackets, how many "
        f"times smaller the pack is than the LoRAs in 16 bits. ✗: above {ENOUGH}, or an adapter loses more."
    )
    return _ratios(result, ALL, title) or UNMEASURED


def ratios_in_16_bits(result: Json) -> str:
    """The same beside rivals that share in 16 bits; nothing where none was measured."""
    title = (
        "**The same where rivals share as papers and packages do, in 16 bits**: joint diagonalisation, one basis, "
        "lorashare, vlora-dev; and each adapter cut and rounded, to any bits, as before."
    )
    return _ratios(result, WIDE, title)


def _ratios(result: Json, who: str, title: str) -> str:
    rows = []
    columns = sorted({cell["error"] for cell in result["cells"].values() if cell["who"] == who})
    for collection in collections(result):
        row = [collection]
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


def ways(result: Json) -> str:
    """The best rival of each cell."""
    rows = []
    for collection in collections(result):
        cells = [best(result, collection, error) for error in errors(result)]
        lora = next(cell["lora_bytes"] for cell in result["cells"].values() if cell["collection"] == collection)
        rows.append([collection, *(_words(cell, lora) for cell in cells)])
    header = ("", *(f"{error:g}" for error in errors(result)))
    title = "**The best rival, and how many times smaller than the LoRAs in 16 bits it is.**"
    return f"{title}\n\n{table(header, rows)}"


def _words(found: tuple[str, Json] | None, lora: int) -> str:
    if found is None:
        return "–"
    way, point = found
    return f"{lora / max(point['bytes'], 1):.3g}× {way}{_settings(point['settings'])}"


def _settings(settings: Mapping[str, Any]) -> str:
    words: Iterable[str] = (
        f"k = {settings['k']}" if "k" in settings else "",
        "/".join(map(str, settings["bits"])) + " bits" if "bits" in settings else "",
    )
    there = [word for word in words if word]
    return f" ({', '.join(there)})" if there else ""
