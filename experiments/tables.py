"""The tables and plots of docs/results.md, and the README's, out of results/: printed, written, or compared.

python experiments/tables.py --write     # tables between markers, and plots
python experiments/tables.py --check     # exits with 1 where a page has other tables
"""

import argparse
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main() -> int:
    from harness import pages, text_tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    config = tomllib.loads((HERE / "configs" / "text.toml").read_text("utf-8"))
    blocks: dict[str, Callable[[], str]] = text_tables.blocks(config)
    stale = False
    for page in (ROOT / "docs" / "results.md", ROOT / "README.md"):
        found = page.read_text("utf-8")
        fresh = pages.filled(found, blocks)
        if not (asked.write or asked.check):
            print(fresh)
        elif fresh != found:
            stale = True
            print(f"{page.relative_to(ROOT)}: {'written' if asked.write else 'not the tables of the results'}")
            if asked.write:
                page.write_text(fresh, "utf-8")
    if asked.write:
        text_tables.plots(config, ROOT / "docs" / "results")
    if stale and asked.check:
        print("python experiments/tables.py --write mends it.", file=sys.stderr)
    return int(stale and asked.check)


if __name__ == "__main__":
    sys.exit(main())
