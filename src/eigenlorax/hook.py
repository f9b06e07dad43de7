"""Tells PEFT of our method as soon as PEFT is loaded, so that `import eigenlorax` anywhere is enough.

PEFT that is loaded learns of it at once, PEFT that is not, right after its own import. Nothing here imports PEFT.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .errors import MissingExtraError, RegistrationWarning


def arrange() -> None:
    """Register now if PEFT is loaded, else as soon as it is. Calling it again changes nothing."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    """An `import peft` of somebody who wants something else must not fail for our sake."""
    try:
        from .tuner import registration

        registration.register()
    except MissingExtraError as error:
        warnings.warn(str(error), RegistrationWarning, stacklevel=2)


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds PEFT once, as the others would, and registers when it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """PEFT's own loader, and one call after it."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        _register()
