"""Fitting one module as a job for a worker: read factors, fit and round bases, project all adapters on them.

One module is in memory at a time. If it is too large, its batches are read again when they are needed.
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
"""Maximum bytes of a module's factors that stay in memory; larger ones are read again in every round."""
PROJECTED_AT_ONCE = 8
"""Number of adapters that are projected together: each needs about twenty times its factors, in float64."""


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """Reference to one adapter's update of a module, which a worker reads.

    Attributes:
        index: Index of the adapter in the fit.
        module: The adapter's own name of the module.
        spec: Shape, dtype and scaling of the factors.
        trained: True if the update is not zero.
    """

    index: int
    module: str
    spec: ModuleSpec
    trained: bool


@dataclass(frozen=True, slots=True)
class FitJob:
    """One module of a fit.

    Attributes:
        module: Name of the module in the subspace.
        updates: Updates of all adapters that have the module.
        fitter: Options of the fit.
        adapters: All adapters of the fit.
        by_iteration: True for subspace iteration over batches, False for full decompositions.
        counts: Numbers of components (down, up) if they were chosen before; else None.
    """

    module: str
    updates: tuple[JobUpdate, ...]
    fitter: ModuleFitter
    adapters: SharedValue[Sequence[Adapter]]
    by_iteration: bool = False
    counts: ComponentCounts | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of large products: float32 is enough for factors in 16 bits."""
        is_wide = any(update.spec.dtype.itemsize > 2 for update in self.updates)
        return torch.float64 if is_wide else torch.float32

    @property
    def projection_dtype(self) -> torch.dtype:
        """Dtype in which adapters are projected and their errors measured."""
        storages = (self.fitter.storage, self.fitter.coefficient_storage)
        return torch.float64 if any(storage.dtype.itemsize > 2 for storage in storages) else self.product_dtype


@dataclass(frozen=True, slots=True)
class LoadedJob:
    """Job with its factors in memory, or with functions that read them.

    Attributes:
        job: The job.
        members: For each batch, indices into the updates of the job.
        batches: For each batch, a function that returns it.
        seconds: Seconds spent reading.
    """

    job: FitJob
    members: tuple[tuple[int, ...], ...]
    batches: tuple[LoadBatch, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class FittedModule:
    """Result of a job.

    Attributes:
        bases: The bases after rounding to their storage.
        members: For each batch, indices into the updates of the job.
        coefficients: For each batch, the coefficients of its adapters.
        errors: Error of each update, in the order of the job.
        by_iteration: True if the bases were found by subspace iteration.
        seconds: Seconds spent, by stage.
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
    """Do all jobs, and yield the results in the order of the jobs.

    A single process reads the next module while it fits one. Several workers get one module each. If there are more
    workers than modules and all use subspace iteration, the workers share the batches of one module at a time.
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
            # frees this module before the next one is read: two in memory, not three
            del loaded
            yield replace(fitted, seconds={**fitted.seconds, "waiting": waited})


def unread(job: FitJob) -> LoadedJob:
    """Return a job whose batches are read at each call. All adapters of a batch have the same rank."""
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
    """Read some updates of a job, in their stored dtype, to the device of the fit.

    Args:
        job: The job.
        members: Indices of the updates.
    """
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
    """Fit a module's bases, round them, and project all adapters.

    Args:
        loaded: The job and its factors.
        run_calls: Runs the calls over batches in subspace iteration, here or on workers.
    """
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
    """Return all updates, in the order of the job."""
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
    """Project all adapters on the stored bases, and measure errors.

    Args:
        loaded: The job and its factors.
        exact: The bases before rounding.
        stored: The bases after rounding.
    """
    job, storage = loaded.job, loaded.job.fitter.coefficient_storage
    exact, stored = (spaces.to_device(bases, job.fitter.device) for bases in (exact, stored))
    unrounded, dual = metrics.unrounded_bases(exact, stored), projection.dual_components(stored)
    coefficients: list[CoefficientBatch] = []
    errors: dict[int, ModuleError] = {}
    for members, read in zip(loaded.members, loaded.batches, strict=True):
        batch, projections = read(), []
        for start in range(0, len(batch), PROJECTED_AT_ONCE):
            chunk = storage.prepare(batch.span(start, start + PROJECTED_AT_ONCE), job.projection_dtype)
            indices = members[start : start + len(chunk)]
            projected = _project(job, indices, chunk, stored, dual)
            exact_coefficients = storage.exact_coefficients(chunk, exact)
            measured = metrics.module_errors(chunk, projected, stored, unrounded, exact_coefficients)
            errors.update(zip(indices, measured, strict=True))
            projections.append(projected.to(torch.device("cpu")))
        coefficients.append(join_batches(projections))
    return tuple(coefficients), tuple(errors[index] for index in range(len(job.updates)))


def _project(
    job: FitJob, members: Sequence[int], batch: ModuleBatch, bases: ModuleBases, dual: projection.DualComponents
) -> CoefficientBatch:
    """Project several adapters. A `NonFiniteError` names the adapter that caused it."""
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
