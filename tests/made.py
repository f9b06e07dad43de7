"""Collections of factors with an answer, at sizes where chance is small."""

import torch

from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis.pairs import Pairs
from planted import MODULES, factors_in, normal, orthonormal, random_factors

WIDE = {"layer.0.query": (131, 113), "layer.0.value": (97, 127)}


def pairs_of(collection, shapes=MODULES):
    found = Pairs.of(len(collection))
    for module, (n_out, n_in) in shapes.items():
        found.add(pad_factors([one.get(module) for one in collection], n_in, n_out))
    return found


def random(n, *, rank=3, shapes=WIDE, seed=0):
    return [
        {
            module: random_factors(rank, *shape, seed=seed + 977 * i + 31 * place)
            for place, (module, shape) in enumerate(shapes.items())
        }
        for i in range(n)
    ]


def gauged(one, seed, condition=3.0):
    """The same updates from other factors: B·M, M⁻¹·A."""
    found = {}
    for place, (module, factors) in enumerate(one.items()):
        rank = factors.down.shape[0]
        sizes = condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)
        mixing = orthonormal(rank, rank, seed + place) @ torch.diag(sizes) @ orthonormal(rank, rank, seed + place + 500)
        found[module] = LoRAFactors(
            torch.linalg.solve(mixing, factors.down.double()), factors.up.double() @ mixing, factors.scaling
        )
    return found


def awkward():
    """Ranks that differ, missing modules, zeros, signs, sizes far apart, narrow dtypes, and an adapter twice."""
    query, other = MODULES
    made = [
        {m: random_factors(2 + i % 3, *MODULES[m], seed=100 * i + j) for j, m in enumerate(MODULES)} for i in range(9)
    ]
    zero = made[3][query]
    made[1] = {other: made[1][other]}
    made[2] = {m: LoRAFactors(f.down, f.up, -0.7) for m, f in made[2].items()}
    made[3][query] = LoRAFactors(zero.down, torch.zeros_like(zero.up), zero.scaling)
    made[4] = {m: LoRAFactors(f.down * 1e9, f.up * 1e4, f.scaling) for m, f in made[4].items()}
    made[5] = {m: LoRAFactors(f.down * 1e-4, f.up * 1e-8, f.scaling) for m, f in made[5].items()}
    made[6] = {m: LoRAFactors(f.down.half(), f.up.bfloat16(), f.scaling) for m, f in made[6].items()}
    made[7] = {query: LoRAFactors(made[7][query].down, made[7][query].up, 0.0)}
    return [*made, gauged(made[0], 3)]


def one_start(n, *, trained, rank=4, shapes=WIDE, seed=0):
    """Adapters whose A began as the same numbers, of which `trained` of the norm is their own by now."""
    made = []
    for i in range(n):
        one = {}
        for place, (module, (n_out, n_in)) in enumerate(shapes.items()):
            start = normal(rank, n_in, seed=seed + place)
            own = normal(rank, n_in, seed=seed + 50 + 977 * i + place)
            down = (1 - trained**2) ** 0.5 * start + trained * own
            one[module] = LoRAFactors(down, normal(n_out, rank, seed=seed + 90 + 977 * i + place), 2.0)
        made.append(one)
    return made


def of_one_subspace(n, *, noise=0.0, rank=3, k=6, shapes=WIDE, seed=0):
    """Adapters in k directions of their own on either side of each module, but for noise; k and all from the seed."""
    bases = {
        module: (orthonormal(k, n_in, seed + 7 * place), orthonormal(k, n_out, seed + 7 * place + 3))
        for place, (module, (n_out, n_in)) in enumerate(shapes.items())
    }
    return [
        {
            module: factors_in(bases[module], rank, seed=seed + 1000 + 97 * i + 11 * place, noise=noise)
            for place, module in enumerate(shapes)
        }
        for i in range(n)
    ]


def with_a_mean(n, *, share, shapes=WIDE, seed=0):
    """Adapters of one common update and one of their own, the common one of that share of the squared norm, in
    factors that have nothing in common."""
    common = random(1, rank=2, shapes=shapes, seed=seed + 7)[0]
    made = []
    for i, own in enumerate(random(n, rank=2, shapes=shapes, seed=seed + 11)):
        one = {}
        for module, factors in own.items():
            sizes = [torch.linalg.matrix_norm(f.up @ f.down) for f in (common[module], factors)]
            one[module] = LoRAFactors(
                torch.cat([common[module].down * share**0.5 / sizes[0], factors.down * (1 - share) ** 0.5 / sizes[1]]),
                torch.cat([common[module].up, factors.up], dim=1),
                1.0,
            )
        made.append(gauged(one, seed + 13 * i))
    return made
