"""Call a function right after another package has been imported, without importing that package."""

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast


def call_after_import(package: str, function: Callable[[], None]) -> None:
    """Call `function` now if `package` is loaded, otherwise as soon as it is. A second request changes nothing."""
    if package in sys.modules:
        function()
    elif not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package, function))


class _Finder:
    """Finder that finds the package by means of the other finders, and wraps its loader, until the package is loaded.

    A search alone changes nothing: transformers and others look for a package that they import later, or never.
    """

    def __init__(self, package: str, function: Callable[[], None]) -> None:
        self.package = package
        self._function = function

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.package:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # not a subclass of `importlib.abc.Loader`, whose import takes longer than that of all of `eigenlorax`
            spec.loader = cast(Any, _Loader(spec.loader, self))
        return spec

    def loaded(self) -> None:
        """Call the function, once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._function()


class _Loader:
    """Loader that runs the package's own loader, then tells the finder."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # as without the hook, also when the module is reloaded
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.loaded()
