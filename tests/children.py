"""Processes that tests start: Python as a user starts it, and forks that are killed at their n-th change on disk.

A fork has everything imported already, so a test can start hundreds. It inherits the type checks and the warning
filters of the tests; a new interpreter does not.
"""

import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eigenlorax.cli import main

TRACEBACK, KILLED = 70, 71
SECONDS = 300
"""Time limit of a process, far above what any of them needs on shared cores."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass(frozen=True)
class Done:
    """Exit status and output of a process.

    code: the exit code; TRACEBACK where a fork raised an exception; minus the signal's number where one killed it.
    """

    code: int
    out: str
    err: str


def python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python script.py …`, `python -m module …` or `python -c code …` in a new interpreter."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )


def command(*arguments: str | Path) -> Done:
    """Run `python -m eigenlorax …` in a new interpreter."""
    process = python("-m", "eigenlorax", *arguments)
    return Done(process.returncode, process.stdout, process.stderr)


def buffered_environment() -> dict[str, str]:
    """Return the environment without PYTHONUNBUFFERED, which hides errors of late flushes."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def load_command() -> None:
    """Import what verbs import when they run, so that forks do not each import it again."""
    for arguments in (["inspect", "no where"], ["fit", "no where", "-o", "no where"], ["add", "no where", "no where"]):
        with pytest.raises(SystemExit):
            main(arguments)


def start(call: Callable[[], object], env: Mapping[str, str] | None = None) -> Callable[[], Done]:
    """Call `call` in a fork of this process, and return a function that waits for its end."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; ours wait for requests or for work, and hold no lock
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _be_child(call, out.fileno(), err.fileno(), env or {})

    def wait() -> Done:
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return Done(os.waitstatus_to_exitcode(status), *texts)

    return wait


def run(call: Callable[[], object], env: Mapping[str, str] | None = None) -> Done:
    """Call `call` in a fork of this process, and wait for its end."""
    return start(call, env)()


def _be_child(call: Callable[[], object], out: int, err: int, env: Mapping[str, str]) -> None:
    code = TRACEBACK
    try:
        signal.alarm(SECONDS)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.update(env)
        # the parent's threads are not in the fork
        torch.set_num_threads(1)
        call()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}


def at_change(n: int, within: Path, happen: Callable[[], object]) -> None:
    """Call `happen` just before the n-th change that this process makes in the folder `within`, counted from 1.

    An audit hook cannot be removed, so call this in a fork.
    """
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if changes_within(within, event, arguments):
            seen += 1
            if seen == n:
                happen()

    sys.addaudithook(hook)


def changes_within(folder: Path, event: str, arguments: tuple) -> bool:
    """Return whether an audit event is a change inside the folder."""
    if event == "open":
        changes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        changes = event in _CHANGES
    return changes and _is_within(arguments[0], folder)


def _is_within(path: object, folder: Path) -> bool:
    # rmtree names files relative to an open folder: only ours is removed in these tests
    return isinstance(path, str | os.PathLike) and (
        not os.path.isabs(path) or os.fspath(path).startswith(str(folder.resolve()))
    )


def kill() -> None:
    """End this process as SIGKILL does: no `finally`, no `except`, no flush."""
    os._exit(KILLED)


def no_more_room() -> None:
    """Limit the files of this process to 200 bytes from now on, as if the disk were full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
