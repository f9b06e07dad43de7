"""Adding adapters to a pack: read them, compare them with its subspace, and encode them in it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..codec import basis_bytes, bitstream
from ..codec.adapter_codes import UNTRAINED, AdapterCodes, ModuleLayout
from ..codec.adapter_encoder import encode_adapter
from ..codec.quantised_basis import QuantisedBasis
from ..codec.storage import coded
from ..codec.storage.base import Storage
from ..codec.storage.table import storage_by_name
from ..core import extension, keys, module_names, projection, threads
from ..core import subspace as spaces
from ..core.adapter import Adapter
from ..core.metrics import AdapterError
from ..core.options import to_int
from ..core.progress import Progress
from ..core.subspace import Subspace
from ..errors import AdapterNameError, ModuleNameError, NothingSharedWarning, OptionError, ShapeError
from ..formats import checks
from ..formats.checks import StatedBase
from ..formats.sources import AdapterSource
from .contents import PackContents
from .copies import names_by_content
from .encoding import EncodedAdapter, encoded_by_codes, pack_adapter, project_module, project_with_residual
from .manifest import SubspaceInfo
from .outside_tensors import OutsideCoding
from .packed_adapter import PackedAdapter
from .scanned_adapter import ScannedAdapter

QuantisedBases = Mapping[str, tuple[QuantisedBasis, QuantisedBasis]]
"""The bases (down, up) of an entropy-coded subspace as integers, by module."""


@dataclass(frozen=True, slots=True)
class AddOptions:
    """Options of `Pack.add`.

    Attributes:
        extend: Maximum number of components to append per side; None for none.
        carry_missing: True to store modules unchanged that the subspace lacks.
        residual: True to store what the bases do not represent of the new adapters.
        same_base: True to accept an adapter that names another base model.
        reading: Options of `read_adapter`.
    """

    extend: int | None
    carry_missing: bool
    residual: bool
    same_base: bool
    reading: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Addition:
    """Encoded new adapters.

    Attributes:
        adapters: The adapters, by name.
        copies: Name of the adapter with the same content, for each new adapter that has one.
        subspace: Their subspace, which may have been extended.
        base_model: Base model of the new adapters; None if none of them names one.
        revision: Revision of the base model; None if unknown.
    """

    adapters: Mapping[str, PackedAdapter]
    copies: Mapping[str, str]
    subspace: Subspace
    base_model: str | None
    revision: str | None


def check_extend(extend: int, pack: PackContents) -> int:
    """Return `extend` as an integer; `OptionError` if it is out of range, or impossible in this pack."""
    extend = to_int("extend", extend)
    largest = pack.info.largest_dimension
    extension_error = storage_by_name(pack.coefficient_storage).extension_error
    if extension_error is not None:
        raise OptionError(extension_error)
    if not 1 <= extend <= largest:
        raise OptionError(
            f"extend={extend}: the number of components to add per side must be from 1 to {largest}, the largest "
            "dimension of a module. Remove extend to project on the unchanged subspace."
        )
    return extend


def check_residual(pack: PackContents) -> None:
    """Raise `OptionError` if the pack cannot store a residual beside the coefficients of a new adapter."""
    if pack.is_coded:
        raise OptionError(
            "residual=True (--residual) has no effect: this pack stores every adapter within its error bound, "
            "residuals included. Remove it."
        )
    if not storage_by_name(pack.coefficient_storage).keeps_factors:
        raise OptionError(
            f"residual=True (--residual) needs coefficients in floats, and this pack stores them as "
            f"{pack.coefficient_storage}. Fit a pack with dtype='float16' (--dtype float16)."
        )


def check_has_bases(pack: PackContents) -> None:
    """Raise `OptionError` if a pack has histories only."""
    if not pack.info.modules and pack.histories:
        raise OptionError(
            "The pack has no bases, but histories only. Append the adapter as a version (pack.append, `eigenlorax "
            "track`), or fit a pack of adapters."
        )


def read_new(sources: Sequence[AdapterSource], pack: PackContents, options: AddOptions) -> list[ScannedAdapter]:
    """Read adapters in the order of the sources, and check that each belongs to the pack.

    Raises:
        AdapterNameError, BaseModelError, ModuleNameError, ShapeError: An adapter does not belong to the pack.
    """
    adapters = []
    for source in sources:
        adapter = _read(source, pack, options)
        adapters.append(adapter)
    in_memory = any(isinstance(source.source, Adapter) for source in sources)
    checks.check_names([*pack.names, *(adapter.name for adapter in adapters)], in_memory=in_memory)
    return adapters


def _read(source: AdapterSource, pack: PackContents, options: AddOptions) -> ScannedAdapter:
    adapter = checks.read_source(source, options.reading)
    adapter = replace(adapter, name=keys.check_name(adapter.name if source.name is None else source.name))
    if adapter.name.lower() in {name.lower() for name in (*pack.names, *pack.histories)}:
        kind = "an adapter" if adapter.name not in pack.histories else "a history"
        raise AdapterNameError(
            f"The pack already has {kind} named {adapter.name!r}. Give the new one another name "
            "(NAME=PATH, name=), or remove the old one first."
        )
    scanned = scan_for_pack(adapter, pack, same_base=options.same_base, carry_missing=options.carry_missing)
    if not scanned.subspace_names and adapter.specs:
        warnings.warn(
            f"Adapter {adapter.name!r} has no module in common with the pack, such as {min(pack.info.modules)!r}. All "
            "of it is stored unchanged. If it belongs to another base model, fit it in a pack of its own.",
            NothingSharedWarning,
            stacklevel=6,
        )
    return scanned


def scan_for_pack(adapter: Adapter, pack: PackContents, *, same_base: bool, carry_missing: bool) -> ScannedAdapter:
    """Scan an adapter, after a check that it belongs to the base model of a pack.

    Args:
        adapter: The adapter.
        pack: The pack.
        same_base: True to accept an adapter that names another base model.
        carry_missing: True to accept modules that the subspace lacks.

    Raises:
        BaseModelError, ModuleNameError, ShapeError: The adapter does not belong to the pack.
        NonFiniteError: The adapter has NaN or infinity.
    """
    if adapter.subspace is None or adapter.subspace not in pack.info.lineage:
        present = StatedBase("the pack", pack.base_model, pack.revision)
        checks.check_one_base([present, StatedBase.of(adapter)], same_base)
    widths = ((module, sides["down"].dimension) for module, sides in pack.info.modules.items())
    checks.check_family(adapter, widths)
    subspace_names = _match_modules(adapter, pack.info, carry_missing)
    return ScannedAdapter(adapter, checks.scan(adapter), subspace_names)


def _match_modules(adapter: Adapter, info: SubspaceInfo, carry_missing: bool) -> dict[str, str]:
    """Return the name in the subspace of each module of an adapter, without modules that the subspace lacks."""
    matches = module_names.resolve_all(adapter.specs, info.modules)
    missing = [module for module, name in matches.items() if name is None]
    if missing and not carry_missing:
        raise ModuleNameError(
            f"Adapter {adapter.name!r} has {len(missing)} of {len(matches)} modules that the subspace lacks, "
            f"such as {missing[0]!r}. Pass carry_missing=True (--carry-missing) to store them unchanged, or fit the "
            "pack again with this adapter among the sources."
        )
    subspace_names = {module: name for module, name in matches.items() if name is not None}
    for module, name in subspace_names.items():
        sides, spec = info.modules[name], adapter.specs[module]
        expected = sides["up"].dimension, sides["down"].dimension
        if (spec.out_features, spec.in_features) != expected:
            raise ShapeError(
                f"Module {module} has shape (out, in) = {(spec.out_features, spec.in_features)} in adapter "
                f"{adapter.name!r} and {expected} in the pack. The adapter belongs to a different base model: fit it "
                "in a pack of its own."
            )
    return subspace_names


def add_adapters(
    sources: Sequence[AdapterSource], pack: PackContents, options: AddOptions, progress: Progress
) -> Addition:
    """Read and encode new adapters, after extending the subspace if requested. If one fails, none is added.

    Args:
        sources: Sources of the adapters.
        pack: The pack, which does not change.
        options: Options of `Pack.add`.
        progress: Callback with the arguments (stage, done, total).
    """
    check_has_bases(pack)
    n_components = None if options.extend is None else check_extend(options.extend, pack)
    if options.residual:
        check_residual(pack)
    new = read_new(sources, pack, options)
    subspace = pack.subspace
    if n_components is not None:
        subspace = extend_subspace(subspace, storage_by_name(pack.storage), new, n_components, progress)
    if pack.is_coded and not pack.aim:
        raise OptionError(
            "This pack was fitted for a size, and no adapter is left in it whose error could be the bound for new "
            "ones. Fit a pack again (max_error, max_bytes or ratio), with the new adapters among the sources."
        )
    bases = quantised_bases(subspace) if pack.is_coded else {}
    outside = OutsideCoding(pack.fit_info.head_error, pack.reference_tensors)
    by_content = names_by_content(pack)
    packed: dict[str, PackedAdapter] = {}
    copies = {}
    for done, scanned in enumerate(new):
        progress("projecting adapters", done, len(new))
        original = by_content.setdefault(scanned.scan.content_hash, scanned.name)
        if original != scanned.name:
            copies[scanned.name] = original
        if not pack.is_coded:
            storage = storage_by_name(pack.coefficient_storage)
            encoded = project_adapter(scanned, subspace, storage, residual=options.residual)
            packed[scanned.name] = pack_adapter(scanned, encoded, outside.encode(scanned), in_fit=False)
        elif original == scanned.name:
            encoded = encode_alone(scanned, subspace, bases, pack.aim)
            packed[scanned.name] = pack_adapter(scanned, encoded, outside.encode(scanned), in_fit=False)
        else:
            packed[scanned.name] = _refer(scanned, packed.get(original) or pack.packed(original), outside)
    progress("projecting adapters", len(new), len(new))
    return Addition(
        packed,
        copies,
        subspace,
        base_model=next((s.adapter.base_model for s in new if s.adapter.base_model), None),
        revision=next((s.adapter.revision for s in new if s.adapter.revision), None),
    )


def _refer(scanned: ScannedAdapter, original: PackedAdapter, outside: OutsideCoding) -> PackedAdapter:
    """Return a new adapter as a reference to the codes of an adapter with the same content."""
    record = original.record
    error = AdapterError(delta_error=record.delta_error, rounding_error=record.rounding_error)
    encoded = EncodedAdapter(original.coefficients, original.payload, error)
    packed = pack_adapter(scanned, encoded, outside.encode(scanned), in_fit=False)
    return replace(packed, subspace=original.subspace).with_parent(original.parent or original.name)


def extend_subspace(
    subspace: Subspace, storage: Storage, new: Sequence[ScannedAdapter], n_components: int, progress: Progress
) -> Subspace:
    """Append the components that reduce the errors of new adapters most.

    All adapters have equal weight, and their order does not matter.

    Args:
        subspace: The subspace.
        storage: Storage of its components.
        new: The new adapters.
        n_components: Maximum number of components to append per side.
        progress: Callback with the arguments (stage, done, total).

    Returns:
        The extended subspace, or the same object if it already contains all updates.
    """
    updates_by_module: dict[str, list[tuple[Adapter, str, float]]] = {}
    for scanned in sorted(new, key=lambda scanned: (scanned.scan.content_hash, scanned.name)):
        square = sum(scanned.scan.delta_squares[module] for module in scanned.subspace_names)
        for module, name in scanned.subspace_names.items():
            if scanned.is_trained(module):
                # relative to the norm over all modules, so that all adapters have equal weight
                updates_by_module.setdefault(name, []).append((scanned.adapter, module, square**-0.5))
    rows = {}
    for done, (name, updates) in enumerate(sorted(updates_by_module.items())):
        progress("extending modules", done, len(updates_by_module))
        factors = [adapter.modules[module] for adapter, module, _ in updates]
        weights = [weight for _, _, weight in updates]
        rows[name] = extension.missing_components(factors, weights, subspace.modules[name], n_components)
    progress("extending modules", len(updates_by_module), len(updates_by_module))
    has_rows = any(len(side) for pair in rows.values() for side in pair)
    return spaces.extend(subspace, rows, storage.extend_basis) if has_rows else subspace


def project_adapter(
    scanned: ScannedAdapter, subspace: Subspace, storage: Storage, *, residual: bool = False
) -> EncodedAdapter:
    """Project all modules of an adapter on their bases, and round the coefficients to their storage.

    Args:
        scanned: The adapter.
        subspace: The subspace.
        storage: Storage of the coefficients.
        residual: True to store what the bases do not represent, too. Modules that are zero have no residual.
    """
    modules = {}
    for module, name in scanned.subspace_names.items():
        bases = subspace.modules[name]
        factors = scanned.adapter.modules[module]
        if residual and scanned.is_trained(module):
            modules[module] = project_with_residual(module, factors, bases, storage)
        else:
            modules[module] = project_module(module, factors, bases, storage, projection.dual_components(bases))
    return EncodedAdapter.of(modules)


def quantised_bases(subspace: Subspace) -> QuantisedBases:
    """Return the bases of an entropy-coded subspace as integers."""
    sides = [basis for pair in subspace.modules.values() for basis in (pair.down, pair.up)]
    decoded = basis_bytes.decode([(coded.stored_basis(side), (side.n_fitted, side.dimension)) for side in sides])
    return {name: (next(decoded), next(decoded)) for name in subspace.modules}


def encode_alone(
    scanned: ScannedAdapter, subspace: Subspace, bases: QuantisedBases, error_bound: float
) -> EncodedAdapter:
    """Encode one adapter with the bases of an entropy-coded pack, in the cluster in which it takes the fewest bytes.

    Args:
        scanned: The adapter.
        subspace: The subspace.
        bases: `quantised_bases` of the subspace.
        error_bound: Delta error that must not be exceeded.
    """
    names = scanned.subspace_names
    trained = [module for module in names if scanned.is_trained(module)]
    n_clusters = max(len(side.blocks) or 1 for pair in bases.values() for side in pair)
    best: tuple[AdapterCodes, dict[str, ModuleLayout], bytes, float] | None = None
    for cluster in range(n_clusters):
        codes, error = AdapterCodes(1.0, cluster, {}), 0.0
        if trained:
            updates = {}
            for module in trained:
                down, up = bases[names[module]]
                updates[names[module]] = scanned.adapter.modules[module], (down.block(cluster), up.block(cluster))
            with threads.suited_to(max(factors.spec.numbers for factors, _ in updates.values())):
                codes, error = encode_adapter(updates, cluster, error_bound)
        modules = {name: codes.modules.get(name, UNTRAINED) for name in names.values()}
        codes = replace(codes, modules=modules)
        layouts = {
            name: coded.with_grown_widths(ModuleLayout.of(bases[name], cluster), subspace.modules[name])
            for name in names.values()
        }
        (data,) = bitstream.encode_adapters([(codes, layouts)])
        if best is None or len(data) < len(best[2]):
            best = codes, layouts, data, error
    assert best is not None
    return encoded_by_codes(scanned, *best)
