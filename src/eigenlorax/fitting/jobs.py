"""One module of a fit as a job that any process can do: read its factors, fit and round its bases, and project on them.

One module is in memory at a time, or, where it is too large for that, batches of it that are read again when needed.
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
from .module_fitter import ComponentCounts, ModuleFitter, ModuleUpdate

HELD_BYTES = 2**28
"""Size of a module's factors up to which they stay in memory; larger ones are read again in every round."""
PROJECTED_AT_ONCE = 8
"""Adapters that are projected together: each needs some twenty times its factors, in float64."""


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """One adapter's update of a module, to be read by a worker.

    index: of the adapter in the fit. module: the adapter's own name of it. trained: whether the update is not zero.
    """

    index: int
    module: str
    spec: ModuleSpec
    trained: bool


@dataclass(frozen=True, slots=True)
class FitJob:
    """One module of a fit, by its name in the subspace.

    adapters: all adapters of the fit. by_iteration: whether bases are found by subspace iteration over batches, rather
    than by full decompositions. counts: of components, where they were chosen before.
    """

    module: str
    updates: tuple[JobUpdate, ...]
    fitter: ModuleFitter
    adapters: SharedValue[Sequence[Adapter]]
    by_iteration: bool = False
    counts: ComponentCounts | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of large products: float32 is enough for factors in 16 bits."""
        is_wide = any(update.spec.dtype.itemsize > 2 for update in self.updates)
        return torch.float64 if is_wide else torch.float32

    @property
    def projection_dtype(self) -> torch.dtype:
        """The dtype in which adapters are projected and their errors measured."""
        storages = (self.fitter.storage, self.fitter.coefficient_storage)
        return torch.float64 if any(each.dtype.itemsize > 2 for each in storages) else self.product_dtype


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """A job with its factors, or with functions that read them.

    members: of each batch, indices into the updates of the job. batches: return one batch each.
    seconds: that reading took.
    """

    job: FitJob
    members: tuple[tuple[int, ...], ...]
    batches: tuple[LoadBatch, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class FittedModule:
    """The result of a job: bases as they are stored, coefficients by batch, and the error of each update.

    members: of each batch, indices into the updates of the job. seconds: by stage.
    """

    bases: ModuleBases
    members: tuple[tuple[int, ...], ...]
    coefficients: tuple[CoefficientBatch, ...]
    errors: tuple[ModuleError, ...]
    by_iteration: bool
    seconds: Mapping[str, float]


def suits_iteration(updates: Sequence[JobUpdate], options: FitOptions) -> bool:
    """Return whether subspace iteration is faster for a module than full decompositions."""
    spec, rows = updates[0].spec, sum(update.spec.rank for update in updates if update.trained)
    return iterative.is_suitable(rows, spec.in_features, spec.out_features, options)


def run(jobs: Sequence[FitJob], engine: Engine) -> Iterator[FittedModule]:
    """Do all jobs, and yield the results in their order.

    A single process reads the next module while it fits one. Several workers get whole modules, or, where there are
    more workers than modules, the batches of one module after the other.
    """
    if engine.workers == 1:
        return _run_reading_ahead(jobs)
    if len(jobs) < engine.workers and all(job.by_iteration for job in jobs):
        return (fit_loaded(unread(job), engine.run) for job in jobs)
    return engine.run(partial(load_and_fit, job) for job in jobs)


def _run_reading_ahead(jobs: Sequence[FitJob]) -> Iterator[FittedModule]:
    with ThreadPoolExecutor(1) as reader:
        pending = [reader.submit(load, job) for job in jobs[:1]]
        for index in range(len(jobs)):
            started = time.perf_counter()
            loaded = pending.pop().result()
            waited = time.perf_counter() - started
            pending.extend(reader.submit(load, job) for job in jobs[index + 1 : index + 2])
            fitted = fit_loaded(loaded)
            # two modules in memory, not three, when the next one is taken
            del loaded
            yield replace(fitted, seconds={**fitted.seconds, "waiting": waited})


def unread(job: FitJob) -> LoadedJob:
    """Return a job whose batches are read each time they are asked for. A batch has adapters of one rank."""
    by_rank: dict[int, list[int]] = {}
    for index, update in enumerate(job.updates):
        by_rank.setdefault(update.spec.rank, []).append(index)
    members = tuple(
        tuple(indices[start : start + BATCH_SIZE])
        for _, indices in sorted(by_rank.items())
        for start in range(0, len(indices), BATCH_SIZE)
    )
    return LoadedJob(job, members, tuple(partial(read_batch, job, batch) for batch in members), 0.0)


def load(job: FitJob) -> LoadedJob:
    """Read the factors of a job, unless they are too large to stay in memory.

    For subspace iteration, 16-bit factors are converted to float32 once, if memory allows.
    """
    started = time.perf_counter()
    loaded = unread(job)
    numbers = sum(update.spec.numbers for update in job.updates)
    stored = sum(update.spec.numbers * update.spec.dtype.itemsize for update in job.updates)
    if job.by_iteration and stored > HELD_BYTES:
        return loaded
    is_narrow = job.product_dtype == torch.float32
    widen = job.by_iteration and is_narrow and numbers * torch.float32.itemsize <= HELD_BYTES
    batches = tuple(partial(_same, read().to(torch.float32) if widen else read()) for read in loaded.batches)
    return replace(loaded, batches=batches, seconds=time.perf_counter() - started)


def read_batch(job: FitJob, members: Sequence[int]) -> ModuleBatch:
    """Read some updates of a job as they are stored, to the device of the fit. members: their indices."""
    adapters = job.adapters.get()
    updates = [job.updates[index] for index in members]
    batch = stack_factors(
        [adapters[update.index].modules[update.module] for update in updates],
        [job.fitter.weights[adapters[update.index].name] if update.trained else 0.0 for update in updates],
    )
    return batch if job.fitter.device.type == "cpu" else batch.to(batch.down.dtype, job.fitter.device)


def _same(batch: ModuleBatch) -> ModuleBatch:
    return batch


def fit_loaded(loaded: LoadedJob, run_calls: iterative.RunCalls = run_serially) -> FittedModule:
    """Fit a module's bases, round them, and project all adapters. run_calls: runs the calls over batches."""
    job = loaded.job
    seconds = {"reading": loaded.seconds}
    with _timed(seconds, "solving"):
        exact = _fit_bases(loaded, run_calls)
    with _timed(seconds, "projecting"):
        stored = job.fitter.storage.round_bases(exact)
        coefficients, errors = _project_all(loaded, exact, stored)
    return FittedModule(stored, loaded.members, coefficients, errors, job.by_iteration, seconds)


