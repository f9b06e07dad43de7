"""Packs whose fit was given an error: bytes are spent on bases, coefficients and rests as they pay."""

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from planted import factors_in, orthonormal, random_factors

SHARES = ("nothing", "much")


def coded_adapters(shapes, shared, n=6, rank=3, first=0):
    """n adapters, which share six directions on each side of each module, and some noise, or nothing."""
    adapters = []
    for index in range(first, first + n):
        modules = {}
        for place, (module, (n_out, n_in)) in enumerate(shapes.items()):
            seed = 100 * index + 7 * place
            if shared == "nothing":
                modules[module] = random_factors(rank, n_out, n_in, seed=seed, size=0.5)
            else:
                bases = orthonormal(6, n_in, 5 + place), orthonormal(6, n_out, 50 + place)
                modules[module] = factors_in(bases, rank, seed=seed, noise=0.05)
        adapters.append(from_factors(f"a{index}", {name: _narrow(one) for name, one in modules.items()}))
    return adapters


def coded_pack(shapes, shared, n=6, rank=3, max_error=0.2):
    """A pack of such adapters."""
    return ex.fit(coded_adapters(shapes, shared, n, rank), max_error=max_error)


def _narrow(factors):
    return type(factors)(factors.down.float(), factors.up.float(), factors.scaling)
