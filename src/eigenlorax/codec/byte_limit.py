"""Encode a collection with the smallest error that fits a number of bytes."""

import math
from collections.abc import Callable

from ..errors import OptionError
from .encoder import LARGEST_TRIED, SMALLEST_TRIED, CollectionEncoder, EncodedCollection, RatePoint

FULL, NEARLY_FULL = 0.99, 0.97
"""Share of the bytes that is to be used; and that is enough after several turns."""
EARLY_TURNS, MAX_TURNS = 5, 12
"""Turns in which the share is to be `FULL`; and turns at most."""
LAST_ERRORS = (0.55, 0.7, 0.85, 0.95)
"""Error bounds that are tried before a number of bytes is said to be out of reach."""


def encode_within(
    collection: CollectionEncoder,
    limit: float,
    measure_bytes: Callable[[EncodedCollection], int],
    refusal: Callable[[int], str],
) -> EncodedCollection:
    """Return the collection encoded with the smallest common error bound whose bytes are at most `limit`.

    Each turn encodes the collection for an error bound and measures its bytes. The search bisects on the logarithm,
    since bytes fall as the error bound grows.

    Args:
        collection: The surveyed collection.
        limit: Largest number of bytes.
        measure_bytes: Returns the bytes of an encoded collection.
        refusal: Returns the message of the error, from the fewest bytes that were reached.

    Raises:
        OptionError: If no error bound has so few bytes.
    """
    best: EncodedCollection | None = None
    # the nearest error bounds with which there are too many bytes, and not too many
    over: RatePoint | None = None
    under: RatePoint | None = None
    target = 0.5 * (1 + FULL) * limit
    # the middle of the range in which the search ends
    bound = collection.error_for_bytes(target)
    for turn in range(MAX_TURNS):
        # before giving up, the fewest bytes that an error bound can have
        if best is None and turn == MAX_TURNS - 1:
            bound = LARGEST_TRIED
        encoded = collection.encode(bound)
        point = RatePoint(bound, measure_bytes(encoded))
        if point.bytes <= limit:
            best, under = encoded, point
            if point.bytes >= (FULL if turn < EARLY_TURNS else NEARLY_FULL) * limit or bound <= 1.001 * SMALLEST_TRIED:
                break
        else:
            over = point
            if bound >= LARGEST_TRIED:
                break
        if over is None or under is None:
            bound = _beyond(collection, point, target, turn, grow=under is None)
        elif under.error < 1.002 * over.error:
            # bytes jump between two error bounds that are nearly equal
            break
        else:
            bound = _between(over, under, target, turn)
    if best is None:
        assert over is not None
        return _last_resort(collection, limit, measure_bytes, refusal, over.bytes)
    return best


def _beyond(collection: CollectionEncoder, point: RatePoint, target: float, turn: int, *, grow: bool) -> float:
    """Return an error bound beyond all that were tried: larger if `grow`, else smaller."""
    # as far from the estimate as the last turn was, and further each time
    push: float = 1.02 ** (2.0**turn)
    # the estimate is off by about the same factor at the next bound as at the last one
    bound = collection.error_for_bytes(target * collection.estimated_bytes(point.error) / point.bytes)
    bound = max(bound, point.error * push) if grow else min(bound, point.error / push)
    return min(max(bound, SMALLEST_TRIED), LARGEST_TRIED)


def _between(over: RatePoint, under: RatePoint, target: float, turn: int) -> float:
    """Return an error bound between one with too many bytes and one with few enough."""
    # log–log interpolation, since bytes fall about as a power of the error
    share: float = math.log(over.bytes / target) / math.log(over.bytes / under.bytes)
    # every third time in the middle, since bytes may jump
    share = 0.5 if turn % 3 == 2 else min(max(share, 0.05), 0.95)
    ratio: float = (under.error / over.error) ** share
    return over.error * ratio


def _last_resort(
    collection: CollectionEncoder,
    limit: float,
    measure_bytes: Callable[[EncodedCollection], int],
    refusal: Callable[[int], str],
    fewest: int,
) -> EncodedCollection:
    """Try a few coarse error bounds where even the largest has too many bytes.

    With an error bound that allows nearly everything, no shared components are kept, and these may have saved bytes.
    """
    for bound in LAST_ERRORS:
        encoded = collection.encode(bound)
        fewest = min(fewest, measure_bytes(encoded))
        if fewest <= limit:
            return encoded
    raise OptionError(refusal(fewest))
