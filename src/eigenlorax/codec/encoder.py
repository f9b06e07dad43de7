"""A collection in as few bytes as an error allows, or with as small an error as bytes allow; module by module.

First all modules are surveyed (`allocation`). Then bases are rounded, and the step of each adapter is sought with which
its delta error, measured, is just below what was asked for. Nothing here knows of files or packs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core import linalg
from ..core.adapter import LoRAFactors
from ..errors import OptionError
from . import bitstream as coded
from . import clusters, rate_allocation, singular_codes
from .bitstream import AdapterCodes, ModuleCodes
from .rate_allocation import Plan, Survey
from .singular_codes import Codes, Components, RoundedBasis

SURVEY, BASES, STEPS, WRITING = (
    "choosing bytes: survey",
    "choosing bytes: bases",
    "choosing bytes: steps",
    "choosing bytes: writing",
)
RANGE = 2.0**-22, 2.0**0.5
"""Steps, relative to the norm of an adapter, that are surveyed where the error is not known beforehand."""
LEAST_ERROR = 1e-6
"""The smallest error that can be asked for."""
CLOSE = 0.995
"""How near an adapter's error must come to what is asked for."""
REACH = 0.9, 1.3
"""How large steps are beside those that were planned, where a plan was good; with others, further plans are tried."""
STRICTER = (0.98, 0.95, 0.9, 0.8)
"""Of an error, what is planned for in its place."""
ENOUGH, TURNS = 8, 24
"""Rounds in which the steps are sought, where some are found by then; and at most."""
FULL, NEARLY = 0.99, 0.97
"""How much of a budget of bytes is to be used, and is enough after several turns."""
LAST_TRIED = (0.55, 0.7, 0.85, 0.95)
"""Errors that are tried before a budget is said to be out of reach."""
SEVERAL, BUDGET_TURNS = 5, 12
"""Errors that are tried for a budget: several, and at most."""
SMALLEST, LARGEST = 1e-6, 0.999
"""Errors that are tried for a budget."""
HELD_BYTES = 2**30
"""Components that are kept in memory between rounds; beyond that, factors are read anew."""
COMPARED = 4
"""Modules by which adapters are compared."""
WORTHWHILE = 0.97
"""The share of bytes that more clusters may take: a pack of several is harder to add to."""

Report = Callable[[str, int, int], None]
Measure = Callable[[Tensor, Tensor], Tensor]
"""From steps, and which of them are asked about, to errors."""
Bases = Mapping[tuple[str, int], tuple[RoundedBasis, RoundedBasis]]
"""By module and cluster, (down, up)."""


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter's place in a module: its number in the collection, and how its factors are read."""

    index: int
    read: Callable[[], LoRAFactors]


@dataclass(frozen=True, slots=True)
class Module:
    """One module: its name, its shape (out, in), the adapters that have trained it, and how many numbers they have.

    cluster: whose these adapters are, where they have bases of their own.
    """

    name: str
    shape: tuple[int, int]
    members: tuple[Member, ...]
    numbers: int
    cluster: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.cluster

    def split(self, groups: Sequence[int]) -> "list[Module]":
        """The module by the clusters of its adapters."""
        found = []
        for cluster in range(max(groups) + 1):
            own = tuple(member for member in self.members if groups[member.index] == cluster)
            if own:
                share = self.numbers * len(own) // len(self.members)
                found.append(replace(self, members=own, numbers=share, cluster=cluster))
        return found


@dataclass(frozen=True, slots=True)
class Coded:
    """What came out: bases (down, up) by module, those of all clusters; each adapter's codes; and what each loses,
    relative to its norm. Adapters lack modules that they have not trained.

    energies: of each module, the squared norm of its updates, relative to those of whole adapters, and what of it lies
    in the directions of either side.
    """

    bases: Mapping[str, tuple[RoundedBasis, RoundedBasis]]
    energies: Mapping[str, tuple[float, float, float]]
    adapters: Sequence[AdapterCodes]
    errors: Sequence[float]


