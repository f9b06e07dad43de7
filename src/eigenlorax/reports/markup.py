"""Pieces of the page as HTML: tables, figures, folds, names. Whatever comes from outside is escaped here."""

import html
import re
from collections.abc import Sequence

from . import numbers
from .render.tables import Cell, Column, Table

_LONG = 16
"""Characters from which on a name may be cut on a narrow screen."""


def text(value: str) -> str:
    """The text as HTML shows it."""
    return html.escape(value)


def prose(value: str) -> str:
    """The text, with what stands between backticks as code."""
    return whole(re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value)))


def whole(content: str) -> str:
    """Sentences that are HTML already, with no line ending within a number such as 1.0e-05."""
    return re.sub(r"\d+\.\d+e-\d+", r'<span class="whole">\g<0></span>', content)


def words(*pairs: tuple[str, str]) -> str:
    """Terms and their meanings, HTML already."""
    return f'<dl class="words">{"".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in pairs)}</dl>'


def columns(found: Table) -> str:
    """What a table's columns mean, where their headings do not say."""
    return words(*((text(column.label), text(column.meaning)) for column in found.columns if column.meaning))


def paragraph(*sentences: str) -> str:
    """Sentences that are HTML already."""
    return f"<p>{whole(' '.join(sentences))}</p>"


def fold(summary: str, *content: str) -> str:
    """What is there for those who open it."""
    return f"<details><summary>{summary}</summary>{''.join(content)}</details>"


def figure(svg: str, caption: str, *, wide: bool = True) -> str:
    """A picture with its caption, if it has one. wide: one that scrolls rather than shrinks on a narrow screen."""
    shape = ' class="wide"' if wide else ""
    return f'<figure{shape}><div class="picture">{svg}</div>{_caption(caption)}</figure>'


def html_figure(content: str, caption: str) -> str:
    """What is no picture but fits any width, with its caption, if it has one."""
    return f"<figure>{content}{_caption(caption)}</figure>"


def pair(*parts: str) -> str:
    """Two things side by side, where there is room."""
    return f'<div class="pair">{"".join(parts)}</div>'


def chips(names: Sequence[str], most: int = 8) -> str:
    """Names in a row, the rest of them folded."""
    if not names:
        return ""
    first, rest = numbers.some(list(names), most)
    if not rest:
        return _row_of(first)
    # on paper it stays folded
    return (
        f'{_row_of(first)}<details class="more"><summary>and {numbers.count(len(rest))} more</summary>'
        f"{_row_of(rest)}</details>"
    )


def table(found: Table, key: str = "", *, tall: bool = False) -> str:
    """The table in a box that scrolls where the screen is small. tall: with rows so many that the box has a height.

    key: the id of a table that the page's script gives a filter and sorting.
    """
    heads = "".join(_head(column) for column in found.columns)
    rows = "\n".join(_row(found.columns, row) for row in found.rows)
    shape = "scroll tall" if tall else "scroll"
    mark = f' id="{key}" class="sorted"' if key else ""
    return (
        f'<div class="{shape}" tabindex="0" role="region" aria-label="{text(found.caption)}">'
        f"<table{mark}><caption>{text(found.caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _caption(caption: str) -> str:
    return f"<figcaption>{caption}</figcaption>" if caption else ""


def _row_of(names: Sequence[str]) -> str:
    return f'<ul class="names">{"".join(f"<li>{text(name)}</li>" for name in names)}</ul>'


def _class(*names: str) -> str:
    return f' class="{" ".join(filter(None, names))}"' if any(names) else ""


def _head(column: Column) -> str:
    meaning = f' title="{text(column.meaning)}"' if column.meaning else ""
    return f'<th scope="col"{_class("" if column.numeric else "t")}{meaning}>{text(column.label)}</th>'


def _row(columns: list[Column], row: list[Cell]) -> str:
    # a long name is cut by the style sheet
    whole = f' title="{text(row[0].text)}"' if len(row[0].text) > _LONG else ""
    cells = [f'<th scope="row"{whole}>{text(row[0].text)}</th>']
    for column, cell in zip(columns[1:], row[1:], strict=True):
        exact = f' title="{text(cell.exact)}"' if cell.exact else ""
        shape = _class("" if column.numeric else "t", "none" if cell.text == numbers.MISSING else "")
        cells.append(f"<td{shape}{exact}>{text(cell.text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"
