"""An adapter in the subspace of all the others: what is left of it in a fit that has not seen it. One module at a time.

Its rows and columns are taken out of the Gram matrix that all share, and the fit is done again from there, sweeps and
all. `crowded` is for modules with too many rows for that.
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
    """‖P_U D P_V‖² of each adapter that was left out: in bases of the size asked for, and by k, without sweeps.

    sizes: components (down, up) of these bases for each adapter; most: those of the bases by k, with the largest k.
    """

    fitted: Float[Tensor, " s"]
    by_k: Float[Tensor, "s g"]
    sizes: list[tuple[int, int]]
    most: list[tuple[int, int]]


def left_out(
    members: Weighted,
    one: ModuleBatch,
    chosen: Sequence[int],
    options: FitOptions,
    k: tuple[int, int] | None,
    grid: Sequence[int],
) -> Kept:
    """What the others' bases keep of each of `chosen`, places in `members`, of which `one` is the stack.

    Nothing, of an adapter that alone has the module. k: components (down, up) of the others' bases, or as many as there
    are; by the options, from the others' spectrum, where it is None. grid: the sizes of `by_k`, ascending.
    """
    if len(one) < 2 or not chosen:
        nothing = [(0, 0)] * len(chosen)
        return Kept(
            torch.zeros(len(chosen), dtype=torch.float64),
            torch.zeros(len(chosen), len(grid)).double(),
            nothing,
            nothing,
        )
    everyone = ExactFit(*members, options)
    fitted, by_k, sizes, there = [], [], [], []
    for index in chosen:
        others = everyone.without(index)
        most = max(grid[-1], *(k or (0, 0)), options.n_components or 0)
        first = others.leading(component_rule(None, 1.0) if options.energy is not None else component_rule(most, None))
        size = k or others.count_components(first, options)
        found = others.fit(first, size)
        alone = one.select([index])
        fitted.append(kept(alone, found.down.components, found.up.components))
        by_k.append(kept_by_k(alone, first[0].components(), first[1].components(), grid))
        sizes.append((found.down.k, found.up.k))
        there.append((first[0].k, first[1].k))
    return Kept(torch.cat(fitted), torch.cat(by_k), sizes, there)
