"""Singular components of modules that are held in memory between the stages of a fit."""

from .module_updates import ModuleUpdates
from .svd_batch import SvdBatch


class HeldUpdates:
    """Singular components of modules, by name, as many as memory allows.

    The clusters of a module select theirs from it. Pickled, it holds nothing: another process reads and decomposes the
    factors of its module anew.

    Args:
        max_bytes: Bytes that may be held. 0, the default, holds nothing.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._free_bytes = max_bytes
        self._held: dict[str, tuple[dict[int, int], SvdBatch]] = {}

    def __reduce__(self) -> tuple[type["HeldUpdates"], tuple[()]]:
        return HeldUpdates, ()

    def svd_batch(self, module: ModuleUpdates) -> SvdBatch:
        """Return the singular components of a module's updates, and hold them if there is room."""
        rows, held = self._held.get(module.name, ({}, None))
        wanted = [source.index for source in module.sources]
        if held is not None and all(index in rows for index in wanted):
            return held if wanted == list(rows) else held.select([rows[index] for index in wanted])
        updates = SvdBatch.of([source.read() for source in module.sources])
        if held is None and updates.nbytes <= self._free_bytes:
            self._free_bytes -= updates.nbytes
            self._held[module.name] = {index: row for row, index in enumerate(wanted)}, updates
        return updates
