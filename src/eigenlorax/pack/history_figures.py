"""Bytes and errors of whole histories, from their records alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .history import History, VersionRecord


@dataclass(frozen=True, slots=True)
class HistoryFigures:
    """Figures of a whole history.

    Attributes:
        versions: Number of versions.
        lossless: Number of versions that are stored bit for bit.
        latest: Label of the latest version.
        lora_bytes: Bytes of the LoRA factors of all versions.
        tensor_bytes: Bytes of all other tensors: heads, biases, norms and embeddings.
        source_lora_bytes: Tensor bytes of the LoRA factors in the sources.
        source_tensor_bytes: Tensor bytes of the other tensors in the sources.
        source_file_bytes: Bytes of the sources' weights files; None if a version was made in memory.
        worst_delta_error: Largest delta error of a version.
        worst_tensor_error: Largest relative error of another tensor.
        common_bytes: Bytes of the common adapter of a population; None in any other history.
        worst_change_error: Largest error of a member, relative to its change from the common adapter; None likewise.
    """

    versions: int
    lossless: int
    latest: str
    lora_bytes: int
    tensor_bytes: int
    source_lora_bytes: int
    source_tensor_bytes: int
    source_file_bytes: int | None
    worst_delta_error: float
    worst_tensor_error: float
    common_bytes: int | None = None
    worst_change_error: float | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the files of all versions."""
        return self.lora_bytes + self.tensor_bytes


def figures(history: History) -> HistoryFigures:
    """Return the figures of a history, from its records alone."""
    records = history.versions
    # equal versions share a file
    files = {(record.file, record.offset): record for record in records}.values()
    source_files = [record.source_file_bytes for record in records]
    return HistoryFigures(
        versions=len(records),
        lossless=sum(record.lossless for record in records),
        latest=history.latest.version,
        lora_bytes=sum(record.lora_bytes for record in files),
        tensor_bytes=sum(record.tensor_bytes for record in files),
        source_lora_bytes=sum(record.source_lora_bytes for record in records),
        source_tensor_bytes=sum(record.source_tensor_bytes for record in records),
        source_file_bytes=sum(source_files) if all(source_files) else None,
        worst_delta_error=max(record.delta_error for record in records),
        worst_tensor_error=max(record.tensor_error for record in records),
        common_bytes=records[0].file_bytes if history.is_population else None,
        worst_change_error=_worst_change_error(records) if history.is_population else None,
    )


def _worst_change_error(records: Sequence[VersionRecord]) -> float:
    """Return the largest error relative to the change, of members that are not the common adapter itself."""
    common, *members = records
    return max(
        (
            record.change_error or 0.0
            for record in members
            # no change is stored, and nothing more is lost than of the common adapter
            if record.change or record.delta_error > common.delta_error
        ),
        default=0.0,
    )


def all_figures(histories: Mapping[str, History]) -> dict[str, HistoryFigures]:
    """Return the figures of several histories, by name."""
    return {name: figures(history) for name, history in histories.items()}
