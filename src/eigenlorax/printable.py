"""Text from outside as a terminal may show it: characters that control one are written as escapes."""

import re

# C0 and C1 controls and DEL; marks that change the direction of text, or begin a line or paragraph; halves of surrogate
# pairs, which no encoding can write
_CONTROLS = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")


def one_line(text: str) -> str:
    r"""Return `text` on one line: each control character, a line break too, becomes its escape (`\x1b`, `\n`)."""
    return _IN_A_LINE.sub(_escape, text)


def lines(text: str) -> str:
    """Return `text` with its line breaks and tabs; any other control character becomes its escape."""
    return _IN_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
