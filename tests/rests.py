"""Packs whose adapters have a rest beside their coefficients, put there by hand."""

from dataclasses import replace

import eigenlorax as ex
from planted import normal

# which sides have a rest of adapters a0, a1, …: module after module in turn; what is not named has none
SIDES = {"a0": ["both"], "a1": ["down", "none", "up"], "a2": ["up", "both", "none", "down"]}


def with_rest(coefficients, bases, sides, seed, size=0.2):
    """Coefficients of a module with a rest on one side or both, which is not orthogonal to the bases."""
    n_out, n_in = bases.shape
    dtype = coefficients.down.dtype
    down = size * normal(coefficients.rank, n_in, seed=seed)
    up = size * normal(n_out, coefficients.rank, seed=seed + 1)
    return replace(
        coefficients,
        down_residual=down.to(dtype) if sides in ("down", "both") else None,
        up_residual=up.to(dtype) if sides in ("up", "both") else None,
    )


def with_rests(pack, sides, seed=700):
    """The same pack with rests for the adapters named."""
    adapters = {}
    for number, name in enumerate(pack.names):
        packed = pack.packed(name)
        wanted = sides.get(name, ["none"])
        found = {
            module: with_rest(
                coefficients,
                pack.subspace.modules[packed.subspace_names[module]],
                wanted[place % len(wanted)],
                seed + 100 * number + 2 * place,
            )
            for place, (module, coefficients) in enumerate(packed.coefficients.items())
        }
        record = replace(packed.record, coefficient_bytes=sum(one.stored_bytes for one in found.values()))
        adapters[name] = replace(packed, coefficients=found, record=record)
    return with_adapters(pack, adapters)


def with_adapters(pack, adapters):
    """The same pack with other packed adapters, by name."""
    return ex.Pack(
        pack.subspace,
        pack.info,
        adapters,
        pack.fit_info,
        base_model=pack.base_model,
        revision=pack.revision,
        coefficient_dtype=pack.coefficient_storage,
    )
