"""`refit`: fit new bases to the adapters of a pack, and compare every adapter before and after.

An adapter is fitted from its original if the original is passed, else from the LoRA that the pack reconstructs. Without
an original, the new error cannot be measured. It is computed from the old error, or bounded.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..codec.storage.table import storage_by_name
from ..core import dtypes, module_names
from ..core.adapter import Adapter
from ..core.fit_options import BYTE_TARGETS, SIZE_OPTIONS
from ..core.progress import Progress
from ..errors import WARN_ABOVE, OptionError
from ..formats.sources import Sources
from ..pack.loss_warnings import check_warn_above, warn_of_losses
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..pack.record import Record
from .fit import fit
from .match_sources import check_any_original, match_adapters
from .options import is_entropy_coded
from .purpose_defaults import Dtype
from .refit_errors import UpdateSquares, compare_updates, follow_record

ROUNDING = 1e-6
"""Increase of a delta error up to which an adapter does not count as worse."""


@dataclass(frozen=True, slots=True)
class Change:
    """Changes of one adapter by a refit.

    Attributes:
        from_original: True if the adapter was fitted from its original, False if from its reconstruction.
        error_before: Delta error against the original in the old pack; None if the adapter is untrained.
        error_after: The same in the new pack.
        bound: True if error_after is an upper bound, because the original was not passed.
        moved: ‖update after − update before‖ ÷ ‖update before‖; None if the update before was zero.
        bytes_before: Bytes of the coefficients and carried tensors in the old pack.
        bytes_after: The same in the new pack.
    """

    from_original: bool
    error_before: float | None
    error_after: float | None
    bound: bool
    moved: float | None
    bytes_before: int
    bytes_after: int

    @property
    def worse(self) -> bool:
        """True if the error is larger than before, or may be."""
        if self.error_before is None or self.error_after is None:
            return False
        return self.error_after > self.error_before + ROUNDING


@dataclass(frozen=True, slots=True)
class Refit:
    """Result of a refit.

    Attributes:
        pack: The new pack, in memory.
        changes: Changes of each adapter, by name.

    Example:
        >>> refitted = eigenlorax.refit(pack, "adapters/", n_components=3)
        >>> refitted.pack.names, refitted.changes["a"].from_original
        (['a', 'b', 'c'], True)
    """

    pack: Pack
    changes: Mapping[str, Change]

    @property
    def worse(self) -> list[str]:
        """Names of adapters whose errors are larger than before, or may be, sorted by decreasing difference."""
        increases = {
            name: (change.error_after or 0.0) - (change.error_before or 0.0)
            for name, change in self.changes.items()
            if change.worse
        }
        return sorted(increases, key=lambda name: (-increases[name], name))


def refit(
    pack: Pack | str | Path,
    adapters: Sources | None = None,
    *,
    n_components: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | float | None = None,
    ratio: float | None = None,
    basis: int | None = None,
    head_error: float | None = None,
    weighting: str | None = None,
    sweeps: int | None = None,
    dtype: str | torch.dtype | None = None,
    coefficient_dtype: str | torch.dtype | None = None,
    warn_above: float = WARN_ABOVE,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Refit:
    """Fit a new subspace to all adapters of a pack. The pack that is passed does not change.

    Coefficients that were trained in the old subspace and saved elsewhere cannot be used with the new one.

    Args:
        pack: A pack, its folder, or its repository on the Hub.
        adapters: Originals, in any form that `fit` takes, matched by content. Adapters without an original are fitted
            from what the pack reconstructs.
        n_components, energy, max_error, max_bytes, ratio, weighting, sweeps: Options of `fit`. Default: the options
            with which the pack was fitted.
        basis: Option of `fit`. Default: that of the pack, if the new pack is entropy-coded too.
        head_error: Option of `fit`. Default: that of the pack, if it is entropy-coded and stays so. Heads that the pack
            codes, and whose originals are not passed, keep their codes.
        dtype, coefficient_dtype: Options of `fit`. Default: the storages of the pack, unless max_error, max_bytes or
            ratio is passed. A pack with cores becomes a pack with coefficients.
        warn_above, device, progress: Options of `fit`.
        options: Options of `read_adapter`, for the originals.

    Returns:
        The new pack, in memory, and the changes by adapter.

    Raises:
        OptionError: The pack has no adapter, or options contradict each other.
        FormatError, ShapeError, NonFiniteError: An adapter cannot be fitted, or none of `adapters` is in the pack.

    Example:
        >>> import eigenlorax
        >>> pack = eigenlorax.fit("adapters/", n_components=2)
        >>> refitted = eigenlorax.refit(pack, "adapters/", max_error=0.1).pack
        >>> refitted.is_coded
        True
    """
    pack = pack if isinstance(pack, Pack) else Pack.from_pretrained(pack)
    warn_above = check_warn_above(warn_above)
    report = progress or (lambda stage, done, total: None)
    if not pack.names:
        remedy = "Fit a pack of adapters." if pack.histories else "Add some with `eigenlorax add`."
        raise OptionError(f"The pack has no adapter to fit a subspace to. {remedy}")
    originals: Mapping[str, Adapter] = {}
    if adapters is not None:
        originals = match_adapters(pack.source_hashes, adapters, report, options, 3).adapters
        check_any_original(originals)
    elif options:
        raise OptionError(
            f"{', '.join(sorted(options))}: options of reading apply to originals, and no adapters were passed. "
            "Pass adapters, or remove the options."
        )
    to_fit = {name: originals.get(name) or pack.adapter(name, torch.float64) for name in pack.names}
    sizes = dict(zip(SIZE_OPTIONS, (n_components, energy, max_error, max_bytes, ratio), strict=True))
    fit_options = _fit_options(
        pack, sizes, weighting, sweeps, _storages(pack, sizes, originals, dtype, coefficient_dtype)
    )
    modules = set(module_names.canonical_names(adapter.specs for adapter in to_fit.values()).values())
    fitted = fit(
        to_fit,
        **fit_options,
        basis=basis if basis is not None else _default_basis(pack, fit_options),
        head_error=_head_error(pack, fit_options, head_error),
        exclude_modules=[name for name in pack.fit_info.excluded_modules if name in modules],
        same_base=True,
        warn_above=1.0,
        device=device,
        progress=progress,
    )
    members, changes = _compare(pack, fitted, originals, report)
    refitted = Pack(
        fitted.subspace,
        fitted.info,
        members,
        replace(fitted.fit_info, skipped=pack.fit_info.skipped),
        base_model=pack.base_model,
        revision=pack.revision,
        coefficient_dtype=fitted.coefficient_storage,
        basis=fitted.basis,
        reference_tensors=fitted.reference_tensors,
        histories=pack.history_store.copied(),
    )
    refitted.notes.extend(fitted.notes)
    if (note := _bound_note(refitted, changes)) is not None:
        refitted.notes.append(note)
    refitted.frontier.extend(fitted.frontier)
    warn_of_losses(refitted.records, warn_above, "Refit from the originals, or with more components.")
    return Refit(refitted, changes)


def _default_basis(pack: Pack, fit_options: Mapping[str, Any]) -> int | None:
    """Return the number of components of the pack's basis, if it has one and the new pack may have one too."""
    if pack.basis is None or not _becomes_coded(fit_options):
        return None
    return pack.basis.fit_info.n_components


