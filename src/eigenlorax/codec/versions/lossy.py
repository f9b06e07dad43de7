"""Encode and decode versions within an error bound."""

from collections.abc import Sequence

from .version import DecodedVersion, EncodedVersion, Version


def encode(version: Version, earlier: Sequence[DecodedVersion]) -> EncodedVersion:
    """Encode a version within its error bounds.

    Args:
        version: The version.
        earlier: Decoded versions that it may be predicted from, the latest first, at most `MAX_REFERENCES`.

    Raises:
        OptionError: The error bound cannot be met in float32.
    """
    raise NotImplementedError


def encode_again(decoded: DecodedVersion, earlier: Sequence[DecodedVersion]) -> EncodedVersion:
    """Encode a decoded version so that it decodes to exactly the same numbers, with other references.

    Args:
        decoded: The version.
        earlier: Decoded versions that it may be predicted from, the latest first, at most `MAX_REFERENCES`.
    """
    raise NotImplementedError


def decode(data: bytes, references: Sequence[DecodedVersion]) -> DecodedVersion:
    """Decode a version.

    Args:
        data: The bytes of `EncodedVersion`.
        references: The decoded versions that it refers to, in the order of `EncodedVersion.references`.

    Raises:
        FormatError: The bytes are damaged, or do not fit the references.
    """
    raise NotImplementedError
