"""Public names of a package that are imported when they are first used, so that importing the package takes no time."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562).

    Args:
        package: Name of the package, its `__name__`.
        modules: Module of the package that defines each public name, such as "core.adapter".
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        attribute = getattr(import_module(f".{modules[name]}", package), name)
        # found without this function from now on
        setattr(sys.modules[package], name, attribute)
        return attribute

    return import_name
