"""Leave-one-out fits of one module: the squared norm of each adapter in bases fitted without it.

The rows of the adapter are removed from the Gram matrix of all rows, and the fit continues from there, with sweeps.
`crowded` handles modules with too many rows for this.
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
from .losses import captured_by_k, kept
from .spectra import Weighted


@dataclass(frozen=True, slots=True)
class Kept:
    """Squared norms ‖P_U D P_V‖² of s adapters in bases fitted without them.

    Attributes:
        fitted: Squared norm in bases of the requested size.
        by_k: Squared norm in bases without sweeps, for each number of components.
        sizes: Numbers of components (down, up) of the bases of each adapter.
        max_components: Numbers of components (down, up) of the bases without sweeps, at the largest k.
    """

    fitted: Float[Tensor, " s"]
    by_k: Float[Tensor, "s g"]
    sizes: list[tuple[int, int]]
    max_components: list[tuple[int, int]]


def left_out(
    members: Weighted,
    batch: ModuleBatch,
    chosen: Sequence[int],
    options: FitOptions,
    k: tuple[int, int] | None,
    grid: Sequence[int],
) -> Kept:
    """Return the squared norm of each chosen adapter in bases fitted to the others; 0 if no other has the module.

    Args:
        members: Factors and weights of the adapters.
        batch: The same factors, padded.
        chosen: Indices of the members to leave out in turn.
        options: Options of the fit.
        k: Maximum numbers of components (down, up) of the bases; None to choose them from the spectrum of the others.
        grid: Numbers of components for `Kept.by_k`, ascending.
    """
    if len(batch) < 2 or not chosen:
        nothing = [(0, 0)] * len(chosen)
        return Kept(
            torch.zeros(len(chosen), dtype=torch.float64),
            torch.zeros(len(chosen), len(grid)).double(),
            nothing,
            nothing,
        )
    whole = ExactFit.stack(*members, options)
    fitted, projected, sizes, max_components = [], [], [], []
    for index in chosen:
        others = whole.without(index)
        largest = max(grid[-1], *(k or (0, 0)), options.n_components or 0)
        rule = component_rule(None, 1.0) if options.energy is not None else component_rule(largest, None)
        first = others.leading(rule)
        size = k or others.count_components(first, options)
        bases = others.fit(first, size)
        alone = batch.select([index])
        fitted.append(kept(alone, bases.down.components, bases.up.components))
        projected.append((alone.down @ first[0].components().mT, alone.up @ first[1].components().mT))
        sizes.append((bases.down.k, bases.up.k))
        max_components.append((first[0].k, first[1].k))
    down, up = (_concatenated(side) for side in zip(*projected, strict=True))
    return Kept(torch.cat(fitted), captured_by_k(down, up, grid), sizes, max_components)


def _concatenated(projected: Sequence[Float[Tensor, "1 r _"]]) -> Float[Tensor, "s r k"]:
    """Concatenate rows that are projected on different numbers of components; missing coordinates become 0."""
    width = max(rows.shape[2] for rows in projected)
    return torch.cat([torch.nn.functional.pad(rows, (0, width - rows.shape[2])) for rows in projected])
