"""Functions that worker processes call, in a module that they can import."""

import os
import signal
from pathlib import Path

from eigenlorax.errors import OptionError


def square(number):
    return number**2


def process():
    return os.getpid()


def refuse(name):
    raise OptionError(f"{name} is refused.")


def fail():
    raise ZeroDivisionError("not one of ours")


def die_once(marker, value):
    """Return `value`, but kill the first process that is called. marker: a file that the first call creates."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def length_of(shared):
    return len(shared.get())


def fetched(shared):
    """Return the process and the identity of a shared object."""
    return os.getpid(), id(shared.get())
