"""Sentences on histories, and on adapters that look like versions of one run."""

from statistics import median

from .data import Finding, ReportData
from .history_data import HistoryFigures, Run
from .numbers import error, plural, ratio, size

NEARLY_ALL, MOST = 0.25, 0.5
"""Maximum mean error of versions that were left out, to say that versions share nearly everything, or most."""


def headline(report: ReportData) -> str:
    """Return one sentence on all histories of a pack without other adapters."""
    histories = report.histories
    if len(histories) == 1:
        (history,) = histories
        shared = _shared(history)
        about = f": they share {shared}" if shared else ""
        if history.is_population:
            members = plural(len(history.versions) - 1, "adapter")
            return f"These are {members} that were trained from a common one{about}. {_stored(report)}."
        return f"These are {plural(len(history.versions), 'version')} of one run{about}. {_stored(report)}."
    versions = sum(len(history.versions) for history in histories)
    if any(history.is_population for history in histories):
        return f"These are {plural(versions, 'version')} in {len(histories)} histories. {_stored(report)}."
    return f"These are {plural(versions, 'version')} of {len(histories)} runs. {_stored(report)}."


def collect(report: ReportData) -> list[Finding]:
    """Return a finding on each history, and on each group of adapters that look like versions of one run."""
    return [
        *(_history(history) for history in report.histories),
        *(_run(run) for run in report.runs),
    ]


def in_runs(report: ReportData) -> set[str]:
    """Return the names of the adapters that look like versions of a run."""
    return {name for run in report.runs for name in run.adapters}


def _history(history: HistoryFigures) -> Finding:
    count, stored = len(history.versions), history.stored_bytes
    text, previous = f"{history.name}: {plural(count, 'version')} of one run", "the previous one"
    if history.is_population:
        text = f"{history.name}: {plural(count - 1, 'adapter')} that were trained from a common one"
        previous = "that"
    changes = [version.change for version in history.versions if version.change is not None]
    if changes:
        text += f", each at a distance of {error(median(changes))} from {previous} (median, relative to its norm)"
    shared = _shared(history)
    if shared:
        member = "an adapter" if history.is_population else "a version"
        text += (
            f". They share {shared}: {member} that is left out has a mean error of {error(history.left_out)} in "
            f"{history.k} components per side of the others"
        )
    smaller = history.source_bytes > stored
    text += f". As a history they take {size(stored)}, {_than_files(history.source_bytes, stored)}."
    return Finding("history", text, good=True if smaller else None)


def _shared(history: HistoryFigures) -> str:
    """Return how much versions share, by the error of versions that were left out; "" if none was."""
    left_out = history.left_out
    if left_out is None:
        return ""
    return "nearly everything" if left_out <= NEARLY_ALL else "most of their updates" if left_out <= MOST else "little"


def _stored(report: ReportData) -> str:
    stored = sum(history.stored_bytes for history in report.histories)
    source = sum(history.source_bytes for history in report.histories)
    plurals = "histories" if len(report.histories) > 1 else "a history"
    return f"Stored as {plurals}, they take {_than_files(source, stored)}"


def _than_files(source: int, stored: int) -> str:
    if source >= stored:
        return f"{ratio(source / max(stored, 1))} fewer bytes than their files"
    return f"{ratio(stored / max(source, 1))} more bytes than their files"


def _run(run: Run) -> Finding:
    first, last = run.adapters[0], run.adapters[-1]
    return Finding(
        "versions",
        f"{plural(len(run.adapters), 'adapter')} look like versions of one run, from {first} to {last}: consecutive "
        f"ones are at a distance of {error(run.change)} of their norm (median). Separately trained adapters are mostly "
        "at a distance above 1.",
        "Keep them as a history: `eigenlorax track RUN -o HISTORY` (`Pack.append` in Python) appends each checkpoint "
        "of the folder RUN with its step and metrics, as its difference to an earlier one. It can be run again while "
        "the run goes on.",
        adapters=run.adapters,
    )
