"""The tables of `results/peers.json` in Markdown: printed, written between markers, or compared with what stands there.

Only the standard library: no package that is measured needs to be installed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "peers.json"
OWN_README = ROOT / "benchmarks" / "README.md"
PAGES = (OWN_README, ROOT / "README.md")
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
MISSED = " ✗"
FIGURES = ("mean", "mean_square", "worst")

Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="replace the text between the markers")
    action.add_argument("--check", action="store_true", help="exit with 1 if the text between the markers differs")
    arguments = parser.parse_args()
    block = markdown(json.loads(RESULT.read_text(encoding="utf-8")))
    if not (arguments.write or arguments.check):
        print(block)
        return 0
    stale = [page for page in pages_with_markers() if replaced(page, block) != page.read_text(encoding="utf-8")]
    for page in stale:
        if arguments.write:
            page.write_text(replaced(page, block), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'written' if arguments.write else f'not the table of {RESULT.name}'}")
    if stale and arguments.check:
        print("python benchmarks/table.py --write mends it.", file=sys.stderr)
        return 1
    return 0


def pages_with_markers() -> list[Path]:
    """benchmarks/README.md, whose markers must be there, and README.md if it has them."""
    found = [page for page in PAGES if page.exists() and BEGIN in page.read_text(encoding="utf-8")]
    if OWN_README not in found:
        raise SystemExit(f"{OWN_README} has no {BEGIN}: there is nowhere to write the tables.")
    return found


def replaced(page: Path, block: str) -> str:
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} has {BEGIN} but no {END} after it.")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def markdown(result: Json) -> str:
    results = result["results"]
    sections = [
        environment(result),
        speed_table(results["speed"]),
        parts_table(results["speed"]),
        equal_k_table(results["equal_k"], results["collection"]),
        equal_bytes_table(results["equal_bytes"]),
        scaling_table(results["scaling"]),
        claims_table(results["claims"]),
    ]
    return "\n\n".join(sections)


def environment(result: Json) -> str:
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"`{result['command']}` on {result['date']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{result['threads']} thread; {packages}."
    )


def speed_table(rows: Sequence[Json]) -> str:
    methods = ("lorashare", "vlora-dev", "ours, factors", "ours, delta")
    header = ("adapters", *methods, "lorashare ÷ factors", "lorashare ÷ delta", "delta ÷ factors")
    cells = [
        [
            row["shape"],
            *(span(row, method) for method in ("lorashare", "vlora", "factors", "delta")),
            *(
                f"{row['ratios']['whole'][ratio]:.1f}"
                for ratio in ("lorashare_to_factors", "lorashare_to_delta", "delta_to_factors")
            ),
        ]
        for row in rows
    ]
    k = rows[0]["n_components"]
    title = (
        f"**Seconds from PEFT folders to bases and coefficients in memory**: median (least–most) of "
        f"{rows[0]['repetitions']} interleaved runs; k = {k['delta']}, vlora-dev {k['vlora']}."
    )
    return f"{title}\n\n{table(header, cells)}"


def span(row: Json, method: str) -> str:
    seconds = row["all_seconds"][method]
    return f"{row['median_seconds'][method]['total']:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def parts_table(rows: Sequence[Json]) -> str:
    header = ("adapters", "part", "lorashare", "vlora-dev", "ours, factors", "ours, delta")
    names = {"read": "reading", "fit": "finding the bases", "rest": "projecting, all else"}
    cells = [
        [
            row["shape"],
            name,
            *(f"{row['median_seconds'][m][part]:.3f}" for m in ("lorashare", "vlora", "factors", "delta")),
        ]
        for row in rows
        for part, name in names.items()
    ]
    return f"**Where those seconds go**\n\n{table(header, cells)}"


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
            errors(row["methods"]["delta"]),
            *(errors(row["methods"][other], row["delta_no_higher_than"][other]) for other in ("factors", "lorashare")),
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
            errors(row["methods"]["delta"]),
            errors(row["methods"]["vlora"], row["delta_no_higher_than"]["vlora"]),
        ]
        for row in rows
    ]
    return f"{title}\n\n{table(header, cells)}"


def errors(figures: Json, ours_no_higher: Mapping[str, bool] | None = None) -> str:
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


def claims_table(claims: Mapping[str, Json]) -> str:
    cells = [
        [claim, "holds" if not found["fails_at"] else f"**fails** at {', '.join(found['fails_at'])}"]
        for claim, found in sorted(claims.items())
        if found["cases"]
    ]
    return f"**Claims**\n\n{table(('claim', 'in this run'), cells)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
