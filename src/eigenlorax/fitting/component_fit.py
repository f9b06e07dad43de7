"""A fit by components: the bases of every module, and all adapters as coefficients in them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

from ..codec.encoder import RatePoint
from ..codec.storage.base import Storage
from ..codec.storage.table import storage_by_name
from ..core import checkpoint as checkpoints
from ..core import dtypes
from ..core.checkpoint import Checkpoint
from ..core.engine import Engine
from ..core.fit_options import FitOptions
from ..core.progress import Progress
from ..core.subspace import ModuleBases
from ..pack.encoding import EncodedAdapter, EncodedModule, encoded_row
from ..version import __version__
from . import auto_rank, fitted_module, jobs, sizes
from .collection import Collection
from .jobs import FitJob, FittedModule, JobUpdate
from .module_fitter import ComponentCounts, ModuleFitter
from .options import Execution, Target


@dataclass(frozen=True, slots=True)
class FittedCollection:
    """The result of a fit: bases by module, and every adapter encoded in them, by name.

    options: of the fit, with the number of components if it was chosen. notes: sentences about choices. seconds: by
    stage. by_iteration: whether bases were found by subspace iteration. frontier: of an entropy-coded fit. fitter: of a
    fit by components.
    """

    modules: Mapping[str, ModuleBases]
    encoded: Mapping[str, EncodedAdapter]
    options: FitOptions
    storage: Storage
    coefficient_storage: Storage
    notes: Sequence[str]
    seconds: Mapping[str, float]
    by_iteration: bool = False
    frontier: Sequence[RatePoint] = ()
    fitter: ModuleFitter | None = None


def fit_components(collection: Collection, target: Target, execution: Execution, engine: Engine) -> FittedCollection:
    """Fit the bases of all modules, and project all adapters on them, module by module."""
    fitter, counts, notes = _choose_sizes(collection, target, execution)
    todo = _make_jobs(collection, fitter, counts, execution.solver)
    with _open_checkpoint(collection, fitter, execution) as checkpoint:
        resumed = [_read_kept(checkpoint, number, job) for number, job in enumerate(todo)]
        modules, encoded, seconds = _run_jobs(todo, resumed, collection, engine, checkpoint, execution.progress)
    n_resumed = sum(module is not None for module in resumed)
    if n_resumed:
        notes.append(f"{n_resumed} of {len(todo)} modules were there from a fit that was interrupted.")
    return FittedCollection(
        modules=modules,
        encoded=encoded,
        options=fitter.options,
        storage=fitter.storage,
        coefficient_storage=fitter.coefficient_storage,
        notes=notes,
        seconds=seconds,
        by_iteration=any(job.by_iteration for job in todo),
        fitter=fitter,
    )


def _choose_sizes(
    collection: Collection, target: Target, execution: Execution
) -> tuple[ModuleFitter, Mapping[str, ComponentCounts], list[str]]:
    """Return how modules are fitted, their numbers of components where they differ, and notes on both."""
    storage = target.storage or storage_by_name(dtypes.name(collection.dtype))
    coefficient_storage = target.coefficient_storage or storage.default_coefficient_storage
    fitter = ModuleFitter(target.options, collection.weights, storage, coefficient_storage, execution.device)
    if target.is_auto:
        choice = auto_rank.choose(collection.reads, collection.outlines, fitter, execution.progress)
        options = replace(target.options, n_components=choice.n_components)
        return replace(fitter, options=options), {}, [choice.reason]
    if target.options.max_error is not None:
        counts = sizes.choose(collection.reads, fitter, execution.progress)
        return fitter, counts, [_note_on_floats(fitter)]
    return fitter, {}, []


def _note_on_floats(fitter: ModuleFitter) -> str:
    """Return a note that an error bound is met in floats, and how entropy coding would take fewer bytes."""
    names = " and ".join(dict.fromkeys([fitter.storage.name, fitter.coefficient_storage.name]))
    if fitter.options.weighting == "delta":
        why, how = "as asked", "without a dtype"
    else:
        why, how = f"with weighting {fitter.options.weighting!r}", "with weighting 'delta' and without a dtype"
    return (
        f"Numbers are {names}, {why}, so only numbers of components were chosen for the error bound: {how} the pack "
        "takes fewer bytes."
    )


def _make_jobs(
    collection: Collection, fitter: ModuleFitter, counts: Mapping[str, ComponentCounts], solver: str
) -> list[FitJob]:
    todo = []
    for name, members in collection.modules.items():
        updates = tuple(
            JobUpdate(collection.index[member.name], member.module, member.spec, member.is_trained)
            for member in members
        )
        # numbers of components for an error bound were measured on bases from full decompositions
        by_iteration = solver == "auto" and not counts and jobs.suits_iteration(updates, fitter.options)
        todo.append(FitJob(name, updates, fitter, collection.adapters, by_iteration, counts.get(name)))
    return todo


def _open_checkpoint(
    collection: Collection, fitter: ModuleFitter, execution: Execution
) -> AbstractContextManager[Checkpoint | None]:
    """Open the checkpoint of this fit, if one is wanted. Its key has everything that the result depends on."""
    if execution.checkpoint is None:
        return nullcontext()
    names = {module: name for each in collection.scanned for module, name in each.subspace_names.items()}
    key = {
        "version": __version__,
        "options": asdict(fitter.options),
        "dtypes": [fitter.storage.name, fitter.coefficient_storage.name],
        "solver": execution.solver,
        "device": execution.device.type,
        "adapters": [[each.name, each.scan.content_hash] for each in collection.scanned],
        "modules": sorted(names.items()),
    }
    return checkpoints.open_checkpoint(execution.checkpoint, key)


def _read_kept(checkpoint: Checkpoint | None, number: int, job: FitJob) -> FittedModule | None:
    """Return the result of a job from the checkpoint; None if the job has to be done."""
    data = checkpoint.find(number, fitted_module.most_bytes(job)) if checkpoint is not None else None
    return fitted_module.from_bytes(data, job) if data is not None else None


def _run_jobs(
    todo: Sequence[FitJob],
    resumed: Sequence[FittedModule | None],
    collection: Collection,
    engine: Engine,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> tuple[dict[str, ModuleBases], dict[str, EncodedAdapter], dict[str, float]]:
    """Do the jobs that have no result yet, and return bases by module, adapters by name, and seconds by stage."""
    modules: dict[str, ModuleBases] = {}
    encoded: dict[str, dict[str, EncodedModule]] = {each.name: {} for each in collection.scanned}
    seconds = Counter[str]()
    results = jobs.run([job for job, result in zip(todo, resumed, strict=True) if result is None], engine)
    for number, (job, result) in enumerate(zip(todo, resumed, strict=True)):
        progress("fitting modules", number, len(todo))
        fitted = result if result is not None else next(results)
        if result is None and checkpoint is not None:
            checkpoint.keep(number, fitted_module.to_bytes(fitted))
        modules[job.module] = fitted.bases
        seconds.update(fitted.seconds)
        names = [member.name for member in collection.modules[job.module]]
        for members, batch in zip(fitted.members, fitted.coefficients, strict=True):
            for row, index in enumerate(members):
                update, error = job.updates[index], fitted.errors[index]
                row_of_adapter = encoded_row(update.module, batch, row, update.spec.kernel, error)
                encoded[names[index]][update.module] = row_of_adapter
    progress("fitting modules", len(todo), len(todo))
    return modules, {name: EncodedAdapter.of(adapter) for name, adapter in encoded.items()}, dict(seconds)
