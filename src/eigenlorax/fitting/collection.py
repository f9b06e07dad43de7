"""The adapters of a fit: find, read, compare and scan them."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from .. import formats
from ..core import keys, module_names
from ..core.adapter import Adapter, LoRAFactors, ModuleSpec
from ..core.engine import Engine, SharedValue
from ..core.progress import Progress
from ..errors import (
    EigenloraxError,
    FormatError,
    NonFiniteError,
    OptionError,
    ShapeError,
    SkippedAdapterWarning,
    UntrainedAdapterWarning,
)
from ..formats import checks, sources
from ..formats.checks import StatedBase
from ..formats.sources import AdapterSource, Sources
from ..pack.scanned_adapter import ScannedAdapter
from .auto_rank import ModuleOutline
from .module_fitter import LoadModule, ModuleUpdate
from .options import ReadOptions

NONE_LEFT = "No adapter is left to fit: all of them were left out (exclude_adapters, skip_bad)."


@dataclass(frozen=True, slots=True)
class ReadCollection:
    """Adapters whose headers were read and agree with each other. Their tensors were not read yet.

    Attributes:
        adapters: The adapters, in the order of the sources.
        subspace_names: Name in the subspace of each module, by the adapters' own name, without excluded modules.
        excluded_modules: Names in the subspace of excluded modules.
        skipped: Adapters that could not be read, with the reason.
        base_model: Base model of the adapters; None if none of them names one.
        revision: Revision of the base model; None if unknown.
        shapes: (out, in) of each module, by name in the subspace.
    """

    adapters: Sequence[Adapter]
    subspace_names: Mapping[str, str]
    excluded_modules: frozenset[str]
    skipped: Mapping[str, str]
    base_model: str | None
    revision: str | None
    shapes: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One module of one adapter.

    Attributes:
        scanned: The adapter.
        module: The adapter's own name of the module.
    """

    scanned: ScannedAdapter
    module: str

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.scanned.name

    @property
    def spec(self) -> ModuleSpec:
        return self.scanned.adapter.specs[self.module]

    @property
    def is_trained(self) -> bool:
        """True if the update of this module is not zero."""
        return self.scanned.is_trained(self.module)

    def read(self) -> LoRAFactors:
        """Read the LoRA factors of this module."""
        return self.scanned.adapter.modules[self.module]


