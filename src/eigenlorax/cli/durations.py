"""Estimates of how long verbs take, from the adapters or from their first steps."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pack.record import Record

WORTH_SAYING = 60.0
"""Seconds from which on a verb says how long it takes."""
MEASURED = 2.0
"""Seconds of a stage after which its duration is estimated from the steps that are done."""
COMPONENT_FIT, CODED_FIT, EXPORT, CODED_EXPORT = 0.15, 1.3, 0.25, 1.0
"""Seconds for each million LoRA numbers on one core, measured with 200 adapters of rank 8 in 12 modules 768 wide."""
BYTES_PER_NUMBER = 4
"""Assumed bytes of a number in a weights file; an estimate for float16 is half of what it takes."""


def in_words(seconds: float) -> str:
    """Return a number of seconds in words, in the unit that suits it."""
    for unit, length in (("hour", 3600), ("minute", 60)):
        # 90 minutes are clearer than 2 hours
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.0f} {unit}s"
    return f"{max(round(seconds), 1)} second{'' if round(seconds) <= 1 else 's'}"


def fit_seconds(adapters: Sequence[str], *, is_coded: bool) -> float:
    """Estimate the seconds of a fit from the sizes of weights files on this machine; others do not count."""
    return _seconds(sum(map(_weights_bytes, adapters)) / BYTES_PER_NUMBER, CODED_FIT if is_coded else COMPONENT_FIT)


def refit_seconds(records: Mapping[str, "Record"], *, is_coded: bool) -> float:
    """Estimate the seconds of another fit to a pack's adapters."""
    return _seconds(_lora_numbers(records), CODED_FIT if is_coded else COMPONENT_FIT)


def export_seconds(records: Mapping[str, "Record"], *, is_coded: bool) -> float:
    """Estimate the seconds of exporting adapters of a pack."""
    return _seconds(_lora_numbers(records), CODED_EXPORT if is_coded else EXPORT)


def _seconds(numbers: float, per_million: float) -> float:
    return numbers / 1e6 * per_million


def _lora_numbers(records: Mapping[str, "Record"]) -> int:
    return sum(record.lora_numbers for record in records.values())


def _weights_bytes(source: str) -> int:
    """Return the bytes of the weights files of an argument of `fit`; 0 if it is not on this machine."""
    path = Path(source)
    if not path.exists():
        path = Path(source.partition("=")[2] or source)
    if path.is_file():
        return path.stat().st_size
    # adapters in a folder, or in the folders of a parent folder
    files = [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")] if path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())


class StageTimes:
    """Times of the stages of a verb, from which their durations are estimated.

    Args:
        is_announced: True if the user has been told how long the verb takes.
    """

    def __init__(self, is_announced: bool) -> None:
        self._starts: dict[str, float] = {}
        self._is_announced = is_announced

    def remaining(self, stage: str, done: int, total: int) -> float:
        """Return the seconds that a stage still takes, by the steps that are done; 0 if they do not tell yet.

        Args:
            stage: Name of the stage.
            done: Number of its steps that are done. With none, the stage starts.
            total: Number of all its steps.
        """
        now = time.monotonic()
        if not done:
            self._starts[stage] = now
        elapsed = now - self._starts.setdefault(stage, now)
        return elapsed / done * (total - done) if done and elapsed >= MEASURED else 0.0

    def must_announce(self, seconds: float) -> bool:
        """Return whether the user has to be told of a stage that takes so long; True once at most."""
        if self._is_announced or seconds < WORTH_SAYING:
            return False
        self._is_announced = True
        return True
