"""The command, and calls, in processes of their own: what they print and leave with, and what becomes of a folder when
one of them is killed, or refused, at its n-th change on disk."""

import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import interpreters
from eigenlorax.cli import main

TRACEBACK, KILLED = 70, 71

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass(frozen=True)
class Done:
    """How a process ended. `code`: its exit code; TRACEBACK where it raised; minus the signal's number."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> Done:
    """`python -m eigenlorax …` as a user runs it."""
    ran = interpreters.python("-m", "eigenlorax", *arguments)
    return Done(ran.returncode, ran.stdout, ran.stderr)


def buffered_environment() -> dict[str, str]:
    """This process's, but for the variable that hides what happens when buffers are flushed late."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def load_command() -> None:
    """Import here, once, what the command would import in each fork: it does so when a verb runs."""
    for arguments in (["inspect", "no where"], ["fit", "no where", "-o", "no where"], ["add", "no where", "no where"]):
        with pytest.raises(SystemExit):
            main(arguments)


def start(call: Callable[[], object], env: Mapping[str, str] | None = None) -> Callable[[], Done]:
    """`call` in a fork of this process, which has everything imported; what is returned waits for its end."""
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
    """`call` in a fork, to its end."""
    return start(call, env)()


def _be_child(call: Callable[[], object], out: int, err: int, env: Mapping[str, str]) -> None:
    code = TRACEBACK
    try:
        signal.alarm(interpreters.SECONDS)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.update(env)
        # the parent's threads are not in the fork
        torch.set_num_threads(1)
        call()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}


def at_change(n: int, within: Path, happen: Callable[[], object]) -> None:
    """Let `happen` run just before the n-th change that this process makes in the folder `within`, the first being 1.

    There is no way back: for forks only.
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
    """Whether what an audit hook is told of is a change in the folder."""
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
    """End this process here and now, as SIGKILL does: no `finally`, no `except`, no flush."""
    os._exit(KILLED)


def no_more_room() -> None:
    """From here on no file of this process gets longer than a message of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