@dataclass(frozen=True, slots=True)
class Collection:
    """Adapters whose tensors were scanned, sorted by content, so that the order of arguments does not matter.

    Attributes:
        scanned: The adapters, sorted by content hash.
        modules: Modules of the subspace in sorted order, each with the adapters that have it.
        weights: 1 / ‖update‖ over the subspace's modules, by adapter name. Untrained adapters have no weight.
        adapters: All adapters that were read, shared with workers.
        index: Position of each adapter in `adapters`, by name.
        skipped: Adapters that were left out, with the reason.
        seconds: Seconds spent reading.
    """

    scanned: Sequence[ScannedAdapter]
    modules: Mapping[str, Sequence[AdapterModule]]
    weights: Mapping[str, float]
    adapters: SharedValue[Sequence[Adapter]]
    index: Mapping[str, int]
    skipped: Mapping[str, str]
    seconds: float

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that can represent the factors of all adapters."""
        dtypes = (spec.dtype for scanned in self.scanned for spec in scanned.adapter.specs.values())
        return reduce(torch.promote_types, dtypes)

    @property
    def checkpoint_key(self) -> dict[str, Any]:
        """Contents of the adapters and names of the modules, as a part of the key of a checkpoint."""
        names = {module: name for scanned in self.scanned for module, name in scanned.subspace_names.items()}
        return {
            "adapters": [[scanned.name, scanned.scan.content_hash] for scanned in self.scanned],
            "modules": sorted(names.items()),
        }

    @property
    def loaders(self) -> dict[str, LoadModule]:
        """Functions that load all updates of a module, by module, for modules that some adapter has trained."""
        return {
            name: partial(_load_updates, members)
            for name, members in self.modules.items()
            if any(member.is_trained for member in members)
        }

    @property
    def outlines(self) -> dict[str, ModuleOutline]:
        """Shapes of all modules and names of the adapters that trained them, by module."""
        return {
            name: ModuleOutline(
                [member.spec for member in members], [member.name for member in members if member.is_trained]
            )
            for name, members in self.modules.items()
        }


def _load_updates(members: Sequence[AdapterModule]) -> list[ModuleUpdate]:
    return [ModuleUpdate(member.name, member.read(), member.is_trained) for member in members]


def read_sources(adapters: Sources, options: ReadOptions) -> ReadCollection:
    """Find adapters, read their configs and headers, and check that they belong together.

    Names, ranks, shapes, base models and model families are compared before a tensor is read.

    Args:
        adapters: Adapters in any form that `fit` takes.
        options: Adapters and modules to leave out, and options of reading.

    Raises:
        FormatError, ShapeError, NonFiniteError: An adapter cannot be read, and `skip_bad` is not set.
        BaseModelError, ModuleNameError: The adapters do not belong together.
        OptionError: No adapter is left.
    """
    adapter_sources = sources.find_adapters(adapters, **options.reading)
    names = [sources.default_name(source) for source in adapter_sources]
    for name in options.exclude_adapters:
        keys.check_known(name, names, "the sources (exclude_adapters, --exclude-adapter)")
    skipped: dict[str, str] = {}
    read = []
    for source, name in zip(adapter_sources, names, strict=True):
        if (
            name not in options.exclude_adapters
            and (adapter := _read_source(source, options, skipped, is_only=len(names) == 1)) is not None
        ):
            read.append(adapter)
    in_memory = any(isinstance(source.source, Adapter) for source in adapter_sources)
    checks.check_names((adapter.name for adapter in read), in_memory=in_memory)
    if not read:
        raise OptionError(NONE_LEFT)
    base_model, revision = checks.check_one_base([StatedBase.of(adapter) for adapter in read], options.same_base)
    checks.check_one_family(read)
    names_in_subspace = module_names.canonical_names(adapter.specs for adapter in read)
    excluded = checks.excluded(names_in_subspace.values(), options.exclude_modules)
    names_in_subspace = {module: name for module, name in names_in_subspace.items() if name not in excluded}
    checks.warn_of_nothing_shared(
        {adapter.name: {names_in_subspace[m] for m in adapter.specs if m in names_in_subspace} for adapter in read}
    )
    shapes = checks.check_one_shape(read, names_in_subspace)
    return ReadCollection(read, names_in_subspace, excluded, skipped, base_model, revision, shapes)


def _read_source(
    source: AdapterSource, options: ReadOptions, skipped: dict[str, str], *, is_only: bool
) -> Adapter | None:
    """Return an adapter without its tensors. Warn and return None if it is broken and may be skipped."""
    if isinstance(source.source, Adapter):
        checks.check_in_memory(source.source)
        return replace(source.source, name=keys.check_name(source.name or source.source.name))
    try:
        return formats.read_adapter(source.source, name=source.name, **options.reading)
    except (FormatError, ShapeError, NonFiniteError) as error:
        name = sources.default_name(source)
        if not options.skip_bad:
            raise type(error)(f"{error}{'' if is_only else _how_to_skip(name)}") from error
        _skip(name, error, source.source, skipped, stacklevel=7)
        return None


def scan(collection: ReadCollection, options: ReadOptions, engine: Engine, progress: Progress) -> Collection:
    """Read the tensors of every adapter once: look for NaN and Inf, hash them, and compute norms of updates.

    Args:
        collection: Adapters from `read_sources`.
        options: The option `skip_bad` is used.
        engine: Engine that scans the adapters, one job each.
        progress: Callback with the arguments (stage, done, total).

    Raises:
        NonFiniteError: An adapter contains NaN or Inf, and `skip_bad` is not set.
        OptionError: No adapter is left, or none has a trained update.
    """
    started = time.perf_counter()
    adapters, skipped = tuple(collection.adapters), dict(collection.skipped)
    shared: SharedValue[Sequence[Adapter]] = engine.share(adapters)
    scanned = []
    scans = engine.run(partial(_scan_adapter, shared, index) for index in range(len(adapters)))
    for done, adapter in enumerate(adapters):
        progress("reading adapters", done, len(adapters))
        outcome = next(scans)
        if isinstance(outcome, NonFiniteError):
            if not options.skip_bad:
                advice = "" if len(adapters) == 1 else _how_to_skip(adapter.name)
                raise NonFiniteError(f"{outcome}{advice}") from outcome
            _skip(adapter.name, outcome, None, skipped, stacklevel=6)
        else:
            names = collection.subspace_names
            own_names = {module: names[module] for module in adapter.specs if module in names}
            scanned.append(ScannedAdapter(adapter, outcome, own_names))
    progress("reading adapters", len(adapters), len(adapters))
    if not scanned:
        raise OptionError(NONE_LEFT)
    scanned.sort(key=lambda each: (each.scan.content_hash, each.name))
    return Collection(
        scanned=scanned,
        modules=_by_module(scanned),
        weights=_weights(scanned),
        adapters=shared,
        index={adapter.name: index for index, adapter in enumerate(adapters)},
        skipped=skipped,
        seconds=time.perf_counter() - started,
    )


def _scan_adapter(adapters: SharedValue[Sequence[Adapter]], index: int) -> checks.Scan | NonFiniteError:
    """Return the scan of one adapter, or its `NonFiniteError`: raising it would end the other workers."""
    try:
        return checks.scan(adapters.get()[index])
    except NonFiniteError as error:
        return error


def _how_to_skip(name: str) -> str:
    """Return a sentence on how to fit without an adapter, to append to an error."""
    return (
        f" Leave it out with exclude_adapters=[{name!r}] (--exclude-adapter {name}), or all broken adapters with "
        "skip_bad=True (--skip-bad)."
    )


def _skip(
    name: str, error: EigenloraxError, source: str | Path | None, skipped: dict[str, str], stacklevel: int
) -> None:
    """Add an adapter to `skipped`, and warn. `stacklevel` is that of the caller of `fit`."""
    # adapters in several folders may have the same name
    n_same = sum(skipped_name.partition(" (")[0] == name for skipped_name in skipped)
    skipped[f"{name} ({n_same + 1})" if n_same else name] = sources.without_folders(str(error), source)
    warnings.warn(f"left out {name}: {error}", SkippedAdapterWarning, stacklevel=stacklevel)


def _weights(scanned: Sequence[ScannedAdapter]) -> dict[str, float]:
    """Return 1 / ‖update‖ of each trained adapter, by name. Warn of untrained adapters."""
    weights = {}
    for each in scanned:
        square = sum(value for module, value in each.scan.delta_squares.items() if module in each.subspace_names)
        if square > 0:
            weights[each.name] = square**-0.5
    untrained = sorted(each.name for each in scanned if each.is_untrained)
    if untrained:
        warnings.warn(
            f"untrained (every update is zero), so kept in the pack but left out of the fit: {', '.join(untrained)}.",
            UntrainedAdapterWarning,
            stacklevel=6,
        )
    if not weights:
        raise OptionError("No adapter has a trained update in the modules to fit, so there is no subspace to find.")
    return weights


def _by_module(scanned: Sequence[ScannedAdapter]) -> dict[str, list[AdapterModule]]:
    members: dict[str, list[AdapterModule]] = {}
    for each in scanned:
        for module, name in each.subspace_names.items():
            members.setdefault(name, []).append(AdapterModule(each, module))
    return dict(sorted(members.items()))
