"""Fit by components: fit the bases of every module, and project all adapters on them."""

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
    """Result of a fit.

    Attributes:
        modules: Bases, by module.
        encoded: Encoded adapters, by name.
        options: Options of the fit, with the number of components if the fit chose it.
        storage: Storage of the components.
        coefficient_storage: Storage of the coefficients.
        notes: Sentences about choices of the fit.
        seconds: Seconds spent, by stage.
        by_iteration: True if bases were found by subspace iteration.
        frontier: Estimated bytes at several error bounds. Empty for a fit by components.
        fitter: Options of a fit by components; None for an entropy-coded fit.
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
    """Fit the bases of all modules, and project all adapters on them, module by module.

    Args:
        collection: The adapters.
        target: Size or error bound, and storage.
        execution: Device, solver and checkpoint.
        engine: Open engine that runs one job per module.

    Raises:
        OptionError: The target cannot be reached.
        NonFiniteError: Coefficients of an adapter are outside the range of their dtype.
    """
    fitter, counts, notes = _choose_sizes(collection, target, execution)
    todo = _make_jobs(collection, fitter, counts, execution.solver)
    with _open_checkpoint(collection, fitter, execution) as checkpoint:
        resumed = [_read_checkpoint(checkpoint, index, job) for index, job in enumerate(todo)]
        modules, encoded, seconds = _run_jobs(todo, resumed, collection, engine, checkpoint, execution.progress)
    n_resumed = sum(module is not None for module in resumed)
    if n_resumed:
        notes.append(f"{n_resumed} of {len(todo)} modules were read from the checkpoint of an interrupted fit.")
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
    """Return the options of every module, numbers of components by module where they differ, and notes on choices."""
    storage = target.storage or storage_by_name(dtypes.name(collection.dtype))
    coefficient_storage = target.coefficient_storage or storage.default_coefficient_storage
    fitter = ModuleFitter(target.options, collection.weights, storage, coefficient_storage, execution.device)
    if target.is_auto:
        choice = auto_rank.choose(collection.loaders, collection.outlines, fitter, execution.progress)
        options = replace(target.options, n_components=choice.n_components)
        return replace(fitter, options=options), {}, [choice.reason]
    if target.options.max_error is not None:
        counts = sizes.choose(collection.loaders, fitter, execution.progress)
        # packs for training and serving have to be in floats
        return fitter, counts, [_note_on_floats(fitter)] if target.purpose in (None, "storage") else []
    return fitter, {}, []


def _note_on_floats(fitter: ModuleFitter) -> str:
    """Return a note that the pack stores floats, and that entropy coding would take fewer bytes."""
    names = " and ".join(dict.fromkeys([fitter.storage.name, fitter.coefficient_storage.name]))
    if fitter.options.weighting == "delta":
        cause, remedy = "as asked", "without a dtype"
    else:
        cause, remedy = f"with weighting {fitter.options.weighting!r}", "with weighting 'delta' and without a dtype"
    return (
        f"Numbers are {names}, {cause}, so only numbers of components were chosen for the error bound: {remedy} the "
        "pack takes fewer bytes."
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
    """Open the checkpoint of this fit, if there is one. Its key contains everything that the result depends on."""
    if execution.checkpoint is None:
        return nullcontext()
    key = {
        "version": __version__,
        "options": asdict(fitter.options),
        "dtypes": [fitter.storage.name, fitter.coefficient_storage.name],
        "solver": execution.solver,
        "device": execution.device.type,
        **collection.checkpoint_key,
    }
    return checkpoints.open_checkpoint(execution.checkpoint, key)


def _read_checkpoint(checkpoint: Checkpoint | None, index: int, job: FitJob) -> FittedModule | None:
    """Return the result of a job from the checkpoint; None if the job has to be done."""
    content = checkpoint.find(index, fitted_module.max_bytes(job)) if checkpoint is not None else None
    return fitted_module.from_bytes(content, job) if content is not None else None


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
    encoded: dict[str, dict[str, EncodedModule]] = {scanned.name: {} for scanned in collection.scanned}
    seconds = Counter[str]()
    computed = jobs.run([job for job, module in zip(todo, resumed, strict=True) if module is None], engine)
    for number, (job, module) in enumerate(zip(todo, resumed, strict=True)):
        progress("fitting modules", number, len(todo))
        fitted = module if module is not None else next(computed)
        if module is None and checkpoint is not None:
            checkpoint.keep(number, fitted_module.to_bytes(fitted))
        modules[job.module] = fitted.bases
        seconds.update(fitted.seconds)
        names = [member.name for member in collection.modules[job.module]]
        for members, batch in zip(fitted.members, fitted.coefficients, strict=True):
            for row, index in enumerate(members):
                update, error = job.updates[index], fitted.errors[index]
                encoded[names[index]][update.module] = encoded_row(update.module, batch, row, update.spec.kernel, error)
    progress("fitting modules", len(todo), len(todo))
    return modules, {name: EncodedAdapter.of(adapter) for name, adapter in encoded.items()}, dict(seconds)
