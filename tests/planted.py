"""Collections whose answer is known by construction. Sizes are pairwise distinct, so that a swapped axis shows."""

import torch

from eigenlorax.core.adapter import LoRAFactors, from_factors

# by dtype: relative tolerance of one product in it
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MODULES = {"encoder.0.query": (41, 29), "encoder.0.dense": (53, 37)}  # (out, in)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(k, d, seed):
    return torch.linalg.qr(normal(d, k, seed=seed))[0].mT.contiguous()


def random_factors(rank, n_out, n_in, *, seed, scaling=2.0, dtype=torch.float64, size=1.0):
    down, up = normal(rank, n_in, seed=seed), normal(n_out, rank, seed=seed + 5000)
    return LoRAFactors((size * down).to(dtype), (size * up).to(dtype), scaling)


def of_spectrum(sigma, n_out, n_in, *, seed, size=1.0, kernel=()):
    """Factors with these singular values, times a size, in random directions."""
    roots = torch.tensor(sigma, dtype=torch.float64).sqrt()[:, None]
    right, left = orthonormal(len(sigma), n_in, seed), orthonormal(len(sigma), n_out, seed + 5000)
    return LoRAFactors(roots * right, (roots * left).mT.contiguous(), size, kernel)


def factors_in(bases, rank, *, seed, scaling=2.0, noise=0.0):
    """Factors whose rows lie in the spans of (down basis, up basis), but for noise."""
    down_basis, up_basis = bases
    down = normal(rank, down_basis.shape[0], seed=seed) @ down_basis
    up = up_basis.mT @ normal(up_basis.shape[0], rank, seed=seed + 1)
    down = down + noise * normal(*down.shape, seed=seed + 2)
    up = up + noise * normal(*up.shape, seed=seed + 3)
    return LoRAFactors(down, up, scaling)


def shared_collection(n, *, k_down=5, k_up=6, rank=3, noise=0.0, dtype=torch.float32):
    """n adapters that share a planted subspace of k_down and k_up directions, and that subspace."""
    bases = {
        name: (orthonormal(k_down, n_in, 11 + i), orthonormal(k_up, n_out, 77 + i))
        for i, (name, (n_out, n_in)) in enumerate(MODULES.items())
    }
    adapters = []
    for index in range(n):
        modules = {}
        for offset, name in enumerate(MODULES):
            one = factors_in(bases[name], rank, seed=100 * index + 10 * offset, scaling=0.5 + index, noise=noise)
            modules[name] = LoRAFactors(one.down.to(dtype), one.up.to(dtype), one.scaling)
        adapters.append(from_factors(f"adapter-{index}", modules, base_model="org/base"))
    return adapters, bases


def decaying_rows(n, d, decades, *, seed):
    """Rows whose singular values fall evenly over `decades`."""
    left, right = orthonormal(n, n, seed), orthonormal(n, d, seed + 1)
    return left @ torch.diag(10.0 ** torch.linspace(0, -decades, n, dtype=torch.float64)) @ right


def assert_same_span(rows, other, atol=1e-9):
    """Two sets of orthonormal rows span the same space: their projectors agree."""
    torch.testing.assert_close(rows.mT @ rows, other.mT @ other, atol=atol, rtol=0)


def random_adapter(name, seed, *, rank=3, modules=MODULES, base="org/base", dtype=torch.float32, size=1.0, **fields):
    factors = {
        module: random_factors(rank, n_out, n_in, seed=seed + i, dtype=dtype, size=size)
        for i, (module, (n_out, n_in)) in enumerate(modules.items())
    }
    return from_factors(name, factors, base_model=base, **fields)


def random_collection(n=5, **options):
    return [random_adapter(f"a{i}", 100 * i, rank=2 + i % 3, **options) for i in range(n)]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
