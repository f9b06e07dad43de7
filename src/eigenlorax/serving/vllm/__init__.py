"""Serving the adapters of a pack in vLLM (docs/vllm.md). Importing this package does not load vLLM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .offline import Adapters

__all__ = ["Adapters"]


def __getattr__(name: str) -> Any:
    if name != "Adapters":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .offline import Adapters

    return Adapters
