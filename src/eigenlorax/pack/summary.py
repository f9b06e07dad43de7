"""Figures of a whole pack: contents, bytes and errors, for tables, JSON and the model card."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..codec.storage.traits import TRAITS
from ..core import keys
from ..formats.image import families
from .history import History
from .manifest import FitInfo, Manifest, SideInfo, SubspaceInfo
from .record import Record, baseline_bytes


@dataclass(frozen=True, slots=True)
class Components:
    """Numbers of components on one side over all modules.

    Attributes:
        min: Smallest number.
        median: Median.
        max: Largest number.
        capped: Modules with fewer components than `n_components`, because the rank of their stack is smaller.
        energy: Fraction of the squared norm of the fitted collection that the fitted components keep, over all modules.
        shortfall: Largest estimated fraction that subspace iteration missed in a module; 0 if all bases are exact.
    """

    min: int
    median: float
    max: int
    capped: list[str]
    energy: float
    shortfall: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Delta errors of a group of adapters.

    Attributes:
        adapters: Number of adapters.
        mean: Mean error.
        rms: Root mean square error.
        worst: Largest error.
        worst_adapter: Name of the adapter with the largest error.
        rounding_mean: Mean error from rounding alone.
        rounding_worst: Largest error from rounding alone.
    """

    adapters: int
    mean: float
    rms: float
    worst: float
    worst_adapter: str
    rounding_mean: float
    rounding_worst: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes of a pack.

    Untrained adapters do not count in the bytes of the LoRAs, because removing them costs nothing.

    Attributes:
        lora: Bytes of the LoRA factors in `lora_bits` bits, and of carried tensors in the source, in at most 16 bits
            where the pack codes them.
        lora_bits: Bits of the pack's narrower dtype, or 16 for integers.
        lora_files: Bytes of the adapters' weights files.
        basis: Bytes of the bases that the adapters need.
        training_basis: Bytes of the basis for training and serving, which the adapters do not need; 0 without one.
        coefficients: Bytes of the coefficients.
        carried: Bytes of carried tensors in the pack.
        heads: Bytes of trained heads in the pack, and of reference tensors that they share.
        source_heads: Bytes of trained heads in the source, in at most 16 bits where the pack codes them.
        ratio: lora ÷ (basis + training_basis + coefficients + carried).
        ratio_without_basis: lora ÷ (coefficients + carried).
        ratio_with_heads: The same as `ratio`, with `source_heads` and `heads` added.
    """

    lora: int
    lora_bits: int
    lora_files: int
    basis: int
    training_basis: int
    coefficients: int
    carried: int
    heads: int
    source_heads: int
    ratio: float
    ratio_without_basis: float
    ratio_with_heads: float

    @property
    def pack(self) -> int:
        """Bytes of all tensors of the pack, without heads."""
        return self.basis + self.training_basis + self.coefficients + self.carried


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Bytes of files, with all their contents. Ratios are None if `sources` is None.

    Attributes:
        sources: Bytes of the weights files of adapters and versions; None if one of them was made in memory.
        pack: Bytes of all files of the pack, without reports.
        reports: Bytes of `report.html` and `report.json` in its folder.
        ratio: sources ÷ pack, with the heads on both sides.
        ratio_without_heads: sources ÷ pack, with the heads on neither side.
        ratio_with_reports: sources ÷ (pack + reports).
    """

    sources: int | None
    pack: int
    reports: int
    ratio: float | None
    ratio_without_heads: float | None
    ratio_with_reports: float | None


