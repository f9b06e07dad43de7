"""Text from files, made safe to print: without control characters of terminals and Markdown."""

import re
from collections.abc import Sequence

# C0 and C1 controls and DEL; marks that change the direction of text, or begin a line or paragraph; surrogates, which
# cannot be encoded
_CONTROLS = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")


def one_line(text: str) -> str:
    r"""Return `text` on one line: each control character, a line break too, becomes its escape (`\x1b`, `\n`)."""
    return _IN_A_LINE.sub(_escape, text)


def multi_line(text: str) -> str:
    """Return `text` with each control character except line breaks and tabs replaced by its escape."""
    return _IN_LINES.sub(_escape, text)


def first_names(names: Sequence[str], n: int = 5) -> str:
    """Return the first `n` names with commas between them, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n:,} more" if len(names) > n else "")


def markdown_code(text: str) -> str:
    """Return one line of Markdown that shows `text` as code, in a table as well.

    Nothing in it is interpreted as a link, an image, HTML, or the end of a table cell.
    """
    # a bar ends a table cell even within code, so it is written as an entity between two pieces of code
    return "&#124;".join(_code_span(piece) for piece in one_line(text).split("|"))


def _code_span(text: str) -> str:
    if not text.strip(" "):
        return text
    # a fence of more backticks than any run in the text, as CommonMark asks
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # Markdown strips one space from both ends of code, and a backtick at an end would join the fence
    pad = " " if "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]
