"""Some of the cases of `scripts/crash-test`: verbs that write are killed, and run again."""

import os
import random
import signal
import threading
from functools import partial

import pytest

import children
import eigenlorax as ex
from children import needs_fork
from crashes import NOT_KILLED, VERBS, Crashes, digest_of
from eigenlorax.cli.main import VERBS as ALL_VERBS
from runs import make_run

CASES, SEED = 78, 19
pytestmark = [pytest.mark.slow, needs_fork, pytest.mark.usefixtures("without_shape_checks")]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_killed_verb_leaves_the_old_or_the_new_and_makes_the_same_when_it_is_run_again(tmp_path):
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")
    crashes = Crashes(tmp_path)
    seen = [crashes.run(crash) for crash in crashes.draw(CASES, SEED)]
    assert set(seen) == {"old", "new", "between"}


def test_versions_of_a_run_that_is_killed_again_and_again(tmp_path):
    checkpoints = make_run(tmp_path / "run", range(1, 16))
    expected = {f"run@{path.name.split('-')[1]}": digest_of(ex.read_adapter(path)) for path in checkpoints}
    folder = ex.Pack.empty().save(tmp_path / "pack")
    drawn, n_kills = random.Random(SEED), 0

    def append_all(delay):
        threading.Timer(delay, partial(os.kill, os.getpid(), signal.SIGKILL)).start()
        pack = ex.Pack.open(folder)
        for name, path in zip(expected, checkpoints, strict=True):
            if name not in pack:
                pack.append(path, lossless=True)
                pack.save()
                os.write(1, f"{name}\n".encode())
        # without waiting for the timer
        os._exit(0)

    saved = set()
    while saved != expected.keys():
        done = children.run(partial(append_all, drawn.uniform(0, 0.1)))
        n_kills += done.code == -signal.SIGKILL
        pack = ex.Pack.open(folder)
        pack.verify()
        saved |= set(done.out.split())
        found = {pack.histories["run"].full_name(record) for record in pack.histories.get("run", ())}
        assert saved <= found
        assert {name: digest_of(pack[name]) for name in found} == {name: expected[name] for name in found}
        saved = found
    assert n_kills > 0


def test_every_verb_that_writes_is_among_those_that_are_killed():
    killed = {arguments.split()[0] for arguments in VERBS.values()}
    assert killed.isdisjoint(NOT_KILLED)
    assert killed | NOT_KILLED.keys() == set(ALL_VERBS)
