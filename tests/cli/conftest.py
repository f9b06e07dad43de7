"""What the tests of the command line share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from children import Done
from eigenlorax.cli import main


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # what is tested are killed processes, not power cuts
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process, where a process of its own is not the point. A traceback is raised as it is."""

    def run(*arguments: str | int | float | Path) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        return Done(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run
