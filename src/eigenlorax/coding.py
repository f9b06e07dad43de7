"""A collection in as few bytes as an error allows, or with as small an error as bytes allow; module by module.

First all modules are surveyed (`allocation`). Then bases are rounded, and the step of each adapter is sought with which
its delta error, measured, is just below what was asked for. Nothing here knows of files or packs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import allocation, coded, transform
from .adapter import LoRAFactors
from .allocation import Plan, Survey
from .coded import AdapterCodes, ModuleCodes, Place
from .errors import OptionError
from .transform import Codes, Components, RoundedBasis

SURVEY, BASES, STEPS, WRITING = (
    "choosing bytes: survey",
    "choosing bytes: bases",
    "choosing bytes: steps",
    "choosing bytes: writing",
)
FINEST, COARSEST = 2.0**-24, 0.7
"""Steps, relative to the norm of an adapter, that are surveyed."""
CLOSE = 0.995
"""How near an adapter's error must come to what is asked for."""
TURNS = 14
"""Rounds in which the steps are sought, at most."""
FULL = 0.985
"""How much of a budget of bytes must be used."""
BUDGET_TURNS = 8
HELD_BYTES = 2**30
"""Components that are kept in memory between rounds; beyond that, factors are read anew."""
BATCH = 64
"""Adapters whose bytes are made together."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter's place in a module: its number in the collection, and how its factors are read."""

    index: int
    read: Callable[[], LoRAFactors]


@dataclass(frozen=True, slots=True)
class Module:
    """One module: its name, its shape (out, in), the adapters that have trained it, and how many numbers they have."""

    name: str
    shape: tuple[int, int]
    members: tuple[Member, ...]
    numbers: int