class _Planned(NamedTuple):
    """Steps, by adapter, beside bases. reach: how large they are beside those that were planned."""

    bases: Bases
    energies: dict[str, tuple[float, float, float]]
    steps: Float[Tensor, " n"]
    errors: Float[Tensor, " n"]
    reach: float


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the frontier: the delta error that no adapter exceeds, and about how many bytes that takes."""

    error: float
    bytes: int


class Collection:
    """The modules of a collection, and the norms of its n adapters over all of them, none of which is 0.

    groups: each adapter's cluster; all in one by default. steps: those that are surveyed, relative to norms. whole: the
    same collection in one cluster, whose components are taken where it has kept them.
    """

    def __init__(
        self,
        modules: Sequence[Module],
        norms: Float[Tensor, " n"],
        steps: Sequence[float],
        report: Report,
        groups: Sequence[int] | None = None,
        whole: "Collection | None" = None,
    ) -> None:
        self.groups = list(groups) if groups is not None else [0] * len(norms)
        self.modules = [part for module in modules for part in module.split(self.groups)]
        self.norms = norms
        self._report = report
        size = 8 * sum(module.numbers for module in modules)
        self._held: dict[tuple[str, int], Components] | None = {} if size <= HELD_BYTES else None
        self._whole = whole
        self._curve: tuple[np.ndarray, np.ndarray] | None = None
        self.survey = Survey(len(norms), steps)
        for module, wide in self._each(SURVEY):
            indices = _indices(module)
            self.survey.add(rate_allocation.view(wide, 1 / norms[indices]), indices.tolist())

    def _each(self, stage: str) -> Iterator[tuple[Module, Components]]:
        for done, module in enumerate(self.modules):
            self._report(stage, done, len(self.modules))
            yield module, self.components(module)
        self._report(stage, len(self.modules), len(self.modules))

    def components(self, module: Module) -> Components:
        """Of a module's updates."""
        if self._held is not None and module.key in self._held:
            return self._held[module.key]
        found = self._of_whole(module)
        if found is None:
            found = singular_codes.components([member.read() for member in module.members])
        if self._held is not None:
            self._held[module.key] = found
        return found

    def _of_whole(self, module: Module) -> Components | None:
        held = self._whole._held if self._whole is not None else None
        if held is None or (module.name, 0) not in held:
            return None
        assert self._whole is not None
        (all_of_it,) = (one for one in self._whole.modules if one.name == module.name)
        rows = {member.index: row for row, member in enumerate(all_of_it.members)}
        return held[module.name, 0].part([rows[member.index] for member in module.members])

    def frontier(self, errors: Sequence[float]) -> list[Point]:
        """About the bytes that each error takes."""
        return [Point(error, round(self.survey.plan(error).bits / 8)) for error in errors]

    def coded(self, error: float) -> Coded:
        """Every adapter's delta error at most this. `OptionError` if that is too small for whole numbers of 32 bits."""
        bound = _bound(error)
        bases, energies, steps, errors, _ = self._best_planned(bound)
        codes: list[dict[str, ModuleCodes]] = [{} for _ in self.norms]
        for module, wide in self._each(WRITING):
            own = steps[_indices(module)]
            for rows in singular_codes.parts(wide):
                found = singular_codes.encoded(wide.part(rows), own[rows], *bases[module.key])
                for place, row in enumerate(rows):
                    codes[module.members[row].index][module.name] = coded.taken(found, place)
        adapters = [
            AdapterCodes(step, group, modules)
            for step, group, modules in zip(steps.tolist(), self.groups, codes, strict=True)
        ]
        return Coded(self._joined(bases), energies, adapters, errors.tolist())

    def _best_planned(self, bound: float) -> "_Planned":
        """Bases, and steps with which no adapter loses more than the bound."""
        found = self._planned(bound, bound)
        if REACH[0] < found.reach < REACH[1]:
            return found
        # Errors jump here, as where adapters nearly coincide. What a plan's directions lack of the bound costs each
        # adapter a rest, where one more direction for all would do.
        tried = [found, *(self._planned(share * bound, bound) for share in STRICTER)]
        return min(tried, key=self._bits)

    def _planned(self, aim: float, bound: float) -> "_Planned":
        """The same with what is planned for an error, `aim`, that is the bound or less."""
        plan = self.survey.plan(aim)
        planned = _as_written(torch.from_numpy(plan.steps) * self.norms)
        bases, energies, errors = self._bases(plan, planned)
        steps, errors = _sought(partial(self._errors, bases), planned, errors, bound)
        return _Planned(bases, energies, steps, errors, float((steps / planned).log2().mean().exp2()))

    def _bits(self, found: "_Planned") -> float:
        """About what bases and adapters take."""
        bits = sum(side.bits() + 16 * side.k for pair in found.bases.values() for side in pair)
        for module, wide in self._each(STEPS):
            bits += float(
                singular_codes.measured(wide, found.steps[_indices(module)], *found.bases[module.key])[0].sum()
            )
        return bits

    def _joined(self, bases: Bases) -> dict[str, tuple[RoundedBasis, RoundedBasis]]:
        """The bases of all clusters of each module, one after the other."""
        count, found = max(self.groups) + 1, {}
        for name, shape in {module.name: module.shape for module in self.modules}.items():
            none = no_basis(shape[1]), no_basis(shape[0])
            pairs = [bases.get((name, cluster), none) for cluster in range(count)]
            down, up = (singular_codes.joined(list(side)) for side in zip(*pairs, strict=True))
            found[name] = down, up
        return found

    def _bases(
        self, plan: Plan, steps: Tensor
    ) -> tuple[
        dict[tuple[str, int], tuple[RoundedBasis, RoundedBasis]],
        dict[str, tuple[float, float, float]],
        Float[Tensor, " n"],
    ]:
        """Rounded bases where they are worth their bytes, the energy in them, and the errors with them."""
        bases: dict[tuple[str, int], tuple[RoundedBasis, RoundedBasis]] = {}
        energies: dict[str, tuple[float, float, float]] = {}
        lost = torch.zeros_like(steps)
        for at, (module, wide) in enumerate(self._each(BASES)):
            indices = _indices(module)
            own = steps[indices]
            best: tuple[float, tuple[RoundedBasis, RoundedBasis], Tensor] | None = None
            one = rate_allocation.view(wide, 1 / self.norms[indices]) if max(map(max, plan.k[at])) else None
            for k in dict.fromkeys([*plan.k[at], (0, 0)]):
                pair = _pair(wide, one, own, k, module.shape)
                bits, missed = singular_codes.measured(wide, own, *pair)
                price = float(singular_codes.price(bits, missed, own).sum()) + sum(
                    side.bits() + 16 * side.k for side in pair
                )
                if best is None or price < best[0]:
                    best = price, pair, missed
            assert best is not None
            _, bases[module.key], missed = best
            lost.index_add_(0, indices, missed)
            relative = wide.s / self.norms[indices, None]
            energy = [float(relative.square().sum())]
            for side, basis in zip(("down", "up"), bases[module.key], strict=True):
                inside = wide.rows(side) @ linalg.dual_rows(basis.rows.double()).mT if basis.k else torch.zeros(0, 0, 1)
                energy.append(float((inside * relative[..., None] if basis.k else inside).square().sum()))
            before = energies.get(module.name, (0.0, 0.0, 0.0))
            energies[module.name] = before[0] + energy[0], before[1] + energy[1], before[2] + energy[2]
        return bases, energies, lost.sqrt() / self.norms

    def _errors(self, bases: Bases, steps: Tensor, which: Tensor) -> Float[Tensor, " n"]:
        """Of some adapters, what they lose with these steps."""
        lost = torch.zeros_like(steps)
        for module, wide in self._each(STEPS):
            rows = [row for row, member in enumerate(module.members) if which[member.index]]
            if rows:
                indices = _indices(module)[rows]
                part = wide if len(rows) == len(module.members) else wide.part(rows)
                lost.index_add_(0, indices, singular_codes.measured(part, steps[indices], *bases[module.key])[1])
        return lost.sqrt() / self.norms

    def within(self, limit: float, size: Callable[[Coded], int], refused: Callable[[int], str]) -> Coded:
        """The smallest error that all adapters can have in so many bytes. size: those of what came out.

        refused: what the error says where nothing is small enough, from the fewest bytes that came out.
        """
        best: Coded | None = None
        # the nearest errors with which there are too many bytes, and not too many
        over: Point | None = None
        under: Point | None = None
        target, aim = 0.5 * (1 + FULL) * limit, self.aimed(0.5 * (1 + FULL) * limit)
        for turn in range(BUDGET_TURNS):
            if best is None and turn == BUDGET_TURNS - 1:
                aim = LARGEST
            found = self.coded(aim)
            here = Point(aim, size(found))
            if here.bytes <= limit:
                best, under = found, here
                if here.bytes >= (FULL if turn < SEVERAL else NEARLY) * limit or aim <= 1.001 * SMALLEST:
                    break
            else:
                over = here
                if aim >= LARGEST:
                    break
            if over is None or under is None:
                # as far from the estimate as the last one was, and further each time
                push = 1.02 ** (2.0**turn)
                aim = self.aimed(target * self._estimated(aim) / here.bytes)
                aim = min(aim, here.error / push) if over is None else max(aim, here.error * push)
                aim = min(max(aim, SMALLEST), LARGEST)
            elif under.error < 1.002 * over.error:
                break
            else:
                share = math.log(over.bytes / target) / math.log(over.bytes / under.bytes)
                # every third time in the middle, since bytes may jump
                share = 0.5 if turn % 3 == 2 else min(max(share, 0.05), 0.95)
                aim = over.error * (under.error / over.error) ** share
        if best is None:
            assert over is not None
            least = over.bytes
            # where an error allows nearly everything, directions in common may have gone that would have saved bytes
            for aim in LAST_TRIED:
                found = self.coded(aim)
                least = min(least, size(found))
                if least <= limit:
                    return found
            raise OptionError(refused(least))
        return best

    def aimed(self, limit: float) -> float:
        """The error whose bytes are estimated to be so many."""
        if self._curve is None:
            errors = np.exp(np.linspace(math.log(SMALLEST), math.log(LARGEST), 65))
            sizes = np.array([point.bytes for point in self.frontier(errors.tolist())])
            self._curve = np.log(errors), np.log(np.maximum(np.minimum.accumulate(sizes), 1))
        errors, sizes = self._curve
        return float(np.exp(np.interp(math.log(max(limit, 1)), sizes[::-1], errors[::-1])))

    def _estimated(self, error: float) -> float:
        return float(max(self.frontier([error])[0].bytes, 1))


