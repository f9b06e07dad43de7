"""One result of a search."""

from dataclasses import dataclass

from ..core.options import to_int
from ..errors import OptionError

TOP = 10
"""Default number of results."""


@dataclass(frozen=True, slots=True)
class Match:
    """One adapter that a search found; the field names are those of `--json`.

    Attributes:
        name: Name of the adapter in the pack, or of a version, such as "run@latest".
        score: BM25 score, cosine similarity, mean cosine with centroids or mean loss, depending on the search. Losses
            are better the lower they are, the other scores the higher.
        reason: One sentence that says where the score is from.

    Example:
        >>> eigenlorax.TextIndex.from_pack(pack).find("adapter b", top=1)[0].name
        'b'
    """

    name: str
    score: float
    reason: str


def check_top(top: int) -> int:
    """Return the number of results as an integer; `OptionError` if it is below 1."""
    if to_int("top", top) < 1:
        raise OptionError(f"top (--top) is the number of results, at least 1, got {top}.")
    return int(top)
