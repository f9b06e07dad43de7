"""Similarity of the adapters as the pack reconstructs them, module by module."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core import projection
from ..core.batch import ModuleBatch, coefficients_as_batch, pad_factors
from ..core.progress import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from .analysis.pairs import Pairs, products
from .measure import coefficients_at


def compare_pairs(pack: Pack, packed: Sequence[PackedAdapter], progress: Progress) -> Pairs:
    """Compare all pairs of reconstructed adapters, by their coefficients alone if there is no residual."""
    pairs = Pairs.of(len(packed))
    for batch, dimensions in _reconstructed(pack, packed, list(pack.subspace.modules), progress):
        pairs.add(batch, dimensions)
    return pairs


def inner_products(pack: Pack, packed: Sequence[PackedAdapter], modules: Sequence[str], progress: Progress) -> Tensor:
    """Return the inner products of the reconstructed updates over some modules of the subspace, (n, n)."""
    sums = torch.zeros(len(packed), len(packed), dtype=torch.float64)
    for batch, _ in _reconstructed(pack, packed, modules, progress):
        sums += products(batch)
    return sums


def _reconstructed(
    pack: Pack, packed: Sequence[PackedAdapter], modules: Sequence[str], progress: Progress
) -> Iterator[tuple[ModuleBatch, tuple[int, int]]]:
    """Yield each module of the reconstructed adapters, and the dimensions (down, up) of the spanned spaces."""
    for done, module in enumerate(modules):
        progress("comparing coefficients", done, len(modules))
        bases = pack.subspace.modules[module]
        coefficients = [coefficients_at(adapter, module, bases) for adapter in packed]
        has_residual = any(c is not None and c.has_residual for c in coefficients)
        # coefficients suffice only for orthonormal bases without residuals: not for paired or integer components
        if has_residual or pack.cores == "diagonal" or bases.down.payload is not None:
            n_out, n_in = bases.shape
            factors = [None if c is None else projection.reconstruct(c, bases) for c in coefficients]
            dimensions = (n_in, n_out) if has_residual else (bases.down.k, bases.up.k)
            yield pad_factors(factors, n_in, n_out), dimensions
        else:
            yield coefficients_as_batch(coefficients, bases.down.k, bases.up.k), (bases.down.k, bases.up.k)
    progress("comparing coefficients", len(modules), len(modules))
