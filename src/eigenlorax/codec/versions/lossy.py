"""Encode and decode versions within an error bound. Each is predicted from at most one earlier version."""

from collections.abc import Sequence

from .version import DecodedVersion, EncodedVersion, Version


def encode(version: Version, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a version within its error bounds.

    Args:
        version: The version.
        reference: Decoded version that it may be predicted from, usually the previous one; None for a key version.

    Raises:
        NonFiniteError: A number is not finite.
    """
    raise NotImplementedError


def encode_again(decoded: DecodedVersion, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a decoded version so that it decodes to exactly the same numbers, with another reference.

    The errors of the result are 0: they are relative to the decoded version.

    Args:
        decoded: The version.
        reference: Decoded version that it may be predicted from; None for a key version.
    """
    raise NotImplementedError


def decode_chain(chain: Sequence[bytes], start: DecodedVersion | None = None) -> DecodedVersion:
    """Decode the last version of a chain, in which each version refers to the previous one. Faster than one by one.

    Args:
        chain: The bytes of the versions, the first of which refers to `start`, or to nothing if that is None.
        start: A decoded version.

    Raises:
        FormatError: The bytes are damaged, or do not fit their references.
    """
    raise NotImplementedError
