"""Histories of a pack: versions of one adapter in the order in which they were appended, without their tensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core import atomic_files, keys
from ..core.options import suggestion
from ..core.origin import Origin
from ..errors import AdapterNameError
from . import source_configs


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """Bytes and errors of one version. docs/pack-format.md defines each field.

    Attributes:
        version: Label, unique in its history.
        step: Training step; None if unknown.
        metrics: Finite numbers by name, such as those of an evaluation.
        sha256: Hash of the version's file.
        reference: Label of the earlier version that the file refers to; None for a key version.
        lossless: True if every tensor is stored bit for bit.
        max_error: Bound of `delta_error` that was asked for; None if lossless.
        head_error: Bound of the relative error of task heads that was asked for; None if lossless.
        delta_error: Relative error ‖D − D̂‖ / ‖D‖ of the update against the original, over all modules.
        tensor_error: Largest relative error of a tensor beside the LoRA factors against the original.
        lora_bytes: Bytes of the LoRA factors in the file.
        tensor_bytes: Bytes of all other tensors in the file. Both together are the whole file.
        source_lora_bytes: Tensor bytes of the LoRA factors in the source.
        source_tensor_bytes: Tensor bytes of the other tensors in the source.
        source_file_bytes: Bytes of the source's weights file; 0 for an adapter that was made in memory.
        source_sha256: Hash of the source's content.
        change: Relative distance ‖D_t − D_{t−1}‖ / ‖D_{t−1}‖ to the previous version, both as decoded; None for the
            first version, and where the previous update is zero. With `change_error`, the distance to `reference`;
            in a population, to the common adapter.
        source_config: The source's `adapter_config.json`, as its differences from `History.source_fields`.
        origin: Single file of the source, for formats other than PEFT's, or a file of PEFT's with metadata.
        change_error: Error ‖D − D̂‖ / ‖D − D_r‖ relative to the change from the decoded version D_r that `reference`
            names; None unless that version was chosen when this one was appended.
        bundle: Hash of the file with several versions that this one is in; None if it has a file of its own.
        offset: Position of the version in that file, in bytes; None likewise.
    """

    version: str
    step: int | None
    metrics: dict[str, float]
    sha256: str
    reference: str | None
    lossless: bool
    max_error: float | None
    head_error: float | None
    delta_error: float
    tensor_error: float
    lora_bytes: int
    tensor_bytes: int
    source_lora_bytes: int
    source_tensor_bytes: int
    source_file_bytes: int
    source_sha256: str
    change: float | None
    source_config: str
    origin: Origin | None
    change_error: float | None = None
    bundle: str | None = None
    offset: int | None = None

    @property
    def file(self) -> str:
        """Path in the pack of the version's own file, or of its bundle."""
        return keys.version_file(self.bundle or self.sha256)

    @property
    def file_bytes(self) -> int:
        """Bytes of the version, in its own file or its bundle."""
        return self.lora_bytes + self.tensor_bytes


@dataclass(frozen=True, slots=True)
class History:
    """Versions of one adapter, in the order in which they were appended.

    Attributes:
        name: Name of the history.
        versions: The versions, the last one being the latest.
        source_fields: Fields of the configs that most versions share.
    """

    name: str
    versions: tuple[VersionRecord, ...]
    source_fields: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.versions)

    def __iter__(self) -> Iterator[VersionRecord]:
        return iter(self.versions)

    def __contains__(self, label: object) -> bool:
        return label == keys.LATEST or any(record.version == label for record in self.versions)

    def __getitem__(self, label: str) -> VersionRecord:
        """Return a version by its label, or by "latest"; `AdapterNameError` if there is none."""
        if label == keys.LATEST:
            return self.latest
        for record in self.versions:
            if record.version == label:
                return record
        known = ", ".join(self.labels[-12:])
        raise AdapterNameError(
            f"no version {label!r} in the history {self.name!r}.{suggestion(label, [*self.labels, keys.LATEST])} "
            f"It has {len(self)}{', the last ones' if len(self) > 12 else ''}: {known}."
        )

    @property
    def is_population(self) -> bool:
        """True if the first version is `common`, and all others refer to it or to nothing."""
        first, *members = self.versions or (None,)
        return (
            first is not None
            and first.version == keys.COMMON
            and not first.lossless
            and all(
                member.reference is None or (member.reference == keys.COMMON and member.change_error is not None)
                for member in members
            )
        )

    @property
    def labels(self) -> list[str]:
        """Labels of the versions, in order."""
        return [record.version for record in self.versions]

    @property
    def latest(self) -> VersionRecord:
        """The version that was appended last."""
        return self.versions[-1]

    def full_name(self, record: VersionRecord) -> str:
        """Return the name of a version, such as "run@1000"."""
        return f"{self.name}{keys.VERSION_MARK}{record.version}"

    def chain(self, record: VersionRecord) -> list[VersionRecord]:
        """Return the versions that have to be decoded for a version, from a key version to the version itself."""
        chain = [record]
        # a version refers to an earlier one
        for earlier in reversed(self.versions):
            if earlier.version == chain[-1].reference:
                chain.append(earlier)
        return chain[::-1]

    def digest(self, record: VersionRecord) -> str:
        """Return a sha256 of all that a version depends on: its config, its file, and the files of its chain."""
        files = [earlier.sha256 for earlier in self.chain(record)]
        origin = asdict(record.origin) if record.origin is not None else None
        content = [files, record.lossless, self.config(record), origin]
        return atomic_files.digest(json.dumps(content, sort_keys=True).encode())

    def config(self, record: VersionRecord) -> str:
        """Return the text of a version's `adapter_config.json`."""
        return source_configs.from_bytes(record.source_config.encode("utf-8"), self.source_fields)[0]