@dataclass(frozen=True, slots=True)
class Coded:
    """What came out: bases by module, the codes of each adapter by module, and what each loses, relative to its norm.

    Adapters lack modules that they have not trained.
    """

    bases: Mapping[str, tuple[RoundedBasis, RoundedBasis]]
    codes: Sequence[Mapping[str, ModuleCodes]]
    steps: Sequence[float]
    errors: Sequence[float]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the frontier: the delta error that no adapter exceeds, and about how many bytes that takes."""

    error: float
    bytes: float


class Collection:
    """The modules of a collection, and the norms of its n adapters over all of them, none of which is 0."""

    def __init__(self, modules: Sequence[Module], norms: Float[Tensor, " n"], report: Report) -> None:
        self.modules = modules
        self.norms = norms
        self._report = report
        size = 8 * sum(module.numbers for module in modules)
        self._held: dict[str, Components] | None = {} if size <= HELD_BYTES else None
        self.survey = Survey(len(norms), _grid())
        for module, wide in self._each(SURVEY):
            indices = _indices(module)
            self.survey.add(allocation.view(wide, 1 / norms[indices]), indices)

    def _each(self, stage: str) -> Iterator[tuple[Module, Components]]:
        for done, module in enumerate(self.modules):
            self._report(stage, done, len(self.modules))
            yield module, self._components(module)
        self._report(stage, len(self.modules), len(self.modules))

    def _components(self, module: Module) -> Components:
        if self._held is not None and module.name in self._held:
            return self._held[module.name]
        found = transform.components([member.read() for member in module.members])
        if self._held is not None:
            self._held[module.name] = found
        return found

    def frontier(self, errors: Sequence[float]) -> list[Point]:
        """About the bytes that each error takes."""
        return [Point(error, self.survey.plan(error).bits / 8) for error in errors]

    def coded(self, error: float) -> Coded:
        """Every adapter's delta error at most this. `OptionError` if that is too small for whole numbers of 32 bits."""
        # a hair below, for the last bits of what is measured of the tensors in float32
        bound = error * (1 - 1e-6) - 2e-7
        if bound <= 0:
            raise OptionError(f"max_error={error:g} is less than float32 can hold: ask for 1e-6 or more.")
        plan = self.survey.plan(bound)
        steps = _as_written(torch.from_numpy(plan.steps) * self.norms)
        bases, errors = self._bases(plan, steps)
        steps, errors = self._sought(bases, steps, errors, bound)
        codes: list[dict[str, ModuleCodes]] = [{} for _ in self.norms]
        for module, wide in self._each(WRITING):
            found = transform.encoded(wide, steps[_indices(module)], *bases[module.name])
            for row, member in enumerate(module.members):
                codes[member.index][module.name] = coded.taken(found, row)
        return Coded(bases, codes, steps.tolist(), errors.tolist())

    def _bases(
        self, plan: Plan, steps: Tensor
    ) -> tuple[dict[str, tuple[RoundedBasis, RoundedBasis]], Float[Tensor, " n"]]:
        """Rounded bases where they are worth their bytes; and the errors with them."""
        bases, lost = {}, torch.zeros_like(steps)
        for at, (module, wide) in enumerate(self._each(BASES)):
            indices = _indices(module)
            own = steps[indices]
            best: tuple[float, tuple[RoundedBasis, RoundedBasis], Codes] | None = None
            one = allocation.view(wide, 1 / self.norms[indices]) if max(plan.k[at]) else None
            for k in dict.fromkeys([plan.k[at], (0, 0)]):
                pair = _pair(wide, one, own, k, module.shape)
                found = transform.encoded(wide, own, *pair)
                price = float(found.price().sum()) + sum(side.bits() + 16 * side.k for side in pair)
                if best is None or price < best[0]:
                    best = price, pair, found
            assert best is not None
            _, bases[module.name], found = best
            lost.index_add_(0, indices, found.lost)
        return bases, lost.sqrt() / self.norms

    def _sought(
        self, bases: Mapping[str, tuple[RoundedBasis, RoundedBasis]], steps: Tensor, errors: Tensor, bound: float
    ) -> tuple[Tensor, Tensor]:
        """The steps with which errors are just below the bound, and those errors."""
        good, good_errors = torch.zeros_like(steps), torch.zeros_like(errors)
        bad = torch.full_like(steps, math.inf)
        for turn in range(TURNS):
            within = errors <= bound
            better = within & (steps > good)
            good, good_errors = torch.where(better, steps, good), torch.where(better, errors, good_errors)
            bad = torch.where(within, bad, torch.minimum(bad, steps))
            open_ = (good == 0) | ((good_errors < CLOSE * bound) & (bad > 1.002 * good))
            if not bool(open_.any()) or (turn > TURNS // 2 and bool((good > 0).all())):
                break
            aimed = steps * (0.5 * (1 + CLOSE) * bound / errors.clamp_min(1e-300)).clamp(0.25, 4.0)
            between = (good * bad).sqrt()
            outside = (aimed <= good) | (aimed >= bad)
            aimed = torch.where(outside & (good > 0) & bad.isfinite(), between, aimed)
            aimed = torch.where((aimed >= bad) & (good == 0), bad / 2, aimed)
            steps = torch.where(open_, _as_written(aimed), good)
            errors = torch.where(open_, self._errors(bases, steps, open_), good_errors)
        if bool((good == 0).any()):
            raise OptionError(f"max_error={bound:g} is more than whole numbers of 32 bits can hold of some adapter.")
        return good, good_errors

    def _errors(
        self, bases: Mapping[str, tuple[RoundedBasis, RoundedBasis]], steps: Tensor, which: Tensor
    ) -> Float[Tensor, " n"]:
        """Of some adapters, what they lose with these steps."""
        lost = torch.zeros_like(steps)
        for module, wide in self._each(STEPS):
            rows = [row for row, member in enumerate(module.members) if which[member.index]]
            if rows:
                indices = _indices(module)[rows]
                part = wide if len(rows) == len(module.members) else wide.part(rows)
                lost.index_add_(0, indices, transform.encoded(part, steps[indices], *bases[module.name]).lost)
        return lost.sqrt() / self.norms

    def within(self, limit: float, size: Callable[[Coded], int], asked: str) -> Coded:
        """The smallest error that all adapters can have in so many bytes. size: those of what came out.

        asked: what the limit is, in words, for the error where nothing is small enough.
        """
        best: Coded | None = None
        low, high = 1e-6, 0.999
        aim = self._aimed(limit)
        for _ in range(BUDGET_TURNS):
            aim = min(max(aim, low), high)
            found = self.coded(aim)
            taken = size(found)
            if taken <= limit:
                best, high = found, aim
                if taken >= FULL * limit or aim <= 1.001 * low:
                    return found
            else:
                low = aim
                if aim >= 0.999:
                    break
            slope = self._slope(aim)
            aim = aim * min(max((taken / (limit * (1 + FULL) / 2)) ** slope, 0.25), 4.0)
            if best is not None and not low < aim < high:
                aim = math.sqrt(low * high)
        if best is None:
            raise OptionError(f"{asked} cannot be reached: with next to nothing kept, there are {taken:,} bytes.")
        return best

    def _aimed(self, limit: float) -> float:
        """The error whose bytes are estimated to be so many."""
        errors = np.exp(np.linspace(math.log(1e-4), math.log(0.98), 41))
        sizes = np.array([point.bytes for point in self.frontier(errors.tolist())])
        order = np.argsort(sizes, kind="stable")
        return float(
            np.exp(np.interp(math.log(max(limit, 1)), np.log(np.maximum(sizes[order], 1)), np.log(errors[order])))
        )

    def _slope(self, error: float) -> float:
        """By which power of the bytes the error falls, near an error."""
        near, far = (point.bytes for point in self.frontier([error, min(1.1 * error, 0.9995)]))
        fall = math.log(max(near, 1) / max(far, 1))
        rise = math.log(min(1.1 * error, 0.9995) / error)
        return min(max(rise / fall if fall > 0 else 1.0, 0.2), 5.0)


def _grid() -> list[float]:
    steps = round(2 * math.log2(COARSEST / FINEST))
    return [COARSEST * 2.0 ** (-number / 2) for number in range(steps + 1)]


def _as_written(steps: Tensor) -> Tensor:
    """Steps whose logarithm is one of float32."""
    return steps.log2().to(torch.float32).to(torch.float64).exp2()


def _indices(module: Module) -> Tensor:
    return torch.tensor([member.index for member in module.members], dtype=torch.int64)


def _pair(
    wide: Components, one: allocation.View | None, steps: Tensor, k: tuple[int, int], shape: tuple[int, int]
) -> tuple[RoundedBasis, RoundedBasis]:
    """The leading directions of both sides, rounded as finely as adapters with these steps ask."""
    if one is None or not max(k):
        return no_basis(shape[1]), no_basis(shape[0])
    lengths = (wide.s / steps[:, None]).flatten().square()
    found = []
    for side, size in zip((one.down, one.up), k, strict=True):
        energy = torch.from_numpy(side.energies[:, :size]).mul(lengths[:, None]).sum(0)
        found.append(transform.rounded_basis(side.directions[:size], energy.sqrt(), energy))
    return found[0], found[1]


def no_basis(dimension: int) -> RoundedBasis:
    """No row at all."""
    none = np.zeros(0, dtype=np.int64)
    return RoundedBasis(torch.zeros(0, dimension, dtype=torch.int64), none, none)


def places(found: Coded, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Place]:
    """Of every module."""
    return {name: Place(found.bases[name], shape) for name, shape in shapes.items()}


def written(found: Coded, by_module: Mapping[str, Place]) -> list[bytes]:
    """The bytes of each adapter."""
    blobs: list[bytes] = []
    for start in range(0, len(found.codes), BATCH):
        batch = [
            (AdapterCodes(step, 0, modules), {name: by_module[name] for name in modules})
            for modules, step in zip(
                found.codes[start : start + BATCH], found.steps[start : start + BATCH], strict=True
            )
        ]
        blobs += coded.adapter_bytes(batch)
    return blobs
