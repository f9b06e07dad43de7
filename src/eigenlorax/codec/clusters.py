"""Groups of adapters whose updates lie in subspaces of their own: candidates for several bases in one pack.

How alike two updates are is how much of one lies in the directions of the other, on both sides, weighted by what they
have there. Groups are found in the leading eigenvectors of these likenesses (Ng, Jordan and Weiss 2001), and kept if
adapters are more alike inside of them than across.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .singular_codes import Components

SAMPLE = 256
"""Adapters that are compared with all others, at most."""
COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
"""Numbers of groups that are tried."""
LEAST = 2
"""Adapters of a group, at least."""
APART = 1.5
"""How many times more alike adapters must be within groups than across."""
ROUNDS = 50


def likenesses(wide: Components, weights: Float[Tensor, " n"], sample: Sequence[int]) -> Float[Tensor, "n s"]:
    """Of every adapter of a module with some of them: Σ over both sides of ‖X_i·X_jᵀ‖², rows X weighted by length."""
    at = torch.tensor(list(sample), dtype=torch.int64)
    found = torch.zeros(len(wide), len(at), dtype=torch.float64)
    scaled = (wide.s * weights[:, None])[..., None]
    for side in ("down", "up"):
        rows = wide.rows(side) * scaled
        some = rows[at].flatten(0, 1)
        for start in range(0, len(wide), 64):
            inner = rows[start : start + 64].flatten(0, 1) @ some.mT
            shaped = inner.square().reshape(-1, rows.shape[1], len(at), rows.shape[1])
            found[start : start + 64] += shaped.sum((1, 3))
    return found


def sample(n: int) -> list[int]:
    """Adapters to compare all others with: evenly spaced."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(n, SAMPLE)).tolist()})


def groupings(alike: Float[Tensor, "n s"], chosen: Sequence[int]) -> list[list[int]]:
    """Each adapter's group, numbered by first appearance: for every number of groups that keep apart.

    alike: of every adapter with those chosen, which have themselves among them.
    """
    inner = alike[list(chosen)]
    size = inner.diagonal().clamp_min(1e-300).sqrt()
    inner = (inner / size[:, None] / size[None]).clamp(0, 1)
    inner.fill_diagonal_(0.0)
    degree = inner.sum(1).clamp_min(1e-12).rsqrt()
    _, vectors = torch.linalg.eigh(degree[:, None] * inner * degree[None])
    found, seen = [], set()
    for count in (count for count in COUNTS if count * LEAST <= len(chosen)):
        leading = vectors[:, -count:]
        rows = leading / torch.linalg.vector_norm(leading, dim=1, keepdim=True).clamp_min(1e-12)
        groups = _means(rows, count)
        member = torch.nn.functional.one_hot(groups, count).to(torch.float64)
        sizes = member.sum(0)
        if float(sizes.min()) < LEAST or not _apart(inner, groups):
            continue
        closest = ((alike / size[None]) @ member / sizes).argmax(1)
        closest[list(chosen)] = groups
        labels = _numbered(closest.tolist())
        if tuple(labels) not in seen:
            seen.add(tuple(labels))
            found.append(labels)
    return found


def _means(rows: Float[Tensor, "s c"], count: int) -> Tensor:
    """k-means from centres that are as far apart as can be."""
    centres = rows[[0]]
    for _ in range(1, count):
        distance = torch.cdist(rows, centres).amin(1)
        centres = torch.cat([centres, rows[[int(distance.argmax())]]])
    groups = torch.cdist(rows, centres).argmin(1)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(groups, count).to(rows.dtype)
        centres = (member.mT @ rows) / member.sum(0).clamp_min(1)[:, None]
        after = torch.cdist(rows, centres).argmin(1)
        if bool((after == groups).all()):
            break
        groups = after
    return groups


def _apart(alike: Float[Tensor, "s s"], groups: Tensor) -> bool:
    """Whether adapters of each group are more alike than those of different ones."""
    same = groups[:, None] == groups[None]
    across = float(alike[~same].mean())
    for number in sorted(set(groups.tolist())):
        own = groups == number
        pairs = int(own.sum()) * (int(own.sum()) - 1)
        if float(alike[own][:, own].sum()) / pairs < APART * across:
            return False
    return True


def _numbered(labels: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
