"""Singular components of modules that are held in memory between the stages of a fit."""

import secrets

import torch

from .module_updates import ModuleUpdates
from .svd_batch import SvdBatch

# What this process holds of the last fit that it works for, by the key of that fit
_held_here: dict[str, "HeldUpdates"] = {}


class HeldUpdates:
    """Singular components of modules, by name, as many as memory allows.

    The clusters of a module select theirs from it. Pickled, it holds nothing: every other process has one of its own,
    and reads and decomposes the factors of its modules itself.

    Args:
        max_bytes: Bytes that a process may hold. 0, the default, holds nothing.
        dtype: Dtype of the singular vectors.
        key: Identifies the fit across processes. Default: a new key.
    """

    def __init__(self, max_bytes: int = 0, dtype: torch.dtype = torch.float64, key: str | None = None) -> None:
        self._max_bytes = self._free_bytes = max_bytes
        self._dtype = dtype
        self._key = key if key is not None else secrets.token_hex(8)
        self._held: dict[str, tuple[dict[int, int], SvdBatch]] = {}

    def __reduce__(self) -> tuple[object, tuple[int, torch.dtype, str]]:
        return _of_this_process, (self._max_bytes, self._dtype, self._key)

    def svd_batch(self, module: ModuleUpdates) -> SvdBatch:
        """Return the singular components of a module's updates, and hold them if there is room."""
        rows, held = self._held.get(module.name, ({}, None))
        wanted = [source.index for source in module.sources]
        if held is not None and all(index in rows for index in wanted):
            # as if they had been decomposed by themselves, since estimates depend on the largest rank
            return held if wanted == list(rows) else held.select([rows[index] for index in wanted]).trimmed()
        updates = SvdBatch.of([source.read() for source in module.sources], self._dtype)
        if held is None and updates.nbytes <= self._free_bytes:
            self._free_bytes -= updates.nbytes
            self._held[module.name] = {index: row for row, index in enumerate(wanted)}, updates
        return updates

    def clear(self) -> None:
        """Free what this process holds."""
        self._held.clear()
        self._free_bytes = self._max_bytes


def _of_this_process(max_bytes: int, dtype: torch.dtype, key: str) -> HeldUpdates:
    """Return what this process holds for a fit, and free what it holds for another."""
    if key not in _held_here:
        _held_here.clear()
        _held_here[key] = HeldUpdates(max_bytes, dtype, key)
    return _held_here[key]
