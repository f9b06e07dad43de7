"""Subspaces that are known in this process, by fingerprint: where each can be had again, without loading it twice.

An opened pack is known by its folder, and read from there when it is wanted; one that is in memory only is kept. One
that has grown is known by its earlier fingerprints too.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from .subspace import Subspace

_holders: dict[str, Callable[[], Any]] = {}
_alive: WeakValueDictionary[str, Subspace] = WeakValueDictionary()


def remember(fingerprint: str, holder: Callable[[], Any]) -> None:
    """Note how what has the subspace with this fingerprint can be had; the latest word counts."""
    _holders[fingerprint] = holder


def holder(fingerprint: str) -> Any:
    """What has the subspace with this fingerprint, or one that has grown from it: a pack; None if it is not known."""
    return _holders[fingerprint]() if fingerprint in _holders else None


def find(fingerprint: str) -> Subspace | None:
    """The subspace with this fingerprint, the same object as long as anybody has it; None if it is not known.

    Of one that has grown since, what it was then.
    """
    found = _alive.get(fingerprint)
    if found is None and (held := holder(fingerprint)) is not None:
        # None where a pack on disk was replaced by one of another subspace
        found = held.subspace.at(fingerprint)
        return share(found) if found is not None else None
    return found


def share(subspace: Subspace) -> Subspace:
    """The one object that stands for all equal subspaces, which may be another one than was passed."""
    return _alive.setdefault(subspace.fingerprint, subspace)


def forget() -> None:
    """Know nothing, as at the start of a process."""
    _holders.clear()
    _alive.clear()
