"""The command on a terminal of some width, in this process."""

import io
import os
import re
import sys
from unittest.mock import patch

import pytest

from children import Done
from eigenlorax.cli import main


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*arguments: object, columns: int = 80, kind: str = "xterm") -> Done:
    """The command where stdout and stderr are a terminal. kind: one that is "dumb" gets no escapes for colours."""
    out, err = _Terminal(), _Terminal()
    with (
        patch.dict(os.environ, {"COLUMNS": str(columns), "TERM": kind}),
        patch.multiple(sys, stdout=out, stderr=err),
        pytest.raises(SystemExit) as left,
    ):
        main([str(argument) for argument in arguments])
    code = left.value.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def without_colours(text: str) -> str:
    """What a terminal shows of a text."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)
