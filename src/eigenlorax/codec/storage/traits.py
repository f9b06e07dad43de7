"""The storages by name, and what tables and manifests need to know of them. The storages themselves need torch."""

from dataclasses import dataclass

from ...core.options import suggestion
from ...errors import OptionError


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """Properties of a storage that follow from its name.

    Attributes:
        lora_itemsize: Bytes per number of the LoRAs that a pack of this storage is compared with.
        is_float: True if files hold plain float tensors, which need no decoder and no mention in an adapter's config.
        is_coded: True if bytes are entropy-coded for an error bound or a size, components and coefficients together.
        core_kind: The kind of cores, of `keys.CORES`, that adapters are stored as; None for two matrices of
            coefficients.
    """

    lora_itemsize: int
    is_float: bool = False
    is_coded: bool = False
    core_kind: str | None = None

    @property
    def holds_components(self) -> bool:
        """True if bases can be stored in it, and not only coefficients."""
        return self.core_kind is None

    @property
    def pairs_components(self) -> bool:
        """True if component j of the down side goes with component j of the up side alone."""
        return self.core_kind == "diagonal"


_FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_IN_USE = _FLOAT_BYTES["float16"]
"""Bytes of the narrowest LoRAs in use. A ratio of integers must not gain from wider ones."""

CODED = "coded"
"""Name of the storage of entropy-coded packs."""
FLOAT_TRAITS = {name: StorageTraits(size, is_float=True) for name, size in _FLOAT_BYTES.items()}
TRAITS = {
    **FLOAT_TRAITS,
    "int8": StorageTraits(_IN_USE),
    "int4": StorageTraits(_IN_USE),
    CODED: StorageTraits(_IN_USE, is_coded=True),
    **{
        f"{kind}-{name}": StorageTraits(size, core_kind=kind)
        for kind in ("full", "diagonal")
        for name, size in _FLOAT_BYTES.items()
    },
}


def check_storage(name: str) -> str:
    """Return the name of a storage; `OptionError` if there is none of this name."""
    if name not in TRAITS:
        # packs with cores are read, but no longer written
        names = [name for name, traits in TRAITS.items() if traits.core_kind is None]
        raise OptionError(f"dtype must be one of {', '.join(names)}, got {name}.{suggestion(name, names)}")
    return name
