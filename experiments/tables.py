"""The tables and plots of docs/results.md, and the README's, out of results/: written, or compared.

python experiments/tables.py --write     # tables between markers, and plots
python experiments/tables.py --check     # exits with 1 where a page has other tables
python experiments/tables.py --grid      # the pictures of docs/images.md
"""

import argparse
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (*(ROOT / "docs" / f"{name}.md" for name in ("results", "images", "tuner", "bytes")), ROOT / "README.md")
GRID = ROOT / "docs" / "images-grid.webp"


def main() -> int:
    from harness import (
        cell_tables,
        drawing_tables,
        language_tables,
        pages,
        record,
        records,
        recycled_tables,
        same_bytes_tables,
        text_tables,
        vision_tables,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument(
        "--grid", action="store_true", help="the pictures, from what `diffusion recycled` left in work/"
    )
    asked = parser.parse_args()
    configs = {
        name: tomllib.loads((HERE / "configs" / f"{name}.toml").read_text("utf-8"))
        for name in ("text", "language", "vision", "diffusion", "bytes")
    }
    if asked.grid:
        drawing_tables.grid(configs["diffusion"], GRID)
        return 0
    blocks: dict[str, Callable[[], str]] = {
        **text_tables.blocks(configs["text"]),
        **cell_tables.blocks(configs["text"]),
        **recycled_tables.blocks(configs["text"]),
        **language_tables.blocks(configs["language"]),
        **vision_tables.blocks(configs["vision"]),
        **drawing_tables.blocks(configs["diffusion"]),
        **same_bytes_tables.blocks(configs["bytes"]),
    }
    records.check_bases(sorted(f"{one.parent.name}/{one.name}" for one in record.RESULTS.glob("*/*") if one.is_dir()))
    stale = []
    for page in PAGES:
        found = page.read_text("utf-8")
        fresh = pages.filled(found, blocks)
        if fresh != found:
            stale.append(page.relative_to(ROOT).as_posix())
            if asked.write:
                page.write_text(fresh, "utf-8")
    if asked.write:
        text_tables.plots(configs["text"], ROOT / "docs" / "results")
    if stale:
        print(f"{', '.join(stale)}: {'written' if asked.write else 'not the tables of the results'}")
    if stale and asked.check:
        print("python experiments/tables.py --write mends it.", file=sys.stderr)
    return int(bool(stale) and asked.check)


if __name__ == "__main__":
    sys.exit(main())
