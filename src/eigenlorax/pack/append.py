"""Appending a version to a history: read it, compare it with the earlier versions, and encode it."""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..codec.versions import lossy
from ..codec.versions.version import DecodedVersion, EncodedVersion, Version
from ..core import atomic_files, keys, metrics
from ..core.adapter import Adapter, LoRAFactors
from ..core.options import format_value, to_float, to_int
from ..errors import AdapterNameError, NothingSharedWarning, OptionError, ShapeError
from ..formats import checks, in_memory, lora_config, run_folders, sources
from ..formats.checks import StatedBase
from ..formats.sources import AdapterSource, Source
from . import lossless_versions, source_configs
from .contents import PackContents
from .history import History, VersionRecord
from .history_store import KEY_DISTANCE, offered_reference
from .lossless_versions import LosslessVersion
from .version_bounds import VersionBounds, change_bounds, default_head_error, own_bounds, search_error

DEFAULT_MAX_ERROR = 0.05
"""Error bound of a version without `max_error`."""
DEFAULT_CHANGE_ERROR = 0.2
"""Error bound of a version with a reference, relative to its change from it."""
DEFAULT_NAME = "adapter"


@dataclass(frozen=True, slots=True)
class VersionOptions:
    """Options of `Pack.append`, all of them valid.

    Attributes:
        label: Label of the version; None to derive it from the step or the labels of the history.
        step: Training step; None if unknown.
        metrics: Metrics by name.
        reference: Label of the version that it refers to; None for the previous one.
        max_bytes: Maximum size of the version's file; None for none. Its errors are then as small as that allows.
        max_error: Error bound of the update; None if lossless or chosen by `max_bytes`. Relative to the change from
            the reference if there is a label of one.
        head_error: Error bound of task heads, likewise; None also for the default that goes with `max_error`.
        lossless: True to store every tensor bit for bit.
        same_base: True to accept an adapter that names another base model.
        reading: Options of `read_adapter`.
    """

    label: str | None
    step: int | None
    metrics: dict[str, float]
    reference: str | None
    max_bytes: int | None
    max_error: float | None
    head_error: float | None
    lossless: bool
    same_base: bool
    reading: Mapping[str, Any]


def refuse_for_lossless(**options: Any) -> None:
    """Raise `OptionError` for the first option that is not None, because a lossless version has no errors."""
    for name, passed in options.items():
        if passed is not None:
            raise OptionError(f"{name} has no effect on a lossless version. Remove it, or lossless=True.")


def check_error_bounds(max_error: Any, head_error: Any, *, lossless: bool) -> tuple[float | None, float | None]:
    """Return the options `max_error` and `head_error` of `Pack.append`; `OptionError` if they are invalid.

    Args:
        max_error, head_error: The options; None for a default.
        lossless: True if the version is lossless, so that there are no errors.
    """
    if lossless:
        refuse_for_lossless(max_error=max_error, head_error=head_error)
    return _check_error_bound("max_error", max_error), _check_error_bound("head_error", head_error)


def _check_error_bound(name: str, bound: Any) -> float | None:
    """Return an error bound as a float, None if it is None; `OptionError` unless it is above 0 and below 1."""
    if bound is not None and not 0 < to_float(name, bound) < 1:
        raise OptionError(f"{name} is a relative error, above 0 and below 1, got {bound!r}.")
    return float(bound) if bound is not None else None


def check_max_bytes(max_bytes: Any, max_error: float | None, reference: str | None) -> int | None:
    """Return the maximum size of a version's file; None for none.

    Args:
        max_bytes: Option of `Pack.append`.
        max_error: Option of `Pack.append`, of which at most one is passed.
        reference: Label of the version that the version refers to, which a maximum size needs.

    Raises:
        OptionError: The options contradict each other.
    """
    if max_bytes is None:
        return None
    number: int = to_int("max_bytes", max_bytes)
    if number < 1:
        raise OptionError(f"max_bytes={number}: it is a number of bytes, at least 1.")
    if max_error is not None:
        raise OptionError("max_bytes chooses the error, and max_error was passed too. Pass one of them.")
    if reference is None:
        raise OptionError("max_bytes needs the version that the new one is compared with: pass reference.")
    return number


def check_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return metrics as floats; `OptionError` if they are no mapping, a number is not finite or a name is not text."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise OptionError(
            f"metrics is a {type(metrics).__name__}; a mapping of numbers by name was expected: {{'loss': 0.5}}."
        )
    checked = {}
    for name, number in (metrics or {}).items():
        if not isinstance(name, str):
            raise OptionError(f"the name of a metric is text, got {name!r}.")
        checked[name] = to_float(f"metric {name!r}", number)
        if not math.isfinite(checked[name]):
            raise OptionError(f"metric {name!r} is {number!r}; a metric is a finite number. Leave it out.")
    return checked


