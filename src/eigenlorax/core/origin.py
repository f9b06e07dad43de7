"""The file that an adapter was read from, as packs record it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Origin:
    """The single file that an adapter was read from.

    Attributes:
        format: One of `formats.FORMATS`.
        spelling: The format's conventions for tensor names that the file follows.
        metadata: Metadata of the file.
    """

    format: str
    spelling: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
