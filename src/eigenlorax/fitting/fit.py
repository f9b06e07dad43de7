"""`fit`: read adapters, check that they belong together, find their subspace, keep each as coefficients in it.

Module by module: what is in memory at one time is one module's factors of all adapters, and what the pack keeps.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from .. import formats
from ..codec.storage.base import Storage
from ..codec.storage.coded import NEEDS_TARGET
from ..codec.storage.table import CODED, parse_storage, storage_by_name
from ..core import checkpoint as checkpoints
from ..core import dtypes, keys, module_names
from ..core import engine as engines
from ..core.adapter import Adapter
from ..core.checkpoint import Checkpoint
from ..core.engine import Engine, SharedValue
from ..core.fit_options import SWEEPS, FitOptions
from ..core.options import check_choice, format_value
from ..core.options import name_list as listed
from ..core.subspace import ModuleBases, Subspace
from ..errors import (
    WARN_ABOVE,
    EigenloraxError,
    FormatError,
    NonFiniteError,
    OptionError,
    ShapeError,
    SkippedAdapterWarning,
    UntrainedAdapterWarning,
    reason,
)
from ..formats import checks, sources
from ..formats.sources import AdapterSource, Sources
from ..pack import manifest
from ..pack.manifest import FitInfo
from ..pack.pack import Pack, check_warn_above, warn_of_losses
from ..pack.packed_adapter import Packing
from ..pack.summary import kept_exactly, lossy
from ..version import __version__
from . import auto_rank as auto
from . import coded_fit, fitted_module, jobs, sizes
from .auto_rank import Outline
from .jobs import Fitted, Job, Place
from .sizes import Member, Read, Setting

DEFAULT_COMPONENTS = 32
AUTO = "auto"
"""The `n_components` that is found rather than given."""
SOLVERS = ("auto", "exact")
FEW = 500
"""Adapters × modules up to which a remedy is sought by looking at all of them."""

Progress = Callable[[str, int, int], None]


def fit(
    adapters: Sources,
    *,
    n_components: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | float | None = None,
    ratio: float | None = None,
    weighting: str = "delta",
    sweeps: int | None = None,
    exclude_adapters: str | Sequence[str] = (),
    exclude_modules: str | Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    coefficient_dtype: str | torch.dtype | None = None,
    same_base: bool = False,
    skip_bad: bool = False,
    warn_above: float = WARN_ABOVE,
    device: str | torch.device = "cpu",
    solver: str = "auto",
    engine: str = "serial",
    workers: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Pack:
    """The pack of some adapters: their shared principal subspace, and each of them in its terms.

    adapters: folders, parent folders, URLs, Hub ids, `NAME=PATH` strings, `Adapter`s, or a mapping from names to those.
    n_components: at most so many directions on each side of each module (default 32), or "auto": a number that is
        found by leaving adapters out, and `Pack.notes` says why; or energy: the smallest number that keeps this share
        of the squared norm; or max_error: as few bytes as keep every adapter's delta error, as its record has it, at
        most this, whatever they are spent on: directions, coefficients, what these miss of an adapter, or digits of any
        of them (docs/method.md, "Bytes"); or max_bytes, or ratio: the smallest error that every adapter can have in so
        many bytes of tensors, heads aside, or in a pack so many times smaller than the LoRAs in 16 bits, basis counted.
        These three do their work in this process, and refuse `sweeps`, `solver="exact"` and `checkpoint`, which they
        have no use for; but max_error with floats (see dtype) is as all else.
    weighting, sweeps: see `FitOptions`; sweeps are 2 by default. With weighting "factors", max_error is in floats.
    exclude_adapters: names to leave out altogether; exclude_modules: patterns of modules to keep out of the subspace,
        which each adapter then carries as they are.
    dtype, coefficient_dtype: of the stored basis and coefficients; the widest among the sources, and dtype, by default.
        With max_error, a float dtype says that numbers are to be kept as such ones, and sizes alone are chosen.
        "int8" and "int4" are integers with a scale for every 64 numbers of a row (docs/method.md), beside which
        coefficients are int8 by default.
    same_base: the adapters' base models are one under several names. skip_bad: leave out, with a warning, adapters that
        cannot be read or hold NaN or Inf, rather than stop. warn_above: warn of adapters whose delta error is above
        that, and say what would keep them; 1 for never.
    device: where bases are fitted. progress(stage, done, total) is called as work goes on.
    solver: "exact" for the whole spectrum of every side; "auto" for a search of its leading directions where a stack is
        large and n_components small beside it (docs/method.md); it lacks less than 1e-4 of the energy, and the pack's
        info says how much.
    engine: who does the work: "serial", this process; "processes", so many `workers` of this machine; "ray", a Ray
        cluster, whose workers must be able to read the adapters' files. The result is the same but for rounding.
    checkpoint: a folder where each module is kept once it is fitted, so that a fit that was interrupted goes on there
        when it is called again with the same adapters and options. It is yours to delete when the pack is saved.
    revision, token, cache_dir, local_files_only, allow_pickle: see `read_adapter`.
    """
    found = n_components == AUTO
    aims = {"max_error": max_error, "max_bytes": max_bytes, "ratio": ratio}
    number = _number(n_components, {"energy": energy, **aims})
    number_of_sweeps = SWEEPS if sweeps is None else sweeps
    fit_options = FitOptions(number, energy, weighting, number_of_sweeps, max_error, max_bytes, ratio)
    fit_device, warn_above = _device(device), check_warn_above(warn_above)
    asked_storage, asked_coefficients = parse_storage(dtype), parse_storage(coefficient_dtype)
    _refuse_cores(dtype=asked_storage, coefficient_dtype=asked_coefficients)
    by_bytes = chooses_bytes(aims, weighting, dtype, coefficient_dtype)
    engines.check_engine(engine, workers)
    check_choice("solver", solver, SOLVERS)
    if by_bytes:
        _refuse_idle(aims, sweeps=sweeps, solver=solver if solver != SOLVERS[0] else None, checkpoint=checkpoint)
    exclude_adapters, exclude_modules = listed(exclude_adapters), listed(exclude_modules)
    report = progress or (lambda stage, done, total: None)
    skipped: dict[str, str] = {}
    options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
    }
    read = _read(adapters, exclude_adapters, skip_bad, skipped, options)
    base_model, base_revision = checks.check_one_base(read, same_base)
    checks.check_one_family(read)
    names, left_out = _module_names(read, exclude_modules)
    checks.warn_of_nothing_shared(
        {one.name: {names[module] for module in one.specs if module in names} for one in read}
    )
    asked = fit_options.n_components if n_components is not None and not found else None
    _check_dimensions(asked, checks.check_one_shape(read, names))
    with engines.open_engine(engine, workers) as workforce:
        taken: Sequence[Adapter] = tuple(read)
        shared = workforce.share(taken)
        started = time.perf_counter()
        packings = _scan(taken, shared, workforce, skip_bad, skipped, report)
        scanned = time.perf_counter() - started
        read = [packing.adapter for packing in packings]
        widest = reduce(torch.promote_types, (s.dtype for a in read for s in a.specs.values()))
        storage = asked_storage or storage_by_name(dtypes.name(widest))
        coefficient_storage = asked_coefficients or storage.default_coefficient_storage
        setting = Setting(fit_options, _fitted(packings, names), storage, coefficient_storage, fit_device)
        by_module = _by_module(packings, names)
        notes = []
        if found:
            choice = auto.choose(_reads(by_module), _outlines(by_module), setting, report)
            fit_options = replace(fit_options, n_components=choice.n_components)
            setting, notes = replace(setting, options=fit_options), [choice.reason]
        compactly, resumed, todo = None, 0, list[Job]()
        if by_bytes:
            storage = coefficient_storage = CODED
            started = time.perf_counter()
            compactly = coded_fit.fit(by_module, setting.weights, fit_options, report)
            modules, by_iteration, seconds = dict(compactly.modules), False, {"coding": time.perf_counter() - started}
            notes.extend(compactly.notes)
            elsewhere = {"engine": engine, "device": str(fit_device)}
            passed_by = [f"{name} {value}" for name, value in elsewhere.items() if value not in ("serial", "cpu")]
            if passed_by:
                notes.append(f"Bytes were chosen in this process, on its CPU, in spite of {' and '.join(passed_by)}.")
        else:
            chosen: Mapping[str, sizes.Cell] = {}
            if fit_options.max_error is not None:
                notes.append(_in_floats(fit_options, storage, coefficient_storage))
                chosen = sizes.choose(_reads(by_module), setting, report)
            index = {adapter.name: place for place, adapter in enumerate(taken)}
            todo = _jobs(by_module, index, setting, shared, chosen, solver)
            with _checkpoint(checkpoint, packings, setting, names, solver) as kept:
                before = [_kept(kept, place, job) if kept else None for place, job in enumerate(todo)]
                by_index = {index[packing.adapter.name]: packing for packing in packings}
                modules, by_iteration, seconds = _fit_modules(todo, before, by_index, workforce, kept, report)
            resumed = sum(one is not None for one in before)
    subspace = Subspace(modules)
    pack = Pack(
        subspace,
        manifest.describe(subspace, storage),
        {p.adapter.name: p.packed(in_fit=p.adapter.name in setting.weights) for p in packings},
        FitInfo(
            **asdict(fit_options),
            auto=found,
            solver="iterative" if by_iteration else "exact",
            excluded_modules=sorted(left_out),
            skipped=dict(sorted(skipped.items())),
        ),
        base_model=base_model,
        revision=base_revision,
        coefficient_dtype=coefficient_storage.name,
    )
    pack.notes.extend(notes)
    if resumed:
        pack.notes.append(f"{resumed} of {len(todo)} modules were there from a fit that was interrupted.")
    if (dominated := kept_exactly(pack.summary.bytes)) is not None:
        pack.notes.append(dominated)
    pack.seconds.update({"scanning": scanned, **seconds})
    if compactly is not None:
        pack.frontier.extend(compactly.frontier)
        warn_of_losses(
            pack.records, warn_above, "That is what was asked for: less (max_error), or more bytes, keeps more."
        )
    elif lossy(pack.records, warn_above):
        # to find out how many would do takes whole spectra
        more = "More components (-k, n_components) keep more of each."
        remedy = more if by_iteration else _remedy(_reads(by_module), setting, warn_above)
        warn_of_losses(pack.records, warn_above, remedy)
    return pack


def chooses_bytes(
    aims: Mapping[str, float | None],
    weighting: str,
    dtype: str | torch.dtype | None,
    coefficient_dtype: str | torch.dtype | None,
) -> bool:
    """Whether a fit with these options finds how numbers are stored with all else, as few bytes as that takes.

    aims: the three options that ask for it. `OptionError` where others do not go with them.
    """
    asked = [one for one in (parse_storage(dtype), parse_storage(coefficient_dtype)) if one is not None]
    coded = [one for one in asked if one.is_coded]
    given = _given(aims)
    if given is None:
        if coded:
            raise OptionError(NEEDS_TARGET)
        return False
    in_floats = aims["max_error"] is not None
    if len(coded) == len(asked) and weighting == "delta":
        return True
    if in_floats and all(one.is_float for one in asked):
        return False
    if asked:
        other = next((one for one in asked if not one.is_float), asked[0])
        raise OptionError(
            f"{given} finds by itself how numbers are stored: leave dtype {other.name} away"
            + (", or give a float dtype." if in_floats else ".")
        )
    raise OptionError(f"{given} goes with weighting 'delta', got {weighting!r}.")


def _given(aims: Mapping[str, float | None]) -> str | None:
    """The first of some options that was given, as it was."""
    return next((f"{name}={format_value(value)}" for name, value in aims.items() if value is not None), None)


def _refuse_idle(aims: Mapping[str, float | None], **options: Any) -> None:
    """Refuse the first option that was given, of those that mean nothing where bytes are chosen."""
    for name, value in options.items():
        if value is not None:
            floats = " Or give a float dtype: then sizes alone are chosen, and it counts." if aims["max_error"] else ""
            raise OptionError(
                f"{name}={value if isinstance(value, int) else str(value)!r} means nothing to {_given(aims)}, which "
                f"chooses bytes, without sweeps, solvers or checkpoints. Leave it away.{floats}"
            )


def _in_floats(options: FitOptions, storage: Storage, coefficients: Storage) -> str:
    """That numbers are not coded, and how they would be, in words."""
    names = " and ".join(dict.fromkeys([storage.name, coefficients.name]))
    if options.weighting == "delta":
        why, way = "as asked", "without a dtype"
    else:
        why, way = f"with weighting {options.weighting!r}", "with weighting 'delta' and without a dtype"
    return f"Numbers are {names}, {why}, and sizes alone were chosen for the error: {way} they take fewer bytes."


def _refuse_cores(**asked: Storage | None) -> None:
    """Raise `OptionError` for a storage of cores: such packs are read, but not written."""
    for option, storage in asked.items():
        if storage is not None and storage.core_kind is not None:
            raise OptionError(
                f"{option} {storage.name} is the storage of an older pack with cores, which fit does not write. "
                f"Pass {option}={storage.basis_storage.name!r}."
            )


def _number(n_components: int | str | None, aims: Mapping[str, float | None]) -> int | None:
    """What `FitOptions` checks: the default where nothing is given, and 1 for now where the number is to be found."""
    if n_components == AUTO:
        given = " and ".join(f"{name}={format_value(value)}" for name, value in aims.items() if value is not None)
        if given:
            raise OptionError(f"n_components='auto' finds a number itself, as {given} would: give one of them.")
        return 1
    if isinstance(n_components, str):
        raise OptionError(f"n_components must be an integer, or 'auto', got {n_components!r}.")
    return DEFAULT_COMPONENTS if n_components is None and set(aims.values()) == {None} else n_components


def _device(device: str | torch.device) -> torch.device:
    """The device, if it is there and does what a fit needs."""
    try:
        found = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=found).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(f"device {str(device)!r} cannot be used to fit in float64 here: {reason(error)}") from error
    return found


def _read(
    adapters: Sources,
    exclude: Sequence[str],
    skip_bad: bool,
    skipped: dict[str, str],
    options: dict[str, Any],
) -> list[Adapter]:
    """Every adapter that is wanted, by its headers: what is wrong with them is found before a tensor is read."""
    found = sources.find_adapters(adapters, **options)
    known = [sources.default_name(one) for one in found]
    for name in exclude:
        keys.check_known(name, known, "the sources (exclude_adapters, --exclude-adapter)")
    kept = [one for one, name in zip(found, known, strict=True) if name not in exclude]
    named = [_read_one(one, options, skip_bad, skipped) for one in kept]
    read = [adapter for adapter in named if adapter is not None]
    checks.check_names(adapter.name for adapter in read)
    if not read:
        raise OptionError("no adapter is left to fit: all of them were left out.")
    return read


def _module_names(read: Sequence[Adapter], exclude: Sequence[str]) -> tuple[dict[str, str], frozenset[str]]:
    """Module name in an adapter → in the subspace, without the excluded ones; and those."""
    names = module_names.canonical_names(adapter.specs for adapter in read)
    left_out = checks.excluded(names.values(), exclude)
    return {module: name for module, name in names.items() if name not in left_out}, left_out


def _scan(
    read: Sequence[Adapter],
    shared: SharedValue[Sequence[Adapter]],
    engine: Engine,
    skip_bad: bool,
    skipped: dict[str, str],
    report: Progress,
) -> list[Packing]:
    """Every adapter, read once, in the order of their content: arguments may come in any order."""
    packings = []
    scans = engine.run(partial(_scanned, shared, index) for index in range(len(read)))
    for done, adapter in enumerate(read):
        report("reading adapters", done, len(read))
        scan = next(scans)
        if isinstance(scan, NonFiniteError):
            if not skip_bad:
                raise NonFiniteError(f"{scan} {_without(adapter.name)}") from scan
            _skip(adapter.name, scan, None, skipped)
        else:
            packings.append(Packing(adapter, scan))
    report("reading adapters", len(read), len(read))
    if not packings:
        raise OptionError("no adapter is left to fit: all of them were left out.")
    return sorted(packings, key=lambda packing: (packing.scan.content_hash, packing.adapter.name))


def _scanned(shared: SharedValue[Sequence[Adapter]], index: int) -> checks.Scan | NonFiniteError:
    """What one adapter's reading tells, or what is wrong with its numbers."""
    try:
        return checks.scan(shared.get()[index])
    except NonFiniteError as error:
        return error


