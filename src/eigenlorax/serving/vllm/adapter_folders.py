"""Folders from which vLLM loads the adapters and versions of a pack. Nothing here imports vLLM.

Without a shared basis a folder contains the adapter as `Pack.export` writes it, in the export's own dtype, so that vLLM
rounds it only once. With a shared basis it contains a LoRA of the cores. The folder's name includes a digest of
everything that determines its content, because vLLM caches adapters by name and path.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...core import atomic_files, keys
from ...core.adapter import Adapter, LoRAFactors, from_factors
from ...errors import AdapterNameError, PackBusyError, ServingError
from ...formats import lora_config, peft
from ...pack import basis_adapters
from ...pack.manifest import SubspaceInfo
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from ..lora_tensors import at_rank
from ..watched import WatchedPack
from . import cache, threads
from .cores import lora_on_cores
from .servable import (
    BASE_WEIGHTS,
    expanded_rank,
    reduced_rank,
    refusal,
    shared_rank,
    version_rank,
    version_refusal_reason,
)
from .settings import SHARED_BASIS, Settings
from .version_names import vllm_name, without_digest

_FORMAT = 1
"""Version of the files' content. Increase it when the same pack gives other files."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """The folder of an adapter or version.

    Attributes:
        name: Name in vLLM: that of the adapter, or that of the version with a digest of its content.
        path: The folder.
        digest: Digest of everything that determines its content.
    """

    name: str
    path: Path
    digest: str


class AdapterFolders:
    """The folders of a pack's adapters and versions. A folder is written at its first request, in a separate thread.

    Args:
        settings: The pack and the cache.
        max_lora_rank: The engine's `max_lora_rank`; None if it is unknown.

    Raises:
        OptionError: The cache cannot be used.
        PackError, HubError: The pack cannot be opened.
    """

    def __init__(self, settings: Settings, max_lora_rank: int | None = None) -> None:
        self.shared = settings.shared_basis
        self._max_lora_rank = max_lora_rank
        self._watched = WatchedPack(settings.pack)
        pack = self._watched.current()
        # the subspace that loaded models hold, even if the pack changes
        self.served: SubspaceInfo = (pack.training_pack if self.shared else pack).info
        # None if adapters are served as they are in the pack
        self._within = basis_adapters.check_within(settings.serve_within, pack) if self._is_projected(pack) else None
        self._root, self._limit = settings.cache or cache.default_root(), settings.cache_bytes
        cache.prepare(self._root)
        self._cache: cache.Cache | None = None
        self._refused: dict[str, ServingError] = {}
        self._executor = threads.single_threaded_executor("eigenlorax")

    @property
    def base_model(self) -> str | None:
        """Base model of the pack, which a pack without adapters learns from its first version."""
        return self.pack.base_model

    @property
    def pack(self) -> Pack:
        """The pack in its current state."""
        return self._watched.current()

    def request(self, name: str, in_use: cache.InUse | None = None) -> "Future[AdapterFolder]":
        """Return a future of the folder.

        The folder of an adapter is kept until the process ends. That of a version is removed if the cache is full and
        it is not in use. The next request writes it again.

        Args:
            name: Name of the adapter, or of a version: "run@1000", "run@latest", or its name in vLLM.
            in_use: Function that returns the names in vLLM of all requests that run. Without it, no folder is removed.

        Raises:
            AdapterNameError: The pack has no adapter or version of that name. The future raises this and other errors.
            ServingError: vLLM cannot serve the adapter.
            CacheFullError: The cache is full.
            PackError, HubError: The pack cannot be read.
        """
        return self._executor.submit(self._checked_folder, name, in_use)

    def _checked_folder(self, name: str, in_use: cache.InUse | None) -> AdapterFolder:
        # names come from clients
        if not (keys.is_valid_version(without_digest(name)) if keys.is_version(name) else keys.is_valid_name(name)):
            raise AdapterNameError(f"{name[:100]!r} is not a valid name of an adapter.")
        try:
            return self._folder(name, in_use)
        except PackBusyError:
            # the pack was replaced between two reads; the second attempt reads the new one
            return self._folder(name, in_use)

    def _folder(self, name: str, in_use: cache.InUse | None) -> AdapterFolder:
        pack = self._watched.current()
        if keys.is_version(name):
            return self._version_folder(pack, name, in_use)
        keys.check_known(name, pack.names, f"the pack {self._watched.source}")
        min_bytes = 0 if self.shared else pack.records[name].lora_numbers * 4
        digest = self._digest(pack, name)
        return AdapterFolder(name, self._written(name, digest, min_bytes, in_use=in_use), digest)

    def _version_folder(self, pack: Pack, name: str, in_use: cache.InUse | None) -> AdapterFolder:
        in_vllm = vllm_name(pack, without_digest(name))
        version = without_digest(in_vllm)
        if name not in (in_vllm, without_digest(name)):
            raise AdapterNameError(
                f"the pack {self._watched.source} has another version {version!r} than {name[:200]!r}."
            )
        _, record = pack.history_store.find(version)
        digest = self._digest(pack, version)
        path = self._written(version, digest, record.source_lora_bytes, client=in_vllm, in_use=in_use)
        return AdapterFolder(in_vllm, path, digest)

    def _digest(self, pack: Pack, name: str) -> str:
        mode = f"cores of {self.served.fingerprint}" if self.shared else "expanded"
        mode += f" within {self._within}" if self._within is not None else ""
        return atomic_files.digest(f"{_FORMAT}, {name}, {pack.digest(name)}, {mode}".encode())

    def _written(
        self, name: str, digest: str, min_bytes: int, *, client: str | None = None, in_use: cache.InUse | None
    ) -> Path:
        """Return the folder of an adapter or version, and write it at the first request.

        Args:
            name: Name of the adapter or version.
            digest: Digest of everything that determines the folder's content.
            min_bytes: Lower bound of its size.
            client, in_use: Arguments of `Cache.folder`.
        """
        if digest in self._refused:
            raise self._refused[digest]
        if self._cache is None:
            # created on demand: the other processes of a server get no requests for adapters
            self._cache = cache.Cache(self._root, self._limit)
        folder = f"{keys.file_name(name)}-{digest[:32]}"
        make = partial(self._files, name, digest)
        return self._cache.folder(folder, min_bytes, make, client=client, in_use=in_use)

    def _files(self, name: str, digest: str) -> atomic_files.Files:
        pack = self._watched.with_adapter(name)
        if self._digest(pack, name) != digest:
            raise PackBusyError(f"the pack {self._watched.source} was replaced while it was read.")
        try:
            lora = self._version(pack, name) if keys.is_version(name) else self._adapter(pack, name)
        except ServingError as error:
            self._refused[digest] = error
            raise
        return peft.to_files(_without_base_weights(lora))

    def _adapter(self, pack: Pack, name: str) -> Adapter:
        """Return an adapter as the LoRA that vLLM loads; raise `ServingError` if vLLM cannot serve it."""
        packed = self._packed(pack, name)
        message = (
            refusal(packed, shared=self.shared)
            or self._changed(packed, pack.info)
            or self._inexact(packed)
            or self._too_large(f"adapter {name!r}", (shared_rank if self.shared else expanded_rank)(packed))
        )
        if message is not None:
            raise ServingError(message)
        if self.shared:
            return lora_on_cores(packed, self.served)
        adapter, rank = pack.adapter(name), reduced_rank(packed)
        if rank is not None:
            adapter = _with_modules(adapter, {module: at_rank(each, rank) for module, each in adapter.modules.items()})
        return _with_subspace_names(adapter, packed.subspace_names)

    def _version(self, pack: Pack, name: str) -> Adapter:
        """Return a version of a history; raise `ServingError` if vLLM cannot serve it."""
        if self.shared:
            raise ServingError(
                f"version {name!r} cannot be served: it is an ordinary LoRA, and the model contains the bases of the "
                f"pack ({SHARED_BASIS}=1). Serve it without a shared basis."
            )
        version = pack.adapter(name)
        reason = version_refusal_reason(version)
        message = (
            f"version {name!r} cannot be served: {reason}."
            if reason is not None
            else self._too_large(f"version {name!r}", version_rank(version))
        )
        if message is not None:
            raise ServingError(message)
        return version

    def _is_projected(self, pack: Pack) -> bool:
        """Return whether adapters are projected on the pack's basis, which loaded models hold."""
        return self.shared and pack.basis is not None

    def _packed(self, pack: Pack, name: str) -> PackedAdapter:
        """Return an adapter as it is in the pack, or as the basis of the pack represents it."""
        return basis_adapters.project(pack, name) if self._is_projected(pack) else pack.packed(name)

    def _inexact(self, packed: PackedAdapter) -> str | None:
        """Return a message if the basis of the pack does not represent an adapter well enough."""
        reason = basis_adapters.refusal_reason(packed, self._within) if self._within is not None else None
        return reason and f"adapter {packed.name!r} cannot be served: {reason}."

    def _too_large(self, adapter: str, rank: int) -> str | None:
        """Return a message if the rank of an adapter is larger than a slot, as far as the slot's rank is known."""
        if self._max_lora_rank is None or rank <= self._max_lora_rank:
            return None
        return f"{adapter} cannot be served: its rank is {rank}, and max_lora_rank is {self._max_lora_rank}."

    def _changed(self, packed: PackedAdapter, info: SubspaceInfo) -> str | None:
        """Return a message if an adapter does not fit the subspace that the pack had when the server started."""
        if self.shared:
            fits, problem = packed.subspace in self.served.lineage, "its coefficients are in another subspace"
        else:
            fits = _sizes(packed, info) == _sizes(packed, self.served)
            problem = "it has modules or sizes of another model"
        if fits:
            return None
        return (
            f"adapter {packed.name!r} cannot be served: {problem} than the pack had when the server started. Restart "
            "the server."
        )


