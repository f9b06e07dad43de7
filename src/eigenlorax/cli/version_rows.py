"""Figures of versions as cells of tables and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from ..pack.history import VersionRecord
    from ..pack.history_figures import HistoryFigures
    from ..pack.summary import FileBytes, Summary

MAX_METRICS = 2
"""Maximum number of metrics that are shown if none is chosen."""
_FIRST = ("eval_accuracy", "eval_", "reward", "loss")
"""Starts of the names of metrics that are shown first."""


def record_json(record: "VersionRecord") -> dict[str, Any]:
    """Return the JSON of a version: its record, without the config of its source."""
    fields = asdict(record)
    for name in ("source_config", "origin"):
        del fields[name]
    return {**fields, "file_bytes": record.file_bytes}


def error(record: "VersionRecord") -> str:
    """Return the delta error of a version, or "exact"."""
    return "exact" if record.lossless else console.format_error(record.delta_error)


def distance(change: float | None) -> str:
    """Return a relative distance; empty if there is none."""
    return "" if change is None else console.format_error(change)


def times_smaller(record: "VersionRecord") -> str:
    """Return how many times smaller a version is than the tensors of its source."""
    source = record.source_lora_bytes + record.source_tensor_bytes
    return f"{source / record.file_bytes:.1f}" if record.file_bytes else ""


def sentence(history: str, record: "VersionRecord") -> str:
    """Return the figures of a version in one line."""
    figures = {
        "delta error": error(record),
        "bytes": f"{record.file_bytes:,}",
        "times smaller": times_smaller(record),
        **{name: cell for name, (cell,) in metric_columns([record]).items()},
    }
    return f"{history}@{record.version}: " + ", ".join(f"{name} {cell}" for name, cell in figures.items())


def metric_columns(records: Sequence["VersionRecord"], chosen: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return a column of cells for each metric.

    Args:
        records: Versions.
        chosen: Names of the metrics. Default: the first `MAX_METRICS` of those that the versions have, evaluations
            before rewards before losses.
    """
    known = sorted({name for record in records for name in record.metrics}, key=_order)
    shown = chosen or [name for name in known if name.startswith(_FIRST)][:MAX_METRICS]
    return {
        name: [f"{record.metrics[name]:.4g}" if name in record.metrics else "" for record in records] for name in shown
    }


def print_pack(title: str, figures: "Summary", histories: Mapping[str, "HistoryFigures"]) -> None:
    """Print the figures of a pack's bases and adapters. Of a pack with histories only, print the base model."""
    if figures.adapters or figures.modules or not histories:
        console.print_rows(title, console.summary_rows(figures))
        console.print_sizes(figures)
    else:
        console.print_rows(title, console.summary_rows(figures)[:1])


def print_histories(histories: Mapping[str, "HistoryFigures"], files: "FileBytes | None") -> None:
    """Print the versions, bytes and errors of histories.

    Args:
        histories: Figures of each history, by name.
        files: Bytes of the pack's files; None if the pack is not on disk.
    """
    columns = {
        "history": list(histories),
        "versions": [str(each.versions) for each in histories.values()],
        "latest": [each.latest for each in histories.values()],
        "LoRA bytes": [_of(each.lora_bytes, each.source_lora_bytes) for each in histories.values()],
        "other bytes": [_of(each.tensor_bytes, each.source_tensor_bytes) for each in histories.values()],
        "all bytes (÷ source files)": [
            "unknown" if each.source_file_bytes is None else _of(each.bytes, each.source_file_bytes)
            for each in histories.values()
        ],
        "delta error at most": [console.format_error(each.worst_delta_error) for each in histories.values()],
        "heads": [console.format_error(each.worst_tensor_error) for each in histories.values()],
    }
    console.print_table("", list(columns), list(zip(*columns.values(), strict=True)), numbers=range(1, len(columns)))
    for name, population in histories.items():
        if population.common_bytes is not None:
            console.print_rows("", _population_rows(name, population))
    if files is not None:
        console.print_rows("", [("bytes of all files of the pack", f"{files.pack:,}")])


def _population_rows(name: str, population: "HistoryFigures") -> list[tuple[str, str]]:
    """Return rows about the members of a population: their bytes without and with the common adapter."""
    assert population.common_bytes is not None
    assert population.worst_change_error is not None
    members = population.versions - 1
    rows = [(f"members ({name})", f"{members:,}"), ("bytes of the common adapter", f"{population.common_bytes:,}")]
    if members:
        own, all_bytes = population.bytes - population.common_bytes, population.bytes
        rows += [
            (
                "bytes of a member",
                f"{own / members:,.0f}, with its share of the common adapter {all_bytes / members:,.0f}",
            ),
            ("error relative to the change", f"at most {console.format_error(population.worst_change_error)}"),
        ]
    return rows


def _of(stored: int, source: int) -> str:
    """Return stored bytes with the ratio to those of the sources."""
    return f"{stored:,} (1/{source / stored:.1f})" if stored and source else f"{stored:,}"


def _order(name: str) -> tuple[int, str]:
    return next((index for index, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST)), name
