"""What a pack holds, costs and lost: the figures of tables, JSON and the model card. Nothing is printed here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..codec.storage.table import storage_by_name
from ..core import keys
from ..formats.image import families
from .manifest import FitInfo, SideInfo, SubspaceInfo
from .packed_adapter import Record


@dataclass(frozen=True, slots=True)
class Components:
    """Numbers of components on one side over the modules, and the share of energy that the fitted ones keep.

    capped: the modules with fewer than were asked for, because their stack has no more directions.
    energy: Σ of squared norm kept ÷ Σ of squared norm, over the modules; of the fitted collection.
    shortfall: the most that the search for a module's first directions is estimated to have missed; 0 where all are
        exact.
    """

    min: int
    median: float
    max: int
    capped: list[str]
    energy: float
    shortfall: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Delta errors over a group of adapters. `rounding_*`: what storing in a narrower dtype alone changes."""

    adapters: int
    mean: float
    rms: float
    worst: float
    worst_adapter: str
    rounding_mean: float
    rounding_worst: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes; heads are kept aside on both sides.

    lora: the LoRAs' factors at the pack's narrower dtype, in 16 bits where that is integers, and what is carried;
    lora_files: the adapters' files as they were; both without untrained adapters, whose factors are worth no byte.
    basis, coefficients, carried: what the pack keeps instead, of all adapters. ratio: lora ÷ all three;
    ratio_without_basis: as if the basis were free.
    """

    lora: int
    lora_files: int
    basis: int
    coefficients: int
    carried: int
    heads: int
    ratio: float
    ratio_without_basis: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a pack. Errors are None where there is no trained adapter of that group.

    family: of an image model, what the names and widths of its modules tell; None of others. n_extended: directions
    that extensions have appended, over all sides. bounds: adapters whose delta error is an upper bound.
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
    bytes: Bytes


def summarize(
    records: Mapping[str, Record],
    info: SubspaceInfo,
    fit: FitInfo,
    coefficient_dtype: str,
    *,
    base_model: str | None,
    revision: str | None,
) -> Summary:
    """The figures of a pack with these adapters in this subspace."""
    trained = {name: record for name, record in records.items() if not record.untrained}
    return Summary(
        base_model=base_model,
        family=families.called(families.families(_widths(info))) or None,
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
        down=_components(info, fit, "down"),
        up=_components(info, fit, "up"),
        in_fit=_errors({name: record for name, record in trained.items() if record.in_fit}),
        projected=_errors({name: record for name, record in trained.items() if not record.in_fit}),
        bounds=sum(record.bound for record in records.values()),
        bytes=_bytes(records, info, coefficient_dtype),
    )


def _widths(info: SubspaceInfo) -> list[tuple[str, int]]:
    return [(module, sides["down"].dimension) for module, sides in info.modules.items()]


def _components(info: SubspaceInfo, fit: FitInfo, side: str) -> Components:
    sides = [sides[side] for sides in info.modules.values()]
    numbers = [one.k for one in sides]
    total = sum(one.square for one in sides)
    wanted = fit.n_components or 0
    return Components(
        min=min(numbers, default=0),
        median=float(statistics.median(numbers or [0])),
        max=max(numbers, default=0),
        capped=[name for name, sides in info.modules.items() if _fitted(sides[side]) < wanted],
        energy=sum(one.energy * one.square for one in sides) / total if total else 1.0,
        shortfall=max((one.shortfall for one in sides), default=0.0),
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


def _bytes(records: Mapping[str, Record], info: SubspaceInfo, coefficient_dtype: str) -> Bytes:
    # the narrower of the two, lest a ratio gain from LoRAs counted wider than the pack itself
    width = min(storage_by_name(name).lora_itemsize for name in (info.dtype, coefficient_dtype))
    carried = sum(record.carried_bytes for record in records.values())
    coefficients = sum(record.coefficient_bytes for record in records.values())
    lora = width * lora_numbers(records) + carried
    ours = coefficients + carried
    return Bytes(
        lora=lora,
        lora_files=sum(record.source_file_bytes for record in records.values() if not record.untrained),
        basis=info.stored_bytes,
        coefficients=coefficients,
        carried=carried,
        heads=sum(record.head_bytes for record in records.values()),
        ratio=lora / (info.stored_bytes + ours) if info.stored_bytes + ours else 1.0,
        ratio_without_basis=lora / ours if ours else 1.0,
    )


def kept_exactly(found: Bytes) -> str | None:
    """What heads and carried tensors take, in words, where that is most of a pack; None elsewhere."""
    exact = found.heads + found.carried
    total = found.basis + found.coefficients + exact
    if exact <= total / 2:
        return None
    kinds = {
        "of heads (modules_to_save, trained biases, resized embeddings)": found.heads,
        "of carried tensors (modules outside the subspace, DoRA magnitudes)": found.carried,
    }
    listed = " and ".join(f"{size:,} {kind}" for kind, size in kinds.items() if size)
    return (
        f"{exact / total:.1%} of the pack's {total:,} bytes are kept as they came, whatever the fit does: {listed}. "
        "Saved in 16 bits before the fit, they take half of what they take in 32; what was saved with the adapters and "
        "not trained can be left out of their files."
    )


def lora_numbers(records: Mapping[str, Record]) -> int:
    """Numbers in the LoRA factors that ratios are taken of: those of untrained adapters come for nothing."""
    return sum(record.lora_numbers for record in records.values() if not record.untrained)


def lossy(records: Mapping[str, Record], share: float) -> list[str]:
    """The trained adapters whose delta error is above `share`, the worst first; none of them where that is 1."""
    if share >= 1:
        return []
    found = [name for name, record in records.items() if not record.untrained and record.delta_error > share]
    return sorted(found, key=lambda name: (-records[name].delta_error, name))


def losses(records: Mapping[str, Record], share: float) -> str:
    """What is lost of the adapters that `lossy` names, in words: five of them, and how many more there are. Of those
    with a bound in the place of an error, what may be lost."""
    found = lossy(records, share)
    measured, bounded = ([name for name in found if records[name].bound == bound] for bound in (False, True))
    sentences = []
    if measured:
        sentences.append(f"more than {share:g} of the update is lost (delta error) of {_named(records, measured)}.")
    if bounded:
        sentences.append(
            f"more than {share:g} of the update may be lost, since the pack was fitted again without the originals and "
            f"only a bound of the delta error is known, of {_named(records, bounded)}."
        )
    return " ".join(sentences)


def _named(records: Mapping[str, Record], found: Sequence[str]) -> str:
    named = ", ".join(f"{name} ({_loss(records[name])})" for name in found[:5])
    return named + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _loss(record: Record) -> str:
    if record.bound and record.delta_error >= 1:
        # no adapter at all has an error of 1
        error = "perhaps all of it"
    else:
        error = f"at most {record.delta_error:.2f}" if record.bound else f"{record.delta_error:.2f}"
    return error + (" of what is not carried" if record.carried_bytes else "")


SIDE_NAMES = {side: f"{side} ({keys.LORA_PARTS[side]})" for side in keys.SIDES}
