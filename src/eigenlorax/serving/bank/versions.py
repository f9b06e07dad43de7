"""Versions of a pack's histories in a bank: looked up when a request starts, decoded once, in bounded memory."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from ...core.adapter import Adapter, LoRAFactors
from ...core.coefficients import Coefficients
from ...errors import PackBusyError
from ...pack.pack import Pack
from ..watched import WatchedPack
from .bank_adapter import BankAdapter


class BankVersions:
    """The versions that a bank has loaded, up to a number of bytes. It is thread-safe.

    Args:
        source: A pack, whose own histories are served, or its folder or repository, which is followed as it changes.
        store: Function that makes an adapter of the bank from a version.
        limit: Maximum bytes of all versions. The version that was used last stays, however large it is.
    """

    def __init__(
        self, source: Pack | str | os.PathLike[str], store: Callable[[Adapter], BankAdapter], limit: int
    ) -> None:
        self._source, self._store, self._limit = source, store, limit
        self._watched: WatchedPack | None = None
        self._lock, self._loading = threading.RLock(), threading.Lock()
        # by digest, the version that was used last at the end
        self._loaded: OrderedDict[str, BankAdapter] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._current().history_store

    @property
    def adapters(self) -> list[BankAdapter]:
        """The versions that are in memory."""
        with self._lock:
            return list(self._loaded.values())

    def get(self, name: str) -> BankAdapter:
        """Return a version as it is now, such as "run@1000" or "run@latest".

        Raises:
            AdapterNameError: The pack has no such version.
            OptionError, ModuleNameError, ShapeError: The bank cannot serve the version.
            PackError, HubError: The pack cannot be read.
        """
        try:
            return self._get(name)
        except PackBusyError:
            # the pack was replaced between two reads; the second attempt reads the new one
            return self._get(name)

    def clear(self) -> None:
        """Drop all versions from memory. Running requests keep theirs."""
        with self._lock:
            self._loaded.clear()

    def _get(self, name: str) -> BankAdapter:
        history, record = self._current().history_store.find(name)
        digest = history.digest(record)
        adapter = self._find(digest)
        if adapter is None:
            # one at a time: a second request for the same version waits for it
            with self._loading:
                adapter = self._find(digest) or self._load(history.full_name(record), digest)
        return adapter

    def _find(self, digest: str) -> BankAdapter | None:
        with self._lock:
            if digest in self._loaded:
                self._loaded.move_to_end(digest)
            return self._loaded.get(digest)

    def _load(self, name: str, digest: str) -> BankAdapter:
        pack = self._watched.with_adapter(name) if self._watched is not None else self._current()
        if pack.digest(name) != digest:
            raise PackBusyError(f"version {name!r} was replaced while it was read. Request it again.")
        adapter = self._store(pack.adapter(name, torch.float32))
        with self._lock:
            self._loaded[digest] = adapter
            while len(self._loaded) > 1 and sum(each.nbytes for each in self._loaded.values()) > self._limit:
                self._loaded.popitem(last=False)
        return adapter

    def _current(self) -> Pack:
        if isinstance(self._source, Pack):
            return self._source
        with self._lock:
            # created on demand: most banks serve no versions
            if self._watched is None:
                self._watched = WatchedPack(self._source)
        return self._watched.current()


def as_residual(factors: LoRAFactors, components: tuple[int, int]) -> Coefficients:
    """Return the factors of one module as a residual beside coefficients that are zero.

    Args:
        factors: The factors.
        components: Number of components of the module's down and up basis.
    """
    k_down, k_up = components
    rank = factors.spec.rank
    return Coefficients(
        factors.down.new_zeros(rank, k_down),
        factors.up.new_zeros(k_up, rank),
        factors.scaling,
        factors.kernel,
        factors.down,
        factors.up,
    )
