"""Warnings about trained adapters with large errors in a pack."""

import warnings
from collections.abc import Mapping, Sequence

from ..core.options import to_float
from ..core.printable import first_names
from ..errors import LossWarning, OptionError
from .record import Record


def check_warn_above(value: float) -> float:
    """Return the option `warn_above` as a float; `OptionError` if it is no number from 0 to 1."""
    share = to_float("warn_above", value)
    if not 0 <= share <= 1:
        raise OptionError(f"warn_above must be a relative error from 0 to 1 (1: never warn), got {value}.")
    return share


RESIDUAL_REMEDY = (
    "To store all of an adapter, remove it and add it again with residual=True (--residual), or fit the pack again "
    "with such adapters among the sources."
)
"""Advice for adapters that were added to a pack of floats."""


def warn_of_losses(
    records: Mapping[str, Record],
    above: float,
    remedy: str = "Fit the pack again with such adapters among the sources, or keep the LoRAs themselves.",
    stacklevel: int = 3,
) -> None:
    """Issue a `LossWarning` that names the trained adapters with large errors.

    Args:
        records: Figures of the adapters, by name.
        above: Delta error above which an adapter is named; 1 disables the warning.
        remedy: Sentence with advice.
        stacklevel: Stack level of the warning.
    """
    if lossy(records, above):
        warnings.warn(f"{describe_losses(records, above)} {remedy}", LossWarning, stacklevel=stacklevel)


def lossy(records: Mapping[str, Record], share: float) -> list[str]:
    """Return the trained adapters with a delta error above `share`, the largest first; none if `share` is 1."""
    if share >= 1:
        return []
    names = [name for name, record in records.items() if not record.untrained and record.delta_error > share]
    return sorted(names, key=lambda name: (-records[name].delta_error, name))


def describe_losses(records: Mapping[str, Record], share: float) -> str:
    """Return sentences that name up to five adapters of `lossy` with their errors, and the number of the others.

    Adapters of which only an upper bound is known have their own sentence.
    """
    names = lossy(records, share)
    measured, bounded = ([name for name in names if records[name].bound == bound] for bound in (False, True))
    sentences = []
    if measured:
        sentences.append(f"The delta error is above {share:g} for {_named(records, measured)}.")
    if bounded:
        sentences.append(
            f"The delta error may be above {share:g}, since the pack was refitted without the originals and only an "
            f"upper bound is known, for {_named(records, bounded)}."
        )
    return " ".join(sentences)


def _named(records: Mapping[str, Record], names: Sequence[str]) -> str:
    return first_names([f"{name} ({_error_text(records[name])})" for name in names])


def _error_text(record: Record) -> str:
    if record.bound and record.delta_error >= 1:
        # a bound of 1 or more says nothing, because an adapter of zeros has an error of 1
        error = "perhaps all of it"
    else:
        error = f"at most {record.delta_error:.2f}" if record.bound else f"{record.delta_error:.2f}"
    return error + (" of what is not carried" if record.carried_bytes else "")