def alone(
    updates: Mapping[str, tuple[LoRAFactors, tuple[RoundedBasis, RoundedBasis]]], cluster: int, error: float
) -> tuple[AdapterCodes, float]:
    """One adapter in bases that are there, and what it loses, which is at most `error`. updates: none is 0."""
    wide = {name: singular_codes.components([factors]) for name, (factors, _) in updates.items()}
    norm = math.sqrt(sum(float(one.s.square().sum()) for one in wide.values()))
    numbers = sum(factors.spec.numbers for factors, _ in updates.values())
    bound = _bound(max(error, LEAST_ERROR))

    def coded_with(steps: Tensor) -> dict[str, Codes]:
        return {name: singular_codes.encoded(wide[name], steps, *updates[name][1]) for name in updates}

    def measure(steps: Tensor, _: Tensor | None = None) -> Tensor:
        return torch.stack([codes.lost for codes in coded_with(steps).values()]).sum(0).sqrt() / norm

    steps = _as_written(torch.tensor([bound * norm / math.sqrt(0.1 * numbers)], dtype=torch.float64))
    steps, errors = _sought(measure, steps, measure(steps), bound)
    modules = {name: coded.taken(codes, 0) for name, codes in coded_with(steps).items()}
    return AdapterCodes(float(steps[0]), cluster, modules), float(errors[0])


