"""Text from outside as a terminal and Markdown may show it: without characters that control or structure these."""

import re

# C0 and C1 controls and DEL; marks that change the direction of text, or begin a line or paragraph; halves of surrogate
# pairs, which no encoding can write
_CONTROLS = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")


def one_line(text: str) -> str:
    r"""Return `text` on one line: each control character, a line break too, becomes its escape (`\x1b`, `\n`)."""
    return _IN_A_LINE.sub(_escape, text)


def multi_line(text: str) -> str:
    """Return `text` with its line breaks and tabs; any other control character becomes its escape."""
    return _IN_LINES.sub(_escape, text)


def markdown_code(text: str) -> str:
    """Return Markdown, on one line and fit for a table, that shows `text` as code: nothing in it is a link, an image,
    HTML, or the end of a cell."""
    # a cell of a table ends at a bar within code, too; as an entity beside code it is a bar
    return "&#124;".join(_code_span(part) for part in one_line(text).split("|"))


def _code_span(text: str) -> str:
    if not text.strip(" "):
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # a space on both sides is taken away
    pad = " " if "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
