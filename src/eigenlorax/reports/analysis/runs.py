"""Adapters that look like versions of one training run: their updates lie on a path, or their names are steps."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .groups import linked
from .pairs import cosines

MIN_COSINE = 0.6
"""Minimum cosine of consecutive versions. Separately trained adapters with one random start have at most 0.4."""
MIN_PATH = 5
"""Minimum number of adapters that are recognised by their updates alone."""
MIN_NAMED = 3
"""Minimum number of adapters that are recognised by names such as `checkpoint-500`."""
MAX_STEP = 0.85
"""Maximum mean distance of consecutive versions, relative to that of all pairs: 1 if all distances are equal."""
MIN_BETWEEN = 0.9
"""Minimum share of triples of versions of which the outer two are farthest from each other."""
_MAX_POINTS = 128
"""Maximum number of versions whose triples are compared."""
_TIE = 1e-3
"""Difference of distances, relative to the largest, that counts as none."""
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)")
_STEP = re.compile(r"(?:.*[^a-z])?(?:checkpoint|ckpt|step|epoch|iter|iteration)[-_=.]?", re.IGNORECASE)


def find_runs(products: Float[Tensor, "n n"], names: Sequence[str]) -> list[list[int]]:
    """Return groups of adapters that look like versions of one run, each in the order of the run.

    Adapters are linked if their cosine is at least `MIN_COSINE`. A group of linked adapters is a run if they are named
    like checkpoints (`checkpoint-500`, `epoch_3`), or if they lie on a path: consecutive ones are close to each other,
    and distances grow along it. Adapters that are all equally far from each other, such as those with a common mean,
    do not.

    Args:
        products: Inner products of the updates, ⟨D_i, D_j⟩.
        names: Names of the adapters.

    Returns:
        Indices of the adapters, the largest group first.
    """
    close = (cosines(products) >= MIN_COSINE).fill_diagonal_(False)
    runs = [run for group in linked(close) if (run := _as_run(products, names, group)) is not None]
    return sorted(runs, key=lambda run: (-len(run), run))


def changes(products: Float[Tensor, "n n"], run: Sequence[int]) -> Float[Tensor, " m"]:
    """Return the distances of consecutive adapters of a run, relative to the larger of their norms."""
    chosen = products[list(run)][:, list(run)]
    square = chosen.diagonal()
    return distances(chosen).diagonal(1) / torch.maximum(square[1:], square[:-1]).sqrt()


def distances(products: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return ‖D_i − D_j‖ of all pairs, from their inner products."""
    square = products.diagonal()
    return (square[:, None] + square[None, :] - 2 * products).clamp_min(0).sqrt()


def _as_run(products: Tensor, names: Sequence[str], group: Sequence[int]) -> list[int] | None:
    """Return a group in the order of its run; None if it is none."""
    by_name = _in_order_of_numbers([names[index] for index in group])
    if by_name is not None and len(group) >= MIN_NAMED and _are_steps([names[index] for index in group]):
        return [group[index] for index in by_name]
    own = products[list(group)][:, list(group)]
    between = distances(own)
    for order in (by_name, _nearest_first(between, own.diagonal())):
        if order is not None and _is_path(between[order][:, order]):
            return [group[index] for index in order]
    return None


def _nearest_first(between: Float[Tensor, "n n"], squares: Float[Tensor, " n"]) -> list[int]:
    """Return an order from one end of the most distant pair, where the nearest of the remaining points is the next.

    The end with the smaller norm is the first, because the update of a LoRA begins at zero.
    """
    ends = divmod(int(between.argmax()), len(between))
    order = [min(ends, key=lambda index: float(squares[index]))]
    remaining = between.clone()
    while len(order) < len(between):
        remaining[:, order[-1]] = torch.inf
        order.append(int(remaining[order[-1]].argmin()))
    return order


def _in_order_of_numbers(names: Sequence[str]) -> list[int] | None:
    """Return the order of names that differ only in their last number; None if they differ in more, or in nothing."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    parts = [(match[1], int(match[2]), match[3]) for match in matches if match is not None]
    numbers = [number for _, number, _ in parts]
    stems = {(head, tail) for head, _, tail in parts}
    if len(parts) < len(names) or len(stems) > 1 or len(set(numbers)) < len(numbers):
        return None
    return sorted(range(len(names)), key=numbers.__getitem__)


def _are_steps(names: Sequence[str]) -> bool:
    """Return whether the number in each name is that of a training step or epoch."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    return all(match is not None and _STEP.fullmatch(match[1]) for match in matches)


def _is_path(between: Float[Tensor, "n n"]) -> bool:
    """Return whether points in this order lie on a path, by their distances."""
    n, tie = len(between), _TIE * float(between.max())
    # copies have no order, and do not make a path longer
    distinct = [index for index in range(n) if index == 0 or float(between[index, index - 1]) > tie]
    if len(distinct) < MIN_PATH:
        return False
    n = min(len(distinct), _MAX_POINTS)
    distinct = [distinct[index * (len(distinct) - 1) // (n - 1)] for index in range(n)]
    between = between[distinct][:, distinct]
    pairs = torch.ones(n, n, dtype=torch.bool).triu(1)
    if between.diagonal(1).mean() > MAX_STEP * between[pairs].mean():
        return False
    # [i, j, k] with i < j < k: the outer two are farther from each other than from the one between them
    triples = pairs[:, :, None] & pairs[None, :, :]
    outer = between[:, None, :] + tie
    is_between = (outer >= between[:, :, None]) & (outer >= between[None, :, :])
    return float(is_between[triples].double().mean()) >= MIN_BETWEEN
