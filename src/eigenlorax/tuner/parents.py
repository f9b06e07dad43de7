"""Adapters of an entropy-coded pack that share the codes of another adapter, their parent (docs/pack-format.md)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..codec.storage import coded
from ..core import keys
from ..core.json_dataclasses import JsonTypeError, from_json
from ..errors import FormatError
from ..pack.pack import Pack
from .config import EigenLoraxConfig


@dataclass(frozen=True, slots=True)
class Parent:
    """Parent that an adapter's config states.

    Attributes:
        name: Name of the parent in the pack.
        sha256: SHA-256 of its codes.
    """

    name: str
    sha256: str

    @classmethod
    def of(cls, config: EigenLoraxConfig) -> "Parent | None":
        """Return the parent of a config; None for an adapter with codes of its own.

        Raises:
            FormatError: The config's field has another form.
        """
        if not config.parent:
            return None
        try:
            parent: Parent = from_json(cls, config.parent, keys.PARENT)
        except JsonTypeError as error:
            raise FormatError(f"the adapter's config: {error}") from error
        return parent

    def with_codes(self, tensors: Mapping[str, Tensor], pack: Pack | None) -> dict[str, Tensor]:
        """Return the tensors of the adapter's file together with the parent's codes.

        Raises:
            FormatError: The pack is not loaded, or does not contain these codes.
            PackDamagedError: The files of the pack were changed.
        """
        if pack is None or self.name not in pack:
            raise FormatError(
                f"the adapter has no codes of its own: they are those of {self.name!r} in its pack, which is not "
                "loaded. Load it from its folder in the pack, or pass subspace= its pack."
            )
        try:
            return coded.with_parent_codes(tensors, pack.codes(self.name), self.sha256, self.name)
        except ValueError as error:
            raise FormatError(f"the adapter cannot be read from {pack!r}: {error}.") from error
