"""Sixty of the cases of `scripts/crash-test`: verbs that write are killed, and run again."""

import os

import pytest
import typer

from children import needs_fork
from crashes import NOT_KILLED, VERBS, Crashes
from eigenlorax.cli.main import app

CASES, SEED = 60, 19
pytestmark = [pytest.mark.slow, needs_fork, pytest.mark.usefixtures("without_shape_checks")]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_killed_verb_leaves_the_old_or_the_new_and_makes_the_same_when_it_is_run_again(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[report]'")
    crashes = Crashes(tmp_path)
    seen = [crashes.run(crash) for crash in crashes.draw(CASES, SEED)]
    assert set(seen) == {"old", "new", "between"}


def test_every_verb_that_writes_is_among_those_that_are_killed():
    killed = {arguments.split()[0] for arguments in VERBS.values()}
    assert killed.isdisjoint(NOT_KILLED)
    assert killed | NOT_KILLED.keys() == typer.main.get_command(app).commands.keys()
