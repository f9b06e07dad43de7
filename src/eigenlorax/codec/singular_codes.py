"""One module's updates as whole numbers of a step: in bases that are rounded themselves, with what these do not hold.

Each update is taken as its singular components, Σ s·u·vᵀ. In units of an adapter's step Δ, both rows of a component are
as long as its singular value, so that an error of one number of either is an error of the update of that size. Each row
is written as coefficients in the module's basis and, where that is worth its bits, as a rest beside them. Small
components vanish in the rounding by themselves. Nothing here knows of files; `coded` makes bytes of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core import linalg
from ..core.adapter import LoRAFactors
from . import dead_zone, entropy

SCALES = 8
"""Steps of a component's scale to an octave."""
MOST_SCALE = 255
QUARTERS = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
"""2^0, 2^¼, 2^½ and 2^¾, each the nearest float64."""
MEAN_TO_SPREAD = math.sqrt(math.pi / 2)
"""Standard deviation of Gaussian numbers, by their mean size."""
LOWER = (0, 3)
"""Classes that are tried, below what the mean size says."""
PART_NUMBERS = 2**23
"""Numbers that are coded at a time: each takes some hundred bytes meanwhile."""
OVERHEAD = 16.0
"""Bits of a component, or a core, beside its numbers: its scale and levels."""


@dataclass(frozen=True, slots=True)
class Components:
    """Singular components of several updates, largest first: Σ_j s[i, j] · u[i, j] · v[i, j]ᵀ; missing ones are 0.

    ranks: of the factors of each update, which are those of what it comes back as.
    """

    u: Float[Tensor, "n r n_out"]
    s: Float[Tensor, "n r"]
    v: Float[Tensor, "n r n_in"]
    ranks: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.s)

    def rows(self, side: str) -> Tensor:
        """Unit rows of one side, (n, r, d)."""
        return self.v if side == "down" else self.u

    def part(self, which: Sequence[int]) -> "Components":
        """Some of the updates."""
        at = torch.tensor(list(which), dtype=torch.int64)
        return Components(self.u[at], self.s[at], self.v[at], self.ranks[at])


def components(factors: Sequence[LoRAFactors]) -> Components:
    """Of updates of one shape and any ranks, scaling included, float64."""
    rank = max(one.down.shape[0] for one in factors)
    n_in, n_out = factors[0].down.shape[1], factors[0].up.shape[0]
    found = Components(
        torch.zeros(len(factors), rank, n_out, dtype=torch.float64),
        torch.zeros(len(factors), rank, dtype=torch.float64),
        torch.zeros(len(factors), rank, n_in, dtype=torch.float64),
        torch.tensor([one.down.shape[0] for one in factors]),
    )
    by_rank: dict[int, list[int]] = {}
    for index, one in enumerate(factors):
        by_rank.setdefault(one.down.shape[0], []).append(index)
    for indices in by_rank.values():
        down = torch.stack([factors[i].down.to(torch.float64) for i in indices])
        up = torch.stack([factors[i].up.to(torch.float64) * factors[i].scaling for i in indices])
        right, left = torch.linalg.qr(down.mT), torch.linalg.qr(up)
        inner = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        count = inner.S.shape[1]
        found.s[indices, :count] = inner.S
        found.u[indices, :count] = (left.Q @ inner.U).mT
        found.v[indices, :count] = inner.Vh @ right.Q.mT
    return found


