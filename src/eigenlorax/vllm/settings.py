"""What the environment asks of the plugin. Every process of a server reads the same."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

PACK = "EIGENLORAX_PACK"
SHARED_BASIS = "EIGENLORAX_SHARED_BASIS"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and how.

    pack: a folder, or a repository on the Hub. shared_basis: whether the model holds the subspace itself.
    """

    pack: str
    shared_basis: bool


def read(environment: Mapping[str, str] = os.environ) -> Settings | None:
    """What is asked for; None where nothing is."""
    pack = environment.get(PACK, "").strip()
    return Settings(pack, environment.get(SHARED_BASIS, "0") == "1") if pack else None