def _read_one(one: AdapterSource, options: dict[str, Any], skip_bad: bool, skipped: dict[str, str]) -> Adapter | None:
    if isinstance(one.source, Adapter):
        checks.check_made(one.source)
        return replace(one.source, name=keys.check_name(one.name or one.source.name))
    try:
        return formats.read_adapter(one.source, name=one.name, **options)
    except (FormatError, ShapeError, NonFiniteError) as error:
        if not skip_bad:
            raise type(error)(f"{error} {_without(sources.default_name(one))}") from error
        _skip(sources.default_name(one), error, one.source, skipped)
        return None


def _without(name: str) -> str:
    """Say how a fit does without an adapter."""
    return (
        f"Leave it out with exclude_adapters=[{name!r}] (--exclude-adapter {name}), or every adapter that is broken "
        "with skip_bad=True (--skip-bad)."
    )


def _skip(name: str, error: EigenloraxError, source: str | Path | None, skipped: dict[str, str]) -> None:
    # two of several folders may have one name
    same = sum(other.partition(" (")[0] == name for other in skipped)
    skipped[f"{name} ({same + 1})" if same else name] = sources.without_folders(str(error), source)
    warnings.warn(f"left out {name}: {error}", SkippedAdapterWarning, stacklevel=4)


def _check_dimensions(n_components: int | None, shapes: dict[str, tuple[int, int]]) -> None:
    if not shapes:
        raise OptionError("no module is left to fit: every LoRA module is excluded, or carried as it is.")
    largest = max(max(shape) for shape in shapes.values())
    if n_components is not None and n_components > largest:
        raise OptionError(
            f"n_components={n_components} exceeds every dimension of every module; the largest is {largest}."
        )


