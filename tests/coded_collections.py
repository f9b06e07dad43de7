"""Collections whose bytes are to be chosen: of every kind that a fit for an error or a size may meet."""

import torch

import reference
from eigenlorax.core.adapter import LoRAFactors, from_factors
from planted import MODULES, factors_in, generator, orthonormal, random_adapter, random_collection, shared_collection

QUERY = "encoder.0.query"
WIDE, TALL = {"wide": (3, 211)}, {"tall": (211, 3)}
NARROW = {"narrow": (7, 5), "plain": (31, 23)}
LINES = {"row": (1, 50), "column": (53, 1)}


def changed(adapter, *, down=1.0, up=1.0, scaling=None):
    """The same adapter with its factors and scaling multiplied and replaced."""
    return from_factors(
        adapter.name,
        {
            name: LoRAFactors(f.down * down, f.up * up, f.scaling if scaling is None else scaling)
            for name, f in adapter.modules.items()
        },
        base_model="org/base",
    )


def untrained(adapter, *modules):
    """The same adapter with no update in some of its modules."""
    return from_factors(
        adapter.name,
        {
            name: LoRAFactors(f.down, torch.zeros_like(f.up), f.scaling) if name in modules else f
            for name, f in adapter.modules.items()
        },
        base_model="org/base",
    )


def of_ranks(ranks, *, noise=0.0, dtype=torch.float32, k=(5, 6), seed=0):
    """Adapters of these ranks, and scalings of either sign, in k directions that they share on both sides."""
    bases = {
        name: (orthonormal(k[0], n_in, seed + 11 + i), orthonormal(k[1], n_out, seed + 77 + i))
        for i, (name, (n_out, n_in)) in enumerate(MODULES.items())
    }
    found = []
    for number, rank in enumerate(ranks):
        modules = {}
        for place, name in enumerate(MODULES):
            at, scaling = seed + 100 * number + 10 * place, (-1) ** number * (0.5 + number)
            one = factors_in(bases[name], rank, seed=at, scaling=scaling, noise=noise)
            modules[name] = LoRAFactors(one.down.to(dtype), one.up.to(dtype), one.scaling)
        found.append(from_factors(f"a{seed}-{number}", modules, base_model="org/base"))
    return found


def grouped(groups, each, *, noise=0.0):
    """Groups of adapters in directions of their own."""
    return [one for group in range(groups) for one in of_ranks([3] * each, noise=noise, k=(4, 5), seed=10_000 * group)]


def convolution(seed):
    """An adapter of a 3 × 3 convolution and of a linear layer."""
    g = generator(seed)
    modules = {
        "conv": LoRAFactors(torch.randn(3, 5 * 9, generator=g), torch.randn(11, 3, generator=g), 1.5, (3, 3)),
        "linear": LoRAFactors(torch.randn(2, 7, generator=g), torch.randn(13, 2, generator=g), 0.5),
    }
    return from_factors(f"conv-{seed}", modules, base_model="org/base")


def lacking(adapters):
    """Adapters of which every third lacks the first module, and every third the second."""
    return [
        from_factors(
            one.name,
            {name: f for place, (name, f) in enumerate(one.modules.items()) if number % 3 != place},
            base_model="org/base",
        )
        for number, one in enumerate(adapters)
    ]


def shared(n, noise=0.0):
    return shared_collection(n, noise=noise)[0]


COLLECTIONS = {
    "shared": lambda: shared(8),
    "shared, with noise": lambda: shared(8, noise=0.1),
    "unshared": lambda: random_collection(6),
    "one alone": lambda: random_collection(1),
    "two": lambda: random_collection(2),
    "two copies": lambda: [random_adapter("a", 1), random_adapter("b", 1)],
    "an outlier": lambda: [*shared(8), random_adapter("far", 777)],
    "three groups": lambda: grouped(3, 4),
    "four groups, with noise": lambda: grouped(4, 4, noise=0.05),
    "an untrained one": lambda: [*shared(4), untrained(random_adapter("zero", 3), *MODULES)],
    "a module that nobody trained": lambda: [untrained(one, QUERY) for one in random_collection(3)],
    "a module that one trained": lambda: [untrained(one, QUERY) if i else one for i, one in enumerate(shared(4))],
    "modules that some lack": lambda: lacking(shared(6)),
    "ranks that differ": lambda: of_ranks([1, 2, 3, 5, 8, 12, 1, 2]),
    "ranks that differ, with noise": lambda: of_ranks([1, 2, 3, 5, 8, 12, 1, 2], noise=0.05),
    "float16": lambda: of_ranks([2, 3, 4, 5], dtype=torch.float16),
    "float64": lambda: of_ranks([2, 3, 4, 5], dtype=torch.float64),
    "tiny updates": lambda: [changed(one, down=1e-20, up=1e-20) for one in shared(4)],
    "huge updates": lambda: [changed(one, down=1e15, up=1e15) for one in shared(4)],
    "lopsided factors": lambda: [changed(one, down=1e15, up=1e-15) for one in shared(4)],
    "norms far apart": lambda: [changed(one, down=10.0 ** (5 * i - 10)) for i, one in enumerate(shared(5))],
    "scalings far apart": lambda: [
        changed(one, scaling=s) for one, s in zip(shared(5), [1e-8, 1e8, -3.0, 1e20, -1e-20], strict=True)
    ],
    "more in than out": lambda: random_collection(4, modules=WIDE),
    "more out than in": lambda: random_collection(4, modules=TALL),
    "single rows and columns": lambda: random_collection(4, modules=LINES),
    "ranks above dimensions": lambda: [random_adapter(f"a{i}", 9 * i, rank=40, modules=NARROW) for i in range(4)],
    "convolutions": lambda: [convolution(seed) for seed in range(4)],
}


def true_errors(pack, originals, modules=None):
    """Of each adapter of a pack, its delta error by dense matrices in float64; 0 where nothing is, and nothing came."""
    found = {}
    for one in originals:
        kept = pack.adapter(one.name, torch.float64)
        assert set(kept.specs) == set(one.specs)
        for name in one.specs:
            assert kept.specs[name].rank == one.specs[name].rank
        some = any(float(f.up.abs().max()) for f in one.modules.values())
        if some:
            found[one.name] = reference.delta_error(one, kept)
        else:
            assert not any(reference.dense(f).any() for f in kept.modules.values())
            found[one.name] = 0.0
    return found