def run_and_step(source: object) -> tuple[str | None, int | None]:
    """Return the name of the run's folder and the step of a Trainer's checkpoint folder; None where it is no such."""
    if not isinstance(source, str | Path):
        return None, None
    path = Path(source)
    step = run_folders.checkpoint_step(path)
    if step is None:
        return None, None
    run = path.absolute().parent.name
    return run if keys.is_valid_name(run) else None, step


def default_name(histories: Collection[str]) -> str:
    """Return the name of the only history, or `DEFAULT_NAME` if there is none or several."""
    return next(iter(histories)) if len(histories) == 1 else DEFAULT_NAME


def version_source(source: Source, name: str) -> AdapterSource:
    """Return the adapter of a source. Of a PEFT model with several, that is the one with the name of the history.

    Args:
        source: Source of the version.
        name: Name of the history.

    Raises:
        OptionError: A model has several adapters, and none of this name.
    """
    if not in_memory.is_peft_model(source):
        return sources.single(name, source)
    adapters = {adapter.name: adapter for adapter in in_memory.from_peft_model(source)}
    if len(adapters) > 1 and name not in adapters:
        raise OptionError(
            f"the model has {len(adapters)} adapters, {', '.join(map(repr, adapters))}, and none is named {name!r}. "
            "Pass name= with the name of one of them, or one of them as (state_dict, config)."
        )
    return AdapterSource(name, adapters.get(name) or next(iter(adapters.values())))


def check_step(step: Any) -> int | None:
    """Return a step as an integer of at least 0; None if there is none."""
    if step is None:
        return None
    number: int = to_int("step", step)
    if not 0 <= number < 2**63:
        raise OptionError(f"step={format_value(number)}: a step is at least 0 and below 2**63.")
    return number


def append(source: AdapterSource, name: str, pack: PackContents, options: VersionOptions) -> VersionRecord:
    """Read and encode a version, add it to its history in a pack, and return its record.

    Args:
        source: The adapter.
        name: Name of the history, which may be new.
        pack: The pack.
        options: Options of `Pack.append`.

    Raises:
        AdapterNameError, BaseModelError, ShapeError, NonFiniteError: The version does not belong to the history.
    """
    store = pack.history_store
    history = store.histories.get(name) or History(name, ())
    if history.name not in store.histories:
        _check_new_name(name, pack)
    label = _label(history, options)
    adapter = _read(source, f"{name}{keys.VERSION_MARK}{label}", pack, options)
    chosen = _chosen_reference(history, options)
    compares_changes = chosen is not None and not options.lossless
    previous: Mapping[str, LoRAFactors] | None = None
    if history.versions:
        compared = chosen if chosen is not None and compares_changes else history.latest
        decoded = store.decode(history, compared)
        # a decoded version computes its factors at each access
        previous = dict(decoded.modules)
        _check_same_shapes(adapter, previous, decoded.tensors, history.full_name(compared))
    elif options.same_base:
        _warn_if_apart(adapter, pack)
    scan = checks.scan(adapter)
    offered = chosen or offered_reference(history, lossless=options.lossless)
    reference = store.decode(history, offered) if offered is not None else None
    encoded, bounds = _encode(adapter, chosen, reference, options)
    config = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
    if not history.versions:
        history = History(name, (), source_configs.shared_fields([config, config]))
    tensors = [*adapter.heads.values(), *adapter.carried.values()]
    record = VersionRecord(
        version=label,
        step=options.step,
        metrics=options.metrics,
        sha256=atomic_files.digest(encoded.data),
        reference=offered.version if offered is not None and encoded.has_reference else None,
        lossless=options.lossless,
        max_error=bounds.max_error if bounds is not None else None,
        head_error=bounds.head_error if bounds is not None else None,
        delta_error=encoded.delta_error,
        tensor_error=encoded.tensor_error,
        lora_bytes=encoded.lora_bytes,
        tensor_bytes=encoded.tensor_bytes,
        source_lora_bytes=sum(factors.down.nbytes + factors.up.nbytes for factors in adapter.modules.values()),
        source_tensor_bytes=sum(tensor.nbytes for tensor in tensors),
        source_file_bytes=adapter.file_bytes,
        source_sha256=scan.content_hash,
        change=metrics.relative_distance(previous, encoded.decoded.modules) if previous is not None else None,
        source_config=source_configs.to_bytes(config, history.source_fields).decode("utf-8"),
        origin=adapter.origin,
        change_error=_change_error(adapter, encoded, reference) if compares_changes and encoded.has_reference else None,
    )
    store.append(history, record, encoded.data, encoded.decoded)
    pack.base_model = pack.base_model or adapter.base_model
    pack.revision = pack.revision or adapter.revision
    return record


