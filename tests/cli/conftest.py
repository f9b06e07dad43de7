"""What the tests of the command line share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from children import Done
from eigenlorax.cli import main


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # what is tested are killed processes, not power cuts
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def _trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of training share; imported here, since it wants transformers."""
    import trainable

    return trainable.make_all(tmp_path_factory.mktemp("trainable"))


@pytest.fixture
def cli(cli_with_reports: Callable[..., Done]) -> Callable[..., Done]:
    """The same, but that `fit` leaves no report, which takes longer than all else and has tests of its own."""

    def run(*arguments: str | int | float | Path) -> Done:
        return cli_with_reports(*arguments, *(["--no-report"] if arguments[:1] == ("fit",) else []))

    return run


@pytest.fixture
def cli_with_reports(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process, where a process of its own is not the point. A traceback is raised as it is."""

    def run(*arguments: str | int | float | Path) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        return Done(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    make_adapters(place / "in", "alpha beta gamma")
    make_adapter(place / "new", seed=9, rank=2)
    ex.fit(place / "in", n_components=4).save(place / "pack")
    return place


@pytest.fixture
def pack(_made: Path, tmp_path: Path) -> Path:
    """A pack, k = 4, of three adapters of rank 3 beside it, `in/alpha`, `in/beta`, `in/gamma`; and `new`, of rank 2."""
    shutil.copytree(_made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "pack"
