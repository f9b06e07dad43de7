"""New adapters on their way into a pack: read, checked against its subspace, each module with its place there."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..codec import bitstream
from ..codec.adapter_codes import UNTRAINED, AdapterCodes, ModuleLayout
from ..codec.adapter_encoder import encode_adapter
from ..codec.quantised_basis import QuantisedBasis
from ..codec.storage import coded
from ..codec.storage.base import Storage
from ..core import extension, keys, module_names, threads
from ..core.adapter import Adapter
from ..core.extension import NewAdapter, Progress
from ..core.options import to_int
from ..core.subspace import Subspace
from ..errors import AdapterNameError, ModuleNameError, NothingSharedWarning, OptionError, ShapeError
from ..formats import checks
from ..formats.sources import AdapterSource
from .manifest import SubspaceInfo
from .packed_adapter import Packing


@dataclass(frozen=True, slots=True)
class Host:
    """What a pack asks of a new adapter. names: of those that are in it."""

    info: SubspaceInfo
    names: Collection[str]
    base_model: str | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class Joining:
    """A new adapter, and the names that its modules have in the subspace, but for those that the subspace lacks."""

    packing: Packing
    places: Mapping[str, str]

    @property
    def adapter(self) -> Adapter:
        return self.packing.adapter


def read(
    found: Sequence[AdapterSource], host: Host, *, carry_missing: bool, same_base: bool, options: Mapping[str, Any]
) -> list[Joining]:
    """Every adapter, in the order given. An error names the first that the pack does not take.

    options: those of `read_adapter`.
    """
    joining = [_read(one, host, carry_missing, same_base, options) for one in found]
    checks.check_names([*host.names, *(one.adapter.name for one in joining)])
    return joining


def _read(
    found: AdapterSource, host: Host, carry_missing: bool, same_base: bool, options: Mapping[str, Any]
) -> Joining:
    adapter = checks.read_source(found, options)
    adapter = replace(adapter, name=keys.check_name(adapter.name if found.name is None else found.name))
    if adapter.name.lower() in {name.lower() for name in host.names}:
        raise AdapterNameError(
            f"the pack already has an adapter named {adapter.name!r}. Give the new one another name "
            "(NAME=PATH, name=), or remove the old one first."
        )
    if adapter.subspace is None or adapter.subspace not in host.info.lineage:
        this = Adapter("the pack", {}, {}, base_model=host.base_model, revision=host.revision)
        checks.check_one_base([this, adapter], same_base)
    checks.check_family(adapter, ((module, sides["down"].dimension) for module, sides in host.info.modules.items()))
    places = _places(adapter, host.info, carry_missing)
    return Joining(Packing(adapter, checks.scan(adapter)), places)


def _places(adapter: Adapter, info: SubspaceInfo, carry_missing: bool) -> dict[str, str]:
    places = module_names.resolve_all(adapter.specs, info.modules)
    missing = [module for module, place in places.items() if place is None]
    if missing and not carry_missing:
        raise ModuleNameError(
            f"adapter {adapter.name!r} has {len(missing)} of {len(places)} modules that the subspace lacks, "
            f"such as {missing[0]!r}. carry_missing=True (--carry-missing) keeps them as they are; or fit the pack "
            "again with it."
        )
    found = {module: place for module, place in places.items() if place is not None}
    if missing and not found:
        warnings.warn(
            f"adapter {adapter.name!r} has no module in common with the pack, such as {min(info.modules)!r}: all of it "
            "is kept as it is, and nothing is shared. If it belongs to another model, fit it in a pack of its own.",
            NothingSharedWarning,
            stacklevel=6,
        )
    for module, place in found.items():
        sides, spec = info.modules[place], adapter.specs[module]
        wanted = sides["up"].dimension, sides["down"].dimension
        if (spec.out_features, spec.in_features) != wanted:
            raise ShapeError(
                f"module {module}: (out, in) is {(spec.out_features, spec.in_features)} in adapter "
                f"{adapter.name!r} and {wanted} in the pack. It belongs to a different base model."
            )
    return found


def check_extend(extend: int, info: SubspaceInfo, coefficients: Storage) -> int:
    """`extend` as a number of directions that the widest side could take. coefficients: how the pack stores them."""
    extend = to_int("extend", extend)
    largest = max((side.dimension for pair in info.modules.values() for side in pair.values()), default=0)
    if coefficients.extension_error is not None:
        raise OptionError(coefficients.extension_error)
    if not 1 <= extend <= largest:
        raise OptionError(
            f"extend={extend}: at least 1 direction a side, and at most {largest}, the largest dimension of a "
            "module. Leave it away to project on the subspace as it is."
        )
    return extend


def extended(
    subspace: Subspace, storage: Storage, joining: Sequence[Joining], most: int, progress: Progress
) -> Subspace:
    """The subspace with at most `most` more directions a side, whatever order the adapters were given in; itself if it
    misses nothing of them. storage: of the subspace."""
    ordered = sorted(joining, key=lambda one: (one.packing.scan.content_hash, one.adapter.name))
    newcomers = [NewAdapter(one.adapter, one.packing.scan.delta_squares, one.places) for one in ordered]
    return extension.extend_for(subspace, newcomers, most, progress, storage.extend_basis)


def rounded_bases(subspace: Subspace) -> dict[str, tuple[QuantisedBasis, QuantisedBasis]]:
    """The bases (down, up) of a coded subspace in whole numbers, by module."""
    sides = [basis for pair in subspace.modules.values() for basis in (pair.down, pair.up)]
    found = bitstream.decode_bases([(coded.basis_bytes(one), (one.n_fitted, one.dimension)) for one in sides])
    return {name: (next(found), next(found)) for name in subspace.modules}


def code(
    one: Joining, subspace: Subspace, bases: Mapping[str, tuple[QuantisedBasis, QuantisedBasis]], error: float
) -> None:
    """Give a new adapter its coefficients, and what is beside them, in the cluster in which it takes fewest bytes.

    bases: `rounded_bases` of the subspace. error: the delta error that it must not exceed.
    """
    packing = one.packing
    packing.places.update(one.places)
    trained = [module for module in one.places if packing.scan.delta_squares[module] > 0]
    best: tuple[AdapterCodes, dict[str, ModuleLayout], bytes, float] | None = None
    for cluster in range(max(len(side.blocks) or 1 for pair in bases.values() for side in pair)):
        found, lost = AdapterCodes(1.0, cluster, {}), 0.0
        if trained:
            blocks = {name: [side.block(cluster) for side in bases[one.places[name]]] for name in trained}
            updates = {
                one.places[name]: (one.adapter.modules[name], (pair[0], pair[1])) for name, pair in blocks.items()
            }
            with threads.suited_to(max(factors.spec.numbers for factors, _ in updates.values())):
                found, lost = encode_adapter(updates, cluster, error)
        whole = replace(found, modules={at: found.modules.get(at, UNTRAINED) for at in one.places.values()})
        places = {
            at: coded.with_grown_widths(ModuleLayout.of(bases[at], cluster), subspace.modules[at])
            for at in one.places.values()
        }
        (data,) = bitstream.encode_adapters([(whole, places)])
        if best is None or len(data) < len(best[2]):
            best = whole, places, data, lost
    assert best is not None
    packing.take_codes(*best)