@dataclass(frozen=True, slots=True)
class RoundedBasis:
    """Rows of a basis as whole numbers: row a is codes[a] · 2^(−fineness[a] / 4).

    profile: by how many classes coefficients on each row are smaller than where they are largest, 0 or less. blocks:
    how many rows are of each cluster, where there are several; the rows of one are nearly orthonormal.
    """

    codes: Int[Tensor, "k d"]
    fineness: Int[np.ndarray, " k"]
    profile: Int[np.ndarray, " k"]
    blocks: tuple[int, ...] = ()

    @property
    def k(self) -> int:
        return len(self.fineness)

    def span(self, cluster: int) -> slice:
        """The rows of a cluster."""
        if not self.blocks:
            return slice(0, self.k)
        start = sum(self.blocks[:cluster])
        return slice(start, start + self.blocks[cluster])

    def block(self, cluster: int) -> "RoundedBasis":
        """The rows of a cluster by themselves."""
        part = self.span(cluster)
        return RoundedBasis(self.codes[part], self.fineness[part], self.profile[part])

    @property
    def rows(self) -> Float[Tensor, "k d"]:
        """The rows, float32: what a reader of the codes gets."""
        # the fingerprint is of these: a power function may be off in the last bit on some machines
        steps = np.ldexp(QUARTERS[-self.fineness % 4], -self.fineness // 4)
        return (self.codes.to(torch.float64) * torch.from_numpy(steps)[:, None]).to(torch.float32)

    def bits(self) -> float:
        """About what the codes take."""
        classes = row_classes(self.fineness, self.codes.shape[1])
        return float(logistic_bits(self.codes.to(torch.float64), torch.from_numpy(classes)[:, None]).sum())


def joined(blocks: Sequence[RoundedBasis]) -> RoundedBasis:
    """The bases of several clusters, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    return RoundedBasis(
        torch.cat([one.codes for one in blocks]),
        np.concatenate([one.fineness for one in blocks]),
        np.concatenate([one.profile for one in blocks]),
        tuple(one.k for one in blocks),
    )


def row_classes(fineness: np.ndarray, dimension: int) -> np.ndarray:
    """The class that the numbers of each row of a basis have: they are those of a unit row."""
    unit = round(16 + 4 * math.log2(math.sqrt(3) / math.pi) - 2 * math.log2(dimension))
    found: np.ndarray = np.clip(fineness + unit, 0, entropy.CLASSES - 1)
    return found


def rounded_basis(
    directions: Float[Tensor, "k d"], importance: Float[Tensor, " k"], energy: Float[Tensor, " k"]
) -> RoundedBasis:
    """Orthonormal rows, each as fine as its importance asks.

    importance: the norm, in steps, of what all adapters have on each row. energy: the mean square of a row's
    coefficients beside those of the others. Rows of which nothing would be left are not there.
    """
    there = importance > 0.4 * directions.shape[1] ** 0.5
    directions, importance, energy = directions[there], importance[there], energy[there]
    fineness = (4 * importance.clamp_min(1).log2()).round().to(torch.int64).clamp(0, 255).numpy()
    steps = torch.from_numpy(2.0 ** (-fineness / 4.0))[:, None]
    profile = 2 * (energy / energy.max().clamp_min(1e-300)).clamp_min(2.0**-60).log2() if len(energy) else energy
    return RoundedBasis(
        (directions / steps).round().to(torch.int64), fineness, profile.round().to(torch.int64).clamp(-120, 0).numpy()
    )


def logistic_bits(codes: Tensor, classes: Tensor) -> Tensor:
    """About what each whole number takes in its class."""
    scale = torch.exp2(classes.to(torch.float64) / 4 - 4)
    low, high = torch.sigmoid((codes.abs() - 0.5) / -scale), torch.sigmoid((codes.abs() + 0.5) / -scale)
    floor = 2.0**-entropy.PRECISION
    return -(low - high + floor).log2()


@dataclass(frozen=True, slots=True)
class SideCodes:
    """One side of the components of several updates. Levels are classes, one more; 0 where all numbers are zero.

    coefficients: (n, r, k), of class level + profile; rest: (n, r, d), of class level.
    """

    coefficients: Int[Tensor, "n r k"]
    coefficient_levels: Int[Tensor, "n r"]
    rest: Int[Tensor, "n r d"]
    rest_levels: Int[Tensor, "n r"]

    def rows(self, basis: Tensor) -> Float[Tensor, "n r d"]:
        """What the codes stand for, in steps, float64."""
        return self.coefficients.to(torch.float64) @ basis.to(torch.float64) + self.rest.to(torch.float64)


@dataclass(frozen=True, slots=True)
class Codes:
    """Several updates in whole numbers: of components, or of a core between the bases in their place.

    scales: of each component, in eighths of an octave of steps; counts: how many components of each update are kept.
    cores: of class level + both profiles. steps: one an update. bits: about what each update takes. lost: the squared
    norm that is lost of it.
    """

    down: SideCodes
    up: SideCodes
    scales: Int[Tensor, "n r"]
    counts: Int[Tensor, " n"]
    cores: Int[Tensor, "n k_up k_down"]
    core_levels: Int[Tensor, " n"]
    steps: Float[Tensor, " n"]
    bits: Float[Tensor, " n"]
    lost: Float[Tensor, " n"]

    def price(self) -> Float[Tensor, " n"]:
        """Bits, and what the loss is worth in bits."""
        return price(self.bits, self.lost, self.steps)


def price(bits: Tensor, lost: Tensor, steps: Tensor) -> Float[Tensor, " n"]:
    """Bits, and what losses are worth in bits."""
    return bits + dead_zone.BITS_PER_SQUARED_ERROR * lost / steps.square()


def encoded(wide: Components, steps: Float[Tensor, " n"], down: RoundedBasis, up: RoundedBasis) -> Codes:
    """Updates as whole numbers of their steps, each in the form that has the lower price."""
    found = _by_components(wide, steps, down, up)
    if not 0 < down.k * up.k <= 2 * wide.s.shape[1] * (down.k + up.k):
        return found
    cores, levels, bits, lost = _by_cores(wide, steps, down, up, found.price())
    better = price(bits, lost, steps) < found.price()
    alone = torch.where(better, 0, 1)
    return replace(
        found,
        down=_cut(found.down, alone[:, None]),
        up=_cut(found.up, alone[:, None]),
        scales=found.scales * alone[:, None],
        counts=found.counts * alone,
        cores=torch.where(better[:, None, None], cores, 0),
        core_levels=torch.where(better, levels, 0),
        bits=torch.where(better, bits, found.bits),
        lost=torch.where(better, lost, found.lost),
    )


def parts(wide: Components) -> Iterator[list[int]]:
    """Updates that are coded together: as many as do not take too much memory at a time."""
    size = max(PART_NUMBERS // max(wide.u[0].numel() + wide.v[0].numel(), 1), 1)
    return (list(range(start, min(start + size, len(wide)))) for start in range(0, len(wide), size))


def measured(
    wide: Components, steps: Float[Tensor, " n"], down: RoundedBasis, up: RoundedBasis
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Of `encoded`, about the bits that each update takes, and what is lost of it."""
    bits, lost = torch.zeros_like(steps), torch.zeros_like(steps)
    for rows in parts(wide):
        codes = encoded(wide.part(rows), steps[rows], down, up)
        bits[rows], lost[rows] = codes.bits, codes.lost
    return bits, lost


def _by_components(wide: Components, steps: Tensor, down: RoundedBasis, up: RoundedBasis) -> Codes:
    length = wide.s / steps[:, None]
    scales = (SCALES * length.clamp_min(1).log2()).round().clamp(0, MOST_SCALE)
    whole = torch.exp2(scales / SCALES)
    v, v_bits, v_error = _side(wide.v * (length * whole).sqrt()[..., None], down)
    # the other side makes up for what was lost on this one
    v_rows = v.rows(down.rows)
    u, u_bits, u_error = _side(_best(wide, steps, v_rows, whole), up)
    gain = dead_zone.BITS_PER_SQUARED_ERROR * (length.square() - v_error - u_error) - v_bits - u_bits - OVERHEAD
    alive = (gain > 0) & (v.coefficient_levels + v.rest_levels > 0) & (u.coefficient_levels + u.rest_levels > 0)
    ranks = torch.arange(1, alive.shape[1] + 1)
    counts = (alive * ranks).amax(dim=1)
    kept = ranks[None] <= counts[:, None]
    v, u = _cut(v, kept), _cut(u, kept)
    n = len(steps)
    found = Codes(
        v,
        u,
        torch.where(kept, scales, 0).to(torch.int64),
        counts,
        torch.zeros(n, up.k, down.k, dtype=torch.int64),
        torch.zeros(n, dtype=torch.int64),
        steps,
        ((v_bits + u_bits + OVERHEAD) * kept).sum(1),
        torch.zeros_like(steps),
    )
    right, left = factors(found, down.rows, up.rows)
    root = wide.s.sqrt()[..., None]
    # component beside component: no two large numbers are subtracted
    return replace(found, lost=linalg.difference_square((wide.u * root).mT, wide.v * root, left.mT, right))


def _by_cores(
    wide: Components, steps: Tensor, down: RoundedBasis, up: RoundedBasis, price: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cores, levels, bits and losses; these are infinite where bits alone are more than the `price`."""
    v_rows, u_rows = down.rows.to(torch.float64), up.rows.to(torch.float64)
    v, u = wide.v @ linalg.dual_rows(v_rows).mT, wide.u @ linalg.dual_rows(u_rows).mT
    exact = (u * (wide.s / steps[:, None])[..., None]).mT @ v
    codes = dead_zone.quantise(exact)
    profile = core_profile(down.profile, up.profile)
    spread = (exact.square() * torch.exp2(-profile / 2.0)).mean((1, 2)).sqrt()
    levels = classes(spread) + 1
    bits = logistic_bits(codes, (levels[:, None, None] - 1 + profile).clamp_min(0)).sum((1, 2)) + OVERHEAD
    lost = torch.full_like(bits, math.inf)
    if rows := torch.nonzero(bits < price)[:, 0].tolist():
        left, right = core_factors(codes[rows], steps[rows], wide.ranks[rows])
        lost[rows] = _lost(wide.part(rows), right @ v_rows, left.mT @ u_rows)
    return codes.to(torch.int64), levels, bits, lost


def core_profile(down: np.ndarray, up: np.ndarray) -> Int[Tensor, "k_up k_down"]:
    """By how many classes each number of a core is smaller than the largest, from the profiles of its bases."""
    return torch.from_numpy(up)[:, None] + torch.from_numpy(down)[None]


def core_factors(
    cores: Tensor, steps: Tensor, ranks: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n k_up r"], Float[Tensor, "n r k_down"]]:
    """The best factors of these ranks of cores in whole numbers; r is the largest of them, if cores have so many."""
    u, s, v = torch.linalg.svd(cores.to(torch.float64), full_matrices=False)
    most = min(int(ranks.max()), s.shape[1])
    kept = torch.arange(most) < ranks[:, None]
    root = (s[:, :most] * kept * steps[:, None]).sqrt()
    return u[:, :, :most] * root[:, None], v[:, :most] * root[..., None]


def _best(wide: Components, steps: Tensor, v_rows: Tensor, whole: Tensor) -> Tensor:
    """The rows of the up side that are best for given ones of the down side: least squares, in steps."""
    gram = v_rows @ v_rows.mT
    there = gram.diagonal(dim1=1, dim2=2) > 0
    gram = gram + torch.diag_embed(torch.where(there, 1e-9 * gram.diagonal(dim1=1, dim2=2), 1.0))
    mixed = torch.linalg.solve(gram, (v_rows @ wide.v.mT) * (wide.s / steps[:, None])[:, None, :])
    found: Tensor = whole[..., None] * (mixed @ wide.u)
    return found


def _side(rows: Tensor, basis: RoundedBasis) -> tuple[SideCodes, Tensor, Tensor]:
    """Rows in whole numbers; and, of each row, about the bits and the squared error."""
    n, r, d = rows.shape
    left, known = rows, torch.zeros(n, r, basis.k, dtype=torch.int64)
    levels, bits = torch.zeros(n, r, dtype=torch.int64), torch.zeros(n, r, dtype=torch.float64)
    if basis.k:
        wide = basis.rows.to(torch.float64)
        exact = rows @ linalg.dual_rows(wide).mT
        codes = dead_zone.quantise(exact)
        profile = torch.from_numpy(basis.profile)
        levels, bits = _cheapest(codes, exact * torch.exp2(-profile / 4.0), profile)
        worth = dead_zone.BITS_PER_SQUARED_ERROR * (exact.square() - (exact - codes).square()).sum(2)
        used = (codes != 0).any(2) & (worth > bits)
        known = torch.where(used[..., None], codes, 0.0).to(torch.int64)
        levels, bits = torch.where(used, levels, 0), torch.where(used, bits, 0.0)
        left = rows - known.to(torch.float64) @ wide
    codes = dead_zone.quantise(left)
    square = left.square().sum(2)
    rest_levels, rest_bits = _cheapest(codes, left, torch.zeros(d, dtype=torch.int64))
    error = (left - codes).square().sum(2)
    used = (codes != 0).any(2) & (dead_zone.BITS_PER_SQUARED_ERROR * (square - error) > rest_bits)
    rest = torch.where(used[..., None], codes, 0.0).to(torch.int64)
    found = SideCodes(known, levels, rest, torch.where(used, rest_levels, 0))
    return found, bits + torch.where(used, rest_bits, 0.0), torch.where(used, error, square)


def _cheapest(codes: Tensor, numbers: Tensor, profile: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of whole numbers, (…, d), the level that takes fewest bits of a few, and those bits.

    numbers: of one spread throughout. By their mean size rather than their square, so that a few large ones do not make
    all others dear; and lower still, where most are nearly nothing.
    """
    first = classes(numbers.abs().mean(-1) * MEAN_TO_SPREAD)
    tried = [(first - lower).clamp_min(0) for lower in LOWER]
    bits = torch.stack([logistic_bits(codes, (one[..., None] + profile).clamp_min(0)).sum(-1) for one in tried])
    least, which = bits.min(0)
    return torch.stack(tried).gather(0, which[None])[0] + 1, least


def classes(spread: Tensor) -> Tensor:
    """The classes for whole numbers of these standard deviations."""
    found = 4 * (spread.clamp_min(1e-9) * math.sqrt(3) / math.pi).log2()
    return (found.round() + 16).clamp(0, entropy.CLASSES - 1).to(torch.int64)


def _cut(one: SideCodes, kept: Tensor) -> SideCodes:
    return SideCodes(
        one.coefficients * kept[..., None],
        one.coefficient_levels * kept,
        one.rest * kept[..., None],
        one.rest_levels * kept,
    )


def factors(codes: Codes, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes stand for: (n, r, in) and (n, r, out), float64, whose products are the updates."""
    weight = (codes.steps[:, None] * torch.exp2(-codes.scales.to(torch.float64) / SCALES)).sqrt()[..., None]
    return codes.down.rows(down) * weight, codes.up.rows(up) * weight


def _lost(wide: Components, right: Tensor, left: Tensor) -> Tensor:
    """‖update − leftᵀ · right‖²."""
    lefts = torch.cat([wide.u * wide.s[..., None], -left], dim=1)
    rights = torch.cat([wide.v, right], dim=1)
    return ((lefts @ lefts.mT) * (rights @ rights.mT)).sum((1, 2)).clamp_min(0)