@dataclass(frozen=True, slots=True)
class TrainingBasis:
    """Basis for training and shared-basis serving in an entropy-coded pack.

    Attributes:
        dtype: Name of the components' storage.
        fingerprint: Fingerprint of its subspace.
        n_extra: Number of random components per side.
        down, up: Numbers of components on each side.
    """

    dtype: str
    fingerprint: str
    n_extra: int
    down: Components
    up: Components


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a pack.

    Attributes:
        base_model: Base model of the adapters; None if unknown.
        family: Family of an image model, recognised by names and widths of modules; None for other models.
        revision: Revision of the base model; None if unknown.
        fit: Options of the fit.
        dtype: Name of the components' storage.
        coefficient_dtype: Name of the coefficients' storage.
        fingerprint: Fingerprint of the subspace.
        n_extra: Number of random components per side.
        n_extended: Number of components that extensions appended, over all sides.
        adapters: Number of adapters.
        ranks: Ranks of the adapters.
        untrained: Names of adapters whose update is zero.
        modules: Number of modules.
        down, up: Numbers of components on each side.
        in_fit: Errors of trained adapters in the fit; None if there are none.
        projected: Errors of trained adapters that were added later; None if there are none.
        bounds: Number of adapters whose delta error is an upper bound.
        basis: Basis for training and serving; None if there is none.
        bytes: Tensor bytes.
        files: Bytes of files; None if the pack is not on disk, or has changed since it was read.

    Example:
        >>> pack.summary.adapters, pack.summary.in_fit.worst < 0.01
        (3, True)
    """

    base_model: str | None
    family: str | None
    revision: str | None
    fit: FitInfo
    dtype: str
    coefficient_dtype: str
    fingerprint: str
    n_extra: int
    n_extended: int
    adapters: int
    ranks: list[int]
    untrained: list[str]
    modules: int
    down: Components
    up: Components
    in_fit: Errors | None
    projected: Errors | None
    bounds: int
    basis: TrainingBasis | None
    bytes: Bytes
    # the same pack in memory and on disk has equal figures but for this one
    files: FileBytes | None = field(compare=False)


def summarize(
    records: Mapping[str, Record],
    info: SubspaceInfo,
    fit: FitInfo,
    coefficient_dtype: str,
    *,
    base_model: str | None,
    revision: str | None,
    basis: SubspaceInfo | None = None,
    histories: Iterable[History] = (),
    pack_files: tuple[int, int] | None = None,
) -> Summary:
    """Return the figures of a pack.

    Args:
        records: Figures of the adapters, by name.
        info: The subspace.
        fit: Options of the fit.
        coefficient_dtype: Name of the coefficients' storage.
        base_model: Base model of the adapters; None if unknown.
        revision: Revision of the base model; None if unknown.
        basis: Subspace of the basis for training; None if there is none.
        histories: Histories, whose versions count in the figures of files.
        pack_files: Bytes of the pack's files and of its reports; None if the pack is not on disk.
    """
    trained = {name: record for name, record in records.items() if not record.untrained}
    return Summary(
        base_model=base_model,
        family=families.describe(families.families(_widths(info))) or None,
        revision=revision,
        fit=fit,
        dtype=info.dtype,
        coefficient_dtype=coefficient_dtype,
        fingerprint=info.fingerprint,
        n_extra=info.n_extra,
        n_extended=info.n_extended,
        adapters=len(records),
        ranks=sorted({rank for record in records.values() for rank in record.ranks}),
        untrained=[name for name, record in records.items() if record.untrained],
        modules=len(info.modules),
        down=_components(info, "down", fit.n_components),
        up=_components(info, "up", fit.n_components),
        in_fit=_errors({name: record for name, record in trained.items() if record.in_fit}),
        projected=_errors({name: record for name, record in trained.items() if not record.in_fit}),
        bounds=sum(record.bound for record in records.values()),
        basis=_training_basis(basis) if basis is not None else None,
        bytes=_bytes(records, info, coefficient_dtype, basis.stored_bytes if basis is not None else 0),
        files=_file_bytes(records, info.reference_bytes, histories, *pack_files) if pack_files is not None else None,
    )


def summarize_manifest(listed: Manifest, pack_files: tuple[int, int] | None = None) -> Summary:
    """Return the figures of a pack as its manifest lists it; `pack_files` as in `summarize`."""
    return summarize(
        listed.records,
        listed.subspace,
        listed.fit,
        listed.coefficient_dtype,
        base_model=listed.base_model,
        revision=listed.revision,
        basis=listed.basis.subspace if listed.basis is not None else None,
        histories=listed.histories.values(),
        pack_files=pack_files,
    )


def _widths(info: SubspaceInfo) -> list[tuple[str, int]]:
    return [(module, sides["down"].dimension) for module, sides in info.modules.items()]


def _training_basis(info: SubspaceInfo) -> TrainingBasis:
    down, up = (_components(info, side, None) for side in keys.SIDES)
    return TrainingBasis(info.dtype, info.fingerprint, info.n_extra, down, up)


def _components(info: SubspaceInfo, side: str, n_components: int | None) -> Components:
    sides = [sides[side] for sides in info.modules.values()]
    counts = [info.k for info in sides]
    total = sum(info.square for info in sides)
    wanted = n_components or 0
    return Components(
        min=min(counts, default=0),
        median=float(statistics.median(counts or [0])),
        max=max(counts, default=0),
        capped=[name for name, sides in info.modules.items() if _fitted(sides[side]) < wanted],
        energy=sum(info.energy * info.square for info in sides) / total if total else 1.0,
        shortfall=max((info.shortfall for info in sides), default=0.0),
    )


def _fitted(side: SideInfo) -> int:
    return side.k - sum(side.grown)


def _errors(records: Mapping[str, Record]) -> Errors | None:
    if not records:
        return None
    errors = [record.delta_error for record in records.values()]
    roundings = [record.rounding_error for record in records.values()]
    return Errors(
        adapters=len(records),
        mean=statistics.fmean(errors),
        rms=statistics.fmean(error**2 for error in errors) ** 0.5,
        worst=max(errors),
        worst_adapter=max(records, key=lambda name: records[name].delta_error),
        rounding_mean=statistics.fmean(roundings),
        rounding_worst=max(roundings),
    )


def _bytes(records: Mapping[str, Record], info: SubspaceInfo, coefficient_dtype: str, training_basis: int) -> Bytes:
    # the narrower of the two: a ratio must not gain from LoRAs that are wider than the pack
    width = min(TRAITS[name].lora_itemsize for name in (info.dtype, coefficient_dtype))
    carried = sum(record.carried_bytes for record in records.values())
    carried_before = sum(
        baseline_bytes(record.source_carried_bytes, record.carried_numbers, is_coded=record.head_error > 0)
        for record in records.values()
    )
    heads_before = sum(
        baseline_bytes(record.source_head_bytes, record.head_numbers, is_coded=record.head_error > 0)
        for record in records.values()
    )
    coefficients = sum(record.coefficient_bytes for record in records.values())
    lora = width * lora_numbers(records) + carried_before
    per_adapter = coefficients + carried
    basis = info.stored_bytes - info.reference_bytes
    total = basis + training_basis + per_adapter
    heads = info.reference_bytes + sum(record.head_bytes for record in records.values())
    return Bytes(
        lora=lora,
        lora_bits=8 * width,
        lora_files=sum(record.source_file_bytes for record in records.values() if not record.untrained),
        basis=basis,
        training_basis=training_basis,
        coefficients=coefficients,
        carried=carried,
        heads=heads,
        source_heads=heads_before,
        ratio=lora / total if total else 1.0,
        ratio_without_basis=lora / per_adapter if per_adapter else 1.0,
        ratio_with_heads=(lora + heads_before) / (total + heads) if total + heads else 1.0,
    )


def _file_bytes(
    records: Mapping[str, Record], references: int, histories: Iterable[History], pack: int, reports: int
) -> FileBytes:
    """Return the figures of files.

    Args:
        records: Figures of the adapters, by name.
        references: Bytes of reference tensors.
        histories: Histories, whose tensors beside the LoRA count as heads.
        pack: Bytes of the pack's files.
        reports: Bytes of its reports.
    """
    versions = [record for history in histories for record in history]
    sizes = [record.source_file_bytes for record in records.values()]
    sizes += [record.source_file_bytes for record in versions]
    heads = references + sum(record.head_bytes for record in records.values())
    # equal versions share a file
    heads += sum({(record.file, record.offset): record.tensor_bytes for record in versions}.values())
    source_heads = sum(record.source_head_bytes for record in records.values())
    source_heads += sum(record.source_tensor_bytes for record in versions)
    # a manifest may state more bytes than the files have
    if not sizes or not all(sizes) or heads >= pack:
        return FileBytes(None, pack, reports, None, None, None)
    sources = sum(sizes)
    return FileBytes(
        sources=sources,
        pack=pack,
        reports=reports,
        ratio=sources / pack,
        ratio_without_heads=(sources - source_heads) / (pack - heads),
        ratio_with_reports=sources / (pack + reports),
    )


def uncompressed_note(summary: Summary) -> str | None:
    """Return a sentence about heads and carried tensors if they are more than half of a pack and stored exactly."""
    if summary.fit.head_error is not None:
        return None
    sizes = summary.bytes
    exact = sizes.heads + sizes.carried
    total = sizes.pack + sizes.heads
    if exact <= total / 2:
        return None
    kinds = {
        "of heads (modules_to_save, trained biases, resized embeddings)": sizes.heads,
        "of carried tensors (modules outside the subspace, DoRA magnitudes)": sizes.carried,
    }
    listed = " and ".join(f"{size:,} {kind}" for kind, size in kinds.items() if size)
    return (
        f"{exact / total:.1%} of the pack's {total:,} bytes are stored exactly: {listed}. A pack that is fitted for an "
        "error bound codes them too. Tensors that were saved with the adapters and not trained can be removed."
    )


def larger_note(sizes: Bytes) -> str | None:
    """Return a sentence about a pack that is larger than its adapters, else None."""
    if sizes.ratio >= 1 or not sizes.basis:
        return None
    return (
        f"The pack is {1 / sizes.ratio:.2f} times larger than the LoRAs: too few adapters share its basis of "
        f"{sizes.basis:,} bytes. Fewer components (-k, n_components) make it smaller; for storage alone, use "
        "max_error=0.1 (--max-error 0.1)."
    )


def lora_numbers(records: Mapping[str, Record]) -> int:
    """Return the number of elements of all LoRA factors. Untrained adapters do not count."""
    return sum(record.lora_numbers for record in records.values() if not record.untrained)


SIDE_NAMES = {side: f"{side} ({keys.LORA_PARTS[side]})" for side in keys.SIDES}
