"""From an adapter's name to a folder that vLLM loads, in either way of serving. Nothing here imports vLLM.

Without a shared basis it is the adapter as `Pack.export` writes it, in the export's own dtype: vLLM rounds it to the
model's, once. With one it is a LoRA of the cores. The folder's name says all that decides its content, so that what is
kept by name and path is never of other weights.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from ...core import atomic_files, keys
from ...core.adapter import Adapter, from_factors
from ...errors import AdapterNameError, PackBusyError, ServingError
from ...formats import lora_config, peft
from ...pack.manifest import SubspaceInfo
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from . import cache, threads
from .cores import on_cores
from .servable import BASE_WEIGHTS, expanded_rank, refusal, shared_rank
from .settings import Settings
from .watched import WatchedPack

_FORMAT = 1
"""Raised by whoever changes what is written for the same pack."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """Where an adapter is written. digest: of all that decides its content."""

    path: Path
    digest: str


class AdapterFolders:
    """The folders of a pack's adapters, each written when it is first asked for, one at a time in a thread of its own.

    `OptionError`, `PackError` or `HubError` at once if the pack or the cache cannot be used.
    """

    def __init__(self, settings: Settings, max_lora_rank: int | None = None) -> None:
        self.shared = settings.shared_basis
        self._max_lora_rank = max_lora_rank
        self._watched = WatchedPack(settings.pack)
        self.base_model = self._watched.now().base_model
        # what models that are loaded now hold, whatever becomes of the pack
        self.served: SubspaceInfo = self._watched.now().info
        self._root, self._limit = settings.cache or cache.place(), settings.cache_bytes
        cache.prepare(self._root)
        self._cache: cache.Cache | None = None
        self._refused: dict[str, ServingError] = {}
        self._thread = threads.single("eigenlorax")

    @property
    def pack(self) -> Pack:
        """The pack as it is now."""
        return self._watched.now()

    def asked(self, name: str) -> "Future[AdapterFolder]":
        """The folder of an adapter, to be waited for. It is there as long as this process.

        `AdapterNameError` if there is none of that name, `ServingError` if it cannot be served, `CacheFullError`, or
        what is wrong with the pack.
        """
        return self._thread.submit(self._find, name)

    def _find(self, name: str) -> AdapterFolder:
        # names are what clients send
        if not keys.is_valid_name(name):
            raise AdapterNameError(f"{name[:100]!r} is not the name of an adapter.")
        try:
            return self._folder(name)
        except PackBusyError:
            # replaced between two reads: now it is another one
            return self._folder(name)

    def _folder(self, name: str) -> AdapterFolder:
        pack = self._watched.now()
        keys.check_known(name, pack.names, f"the pack {self._watched.source}")
        digest = self._digest(pack, name)
        if digest in self._refused:
            raise self._refused[digest]
        at_least = 0 if self.shared else pack.records[name].lora_numbers * 4
        if self._cache is None:
            # by the process that is asked: others only look whether it could be
            self._cache = cache.Cache(self._root, self._limit)
        path = self._cache.folder(f"{name}-{digest[:32]}", at_least, lambda: self._files(name, digest))
        return AdapterFolder(path, digest)

    def _digest(self, pack: Pack, name: str) -> str:
        way = f"cores of {self.served.fingerprint}" if self.shared else "expanded"
        return atomic_files.digest(f"{_FORMAT}, {name}, {pack.digest(name)}, {way}".encode())

    def _files(self, name: str, digest: str) -> atomic_files.Files:
        pack = self._watched.having(name)
        if self._digest(pack, name) != digest:
            raise PackBusyError(f"the pack {self._watched.source} was replaced while it was read.")
        found = pack.packed(name)
        why = refusal(found, shared=self.shared) or self._changed(found, pack.info) or self._too_large(found)
        if why is not None:
            self._refused[digest] = ServingError(why)
            raise self._refused[digest]
        made = on_cores(found, self.served) if self.shared else _at_places(pack.adapter(name), found.places)
        return peft.to_files(_without_base_weights(made))

    def _too_large(self, found: PackedAdapter) -> str | None:
        """Why an adapter has no room in a slot, where that is known here."""
        needed = (shared_rank if self.shared else expanded_rank)(found)
        if self._max_lora_rank is None or needed <= self._max_lora_rank:
            return None
        limit = f"max_lora_rank is {self._max_lora_rank}"
        return f"adapter {found.name!r} cannot be served: its rank is {needed}, and {limit}."

    def _changed(self, found: PackedAdapter, now: SubspaceInfo) -> str | None:
        """Why an adapter does not go with what was loaded, or compared with the model, when the server started."""
        if self.shared:
            fits, what = found.subspace in self.served.lineage, "its coefficients are in another subspace"
        else:
            fits, what = _sizes(found, now) == _sizes(found, self.served), "it has modules or sizes of another model"
        if fits:
            return None
        return (
            f"adapter {found.name!r} cannot be served: {what} than the pack had when the server started. Restart the "
            "server."
        )


def _sizes(found: PackedAdapter, info: SubspaceInfo) -> list[tuple[int, int] | None]:
    """(out, in) of each module of an adapter, as a subspace has it."""
    sides = [info.modules.get(place) for place in found.places.values()]
    return [(pair["up"].dimension, pair["down"].dimension) if pair is not None else None for pair in sides]


def _at_places(adapter: Adapter, places: Mapping[str, str]) -> Adapter:
    """The adapter with the subspace's names of its modules, where it lacks their first part: such names lead nowhere in
    vLLM, which does not say so."""
    if all(module == place for module, place in places.items()):
        return adapter
    modules = {places[module]: adapter.modules[module] for module in adapter.modules}
    renamed = from_factors(adapter.name, modules, base_model=adapter.base_model, heads=adapter.heads)
    return replace(renamed, source_config=lora_config.derived(renamed, adapter.config))


def _without_base_weights(adapter: Adapter) -> Adapter:
    """Without what vLLM would read and not use: whole embeddings of the base model."""
    return replace(adapter, heads={key: adapter.heads[key] for key in adapter.heads if not key.endswith(BASE_WEIGHTS)})
