"""Figures of histories, and of adapters that look like versions of one run: a part of the figures in `data`."""

from dataclasses import dataclass

from ..core import keys


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """Figures of one version. Distances and positions are of the updates as the pack decodes them.

    Attributes:
        version: Label of the version.
        sha256: Hash of the version's file.
        step: Training step; None if unknown.
        metrics: Finite numbers by name.
        delta_error: Error of the update against the original.
        lora_stored, tensors_stored: Bytes of the LoRA factors and of all other tensors in the version's file.
        source_bytes: Bytes of the source's weights file; of its tensors if it was no file.
        change: Relative distance to the previous version.
        to_final: Distance to the last version ÷ norm of the last version; None if the version was not sampled.
        left_out_error: Delta error in components that were fitted to other versions; None if it was not left out.
        x, y: Position in the leading two components of the updates ÷ norm of the last version; None if the version
            was not sampled.
    """

    version: str
    sha256: str
    step: int | None
    metrics: dict[str, float]
    delta_error: float
    lora_stored: int
    tensors_stored: int
    source_bytes: int
    change: float | None
    to_final: float | None
    left_out_error: float | None
    x: float | None
    y: float | None


@dataclass(frozen=True, slots=True)
class HistoryFigures:
    """Figures of one history.

    Attributes:
        name: Name of the history.
        versions: Figures by version, the latest last.
        path_share: Share of the squared distances between versions that the leading two components show; None if
            there are fewer than two versions.
        k: Maximum number of components per side for `left_out_error`.
        fitted: Number of versions for `left_out_error`: each version that is left out is represented in components of
            all others of these; 0 if none was left out.
    """

    name: str
    versions: list[VersionFigures]
    path_share: float | None
    k: int
    fitted: int

    @property
    def is_population(self) -> bool:
        """True if the versions are a common adapter and others that are stored as changes from it."""
        return any(version.version == keys.COMMON for version in self.versions[:1])

    @property
    def stored_bytes(self) -> int:
        """Bytes of the versions' files."""
        return sum(version.lora_stored + version.tensors_stored for version in self.versions)

    @property
    def source_bytes(self) -> int:
        """Bytes of the sources' weights files."""
        return sum(version.source_bytes for version in self.versions)

    @property
    def ratio(self) -> float:
        """Bytes of the sources' weights files ÷ bytes of the versions' files."""
        return self.source_bytes / max(self.stored_bytes, 1)

    @property
    def left_out(self) -> float | None:
        """Mean of `left_out_error`; None if no version was left out."""
        errors = [version.left_out_error for version in self.versions if version.left_out_error is not None]
        return sum(errors) / len(errors) if errors else None


@dataclass(frozen=True, slots=True)
class Run:
    """Adapters of a pack that look like versions of one training run.

    Attributes:
        adapters: Names of the adapters, in the order of the run.
        change: Median of the distances between consecutive adapters ÷ the larger of their norms.
    """

    adapters: list[str]
    change: float
