"""Write the tables of the docs from results/, or check that they are up to date.

python experiments/tables.py --write     # tables between markers
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
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("results", "images", "bytes", "merging", "routing")]
GRID = ROOT / "docs" / "images-grid.webp"


def main() -> int:
    from harness import (
        cell_tables,
        drawing_tables,
        head_tables,
        language_tables,
        merging,
        pages,
        population_tables,
        record,
        records,
        recycled_tables,
        routing,
        same_bytes_tables,
        task_tables,
        texts_tables,
        vision_tables,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument(
        "--grid", action="store_true", help="the pictures, from what `diffusion recycled` left in work/"
    )
    options = parser.parse_args()
    configs = {
        name: tomllib.loads((HERE / "configs" / f"{name}.toml").read_text("utf-8"))
        for name in ("text", "language", "vision", "diffusion", "bytes", "tasks", "texts", "merging", "routing")
    }
    if options.grid:
        drawing_tables.grid(configs["diffusion"], GRID)
        return 0
    blocks: dict[str, Callable[[], str]] = {
        **cell_tables.blocks(configs["text"]),
        **recycled_tables.blocks(configs["text"]),
        **language_tables.blocks(configs["language"]),
        **vision_tables.blocks(configs["vision"]),
        **drawing_tables.blocks(configs["diffusion"]),
        **same_bytes_tables.blocks(configs["bytes"]),
        **task_tables.blocks(configs["tasks"]),
        **texts_tables.blocks(configs["texts"]),
        **merging.blocks(configs["merging"]),
        **routing.blocks(configs["routing"]),
        **head_tables.blocks(),
        **population_tables.blocks(),
    }
    records.check_bases(
        sorted(f"{folder.parent.name}/{folder.name}" for folder in record.RESULTS.glob("*/*") if folder.is_dir())
    )
    stale = []
    for page in PAGES:
        old = page.read_text("utf-8")
        fresh = pages.filled(old, blocks)
        if fresh != old:
            stale.append(page.relative_to(ROOT).as_posix())
            if options.write:
                page.write_text(fresh, "utf-8")
    if stale:
        print(f"{', '.join(stale)}: {'written' if options.write else 'not the tables of the results'}")
    if stale and options.check:
        print("python experiments/tables.py --write mends it.", file=sys.stderr)
    return int(bool(stale) and options.check)


if __name__ == "__main__":
    sys.exit(main())