def _sizes(packed: PackedAdapter, info: SubspaceInfo) -> list[tuple[int, int] | None]:
    """Return (out, in) of each module of an adapter in a subspace."""
    sides = [info.modules.get(subspace_name) for subspace_name in packed.subspace_names.values()]
    return [(pair["up"].dimension, pair["down"].dimension) if pair is not None else None for pair in sides]


def _with_subspace_names(adapter: Adapter, subspace_names: Mapping[str, str]) -> Adapter:
    """Return an adapter with the subspace's full names of its modules, since vLLM silently ignores shorter names."""
    if all(module == subspace_name for module, subspace_name in subspace_names.items()):
        return adapter
    return _with_modules(adapter, {subspace_names[module]: adapter.modules[module] for module in adapter.modules})


def _with_modules(adapter: Adapter, modules: Mapping[str, LoRAFactors]) -> Adapter:
    """Return an adapter with other names or factors of its modules."""
    changed = from_factors(adapter.name, modules, base_model=adapter.base_model, heads=adapter.heads)
    return replace(changed, source_config=lora_config.derived(changed, adapter.config))


def _without_base_weights(adapter: Adapter) -> Adapter:
    """Return an adapter without embeddings of the base model, which vLLM would read and not use."""
    return replace(adapter, heads={key: adapter.heads[key] for key in adapter.heads if not key.endswith(BASE_WEIGHTS)})
