"""Tables in Markdown, and what their captions say of the measured release."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows under a header."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def release(result: Mapping[str, Any]) -> str:
    """The release that was measured, and the day and the commit where the result has them."""
    measured = f" on {result['date']}, commit {result['commit']}" if "commit" in result else ""
    return f"eigenlorax {result['environment']['eigenlorax']}{measured}"
