"""Subspaces that this process knows, by fingerprint, so that equal ones are loaded and kept once.

An opened pack is registered by its folder, and read from there again when its subspace is wanted; a pack in memory is
kept. A subspace that has grown is registered under its earlier fingerprints too.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from .subspace import Subspace

_holders: dict[str, Callable[[], Any]] = {}
# weak: a subspace is freed when nobody uses it, and read again from its pack when it is wanted
_alive: WeakValueDictionary[str, Subspace] = WeakValueDictionary()


def register(fingerprint: str, open_holder: Callable[[], Any]) -> None:
    """Register how to get the pack that has this fingerprint. A later registration replaces an earlier one."""
    _holders[fingerprint] = open_holder


def find_holder(fingerprint: str) -> Any:
    """Return the pack whose subspace has, or once had, this fingerprint; None if none is registered."""
    return _holders[fingerprint]() if fingerprint in _holders else None


def find(fingerprint: str) -> Subspace | None:
    """Return the subspace with this fingerprint, in the state that had it; None if it is not registered.

    As long as anybody holds the object, each call returns the same one.
    """
    subspace = _alive.get(fingerprint)
    if subspace is None and (pack := find_holder(fingerprint)) is not None:
        # None where the pack on disk was replaced by one with another subspace
        state = pack.subspace.at(fingerprint)
        return intern(state) if state is not None else None
    return subspace


def intern(subspace: Subspace) -> Subspace:
    """Return the one object that stands for all subspaces equal to this one."""
    return _alive.setdefault(subspace.fingerprint, subspace)


def clear() -> None:
    """Forget all subspaces, as at the start of a process."""
    _holders.clear()
    _alive.clear()
