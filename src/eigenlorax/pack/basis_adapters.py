"""Adapters of an entropy-coded pack as coefficients in the pack's basis, with upper bounds of their errors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..codec.storage.table import storage_by_name
from ..core import projection
from ..core.adapter import LazyMapping
from ..core.options import to_float
from ..errors import OptionError
from .contents import PackContents
from .encoding import EncodedAdapter, project_module
from .packed_adapter import PackedAdapter, coefficient_bytes, unpack

if TYPE_CHECKING:
    from .pack import Pack

SERVE_WITHIN = 0.1
"""Default error up to which a basis serves an adapter, unless the error bound of the pack is more than half of it."""
COEFFICIENT_DTYPE = "float32"
"""Storage of coefficients on a basis."""
RANDOM_COMPONENTS_NOTE = (
    "The pack was made for storage and has no basis for training: new tasks train on these random components, and on "
    "those that saved bytes, often few or none. Fit it with basis=32 (--basis 32) or purpose='training' "
    "(--for training) for components that the adapters share."
)
"""Note on an entropy-coded pack that was augmented without a basis."""


def check_has_basis(pack: PackContents) -> "Pack":
    """Return the basis of a pack; `OptionError` if it has none."""
    if pack.basis is None:
        remedy = (
            "Fit it with basis=32 (--basis 32)." if pack.is_coded else "Its adapters are coefficients in it already."
        )
        raise OptionError(f"{pack!r} has no basis beside its subspace. {remedy}")
    return pack.basis


def check_within(within: float | None, pack: PackContents, option: str = "serve_within") -> float:
    """Return the error up to which the basis of a pack serves an adapter; `OptionError` if it is not 0 to 1.

    Args:
        within: The option; None for the default, `SERVE_WITHIN` or twice the pack's error bound.
        pack: The pack.
        option: Name of the option, for the error message.
    """
    if within is None:
        # an adapter that is as inexact as the pack allows needs some room for the basis
        return max(SERVE_WITHIN, 2 * pack.aim)
    within = to_float(option, within)
    if not 0 < within < 1:
        raise OptionError(
            f"{option} must be above 0 and below 1, got {within!r}: it is the largest error of an adapter that a basis "
            "serves."
        )
    return within


def project(pack: PackContents, name: str) -> PackedAdapter:
    """Return an adapter as the pack's basis represents it: coefficients of its decoded update.

    `delta_error` of its record is an upper bound of the error against the original. By the triangle inequality, it is
    e + (1 + e) · p for the error e in the pack and the error p of the projection, since the norm of the decoded update
    is at most 1 + e times that of the original.

    Args:
        pack: A pack that has a basis.
        name: Name of the adapter.

    Raises:
        OptionError: The pack has no basis.
        AdapterNameError: The name is unknown.
    """
    basis, packed = check_has_basis(pack), pack.packed(name)
    decoded, storage = unpack(packed, pack.subspace, pack.lossless_dtype), storage_by_name(COEFFICIENT_DTYPE)
    modules = {}
    for module, subspace_name in packed.subspace_names.items():
        bases = basis.subspace.modules[subspace_name]
        modules[module] = project_module(
            module, decoded.modules[module], bases, storage, projection.dual_components(bases)
        )
    encoded = EncodedAdapter.of(modules)
    record = replace(
        packed.record,
        delta_error=_bound(packed.record.delta_error, encoded.error.delta_error),
        rounding_error=_bound(packed.record.rounding_error, encoded.error.rounding_error),
        bound=True,
        coefficient_bytes=coefficient_bytes(encoded.coefficients, encoded.payload),
        head_bytes=packed.record.source_head_bytes,
        carried_bytes=packed.record.source_carried_bytes,
    )
    return replace(
        packed,
        coefficients=encoded.coefficients,
        payload=encoded.payload,
        # decoded, because their codes may need references that a pack of the basis does not have
        heads=LazyMapping(packed.heads, packed.heads.__getitem__),
        carried=LazyMapping(packed.carried, packed.carried.__getitem__),
        subspace=basis.info.fingerprint,
        parent=None,
        record=record,
    )


def _bound(recorded: float, added: float) -> float:
    return recorded + (1 + recorded) * added


def select_within(projected: Mapping[str, PackedAdapter], within: float) -> dict[str, PackedAdapter]:
    """Return the projected adapters whose errors are within the bound; `OptionError` if there are some but none is."""
    selected = {name: packed for name, packed in projected.items() if packed.record.delta_error <= within}
    if projected and not selected:
        smallest = min(packed.record.delta_error for packed in projected.values())
        # rounded up, so that the adapter is included if this is passed
        enough = math.ceil(smallest * 1000) / 1000
        remedy = f"Pass a larger error (within={enough:g} includes one). " if enough < 1 else ""
        adapters = f"{len(projected):,} adapter{'s' * (len(projected) > 1)}"
        raise OptionError(
            f"The basis represents none of {adapters} with an error of at most {within:g}: the smallest upper "
            f"bound is {smallest:.3f}. {remedy}AdapterBank(model, pack) serves them from the pack itself, without a "
            "shared basis."
        )
    return selected


def refusal_reason(packed: PackedAdapter, within: float) -> str | None:
    """Return why a projected adapter is not served by the basis; None if its error is within the bound.

    Args:
        packed: The adapter, from `project`.
        within: Largest error that is served.
    """
    if packed.record.delta_error <= within:
        return None
    return (
        f"its error in the basis may be above {within:g}, the largest that is served (serve_within=, --serve-within); "
        "without a shared basis it can be served"
    )