def _head_error(pack: Pack, fit_options: Mapping[str, Any], head_error: float | None) -> float | None:
    """Return the option of `fit`: the argument, else the bound of a pack that stays entropy-coded, else the default."""
    if head_error is not None or not pack.is_coded:
        return head_error
    return (pack.fit_info.head_error or 0.0) if _becomes_coded(fit_options) else None


def _becomes_coded(fit_options: Mapping[str, Any]) -> bool:
    """Return whether `fit` makes an entropy-coded pack with these options."""
    bounds = {name: fit_options[name] for name in BYTE_TARGETS}
    return is_entropy_coded(bounds, fit_options["weighting"], fit_options["dtype"], fit_options["coefficient_dtype"])


def _bound_note(refitted: Pack, changes: Mapping[str, Change]) -> str | None:
    """Return what an error bound is not a bound of, for adapters that were refitted without their originals."""
    bound = refitted.fit_info.max_error
    without_original = [name for name, change in changes.items() if not change.from_original]
    worst = max((refitted.records[name].delta_error for name in without_original), default=0.0)
    if bound is None or worst <= bound:
        return None
    return (
        f"max_error={bound:g} holds against the adapters as the old pack reconstructs them. Against their originals, "
        f"errors may be up to {worst:.4f}: pass the originals (--adapters) to keep the bound against these."
    )


