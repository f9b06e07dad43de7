"""Subspaces that are known in this process, by fingerprint: where each can be had again, without loading it twice.

An opened pack is known by its folder, and read from there when it is wanted; a subspace that is in memory only is kept.
"""

from collections.abc import Callable
from weakref import WeakValueDictionary

from .subspace import Subspace

_sources: dict[str, Callable[[], Subspace]] = {}
_alive: WeakValueDictionary[str, Subspace] = WeakValueDictionary()


def remember(fingerprint: str, source: Callable[[], Subspace]) -> None:
    """Note how the subspace with this fingerprint can be had; the latest word counts."""
    _sources[fingerprint] = source


def find(fingerprint: str) -> Subspace | None:
    """The subspace with this fingerprint, the same object as long as anybody has it; None if it is not known."""
    found = _alive.get(fingerprint)
    if found is None and fingerprint in _sources:
        found = share(_sources[fingerprint]())
    # a pack on disk may have been replaced since
    return found if found is not None and found.fingerprint == fingerprint else None


def share(subspace: Subspace) -> Subspace:
    """The one object that stands for all equal subspaces, which may be another one than was passed."""
    return _alive.setdefault(subspace.fingerprint, subspace)
