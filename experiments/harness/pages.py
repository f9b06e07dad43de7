"""Markdown: tables, and pages with generated blocks."""

import re
from collections.abc import Callable, Mapping, Sequence

BLOCK = re.compile(r"<!-- experiment:([a-z-]+) -->\n.*?<!-- /experiment -->", re.DOTALL)


def filled(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with every block written anew. Exits if a block's name is unknown."""

    def block(old: re.Match[str]) -> str:
        name = old[1]
        if name not in blocks:
            raise SystemExit(f"there is no block {name!r}. There are: {', '.join(blocks)}.")
        return f"<!-- experiment:{name} -->\n{blocks[name]()}\n<!-- /experiment -->"

    return BLOCK.sub(block, page)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
