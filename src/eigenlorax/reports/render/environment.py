"""Jinja2 environments of the templates. Printed values are escaped, unless they are markup."""

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .. import numbers

if TYPE_CHECKING:
    from jinja2 import Environment

_NUMBER_FILTERS: dict[str, Callable[..., str]] = {
    "error": numbers.error,
    "share": numbers.share,
    "cosine": numbers.cosine,
    "count": numbers.count,
    "ratio": numbers.ratio,
    "size": numbers.size,
    "plural": numbers.plural,
}


@cache
def markdown_environment() -> "Environment":
    """Return the environment of `report.md`, which escapes printed values as Markdown."""
    environment = _environment(finalize=_markdown_value)
    environment.filters |= {"prose": markdown_prose, **_NUMBER_FILTERS}
    environment.globals |= {"split_names": numbers.split_names}
    return environment


@cache
def html_environment() -> "Environment":
    """Return the environment of `page.html`, which escapes printed values as HTML."""
    environment = _environment()
    environment.filters |= {**_NUMBER_FILTERS, "prose": html_prose, "text": unbroken_numbers}
    environment.filters["error"] = lambda value: unbroken_numbers(numbers.error(value))
    environment.globals |= {"split_names": numbers.split_names, "MISSING": numbers.MISSING}
    return environment


def _environment(finalize: Callable[[Any], Any] | None = None) -> "Environment":
    # imported here, because only writing a report needs it
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("eigenlorax.reports.render"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


class MarkdownText(str):
    """Text in Markdown, which Jinja2 prints unchanged."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


def _markdown_value(value: object) -> object:
    return value if hasattr(value, "__html__") else MarkdownText(escape_markdown(str(value)))


def escape_markdown(text: str) -> str:
    """Escape text for Markdown. The result is one line and can be used in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # underscores within a word have no meaning
    text = " ".join(re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text).split())
    # at the start of a line, these begin a list or draw a rule
    return re.sub(r"^(\d{0,9})([.)](?= |$)|[-+](?=[- ]|$))", r"\1\\\2", text)


def markdown_prose(text: str) -> MarkdownText:
    """Convert a sentence of the report to Markdown. Text between backticks is code, other text is escaped."""
    pieces = re.split(r"`([^`]+)`", text)
    return MarkdownText(
        "".join(f"`{piece}`" if index % 2 else _escape_between_code(piece) for index, piece in enumerate(pieces))
    )


def _escape_between_code(text: str) -> str:
    # escaping strips blanks, but those beside a code span separate words
    before, after = (" " if text[:1].isspace() else ""), (" " if text[-1:].isspace() else "")
    return f"{before}{escape_markdown(text)}{after}" if text.strip() else text


def html_prose(text: str) -> Markup:
    """Convert a sentence of the report to HTML. Text between backticks is code, other text is escaped."""
    pieces = re.split(r"`([^`]+)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else unbroken_numbers(piece)
        for index, piece in enumerate(pieces)
    )


def unbroken_numbers(text: str) -> Markup:
    """Convert text to HTML without line breaks within numbers such as 1.0e-05."""
    pieces = re.split(r"(\d+\.\d+e-\d+)", text)
    return Markup("").join(
        Markup('<span class="whole">{}</span>').format(piece) if index % 2 else piece
        for index, piece in enumerate(pieces)
    )
