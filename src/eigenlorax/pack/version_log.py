"""The log of a history: its versions, with distances to the latest one."""

from dataclasses import dataclass

from ..core import metrics
from .history import History, VersionRecord
from .history_store import HistoryStore


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One version in the log of a history.

    Attributes:
        record: The version, with its step, metrics, errors, bytes, and the distance to the previous one (`change`).
        to_latest: Relative distance ‖D_t − D‖ / ‖D‖ to the latest version D, both as decoded; None if D is zero, and
            in a population, whose members have no order.
    """

    record: VersionRecord
    to_latest: float | None


def read_log(store: HistoryStore, history: History) -> list[LogEntry]:
    """Return the log of a history, in the order of its versions. Every version is decoded, unless of a population."""
    if history.is_population:
        return [LogEntry(record, None) for record in history]
    latest = store.decode(history, history.latest).modules
    return [
        LogEntry(record, metrics.relative_distance(latest, store.decode(history, record).modules)) for record in history
    ]
