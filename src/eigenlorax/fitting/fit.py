"""`fit`: find the subspace that adapters share, and store every adapter as coefficients in it.

The stages are `collection.read_sources`, `collection.scan`, then `component_fit.fit_components` or
`coded_fit.encode_collection`, and `assemble_pack`.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..core import engine as engines
from ..core.options import name_list, suggest_keywords
from ..core.progress import Progress
from ..core.subspace import Subspace
from ..errors import WARN_ABOVE, OptionError
from ..formats.sources import Source, Sources
from ..formats.table import BaseConfig
from ..pack import manifest
from ..pack.copies import share_codes, warn_of_copies
from ..pack.encoding import pack_adapter
from ..pack.loss_warnings import check_warn_above, lossy, warn_of_losses
from ..pack.manifest import FitInfo
from ..pack.pack import Pack
from ..pack.summary import larger_note, uncompressed_note
from . import population, remedy
from .coded_fit import encode_collection
from .collection import Collection, ReadCollection, read_sources, scan
from .component_fit import FittedCollection, fit_components
from .equal_updates import find_equal_updates
from .options import Execution, ReadOptions, Target
from .population import MemberOptions
from .stored_outside import StoredOutside, store_exactly
from .training_basis import check_basis, fit_basis


@suggest_keywords(
    k="n_components",
    rank="n_components",
    r="n_components",
    components="n_components",
    variance="energy",
    error="max_error",
    tol="max_error",
    size="max_bytes",
    compression="ratio",
    storage="dtype",
    num_workers="workers",
    skip_errors="skip_bad",
    exclude="exclude_adapters",
    trust_pickle="allow_pickle",
)
def fit(
    adapters: Sources,
    *,
    purpose: str | None = None,
    n_components: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | float | None = None,
    ratio: float | None = None,
    reference: Source | None = None,
    max_bytes_per_adapter: int | None = None,
    name: str | None = None,
    basis: int | None = None,
    head_error: float | None = None,
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
    base_config: BaseConfig | None = None,
) -> Pack:
    """Find the principal subspace that adapters of one base model share, and encode every adapter in it.

    Without any option, the pack is the smallest one in which no adapter's delta error exceeds 0.1 (docs/bytes.md). Pass
    at most one of n_components, energy, max_error, max_bytes and ratio for another size. The first two give a subspace
    for training and serving; the others give the smallest pack, entropy-coded.

    Args:
        adapters: Folders, folders of adapters, LoRA files, URLs, Hub ids, `NAME=PATH` strings, `Adapter` objects,
            `PeftModel`s, state dicts with their configs as pairs (state_dict, config), or a mapping from names to any
            of these.
        purpose: Purpose of the pack, which sets the size and the storage that are not passed. "storage", the default if
            no size is passed either: max_error=0.1, entropy-coded. "training": n_components=32 in float16. "serving":
            max_error=0.1 in float16, by numbers of components alone, so that one shared basis serves every adapter.
        n_components: Maximum number of components per side and module. "auto" chooses a number by leaving
            adapters out, and explains it in `Pack.notes`.
        energy: Fraction of the squared norm to keep per side, above 0, at most 1.
        max_error: Error bound: the delta error that no adapter may exceed, above 0 and below 1. The pack takes as few
            bytes as possible. With a float dtype, or weighting "factors", the pack stores floats, and only numbers of
            components are chosen. Default: 0.1, if no other size is passed.
        max_bytes: Maximum size of all tensors, bases and heads included, in bytes. The largest error of an adapter is
            as small as this size allows.
        ratio: Size as a compression ratio, at least 1: bytes of the LoRAs and heads in 16 bits ÷ bytes of the pack,
            bases and heads included.
        reference: Common adapter from which all adapters were trained, such as one of all users. The pack is then a
            population (docs/histories.md): a history whose version "common" is this adapter, and whose other versions
            are the adapters, each coded as its change from it and independent of the others. `max_error` is relative
            to that change (default: 0.2), and options of subspaces have no effect.
        max_bytes_per_adapter: With `reference`, maximum size of each adapter in bytes, in place of `max_error`: its
            error is about as small as that allows.
        name: With `reference`, name of the history. Default: "members".
        basis: Maximum number of components per side and module of a basis beside the entropy-coded adapters, in 8 bits
            per number: for training new tasks, and for serving from one basis. Its bytes are in `max_bytes` and
            `ratio`. Default: no basis.
        head_error: Error bound of task heads in an entropy-coded pack: their relative error, at least 0 and below 1.
            Other tensors outside the subspace (biases, norms, embeddings, DoRA magnitudes) keep a relative error of
            0.002, or this one if it is smaller. 0 stores all of them exactly. Default: the error bound of the updates,
            at least 0.1 and at most 0.3 (docs/bytes.md).
        weighting: "delta" minimises the error of the updates; "factors" stacks A and B as they are (arXiv 2502.04700).
            Default: "delta".
        sweeps: Number of alternating refinements of the "delta" fit. Default: 2.
        exclude_adapters: Names of adapters to leave out.
        exclude_modules: Patterns of modules to keep out of the subspace. Their LoRA factors are stored exactly, or
            within a relative error of 0.002 in an entropy-coded pack.
        dtype: Storage of the components: a float dtype, "int8" or "int4". Default: entropy coding with max_error,
            max_bytes and ratio, float16 for training and serving, else the widest dtype of the adapters.
        coefficient_dtype: Storage of the coefficients. Default: `dtype`; "int8" if dtype is "int8" or "int4".
        same_base: Accept adapters that name different base models.
        skip_bad: Leave out adapters that cannot be read or contain NaN or Inf, with a warning, instead of raising.
        warn_above: Delta error above which adapters are named in a `LossWarning`, with advice; 1 disables it.
        device: Device on which bases are fitted and adapters projected.
        solver: "exact" for full decompositions; "auto" for subspace iteration where stacks are large and n_components
            is small. Subspace iteration misses less than 1e-4 of the energy; `Pack.info` has the estimate.
        engine: "serial" (this process), "processes" (on this machine) or "ray" (a cluster that can read the files).
        workers: Number of processes. Default: all cores.
        checkpoint: Folder for the results of finished modules. After an interruption, the same call continues there.
            Delete it after the pack is saved.
        progress: Callback with the arguments (stage, done, total).
        revision, token, cache_dir, local_files_only, allow_pickle, base_config: Options of `read_adapter`.

    Returns:
        A pack in memory; `Pack.save` writes it.

    Raises:
        OptionError: Options contradict each other, or a target cannot be reached.
        FormatError, ShapeError, NonFiniteError: An adapter cannot be read.
        BaseModelError, ModuleNameError: Adapters do not belong together.

    Example:
        >>> import eigenlorax
        >>> pack = eigenlorax.fit("adapters/")
        >>> pack.names
        ['a', 'b', 'c']
        >>> all(record.delta_error <= 0.1 for record in pack.records.values())
        True
        >>> path = pack.save("pack/")
        >>> users = eigenlorax.fit(["adapters/b", "adapters/c"], reference="adapters/a", max_bytes_per_adapter=8000)
        >>> users.histories["members"].labels
        ['common', 'b', 'c']
    """
    if isinstance(adapters, Pack):
        raise OptionError("a pack is not a collection of originals: pass it to eigenlorax.refit, or export it first.")
    reading = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
        "base_config": base_config,
    }
    options = ReadOptions(name_list(exclude_adapters), name_list(exclude_modules), same_base, skip_bad, reading)
    if reference is not None:
        others: dict[str, tuple[Any, Any]] = {
            "purpose": (purpose, None),
            "n_components": (n_components, None),
            "energy": (energy, None),
            "max_bytes": (max_bytes, None),
            "ratio": (ratio, None),
            "basis": (basis, None),
            "weighting": (weighting, "delta"),
            "sweeps": (sweeps, None),
            "exclude_modules": (options.exclude_modules, []),
            "dtype": (dtype, None),
            "coefficient_dtype": (coefficient_dtype, None),
            "skip_bad": (skip_bad, False),
            "warn_above": (warn_above, WARN_ABOVE),
            "device": (device, "cpu"),
            "solver": (solver, "auto"),
            "engine": (engine, "serial"),
            "workers": (workers, None),
            "checkpoint": (checkpoint, None),
        }
        population.refuse_options(
            "on adapters that are coded as changes from a common one (reference, --reference)", others
        )
        members = MemberOptions(name or population.DEFAULT_NAME, max_error, head_error, max_bytes_per_adapter)
        return population.fit_population(
            adapters, reference, members, options, progress or (lambda stage, done, total: None)
        )
    population.refuse_options(
        "without a common adapter (reference, --reference)",
        {"max_bytes_per_adapter": (max_bytes_per_adapter, None), "name": (name, None)},
    )
    sizes = {
        "n_components": n_components,
        "energy": energy,
        "max_error": max_error,
        "max_bytes": max_bytes,
        "ratio": ratio,
    }
    target = Target.of(sizes, weighting, sweeps, (dtype, coefficient_dtype), purpose, head_error)
    execution = Execution.of(device, solver, engine, workers, checkpoint, progress)
    warn_above = check_warn_above(warn_above)
    target.refuse_unused(sweeps=sweeps, solver=solver if solver != "auto" else None)
    return _fit_subspace(adapters, options, target, basis, execution, warn_above)


def _fit_subspace(
    adapters: Sources, options: ReadOptions, target: Target, basis: int | None, execution: Execution, warn_above: float
) -> Pack:
    """Return the pack of a subspace; arguments as those of `fit`, checked and grouped."""
    sources = read_sources(adapters, options)
    target.check_dimensions(sources.shapes)
    basis = check_basis(basis, target, sources.shapes)
    with engines.open_engine(execution.engine, execution.workers) as workforce:
        collection = scan(sources, options, workforce, execution.progress)
        copies = find_equal_updates(collection)
        basis_pack = None
        if basis is not None:
            # the checkpoint is that of the adapters, which take longer
            basis_pack = fit_basis(sources, collection, basis, replace(execution, checkpoint=None), workforce)
        if target.is_coded:
            basis_bytes = basis_pack.info.stored_bytes if basis_pack is not None else 0
            fitted, outside = encode_collection(collection, copies, target, execution, workforce, basis_bytes)
        else:
            fitted = fit_components(collection, target, execution, workforce)
            outside = store_exactly(collection)
    pack = assemble_pack(sources, collection, fitted, outside, target, basis_pack)
    _warn_of_losses(pack, collection, fitted, warn_above)
    warn_of_copies(copies, pack.records, as_references=pack.is_coded)
    return pack


def assemble_pack(
    sources: ReadCollection,
    collection: Collection,
    fitted: FittedCollection,
    outside: StoredOutside,
    target: Target,
    basis: Pack | None = None,
) -> Pack:
    """Return the pack of a fitted collection.

    Args:
        sources: Adapters and modules that were read, excluded or skipped.
        collection: The adapters of the fit.
        fitted: Bases, and every adapter encoded in them.
        outside: Heads and carried tensors of the adapters.
        target: Size and purpose that were asked for.
        basis: Basis for training; None if there is none.
    """
    subspace = Subspace(fitted.modules)
    pack = Pack(
        subspace,
        manifest.describe(subspace, fitted.storage, outside.references),
        share_codes(
            {
                scanned.name: pack_adapter(
                    scanned,
                    fitted.encoded[scanned.name],
                    outside.by_adapter[scanned.name],
                    in_fit=scanned.name in collection.weights,
                )
                for scanned in collection.scanned
            }
        ),
        FitInfo(
            **asdict(fitted.options),
            auto=target.is_auto,
            purpose=target.purpose,
            head_error=outside.head_error,
            solver="iterative" if fitted.by_iteration else "exact",
            excluded_modules=sorted(sources.excluded_modules),
            skipped=dict(sorted(collection.skipped.items())),
        ),
        base_model=sources.base_model,
        revision=sources.revision,
        coefficient_dtype=fitted.coefficient_storage.name,
        basis=basis,
        reference_tensors=outside.references,
    )
    pack.notes.extend([*fitted.notes, *(basis.notes if basis is not None else [])])
    summary = pack.summary
    pack.notes.extend(note for note in (uncompressed_note(summary), larger_note(summary.bytes)) if note is not None)
    basis_seconds = basis.seconds if basis is not None else {}
    pack.seconds.update({"scanning": collection.seconds, **basis_seconds, **fitted.seconds})
    pack.frontier.extend(fitted.frontier)
    return pack


def _warn_of_losses(pack: Pack, collection: Collection, fitted: FittedCollection, warn_above: float) -> None:
    """Warn of adapters with large errors, and say what would lower them."""
    if not lossy(pack.records, warn_above):
        return
    if fitted.fitter is None:
        advice = "The target allows such errors: a smaller max_error, or more bytes, lowers them."
    elif fitted.by_iteration:
        # the number of components that suffices follows from full spectra, which such a fit does not compute
        advice = "More components (-k, n_components) lower the errors."
    else:
        advice = remedy.suggest(collection.loaders, fitted.fitter, warn_above)
    warn_of_losses(pack.records, warn_above, advice, stacklevel=6)
