"""Hostile inputs of every kind: what is read is a result or an error of ours, within time and memory.

The cases run in processes that have nothing of the tests' checks of types, which would raise errors of their own.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from children import python
from eigenlorax.errors import FormatError
from fuzz import harness
from fuzz.targets import TARGETS, Target, WrongError

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz"
CASES = Path(__file__).parent / "fuzz" / "cases.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux does"),
]


def test_none_fails_of_two_thousand_new_cases_and_of_those_that_have_failed_once():
    ran = python(SCRIPT, "--replay", CASES, "--cases", 2000, "--seed", 20260730)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert all(f"{name} " in ran.stdout for name in TARGETS)
    assert ran.stdout.count(" 0 failed") == len(TARGETS)
    # of most kinds, some cases are refused, and some are read to their end
    assert min(ran.stdout.count(" done"), ran.stdout.count("Error")) > len(TARGETS) // 2


def test_what_cases_are_made_of_is_read_to_its_end(without_shape_checks):
    # two names stand for the same inputs as "pack"
    targets = [target for name, target in TARGETS.items() if name not in ("manifest", "pack-special")]
    outcomes = harness.run(harness.unchanged(targets))
    assert {kind for _, kind in outcomes.counts} == {"done"}


def test_a_case_says_what_it_is_about():
    lines = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    assert all(line["about"] and line["changes"] for line in lines)


HOSTILE = {
    "killed by SIGSEGV": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    "waited for 2 s": lambda folder: time.sleep(1000),
    "took more than 0.2 s": lambda folder: sum(iter(int, 1)),
    "KeyError at": lambda folder: {}[folder],
    "more memory than it may take": lambda folder: 0 * len(b"x" * (400 << 20)),
    "not what it was": lambda folder: _raise(WrongError("not what it was: 3")),
}


def _raise(error):
    raise error


@pytest.mark.parametrize("cause", HOSTILE)
def test_what_is_neither_done_nor_refused_is_a_failure(monkeypatch, cause):
    if cause.startswith("waited"):
        monkeypatch.setattr(harness, "WAIT_SECONDS", 2)
    if cause.startswith("took"):
        monkeypatch.setattr(harness, "PATIENCE", 0.1)
    attempts = iter([lambda folder: 0, HOSTILE[cause], lambda folder: _raise(FormatError("no")), HOSTILE[cause]])
    targets = [Target("some", lambda: {"start": {"file": b""}}, lambda random, tree: [], one) for one in attempts]
    outcomes = harness.run([partial(harness.drawn, target, 7, number) for number, target in enumerate(targets)])
    assert outcomes.counts == {("some", "done"): 1, ("some", "failed"): 2, ("some", "FormatError"): 1}
    assert f"2 × some: {cause}" in str(outcomes)
    # what makes it again
    assert {failure.case for failure in outcomes.failures} == {f"--target some --seed 7 --case {n}" for n in (1, 3)}