def _read(source: AdapterSource, full_name: str, pack: PackContents, options: VersionOptions) -> Adapter:
    """Read a version into memory, and check that it has the base model of the pack.

    Args:
        source: The adapter.
        full_name: Name of the version, such as "run@1000".
        pack: The pack.
        options: Options of `Pack.append`.
    """
    adapter = replace(_copied(checks.read_source(source, options.reading)), name=full_name)
    if options.lossless:
        _check_restorable(source, adapter)
    if adapter.subspace is None or adapter.subspace not in pack.info.lineage:
        # an empty pack may state none yet
        states_one = bool(pack.base_model or pack.names or pack.histories)
        present = [StatedBase("the pack", pack.base_model, pack.revision)] * states_one
        checks.check_one_base([*present, StatedBase.of(adapter)], options.same_base)
    return adapter


def _check_new_name(name: str, pack: PackContents) -> None:
    """Raise `AdapterNameError` unless a new history may have this name."""
    keys.check_name(name, kind="history")
    for known in (*pack.names, *pack.history_store.histories):
        if known.lower() == name.lower():
            kind = "an adapter" if known in pack.names else "a history"
            raise AdapterNameError(
                f"The pack already has {kind} named {known!r}, so that no history can be named {name!r}: names have to "
                "differ in more than the case of letters. Pass another name (--name)."
            )


def _warn_if_apart(adapter: Adapter, pack: PackContents) -> None:
    """Warn if the first version of a history has no module in common with any adapter or history of its pack."""
    store = pack.history_store
    known = set(pack.info.modules)
    for history in store.histories.values():
        known |= store.decode(history, history.latest).modules.keys()
    if known and known.isdisjoint(adapter.specs):
        warnings.warn(
            f"Adapter {adapter.name!r}, with modules like {min(adapter.specs)!r}, has no module in common with the "
            f"pack, with modules like {min(known)!r}. If it belongs to another base model, store it in a pack of its "
            "own.",
            NothingSharedWarning,
            stacklevel=4,
        )


def _label(history: History, options: VersionOptions) -> str:
    """Return the label of a new version: the one that was passed, the step, or the next integer."""
    label = options.label
    if label is None and options.step is not None:
        label = str(options.step)
    if label is None:
        numbers = [int(known) for known in history.labels if re.fullmatch(r"[0-9]{1,18}", known)]
        label = str(max(numbers, default=0) + 1)
    if label.lower() in {known.lower() for known in history.labels}:
        raise AdapterNameError(
            f"The history {history.name!r} already has a version {label!r}. Pass another version, or remove that one "
            "first."
        )
    return keys.check_label(label)


def _check_restorable(source: AdapterSource, adapter: Adapter) -> None:
    """Raise `OptionError` if an adapter was converted while it was read, so that its folder cannot be restored."""
    if isinstance(source.source, Adapter):
        return
    path = Path(source.source) / keys.ADAPTER_CONFIG
    if path.is_file() and path.read_bytes() != (adapter.source_config or "").encode("utf-8"):
        raise OptionError(
            f"{source.source} is no LoRA of PEFT's, but is converted to one when it is read. A lossless version would "
            "restore another folder: remove lossless=True (--lossless)."
        )


def _copied(adapter: Adapter) -> Adapter:
    """Return an adapter with copies of its tensors in memory.

    They are read several times, and those that are stored exactly predict the next version, whatever the caller does
    with its own tensors in the meantime.
    """
    return replace(
        adapter,
        # one module at a time, because a file's factors are read at each access
        modules={module: _copied_factors(adapter.modules[module]) for module in sorted(adapter.specs)},
        heads={key: _copy(adapter.heads[key]) for key in sorted(adapter.heads)},
        carried={key: _copy(adapter.carried[key]) for key in sorted(adapter.carried)},
    )


