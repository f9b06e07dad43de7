"""vLLM's question for an adapter that it does not know, answered from a pack. It is asked in the process of the server.

Names are what clients send: whatever is asked for, the answer is a folder or None, and the server goes on.
"""

import asyncio
import logging
import multiprocessing
from collections import OrderedDict
from pathlib import PurePath

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ...errors import AdapterNameError, EigenloraxError
from .folders import AdapterFolders
from .settings import Settings

NAME = "eigenlorax"
_REMEMBERED = 1000
"""Of how many refusals it is known that they were said already."""

# vLLM shows what its own loggers say
_log = init_logger("vllm.plugins.eigenlorax")


def register(settings: Settings) -> None:
    """Let vLLM ask for the adapters of a pack.

    Each process of a server does it. The first one looks whether the pack and the cache can be used, so that a server
    that could not serve does not start; the others are never asked.
    """
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        resolver = PackResolver(settings)
        if multiprocessing.parent_process() is None:
            resolver.open()
        LoRAResolverRegistry.register_resolver(NAME, resolver)


class PackResolver(LoRAResolver):
    """Finds the adapters of a pack by their names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders: AdapterFolders | None = None
        self._said: OrderedDict[tuple[str, str], None] = OrderedDict()

    def open(self) -> AdapterFolders:
        """The folders of the pack, which is looked at when they are first wanted."""
        if self._folders is None:
            self._folders = AdapterFolders(self._settings)
        return self._folders

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of that name as vLLM loads it; None, and a line in the log, if it cannot be served."""
        try:
            folders = self.open()
            found = await asyncio.wrap_future(folders.asked(lora_name))
            self._compare(folders.base_model, base_model_name)
        except AdapterNameError as error:
            self._say_once(logging.INFO, lora_name, str(error))
        except EigenloraxError as error:
            self._say_once(logging.WARNING, lora_name, str(error))
        # one request must not end all others
        except Exception as error:  # noqa: BLE001
            self._say_once(logging.ERROR, lora_name, f"{type(error).__name__}: {error}")
        else:
            # the id is replaced by the server's own count
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(found.path))
        return None

    def _compare(self, wanted: str | None, served: str) -> None:
        """Say it if the model's name is not the one that the pack's adapters are for: a copy may be called as it likes,
        and what has other sizes is refused by vLLM."""
        if wanted is not None and PurePath(wanted).name.casefold() != PurePath(served).name.casefold():
            self._say_once(
                logging.WARNING, "", f"the pack's adapters are for the base model {wanted}; the served one is {served}."
            )

    def _say_once(self, level: int, name: str, text: str) -> None:
        """One line for a name and what is wrong with it, as long as there are not too many of them."""
        key = name[:100], text
        if key not in self._said:
            _log.log(level, "eigenlorax: %s", text)
            self._said[key] = None
            if len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
