"""One module of a fit as a job that any process can do: read its factors, find its bases, round them, project on them.

What is in memory is one module, or, where that is too much, a part of it that is read anew when it is needed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..core import iterative, metrics, projection
from ..core import subspace as spaces
from ..core.adapter import Adapter, ModuleSpec
from ..core.batch import BATCH_SIZE, ModuleBatch, stack_factors
from ..core.coefficients import CoefficientBatch, join_batches
from ..core.engine import Engine, SharedValue, run_serially
from ..core.fit_options import FitOptions
from ..core.iterative import LoadBatch
from ..core.metrics import ModuleError
from ..core.subspace import ModuleBases
from ..errors import NonFiniteError
from .sizes import Cell, Member, Setting

HELD_BYTES = 2**28
"""The factors of one module that may be in memory; of a larger one, chunks are read anew in every round."""
PROJECTED = 8
"""Adapters that are projected at a time: each needs some twenty times its factors, in float64."""


@dataclass(frozen=True, slots=True)
class Place:
    """One adapter in a module. index: among the adapters of the fit. trained: whether its update there is not zero."""

    index: int
    module: str
    spec: ModuleSpec
    trained: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One module, by its name in the subspace.

    by_iteration: whether its bases are found by rounds over chunks, rather than by whole spectra.
    k: the components of its sides where they were chosen before.
    """

    module: str
    places: tuple[Place, ...]
    setting: Setting
    adapters: SharedValue[Sequence[Adapter]]
    by_iteration: bool = False
    k: Cell | None = None

    @property
    def products(self) -> torch.dtype:
        """The dtype of large products: float32 holds what is narrower than it."""
        wide = any(place.spec.dtype.itemsize > 2 for place in self.places)
        return torch.float64 if wide else torch.float32

    @property
    def measured(self) -> torch.dtype:
        """The dtype in which adapters are projected, and their losses measured."""
        stored = (self.setting.storage, self.setting.coefficient_storage)
        return torch.float64 if any(one.dtype.itemsize > 2 for one in stored) else self.products


