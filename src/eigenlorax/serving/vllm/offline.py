"""The adapters of a pack for `LLM.generate`, by name."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import AdapterNameError, MissingExtraError
from . import settings
from .folders import AdapterFolders
from .settings import Settings

try:
    from vllm.lora.request import LoRARequest
except ImportError as error:
    raise MissingExtraError("eigenlorax.serving.vllm.Adapters needs vLLM: pip install 'eigenlorax[vllm]'.") from error

_ids: dict[str, int] = {}
"""vLLM's numbers of adapters, by the digest of what is in them: of several packs no two adapters have the same."""


class Adapters(Mapping[str, LoRARequest]):
    """The adapters of a pack as vLLM's offline engine takes them: `llm.generate(…, lora_request=adapters["name"])`.

    An adapter is written to a cache when it is first asked for, and is there until the process ends. The pack may be
    changed meanwhile: an adapter that is another one then has another id, so that vLLM does not confuse the two.

    pack: a folder, or a repository on the Hub. max_lora_rank: the engine's, so that an adapter of a larger rank is an
        error here; an engine of several processes ends by it.
    shared_basis: whether the model holds the pack's subspace itself; by default what EIGENLORAX_SHARED_BASIS says, as
        it did when the model was loaded. The cache is the one of EIGENLORAX_CACHE and EIGENLORAX_CACHE_BYTES.
    """

    def __init__(
        self, pack: str | os.PathLike[str], *, max_lora_rank: int | None = None, shared_basis: bool | None = None
    ) -> None:
        shared = settings.shared_basis() if shared_basis is None else shared_basis
        asked = Settings(os.fspath(pack), shared, settings.cache(), settings.cache_bytes())
        self._folders = AdapterFolders(asked, max_lora_rank)

    def __getitem__(self, name: str) -> LoRARequest:
        """The request for an adapter. `AdapterNameError` if the pack has none of that name, `ServingError` if vLLM
        cannot serve it, `CacheFullError` if there is no room for it."""
        found = self._folders.asked(name).result()
        number = _ids.setdefault(found.digest, len(_ids) + 1)
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(found.path))

    def get(self, name: str, default: Any = None) -> Any:
        """The request for an adapter, or `default` if the pack has none of that name."""
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
