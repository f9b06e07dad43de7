"""Adapters in the subspace of all the others, by a fit without them. One module at a time.

The rows of the adapter are taken out of the Gram matrix of all, and the fit continues from there, with sweeps.
`crowded` is for modules with too many rows for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.basis import component_rule
from ...core.batch import ModuleBatch
from ...core.exact_fit import ExactFit
from ...core.fit_options import FitOptions
from .losses import kept, kept_by_k
from .spectra import Weighted


@dataclass(frozen=True, slots=True)
class Kept:
    """‖P_U D P_V‖² of each adapter that was left out: in bases of the requested size, and by k without sweeps.

    sizes: components (down, up) of the bases of each adapter. most: those of the bases by k, at the largest k.
    """

    fitted: Float[Tensor, " s"]
    by_k: Float[Tensor, "s g"]
    sizes: list[tuple[int, int]]
    most: list[tuple[int, int]]


def left_out(
    members: Weighted,
    batch: ModuleBatch,
    chosen: Sequence[int],
    options: FitOptions,
    k: tuple[int, int] | None,
    grid: Sequence[int],
) -> Kept:
    """Return what the bases of the others keep of each adapter in `chosen`; 0 if no other has the module.

    members: factors and weights of the adapters; batch: the same factors. chosen: indices of members.
    k: components (down, up) of the bases, or as many as there are; None chooses them from the spectrum of the others,
    by the options. grid: the sizes of `by_k`, ascending.
    """
    if len(batch) < 2 or not chosen:
        nothing = [(0, 0)] * len(chosen)
        return Kept(
            torch.zeros(len(chosen), dtype=torch.float64),
            torch.zeros(len(chosen), len(grid)).double(),
            nothing,
            nothing,
        )
    everyone = ExactFit.stack(*members, options)
    fitted, by_k, sizes, most_sizes = [], [], [], []
    for index in chosen:
        others = everyone.without(index)
        most = max(grid[-1], *(k or (0, 0)), options.n_components or 0)
        first = others.leading(component_rule(None, 1.0) if options.energy is not None else component_rule(most, None))
        size = k or others.count_components(first, options)
        bases = others.fit(first, size)
        alone = batch.select([index])
        fitted.append(kept(alone, bases.down.components, bases.up.components))
        by_k.append(kept_by_k(alone, first[0].components(), first[1].components(), grid))
        sizes.append((bases.down.k, bases.up.k))
        most_sizes.append((first[0].k, first[1].k))
    return Kept(torch.cat(fitted), torch.cat(by_k), sizes, most_sizes)