def _copied_factors(factors: LoRAFactors) -> LoRAFactors:
    return replace(factors, down=_copy(factors.down), up=_copy(factors.up))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _check_same_shapes(
    adapter: Adapter, modules: Mapping[str, LoRAFactors], tensors: Mapping[str, Tensor], compared: str
) -> None:
    """Raise `ShapeError` unless an adapter has the modules and tensors of an earlier version. Ranks may differ.

    Args:
        adapter: The adapter.
        modules: LoRA factors of the earlier version.
        tensors: Its other tensors.
        compared: Full name of the earlier version.
    """
    remedy = "It belongs to another run, or was trained from another adapter: append it under another name (name=)."
    if compared.endswith(keys.VERSION_MARK + keys.COMMON):
        remedy = (
            "It was not trained from this common adapter: leave it out (exclude_adapters, --exclude-adapter), or store "
            "it in another pack."
        )
    own = {**adapter.heads, **adapter.carried}
    for kind, names, known in (("module", adapter.specs, modules), ("tensor", own, tensors)):
        differing = sorted(names.keys() ^ known.keys())
        if differing:
            lacks = "lacks" if differing[0] in known else "has"
            raise ShapeError(
                f"Adapter {adapter.name!r} {lacks} {kind} {differing[0]}, unlike version {compared} "
                f"({len(differing)} {kind}s differ). {remedy}"
            )
    shapes = {module: _module_shape(factors) for module, factors in adapter.modules.items()}
    for module, factors in modules.items():
        if shapes[module] != _module_shape(factors):
            raise ShapeError(
                f"Module {module} has shape (out, in, kernel) = {shapes[module]} in adapter {adapter.name!r} and "
                f"{_module_shape(factors)} in version {compared}. {remedy}"
            )
    for key, tensor in tensors.items():
        if own[key].shape != tensor.shape:
            raise ShapeError(
                f"Tensor {key} has shape {tuple(own[key].shape)} in adapter {adapter.name!r} and "
                f"{tuple(tensor.shape)} in version {compared}. {remedy}"
            )


def _module_shape(factors: LoRAFactors) -> tuple[int, int, tuple[int, ...]]:
    return factors.up.shape[0], factors.down.shape[1], factors.kernel


def _encode(
    adapter: Adapter, chosen: VersionRecord | None, reference: DecodedVersion | None, options: VersionOptions
) -> tuple[EncodedVersion, VersionBounds | None]:
    """Encode a version, and return it with its error bounds, None if it is lossless.

    Args:
        adapter: The version.
        chosen: Version that errors are relative to the change from; None if they are relative to the version itself.
        reference: Decoded version that it may refer to, `chosen` if there is one; None for a key version.
        options: Options of `Pack.append`.
    """
    tensors = {**adapter.heads, **adapter.carried}
    if options.lossless:
        return lossless_versions.encode(LosslessVersion(adapter.modules, tensors), reference), None
    default = DEFAULT_MAX_ERROR if chosen is None else DEFAULT_CHANGE_ERROR

    def encode(max_error: float) -> tuple[EncodedVersion, VersionBounds]:
        head_error = options.head_error or default_head_error(max_error)
        if chosen is not None and reference is not None:
            bounds = change_bounds(adapter, chosen, reference, max_error, head_error)
        else:
            bounds = own_bounds(adapter, max_error, head_error)
        return lossy.encode(Version(adapter.modules, tensors, bounds.max_error, bounds.tensors), reference), bounds

    if options.max_bytes is not None:
        return encode(search_error(options.max_bytes, lambda error: len(encode(error)[0].data)))
    return encode(options.max_error or default)


def _chosen_reference(history: History, options: VersionOptions) -> VersionRecord | None:
    """Return the version that a new one refers to by its options; None if that is left to the history.

    Raises:
        AdapterNameError: There is no such version.
        OptionError: The version is of another kind, or needs too many others itself.
    """
    if options.reference is None:
        return None
    record = history[options.reference]
    if record.lossless != options.lossless:
        kinds = "within an error bound", "bit for bit"
        raise OptionError(
            f"Version {history.full_name(record)!r} is stored {kinds[record.lossless]}, so that a version "
            f"{kinds[options.lossless]} cannot refer to it. Pass lossless={record.lossless}, or another reference."
        )
    if len(history.chain(record)) >= KEY_DISTANCE:
        raise OptionError(
            f"Version {history.full_name(record)!r} needs {KEY_DISTANCE - 1} others already, which is the largest "
            "number. Pass an earlier version or a key version as reference."
        )
    return record


def _change_error(adapter: Adapter, encoded: EncodedVersion, reference: DecodedVersion | None) -> float:
    """Return the error of a version relative to its change from a reference; 0 where that is exact or no change."""
    distance = metrics.relative_distance(adapter.modules, reference.modules) if reference is not None else None
    return encoded.delta_error / distance if distance else 0.0
