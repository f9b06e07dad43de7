"""The command on a terminal of some width, in this process."""

import io
import os
import re
import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest

from children import Done
from eigenlorax.cli import main


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(call: Callable[[], object], *, columns: int = 80, kind: str = "xterm") -> tuple[str, str]:
    """What a call writes to stdout, without escapes, and to stderr where both are a terminal. One that is "dumb" gets
    no escapes."""
    out, err = _Terminal(), _Terminal()
    with (
        patch.dict(os.environ, {"COLUMNS": str(columns), "TERM": kind}),
        patch.multiple(sys, stdout=out, stderr=err),
    ):
        call()
    return without_escapes(out.getvalue()) if kind != "dumb" else out.getvalue(), err.getvalue()


def run(*arguments: object, columns: int = 80, kind: str = "xterm") -> Done:
    """The command there."""
    left: list[object] = []

    def leave() -> None:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        left.append(leaving.value.code)

    out, err = shown(leave, columns=columns, kind=kind)
    (code,) = left
    return Done(code if isinstance(code, int) else int(code is not None), out, err)


def without_escapes(text: str) -> str:
    """A text without its colours and moves of the cursor."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", text)
