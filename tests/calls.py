"""Calls that processes of their own make, in a module that they can import."""

import os
import signal
from pathlib import Path

from eigenlorax.errors import OptionError


def square(number):
    return number**2


def process():
    return os.getpid()


def refuse(what):
    raise OptionError(f"{what} is refused.")


def fail():
    raise ZeroDivisionError("not one of ours")


def die_once(marker, value):
    """The value; but the first process that is asked is killed."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def length_of(shared):
    return len(shared.get())


def fetched(shared):
    """Which object it is, and in which process."""
    return os.getpid(), id(shared.get())
