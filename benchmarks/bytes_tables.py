"""The result of `bytes.py` in Markdown: bytes at each error, ours beside the best of all rivals, and which that is."""

from collections.abc import Iterable, Mapping
from typing import Any

from markdown_table import table

Json = dict[str, Any]

UNMEASURED = "Not measured yet: `python benchmarks/bytes.py`."
NAMES = {"vlora": "vlora-dev"}
ENOUGH = 1.02
"""How many times the best rival's bytes a pack may take: its manifest of spectra and the like is small."""


def markdown(result: Json) -> str:
    """Everything: where, the ratios, and the rivals one by one."""
    if not result["cells"]:
        return UNMEASURED
    return "\n\n".join(part for part in (environment(result), ratios(result), ways(result)) if part)


def page(result: Json) -> str:
    """The ratios alone."""
    return ratios(result) if result["cells"] else UNMEASURED


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


def of_rivals(result: Json, collection: str, error: float) -> dict[str, Json]:
    """The points of all rivals that hold the error, by their names."""
    cell = result["cells"].get(f"{collection} | rivals | {error:g}", {"ways": {}})
    found = dict(cell["ways"])
    for package in ("lorashare", "vlora"):
        points = result["cells"].get(f"{collection} | {package}", {}).get("points", {})
        found[NAMES.get(package, package)] = points.get(f"{error:g}")
    return {way: point for way, point in found.items() if point is not None}


def best(result: Json, collection: str, error: float) -> tuple[str, Json] | None:
    """The rival of the fewest bytes."""
    found = of_rivals(result, collection, error)
    return min(found.items(), key=lambda item: item[1]["bytes"], default=None)


def ratio(result: Json, collection: str, error: float) -> float | None:
    """Our bytes beside the best rival's; None where one of the two is not there."""
    ours = result["cells"].get(f"{collection} | ours | {error:g}", {})
    found = best(result, collection, error)
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
    rows = []
    for collection in collections(result):
        row = [collection]
        for error in errors(result):
            value = ratio(result, collection, error)
            ours = result["cells"].get(f"{collection} | ours | {error:g}", {})
            if value is None:
                row.append("–")
                continue
            missed = " ✗" if value > ENOUGH or ours["worst"] > error else ""
            row.append(f"{value:.2f}{missed} ({ours['lora_bytes'] / max(ours['bytes'], 1):.3g}×)")
        rows.append(row)
    if all(cell == "–" for row in rows for cell in row[1:]):
        return UNMEASURED
    header = ("", *(f"{error:g}" for error in errors(result)))
    title = (
        "**Bytes of a pack ÷ those of the best rival**, by the error that no adapter exceeds; in brackets, how many "
        f"times smaller the pack is than the LoRAs in 16 bits. ✗: above {ENOUGH}, or an adapter loses more."
    )
    return f"{title}\n\n{table(header, rows)}"


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
