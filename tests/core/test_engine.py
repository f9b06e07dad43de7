"""Engines make calls: here, in processes, on Ray; also where one of those is killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import calls
from eigenlorax.core import engine
from eigenlorax.errors import EngineError, OptionError

pytestmark = pytest.mark.slow

NAMES = ["serial", "processes"]


@pytest.fixture(scope="module", params=NAMES)
def opened(request):
    with engine.open_engine(request.param, 2 if request.param == "processes" else None) as found:
        yield found


def test_results_come_in_the_order_of_the_calls(opened):
    assert list(opened.run(partial(calls.square, number) for number in range(40))) == [n**2 for n in range(40)]


def test_calls_are_taken_as_workers_are_free(opened):
    taken = []

    def listed():
        for number in range(50):
            taken.append(number)
            yield partial(calls.square, number)

    results = opened.run(listed())
    assert next(iter(results)) == 0
    assert len(taken) <= 2 * opened.workers + 1


def test_an_error_of_ours_comes_back_as_it_was(opened):
    with pytest.raises(OptionError, match=r"^seven is refused\.$"):
        list(opened.run([partial(calls.refuse, "seven")]))


def test_other_errors_come_back_too(opened):
    with pytest.raises(ZeroDivisionError, match="not one of ours"):
        list(opened.run([calls.fail]))


def test_what_is_shared_is_sent_to_each_process_once(opened):
    shared = opened.share(list(range(1000)))
    assert list(opened.run(partial(calls.length_of, shared) for _ in range(6))) == [1000] * 6
    seen = list(opened.run(partial(calls.fetched, shared) for _ in range(12)))
    assert len(set(seen)) == len({process for process, _ in seen})


def test_serial_calls_are_made_here():
    with engine.open_engine("serial") as found:
        assert list(found.run([calls.process])) == [os.getpid()]
        assert found.workers == 1


def only_processes(test):
    """Run a test on the engine of processes alone, the one that the other tests use."""
    return pytest.mark.parametrize("opened", ["processes"], indirect=True, scope="module")(test)


@only_processes
def test_processes_are_others(opened):
    assert os.getpid() not in set(opened.run([calls.process] * 8))
    assert opened.workers == 2


@only_processes
def test_a_process_that_is_killed_is_replaced_and_its_calls_made_again(opened, tmp_path):
    made = [
        partial(calls.die_once, str(tmp_path / str(n)), n) if n == 5 else partial(calls.square, n) for n in range(12)
    ]
    assert list(opened.run(made)) == [5 if n == 5 else n**2 for n in range(12)]
    assert list(opened.run([partial(calls.square, 3)])) == [9]


@only_processes
def test_a_process_that_is_killed_while_nobody_waits_is_replaced_too(opened):
    for worker in set(opened.run([calls.process] * 8)):
        os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)
    assert list(opened.run(partial(calls.square, number) for number in range(9))) == [n**2 for n in range(9)]


def test_a_file_that_is_not_there_is_said_as_it_would_be_here(opened, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        list(opened.run([(tmp_path / "gone").read_bytes]))


def test_a_call_that_kills_every_process_ends_with_an_error():
    with (
        engine.open_engine("processes", 2) as found,
        pytest.raises(EngineError, match=r"killed 3 times.*workers=1 \(--workers\)"),
    ):
        list(found.run([calls.die]))


@pytest.mark.parametrize(
    ("name", "workers", "message"),
    [
        ("threads", None, "engine must be one of serial, processes, ray, got 'threads'"),
        ("serial", 2, r"workers=2 requires engine='processes' \(--engine processes\), got engine='serial'"),
        ("ray", 2, "workers=2 requires engine='processes'"),
        ("processes", 0, "workers must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_opened_is_refused(name, workers, message):
    with pytest.raises(OptionError, match=message):
        engine.open_engine(name, workers)


def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from eigenlorax.core import engine\n"
        "with engine.open_engine('processes', 1) as found:\n"
        "    list(found.run([dict]))\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert "the call has to be under `if __name__ == '__main__':`" in ran.stderr
