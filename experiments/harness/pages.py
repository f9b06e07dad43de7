"""Markdown: tables, and pages whose marked blocks are filled. Nothing here knows what is in them."""

import re
from collections.abc import Callable, Mapping, Sequence

BLOCK = re.compile(r"<!-- experiment:([a-z-]+) -->\n.*?<!-- /experiment -->", re.DOTALL)


def filled(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with every block as it is now. An unknown name is an error."""

    def one(found: re.Match[str]) -> str:
        name = found[1]
        if name not in blocks:
            raise SystemExit(f"there is no block {name!r}. There are: {', '.join(blocks)}.")
        return f"<!-- experiment:{name} -->\n{blocks[name]()}\n<!-- /experiment -->"

    return BLOCK.sub(one, page)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
