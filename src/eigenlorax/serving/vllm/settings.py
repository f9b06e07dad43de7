"""What the environment asks of the plugin. Every process of a server reads the same."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.options import parse_byte_count
from ...errors import OptionError

PACK = "EIGENLORAX_PACK"
SHARED_BASIS = "EIGENLORAX_SHARED_BASIS"
CACHE = "EIGENLORAX_CACHE"
CACHE_BYTES = "EIGENLORAX_CACHE_BYTES"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and how.

    pack: a folder, or a repository on the Hub (`org/name`, `org/name@revision`). shared_basis: whether the model holds
    the subspace itself. cache, cache_bytes: where adapters are written for vLLM, and how much of them; None: as
    `cache.place` finds it.
    """

    pack: str
    shared_basis: bool = False
    cache: Path | None = None
    cache_bytes: int | None = None


def read(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """What is asked for; None where no pack is. `OptionError` for a value that is not one."""
    pack, shared = environment.get(PACK, "").strip(), shared_basis(environment)
    if pack:
        return Settings(pack, shared, cache(environment), cache_bytes(environment))
    if shared:
        raise OptionError(f"{SHARED_BASIS}=1 needs the pack whose bases the model is to hold: set {PACK} too.")
    return None


def shared_basis(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the model is to hold the subspace itself."""
    value = environment.get(SHARED_BASIS, "").strip() or "0"
    if value not in ("0", "1"):
        raise OptionError(f"{SHARED_BASIS} is {value!r}; it must be 1, for the bases in the model, or 0.")
    return value == "1"


def cache(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder in which caches are to be made, if one is asked for."""
    value = environment.get(CACHE, "").strip()
    if value and not os.path.isabs(value):
        raise OptionError(f"{CACHE} is {value!r}; it must be an absolute path.")
    return Path(value) if value else None


def cache_bytes(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many bytes a cache may have, if that is asked for. `8GB` is 8 · 10⁹, `8GiB` 8 · 2³⁰."""
    value = environment.get(CACHE_BYTES, "").strip()
    return parse_byte_count(CACHE_BYTES, value) if value else None
