"""The adapters and versions of a pack for `LLM.generate`, by name."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import AdapterNameError, MissingExtraError
from . import settings
from .adapter_folders import AdapterFolders
from .settings import Settings

try:
    from vllm.lora.request import LoRARequest
except ImportError as error:
    raise MissingExtraError("eigenlorax.serving.vllm.Adapters needs vLLM: pip install 'eigenlorax[vllm]'.") from error

_ids: dict[str, int] = {}
"""vLLM's ids of adapters by the digest of their content, so that adapters of several packs never share an id."""


class Adapters(Mapping[str, LoRARequest]):
    """Adapters of a pack for vLLM's offline engine: `llm.generate(…, lora_request=adapters["name"])`.

    Versions of the pack's histories have names such as `adapters["run@1000"]`. `adapters["run@latest"]` is the version
    that was appended last, at each access.

    An adapter is written to a cache when it is first requested, and stays there until the process ends. If it changes
    in the pack, it gets another id, so that vLLM loads it again. EIGENLORAX_CACHE and EIGENLORAX_CACHE_BYTES set the
    cache.

    Args:
        pack: A folder, or a repository on the Hub.
        max_lora_rank: The engine's `max_lora_rank`. An adapter of a larger rank then raises an error here, where it
            would end an engine of several processes.
        shared_basis: Whether the model contains the pack's subspace. Default: the value of EIGENLORAX_SHARED_BASIS,
            which was read when the model was loaded.
    """

    def __init__(
        self, pack: str | os.PathLike[str], *, max_lora_rank: int | None = None, shared_basis: bool | None = None
    ) -> None:
        shared = settings.shared_basis() if shared_basis is None else shared_basis
        environment = Settings(
            os.fspath(pack), shared, settings.cache(), settings.cache_bytes(), settings.serve_within()
        )
        self._folders = AdapterFolders(environment, max_lora_rank)

    def __getitem__(self, name: str) -> LoRARequest:
        """Return the request for an adapter.

        Raises:
            AdapterNameError: The pack has no adapter or version of that name.
            ServingError: vLLM cannot serve the adapter.
            CacheFullError: The cache is full.
        """
        folder = self._folders.request(name).result()
        adapter_id = _ids.setdefault(folder.digest, len(_ids) + 1)
        return LoRARequest(lora_name=folder.name, lora_int_id=adapter_id, lora_path=str(folder.path))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the request for an adapter, or `default` if the pack has no adapter of that name."""
        try:
            return self[name]
        except AdapterNameError:
            return default

    def __contains__(self, name: object) -> bool:
        return name in self._folders.pack

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders.pack.names)

    def __len__(self) -> int:
        return len(self._folders.pack)