@dataclass(frozen=True, slots=True)
class Loaded:
    """A job with its factors, or with how to read them. members: of each chunk, indices into the job's places."""

    job: Job
    members: tuple[tuple[int, ...], ...]
    held: tuple[LoadBatch, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a job: the bases as they are stored, coefficients by chunk, and errors place by place.

    seconds: by what they were spent on.
    """

    bases: ModuleBases
    members: tuple[tuple[int, ...], ...]
    coefficients: tuple[CoefficientBatch, ...]
    errors: tuple[ModuleError, ...]
    by_iteration: bool
    seconds: Mapping[str, float]


def suits_iteration(places: Sequence[Place], options: FitOptions) -> bool:
    """Whether the stack of a module is so large, beside the components that are wanted, that rounds are for it."""
    spec, rows = places[0].spec, sum(place.spec.rank for place in places if place.trained)
    return iterative.is_suitable(rows, spec.in_features, spec.out_features, options)


def run(jobs: Sequence[Job], engine: Engine) -> Iterator[Fitted]:
    """The results, in the order of the jobs.

    Here, the next module is read while one is fitted. Workers are given whole modules, or, where there are fewer of
    those than workers, the chunks of each round of a module in turn.
    """
    if engine.workers == 1:
        return _reading_ahead(jobs)
    if len(jobs) < engine.workers and all(job.by_iteration for job in jobs):
        return (do(unread(job), engine.run) for job in jobs)
    return engine.run(partial(load_and_do, job) for job in jobs)


def _reading_ahead(jobs: Sequence[Job]) -> Iterator[Fitted]:
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(load, job) for job in jobs[:1]]
        for index in range(len(jobs)):
            started = time.perf_counter()
            loaded = coming.pop().result()
            waited = time.perf_counter() - started
            coming.extend(reader.submit(load, job) for job in jobs[index + 1 : index + 2])
            fitted = do(loaded)
            del loaded
            yield replace(fitted, seconds={**fitted.seconds, "waiting": waited})


def unread(job: Job) -> Loaded:
    """A job whose chunks are read when they are asked for, each time anew."""
    by_rank: dict[int, list[int]] = {}
    for index, place in enumerate(job.places):
        by_rank.setdefault(place.spec.rank, []).append(index)
    members = tuple(
        tuple(indices[start : start + BATCH_SIZE])
        for _, indices in sorted(by_rank.items())
        for start in range(0, len(indices), BATCH_SIZE)
    )
    return Loaded(job, members, tuple(partial(read, job, chunk) for chunk in members), 0.0)


def load(job: Job) -> Loaded:
    """Read a job's factors; what is narrower than float32 becomes that where rounds will need it, and memory allows."""
    started = time.perf_counter()
    loaded = unread(job)
    numbers = sum(place.spec.numbers for place in job.places)
    stored = sum(place.spec.numbers * place.spec.dtype.itemsize for place in job.places)
    if job.by_iteration and stored > HELD_BYTES:
        return loaded
    narrow = job.products == torch.float32
    widened = job.by_iteration and narrow and numbers * torch.float32.itemsize <= HELD_BYTES
    held = tuple(partial(_at_hand, one().to(torch.float32) if widened else one()) for one in loaded.held)
    return replace(loaded, held=held, seconds=time.perf_counter() - started)


def read(job: Job, members: Sequence[int]) -> ModuleBatch:
    """Some of a job's adapters, as they are stored, on the device of the fit."""
    adapters = job.adapters.get()
    places = [job.places[index] for index in members]
    found = stack_factors(
        [adapters[place.index].modules[place.module] for place in places],
        [job.setting.weights[adapters[place.index].name] if place.trained else 0.0 for place in places],
    )
    return found if job.setting.device.type == "cpu" else found.to(found.down.dtype, job.setting.device)


def _at_hand(one: ModuleBatch) -> ModuleBatch:
    return one


def do(loaded: Loaded, rounds: iterative.RunCalls = run_serially) -> Fitted:
    """The bases and coefficients of a job. rounds: who makes the calls of rounds over chunks."""
    job, setting = loaded.job, loaded.job.setting
    seconds = {"reading": loaded.seconds}
    with _timed(seconds, "solving"):
        exact = _bases(loaded, rounds)
    with _timed(seconds, "projecting"):
        stored = setting.storage.round_bases(exact)
        on_device = [spaces.to_device(bases, setting.device) for bases in (exact, stored)]
        before, dual = metrics.unrounded_bases(*on_device), projection.dual_components(on_device[1])
        coefficients: list[CoefficientBatch] = []
        errors: dict[int, ModuleError] = {}
        for members, held in zip(loaded.members, loaded.held, strict=True):
            parts = []
            for start, narrow in _parts(held()):
                part = setting.coefficient_storage.prepare(narrow, job.measured)
                found = _projected(job, members[start : start + len(part)], part, on_device[1], dual)
                unrounded = setting.coefficient_storage.exact_coefficients(part, on_device[0])
                lost = metrics.module_errors(part, found, on_device[1], before, unrounded)
                errors.update(zip(members[start : start + len(part)], lost, strict=True))
                parts.append(found.to(torch.device("cpu")))
            coefficients.append(join_batches(parts))
    return Fitted(
        bases=stored,
        members=loaded.members,
        coefficients=tuple(coefficients),
        errors=tuple(errors[index] for index in range(len(job.places))),
        by_iteration=job.by_iteration,
        seconds=seconds,
    )


def load_and_do(job: Job) -> Fitted:
    """A job from its beginning to its end."""
    return do(load(job))


def _bases(loaded: Loaded, rounds: iterative.RunCalls) -> ModuleBases:
    job, setting = loaded.job, loaded.job.setting
    if not any(place.trained for place in job.places):
        spec = job.places[0].spec
        return spaces.empty_bases(spec.in_features, spec.out_features, torch.float64)
    if job.by_iteration:
        return iterative.fit(loaded.held, setting.options, job.module, dtype=job.products, run=rounds)
    return setting.fit(_members(loaded), job.k)


def _members(loaded: Loaded) -> list[Member]:
    """The adapters one by one, in the order of the job's places."""
    job, adapters = loaded.job, loaded.job.adapters.get()
    found: dict[int, Member] = {}
    for indices, held in zip(loaded.members, loaded.held, strict=True):
        one = held()
        for row, index in enumerate(indices):
            place = job.places[index]
            found[index] = Member(adapters[place.index].name, one.factors(row), place.trained)
    return [found[index] for index in range(len(job.places))]


def _parts(one: ModuleBatch) -> Iterator[tuple[int, ModuleBatch]]:
    return ((start, one.span(start, start + PROJECTED)) for start in range(0, len(one), PROJECTED))


def _projected(
    job: Job, members: Sequence[int], part: ModuleBatch, bases: ModuleBases, dual: projection.DualComponents
) -> CoefficientBatch:
    """Coefficients of several adapters; an error says which of them it is about."""
    storage = job.setting.coefficient_storage
    try:
        return storage.project(part, bases, dual)
    except NonFiniteError:
        for row, index in enumerate(members):
            try:
                storage.project(part.span(row, row + 1), bases, dual)
            except NonFiniteError as error:
                name = job.adapters.get()[job.places[index].index].name
                raise NonFiniteError(f"adapter {name!r}, module {job.module}: {error}") from error
        raise


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - started