def _fitted(packings: Sequence[Packing], names: dict[str, str]) -> dict[str, float]:
    """The adapters that take part in the fit, with their weights: 1 / ‖delta weight‖ over the subspace's modules."""
    weights = {}
    for packing in packings:
        square = sum(value for module, value in packing.scan.delta_squares.items() if module in names)
        if square > 0:
            weights[packing.adapter.name] = square**-0.5
    untrained = sorted(packing.adapter.name for packing in packings if packing.untrained)
    if untrained:
        warnings.warn(
            f"untrained (every update is zero), so kept in the pack but left out of the fit: {', '.join(untrained)}.",
            UntrainedAdapterWarning,
            stacklevel=3,
        )
    if not weights:
        raise OptionError("no adapter has a trained update in the modules to fit: there is no subspace to find.")
    return weights


def _by_module(packings: Sequence[Packing], names: dict[str, str]) -> list[tuple[str, list[tuple[Packing, str]]]]:
    """The modules of the subspace in sorted order, each with its adapters and the name it has there."""
    members: dict[str, list[tuple[Packing, str]]] = {}
    for packing in packings:
        for module in packing.adapter.specs:
            if module in names:
                members.setdefault(names[module], []).append((packing, module))
    return sorted(members.items())


def _reads(by_module: Sequence[tuple[str, Sequence[tuple[Packing, str]]]]) -> dict[str, Read]:
    """Of each module that some adapter has trained, how its adapters' factors are read."""

    def read(members: Sequence[tuple[Packing, str]]) -> list[Member]:
        return [_member(packing, module) for packing, module in members]

    return {
        name: partial(read, members)
        for name, members in by_module
        if any(packing.scan.delta_squares[module] > 0 for packing, module in members)
    }


