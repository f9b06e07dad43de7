"""MkDocs hook: headers of rows in tables, and a name of the search dialog, for screen readers.

Colours and underlines are in docs/stylesheets/accessible.css.
"""

import re
from typing import Any

TABLE = re.compile(r"<table>\s*<thead>\s*<tr>\s*<th[^>]*></th>.*?</table>", re.DOTALL)
"""Table whose first column has no header, because it has the names of the rows."""
FIRST_CELL = re.compile(r"(<tr>\s*)<td([^>]*)>(.*?)</td>", re.DOTALL)
SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'


def on_page_content(rendered: str, **_: Any) -> str:
    return TABLE.sub(lambda table: FIRST_CELL.sub(r'\1<th scope="row"\2>\3</th>', table[0]), rendered)


def on_post_page(output: str, **_: Any) -> str:
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')
