"""Settings of the plugin, from environment variables that every process of a server reads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.options import parse_byte_count
from ...errors import OptionError

PACK = "EIGENLORAX_PACK"
SHARED_BASIS = "EIGENLORAX_SHARED_BASIS"
SERVE_WITHIN = "EIGENLORAX_SERVE_WITHIN"
CACHE = "EIGENLORAX_CACHE"
CACHE_BYTES = "EIGENLORAX_CACHE_BYTES"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the plugin.

    Attributes:
        pack: A folder, or a repository on the Hub (`org/name`, `org/name@revision`).
        shared_basis: Whether the model contains the subspace, and adapters are served as LoRAs on its cores.
        cache: Folder to which adapters are written for vLLM; None for `cache.default_root`.
        cache_bytes: Maximum size of the cache; None for half of the free space.
        serve_within: Largest error of an adapter that the basis of an entropy-coded pack serves; None for the default
            of `Pack.on_basis`.
    """

    pack: str
    shared_basis: bool = False
    cache: Path | None = None
    cache_bytes: int | None = None
    serve_within: float | None = None


def read(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """Return the settings, or None if the environment names no pack; raise `OptionError` for an invalid value."""
    pack, shared = environment.get(PACK, "").strip(), shared_basis(environment)
    if pack:
        return Settings(pack, shared, cache(environment), cache_bytes(environment), serve_within(environment))
    if shared:
        raise OptionError(f"{SHARED_BASIS}=1 needs the pack with the bases: set {PACK} too.")
    return None


def shared_basis(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the model contains the subspace."""
    value = environment.get(SHARED_BASIS, "").strip() or "0"
    if value not in ("0", "1"):
        raise OptionError(f"{SHARED_BASIS} is {value!r}; it must be 1, for the bases in the model, or 0.")
    return value == "1"


def serve_within(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the largest error of an adapter that a pack's basis serves, or None for the default."""
    value = environment.get(SERVE_WITHIN, "").strip()
    if not value:
        return None
    try:
        return float(value)
    except ValueError as error:
        raise OptionError(f"{SERVE_WITHIN} is {value!r}; it must be a number above 0 and below 1.") from error


def cache(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder for caches, or None for the default."""
    value = environment.get(CACHE, "").strip()
    if value and not os.path.isabs(value):
        raise OptionError(f"{CACHE} is {value!r}; it must be an absolute path.")
    return Path(value) if value else None


def cache_bytes(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the maximum size of the cache in bytes, or None for the default. `8GB` is 8 · 10⁹, `8GiB` 8 · 2³⁰."""
    value = environment.get(CACHE_BYTES, "").strip()
    return parse_byte_count(CACHE_BYTES, value) if value else None