def check(error: float) -> None:
    """`OptionError` where numbers in float32 cannot keep so small an error."""
    if error < LEAST_ERROR:
        raise OptionError(
            f"max_error={error:g} is less than numbers in float32 can keep: ask for 1e-6 or more, or store wider ones "
            "(dtype='float64', --dtype float64)."
        )


def _bound(error: float) -> float:
    """A hair less than an error, for the last bits of what comes back in float32."""
    check(error)
    return error * (1 - 1e-6) - 2e-7


def _sought(measure: Measure, steps: Tensor, errors: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The steps with which errors are just below the bound, and those errors."""
    good, good_errors = torch.zeros_like(steps), torch.zeros_like(errors)
    bad, bad_errors = torch.full_like(steps, math.inf), torch.full_like(errors, math.inf)
    target = 0.5 * (1 + CLOSE) * bound
    for turn in range(TURNS):
        within = errors <= bound
        better, worse = within & (steps > good), ~within & (steps < bad)
        good, good_errors = torch.where(better, steps, good), torch.where(better, errors, good_errors)
        bad, bad_errors = torch.where(worse, steps, bad), torch.where(worse, errors, bad_errors)
        open_ = (good == 0) | ((good_errors < CLOSE * bound) & (bad > 1.002 * good))
        if not bool(open_.any()) or (turn >= ENOUGH and bool((good > 0).all())):
            break
        # further each time: where whole components come and go, errors hardly change for long, and then at once
        ratio = (target / errors.clamp_min(1e-300)) ** 2.0**turn
        aimed = steps * ratio.clamp(0.25, 4.0)
        share = (target / good_errors).log() / (bad_errors / good_errors).log()
        # every other time in the middle, since errors may jump
        share = torch.full_like(share, 0.5) if turn % 2 else share.clamp(0.05, 0.95)
        closed = (good > 0) & bad.isfinite()
        aimed = torch.where(closed, good * (bad / good) ** share, aimed)
        steps = torch.where(open_, _as_written(aimed), good)
        errors = torch.where(open_, measure(steps, open_), good_errors)
    if bool((good == 0).any()):
        raise OptionError(f"max_error={bound:g} is more than whole numbers of 32 bits can hold of some adapter.")
    return good, good_errors


def steps_for(error: float, numbers: int) -> list[float]:
    """Steps that may be those of an adapter of so many numbers with this error, or a little more or less.

    The smallest is that of one whose every number is coded; the largest is that of one that loses whole components.
    """
    least, most = error / math.sqrt(0.1 * numbers) / 3, min(3 * error, RANGE[1])
    return _spaced(least, most, 2)


def steps_for_any() -> list[float]:
    """Steps for errors of every size."""
    return _spaced(*RANGE, 1)


def _spaced(least: float, most: float, by_octave: int) -> list[float]:
    count = max(math.ceil(by_octave * math.log2(most / least)), 2)
    return [float(step) for step in np.geomspace(least, most, count + 1)]


def _as_written(steps: Tensor) -> Tensor:
    """The nearest steps that can be written."""
    return (coded.STEPS * steps.log2()).round().div(coded.STEPS).exp2()


def _indices(module: Module) -> Tensor:
    return torch.tensor([member.index for member in module.members], dtype=torch.int64)


def _pair(
    wide: Components, one: rate_allocation.View | None, steps: Tensor, k: tuple[int, int], shape: tuple[int, int]
) -> tuple[RoundedBasis, RoundedBasis]:
    """The leading directions of both sides, rounded as finely as adapters with these steps ask."""
    if one is None or not max(k):
        return no_basis(shape[1]), no_basis(shape[0])
    lengths = (wide.s / steps[:, None]).flatten().square()
    found = []
    for side, size in zip((one.down, one.up), k, strict=True):
        energy = torch.from_numpy(side.energies[:, :size]).mul(lengths[:, None]).sum(0)
        found.append(singular_codes.rounded_basis(side.directions[:size], energy.sqrt(), energy))
    return found[0], found[1]


def no_basis(dimension: int) -> RoundedBasis:
    """No row at all."""
    none = np.zeros(0, dtype=np.int64)
    return RoundedBasis(torch.zeros(0, dimension, dtype=torch.int64), none, none)


def clustered(whole: Collection, modules: Sequence[Module], error: float, report: Report) -> Collection:
    """The collection in as many clusters as take fewest bytes, by estimate, with this error."""
    n = len(whole.norms)
    compared = [module for module in whole.modules if len(module.members) == n]
    if n < 2 * clusters.LEAST or not compared:
        return whole
    chosen = clusters.sample(n)
    alike = torch.zeros(n, len(chosen), dtype=torch.float64)
    for at in np.unique(np.linspace(0, len(compared) - 1, COMPARED).round().astype(int)).tolist():
        alike += clusters.likenesses(whole.components(compared[at]), 1 / whole.norms, chosen)
    steps = whole.survey.steps
    middle = int(np.abs(np.log(steps) - np.log(whole.survey.plan(error).steps).mean()).argmin())
    near = steps[max(middle - 1, 0) : middle + 2].tolist()
    candidates = clusters.groupings(alike, chosen)
    if not candidates:
        return whole

    def bits(groups: list[int] | None) -> float:
        return Collection(modules, whole.norms, near, report, groups, whole).survey.plan(error).bits

    best, least = None, WORTHWHILE * bits(None)
    for groups in candidates:
        if (found := bits(groups)) < least:
            best, least = groups, WORTHWHILE * found
    return Collection(modules, whole.norms, steps.tolist(), report, best, whole) if best is not None else whole
