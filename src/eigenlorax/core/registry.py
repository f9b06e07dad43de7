"""Subspaces of this process by fingerprint, so that equal subspaces are loaded once.

An opened pack is registered by its folder, and its subspace is read from there when it is needed; a pack in memory is
kept alive. A subspace that has grown is registered under its earlier fingerprints too.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from .subspace import Subspace

_pack_openers: dict[str, Callable[[], Any]] = {}
# weak references: an unused subspace is freed, and read from its pack again when it is needed
_alive: WeakValueDictionary[str, Subspace] = WeakValueDictionary()


def register(fingerprint: str, open_pack: Callable[[], Any]) -> None:
    """Register the function that opens the pack with this fingerprint. It replaces an earlier registration."""
    _pack_openers[fingerprint] = open_pack


def find_pack(fingerprint: str) -> Any:
    """Return the pack whose subspace has, or once had, this fingerprint; None if none is registered."""
    return _pack_openers[fingerprint]() if fingerprint in _pack_openers else None


def find(fingerprint: str) -> Subspace | None:
    """Return the subspace with this fingerprint, in the state that had it; None if it is not registered.

    While the object is in use, each call returns the same object.
    """
    subspace = _alive.get(fingerprint)
    if subspace is None and (pack := find_pack(fingerprint)) is not None:
        # None where the pack on disk was replaced by one with another subspace
        state = pack.subspace.at(fingerprint)
        return intern(state) if state is not None else None
    return subspace


def intern(subspace: Subspace) -> Subspace:
    """Return the registered object that equals this subspace, after registering this one if there is none."""
    return _alive.setdefault(subspace.fingerprint, subspace)


def clear() -> None:
    """Forget all subspaces, as at the start of a process."""
    _pack_openers.clear()
    _alive.clear()
