"""Resolver that finds adapters in a pack that vLLM does not know. It runs in the server's process.

Names come from clients. For any name the result is a folder or None, and the server keeps running.
"""

import asyncio
import logging
import multiprocessing
from collections import OrderedDict
from pathlib import PurePath

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ...core import keys
from ...errors import AdapterNameError, EigenloraxError
from .adapter_folders import AdapterFolder, AdapterFolders
from .cache import InUse
from .settings import Settings

NAME = "eigenlorax"
_MAX_LOGGED = 1000
"""Number of messages that are stored, so that each is logged once."""

# a child of vLLM's logger, because vLLM shows only messages of its own loggers
_log = init_logger("vllm.plugins.eigenlorax")


def register(settings: Settings) -> None:
    """Register a resolver for the adapters of a pack in vLLM.

    Every process of a server does this. Only the first one gets requests for adapters. It opens the pack and the
    cache at once, so that a server that cannot use them does not start.
    """
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        resolver = PackResolver(settings)
        if multiprocessing.parent_process() is None:
            resolver.open()
        LoRAResolverRegistry.register_resolver(NAME, resolver)


class PackResolver(LoRAResolver):
    """Resolver of adapters and versions of a pack by name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders: AdapterFolders | None = None
        self._logged: OrderedDict[tuple[str, str], None] = OrderedDict()

    def open(self) -> AdapterFolders:
        """Return the folders of the pack's adapters, and open the pack on the first call."""
        if self._folders is None:
            self._folders = AdapterFolders(self._settings)
        return self._folders

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return vLLM's request for an adapter or version by name; None if it cannot be served."""
        if keys.is_version(lora_name):
            # imported here, because only servers ask for adapters
            from . import current_versions

            current_versions.register()
        folder = await self.find(base_model_name, lora_name)
        # the server replaces the id by its own
        return LoRARequest(folder.name, lora_int_id=1, lora_path=str(folder.path)) if folder is not None else None

    async def find(self, base_model_name: str, name: str, in_use: InUse | None = None) -> AdapterFolder | None:
        """Return the folder of an adapter or version; log a message and return None if it cannot be served.

        Args:
            base_model_name: Name of the served model.
            name: Name of the adapter or version.
            in_use: Names in vLLM of all requests that run, whose folders have to stay if the cache is full.
        """
        try:
            folders = self.open()
            folder = await asyncio.wrap_future(folders.request(name, in_use))
            self._compare_base_models(folders.base_model, base_model_name)
        except AdapterNameError as error:
            self._log_once(logging.INFO, name, str(error))
        except EigenloraxError as error:
            self._log_once(logging.WARNING, name, str(error))
        # an error in one request must not end the server
        except Exception as error:  # noqa: BLE001
            self._log_once(logging.ERROR, name, f"{type(error).__name__}: {error}")
        else:
            return folder
        return None

    def _compare_base_models(self, expected: str | None, served: str) -> None:
        """Warn if the served model has another name than the pack's base model.

        It is not an error, because a copy of a model may have any name. vLLM rejects adapters of other sizes.
        """
        if expected is not None and PurePath(expected).name.casefold() != PurePath(served).name.casefold():
            self._log_once(
                logging.WARNING,
                "",
                f"the pack's adapters are for the base model {expected}; the served one is {served}.",
            )

    def _log_once(self, level: int, name: str, text: str) -> None:
        """Log a message once per adapter name."""
        key = name[:100], text
        if key not in self._logged:
            _log.log(level, "eigenlorax: %s", text)
            self._logged[key] = None
            if len(self._logged) > _MAX_LOGGED:
                self._logged.popitem(last=False)