def load_and_fit(job: FitJob) -> FittedModule:
    """Read and fit a module."""
    return fit_loaded(load(job))


def _fit_bases(loaded: LoadedJob, run_calls: iterative.RunCalls) -> ModuleBases:
    job, fitter = loaded.job, loaded.job.fitter
    if not any(update.trained for update in job.updates):
        spec = job.updates[0].spec
        return spaces.empty_bases(spec.in_features, spec.out_features, torch.float64)
    if job.by_iteration:
        return iterative.fit(loaded.batches, fitter.options, job.module, dtype=job.product_dtype, run=run_calls)
    return fitter.fit(_read_updates(loaded), job.counts)


def _read_updates(loaded: LoadedJob) -> list[ModuleUpdate]:
    """Return the updates one by one, in the order of the job."""
    job, adapters = loaded.job, loaded.job.adapters.get()
    by_index: dict[int, ModuleUpdate] = {}
    for members, read in zip(loaded.members, loaded.batches, strict=True):
        batch = read()
        for row, index in enumerate(members):
            update = job.updates[index]
            by_index[index] = ModuleUpdate(adapters[update.index].name, batch.factors(row), update.trained)
    return [by_index[index] for index in range(len(job.updates))]


def _project_all(
    loaded: LoadedJob, exact: ModuleBases, stored: ModuleBases
) -> tuple[tuple[CoefficientBatch, ...], tuple[ModuleError, ...]]:
    """Project all adapters on the stored bases, and measure errors. exact: the bases before rounding."""
    job, storage = loaded.job, loaded.job.fitter.coefficient_storage
    exact, stored = (spaces.to_device(bases, job.fitter.device) for bases in (exact, stored))
    unrounded, dual = metrics.unrounded_bases(exact, stored), projection.dual_components(stored)
    coefficients: list[CoefficientBatch] = []
    errors: dict[int, ModuleError] = {}
    for members, read in zip(loaded.members, loaded.batches, strict=True):
        batch, parts = read(), []
        for start in range(0, len(batch), PROJECTED_AT_ONCE):
            part = storage.prepare(batch.span(start, start + PROJECTED_AT_ONCE), job.projection_dtype)
            indices = members[start : start + len(part)]
            projected = _project(job, indices, part, stored, dual)
            exact_coefficients = storage.exact_coefficients(part, exact)
            measured = metrics.module_errors(part, projected, stored, unrounded, exact_coefficients)
            errors.update(zip(indices, measured, strict=True))
            parts.append(projected.to(torch.device("cpu")))
        coefficients.append(join_batches(parts))
    return tuple(coefficients), tuple(errors[index] for index in range(len(job.updates)))


def _project(
    job: FitJob, members: Sequence[int], batch: ModuleBatch, bases: ModuleBases, dual: projection.DualComponents
) -> CoefficientBatch:
    """Project several adapters; an error names the one that caused it."""
    storage = job.fitter.coefficient_storage
    try:
        return storage.project(batch, bases, dual)
    except NonFiniteError:
        for row, index in enumerate(members):
            try:
                storage.project(batch.span(row, row + 1), bases, dual)
            except NonFiniteError as error:
                name = job.adapters.get()[job.updates[index].index].name
                raise NonFiniteError(f"Adapter {name!r}, module {job.module}: {error}") from error
        raise


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