def _storages(
    pack: Pack, sizes: Mapping[str, Any], originals: Mapping[str, Adapter], dtype: Dtype, coefficient_dtype: Dtype
) -> tuple[Dtype, Dtype]:
    """Return the storages of components and coefficients: the argument, else the pack's, else None for the default."""
    if any(sizes[name] is not None for name in BYTE_TARGETS):
        # such a fit chooses the storage itself
        return dtype, coefficient_dtype
    defaults: tuple[Dtype, Dtype] = pack.storage, storage_by_name(pack.coefficient_storage).basis_storage.name
    if pack.is_coded:
        by_default = all(value is None for value in sizes.values())
        # reconstructed adapters are in float64, which must not become the dtype of the new pack
        name = None if by_default or set(originals) == set(pack.names) else dtypes.name(pack.dtype)
        defaults = name, name
    return (
        defaults[0] if dtype is None else dtype,
        defaults[1] if coefficient_dtype is None else coefficient_dtype,
    )


def _fit_options(
    pack: Pack,
    sizes: Mapping[str, Any],
    weighting: str | None,
    sweeps: int | None,
    storages: tuple[Dtype, Dtype],
) -> dict[str, Any]:
    """Return the options of `fit`, with those of the old fit as defaults.

    Args:
        pack: The old pack.
        sizes: n_components, energy, max_error, max_bytes and ratio, by name; None where not passed.
        weighting: The option of `refit`.
        sweeps: The option of `refit`.
        storages: Storage of the components and of the coefficients.
    """
    old, purpose = pack.fit_info, None
    if all(value is None for value in sizes.values()):
        sizes, purpose = {name: getattr(old, name) for name in SIZE_OPTIONS}, old.purpose
        if old.n_components is not None:
            # the default of a purpose may exceed all dimensions, an option of `fit` may not
            sizes["n_components"] = min(old.n_components, pack.info.largest_dimension)
    weighting = old.weighting if weighting is None else weighting
    bounds = {name: sizes[name] for name in BYTE_TARGETS}
    if sweeps is None and not is_entropy_coded(bounds, weighting, *storages):
        sweeps = old.sweeps
    return {
        **sizes,
        "purpose": purpose,
        "weighting": weighting,
        "sweeps": sweeps,
        "dtype": storages[0],
        "coefficient_dtype": storages[1],
    }


def _compare(
    pack: Pack, fitted: Pack, originals: Mapping[str, Adapter], progress: Progress
) -> tuple[dict[str, PackedAdapter], dict[str, Change]]:
    """Return the adapters of the new pack, with errors against the originals, and the changes of each adapter."""
    # residuals, quantisation errors and errors of diagonal cores need not be orthogonal to the components
    in_components = not (pack.is_coded or fitted.is_coded or pack.cores == "diagonal")
    members: dict[str, PackedAdapter] = {}
    changes: dict[str, Change] = {}
    for done, name in enumerate(pack.names):
        progress("comparing adapters", done, len(pack.names))
        before, after = pack.packed(name), fitted.packed(name)
        squares = compare_updates(pack.adapter(name, torch.float64), fitted.adapter(name, torch.float64), before, after)
        record = after.record
        if name not in originals:
            # not the float64 in which the pack reconstructs it
            after = replace(after, source_dtype=before.source_dtype)
            alone = not originals and before.subspace in (None, pack.info.fingerprint) and in_components
            record = follow_record(before.record, record, squares, alone=alone, projected=not pack.is_coded)
        # an original may be a copy without its card
        members[name] = replace(after, record=record, license=after.license or before.license)
        changes[name] = _change(before.record, record, squares, name in originals)
    progress("comparing adapters", len(pack.names), len(pack.names))
    return members, changes


def _change(before: Record, after: Record, squares: UpdateSquares, from_original: bool) -> Change:
    norm = squares.before + squares.outside + squares.excluded
    trained = not before.untrained
    return Change(
        from_original=from_original,
        error_before=before.delta_error if trained else None,
        error_after=after.delta_error if trained else None,
        bound=after.bound,
        moved=math.sqrt((squares.moved + squares.moved_outside) / norm) if norm else None,
        bytes_before=before.coefficient_bytes + before.carried_bytes,
        bytes_after=after.coefficient_bytes + after.carried_bytes,
    )


def changes_json(refitted: Refit) -> dict[str, Any]:
    """Return the changes by adapter as JSON-compatible dictionaries."""
    return {name: {**asdict(change), "worse": change.worse} for name, change in refitted.changes.items()}