def _outlines(by_module: Sequence[tuple[str, Sequence[tuple[Packing, str]]]]) -> dict[str, Outline]:
    """What is known of each module before a tensor is read."""
    return {
        name: Outline(
            [packing.adapter.specs[module] for packing, module in members],
            [packing.adapter.name for packing, module in members if packing.scan.delta_squares[module] > 0],
        )
        for name, members in by_module
    }


def _remedy(reads: dict[str, Read], setting: Setting, above: float) -> str:
    """What would keep adapters that lose more than `above`, in words."""
    k, share = sizes.smallest(_some(reads, len(setting.weights)), setting, above)
    below = f"About -k {k} (n_components={k}) would bring every adapter below {above:g}"
    if share >= 1:
        return f"{below}, in more bytes than the LoRAs themselves have: keep such adapters as ordinary LoRAs."
    bounded = f"; or --max-error {above:g} (max_error={above:g}), in the fewest bytes" if above else ""
    return f"{below}{bounded}."


def _some(reads: dict[str, Read], adapters: int) -> dict[str, Read]:
    """A random quarter of the modules, the same ones each time, where looking at all of them would take long."""
    if adapters * len(reads) <= FEW:
        return reads
    order = torch.randperm(len(reads), generator=torch.Generator().manual_seed(0)).tolist()
    names = list(reads)
    return {names[place]: reads[names[place]] for place in sorted(order[: -(-len(reads) // 4)])}


def _member(packing: Packing, module: str) -> Member:
    return Member(packing.adapter.name, packing.adapter.modules[module], packing.scan.delta_squares[module] > 0)


def _checkpoint(
    folder: str | Path | None, packings: Sequence[Packing], setting: Setting, names: dict[str, str], solver: str
) -> AbstractContextManager[Checkpoint | None]:
    """The checkpoint of this fit in a folder, where one is wanted."""
    if folder is None:
        return nullcontext()
    key = {
        "version": __version__,
        "options": asdict(setting.options),
        "dtypes": [setting.storage.name, setting.coefficient_storage.name],
        "solver": solver,
        "device": setting.device.type,
        "adapters": [[packing.adapter.name, packing.scan.content_hash] for packing in packings],
        "modules": sorted(names.items()),
    }
    return checkpoints.open_checkpoint(Path(folder), key)


def _kept(checkpoint: Checkpoint, place: int, job: Job) -> Fitted | None:
    """Return the result of a job that was kept; None where it has to be done."""
    data = checkpoint.find(place, fitted_module.most_bytes(job))
    return fitted_module.from_bytes(data, job) if data is not None else None


def _jobs(
    by_module: Sequence[tuple[str, Sequence[tuple[Packing, str]]]],
    index: Mapping[str, int],
    setting: Setting,
    shared: SharedValue[Sequence[Adapter]],
    chosen: Mapping[str, sizes.Cell],
    solver: str,
) -> list[Job]:
    """One job a module. index: of each adapter among those that are shared."""
    found = []
    for name, members in by_module:
        places = tuple(
            Place(
                index=index[packing.adapter.name],
                module=module,
                spec=packing.adapter.specs[module],
                trained=packing.scan.delta_squares[module] > 0,
            )
            for packing, module in members
        )
        by_iteration = solver == "auto" and not chosen and jobs.suits_iteration(places, setting.options)
        found.append(Job(name, places, setting, shared, by_iteration, chosen.get(name)))
    return found


def _fit_modules(
    todo: Sequence[Job],
    before: Sequence[Fitted | None],
    packings: Mapping[int, Packing],
    engine: Engine,
    kept: Checkpoint | None,
    report: Progress,
) -> tuple[dict[str, ModuleBases], bool, dict[str, float]]:
    """The bases by module, whether some were found by iteration, and the seconds that went into it.

    before: what is there of them already. The packings get their coefficients.
    """
    modules: dict[str, ModuleBases] = {}
    by_iteration, seconds = False, Counter[str]()
    done = jobs.run([todo[place] for place, found in enumerate(before) if found is None], engine)
    for place, job in enumerate(todo):
        report("fitting modules", place, len(todo))
        fitted = before[place]
        if fitted is None:
            fitted = next(done)
            if kept:
                kept.keep(place, fitted_module.to_bytes(fitted))
        modules[job.module] = fitted.bases
        by_iteration |= fitted.by_iteration
        seconds.update(fitted.seconds)
        _take(fitted, job, packings)
    report("fitting modules", len(todo), len(todo))
    return modules, by_iteration, dict(seconds)


def _take(fitted: Fitted, job: Job, packings: Mapping[int, Packing]) -> None:
    """Give each adapter its coefficients of a module."""
    for members, chunk in zip(fitted.members, fitted.coefficients, strict=True):
        for row, index in enumerate(members):
            place = job.places[index]
            error = fitted.errors[index]
            packings[place.index].take(place.module, job.module, chunk, row, place.spec.kernel, error)
