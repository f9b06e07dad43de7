"""Packs with cores, the form of joint diagonalisation (arXiv 2407.00066): a baseline. `fit` does not write them.

With full cores, an adapter keeps a number for each pair of components of a module, between the bases of any fit. With
diagonal cores, it keeps one for each component, between bases whose rows go in pairs and are not orthogonal.
"""

from collections.abc import Sequence
from dataclasses import replace

import joint
import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.codec.storage.cores import DiagonalCoreStorage
from eigenlorax.codec.storage.table import storage_by_name
from eigenlorax.core import module_names
from eigenlorax.core.adapter import Adapter, LoRAFactors, delta_square
from eigenlorax.core.basis import Basis, component_rule
from eigenlorax.core.batch import pad_factors
from eigenlorax.core.exact_fit import ExactFit
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.core.linalg import orthonormal_rows
from eigenlorax.core.subspace import ModuleBases, Subspace
from eigenlorax.formats import checks, sources
from eigenlorax.pack import manifest

NEGLIGIBLE = 1e-14


def fit_with_cores(adapters: sources.Sources, kind: str, **options) -> ex.Pack:
    """Return a pack of adapters with `kind` cores, "full" or "diagonal"; options: those of `fit`, dtypes floats."""
    plain = ex.fit(adapters, **{"warn_above": 1.0, **options})
    read = [checks.read_source(source, {}) for source in sources.find_adapters(adapters)]
    floats = storage_by_name(plain.storage)
    coefficients = storage_by_name(f"{kind}-{plain.storage}")
    subspace = plain.subspace
    if isinstance(coefficients, DiagonalCoreStorage):
        subspace = paired_subspace(plain.subspace, read, options["n_components"], coefficients.ridge)
        subspace = Subspace({name: floats.round_bases(pair) for name, pair in subspace.modules.items()})
    about = {"base_model": plain.base_model, "revision": plain.revision, "coefficient_dtype": coefficients.name}
    info = manifest.describe(subspace, floats)
    pack = ex.Pack(subspace, info, {}, plain.fit_info, **about)
    pack.add_all(read, carry_missing=True, same_base=True, warn_above=1.0)
    packed = {name: pack.packed(name) for name in pack.names}
    fitted = {name: replace(one, record=replace(one.record, in_fit=True)) for name, one in packed.items()}
    return ex.Pack(subspace, info, fitted, plain.fit_info, **about)


def paired_subspace(plain: Subspace, adapters: Sequence[Adapter], k: int, ridge: float) -> Subspace:
    """Return the bases of every module of `plain` for diagonal cores."""
    weights, members = [], []
    for adapter in adapters:
        modules = {
            module: place for module, place in module_names.resolve_all(adapter.specs, plain.modules).items() if place
        }
        squares = {module: delta_square(adapter.modules[module]) for module in modules}
        if any(squares.values()):
            weights.append(sum(squares.values()) ** -0.5)
            members.append({place: adapter.modules[module] for module, place in modules.items() if squares[module]})
    found = {}
    for name, bases in plain.modules.items():
        trained = [(each[name], weight) for each, weight in zip(members, weights, strict=True) if name in each]
        found[name] = paired(*map(list, zip(*trained, strict=True)), k, ridge) if trained else bases
    return Subspace(found)


def paired(factors: Sequence[LoRAFactors], weights: Sequence[float], k: int, ridge: float) -> ModuleBases:
    """Return bases of a module for diagonal cores, float64.

    Both sides have as many rows, at most k, of length 1: row j of one goes with row j of the other. Those that adapters
    have most of come first. factors, weights: as for `exact_fit.fit_module`.
    """
    n_out, n_in = factors[0].up.shape[0], factors[0].down.shape[1]
    each = torch.tensor(weights, dtype=torch.float64)
    fitted = joint.diagonal(pad_factors(factors, n_in, n_out), each, min(k, n_in, n_out), ridge=ridge)
    sizes = (each[:, None] * fitted.cores).square().sum(0)
    order = sizes.argsort(descending=True, stable=True)
    order = order[sizes[order] > NEGLIGIBLE * sizes.max()]
    sides = ExactFit.stack(factors, weights, FitOptions(n_components=k, sweeps=0))
    alone = sides.refine(sides.leading(component_rule(k, None)))
    return ModuleBases(
        down=with_rows(alone.down, fitted.down[order], sides.down.weighted(sides.down_roots)),
        up=with_rows(alone.up, fitted.up[order], sides.up.weighted(sides.up_roots)),
    )


def with_rows(basis: Basis, rows: Tensor, weighted: Tensor) -> Basis:
    """Return the basis with other rows, each with its largest entry positive, and the energy in their span."""
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    energy = float((weighted @ orthonormal_rows(rows).mT).square().sum() / weighted.square().sum())
    return replace(basis, components=torch.where(largest < 0, -rows, rows), energy=min(energy, 1.0))
