"""Export of adapters from a pack as ordinary LoRAs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch

from .. import formats
from ..codec.storage.coded import CodedCoefficients
from ..core import atomic_files, dtypes, keys, metrics, narrowing, staging
from ..core.adapter import Adapter, LazyMapping, LoRAFactors
from ..core.progress import Progress
from ..errors import AdapterNameError, OptionError
from ..formats.gguf import writer as gguf_writer
from ..formats.gguf.architectures import BaseModel
from ..formats.table import BaseConfig
from . import writer
from .contents import PackContents
from .packed_adapter import PackedAdapter, unpack

MODELFILE_SUFFIX = ".Modelfile"
"""Suffix of the file from which Ollama makes a model with an adapter."""
_OLLAMA_MODEL = re.compile(r"[^\s\x00-\x1f\x7f]{1,1024}")
HELD_BYTES = 2**28
"""Maximum bytes of adapters that stay in memory between check and writing. Others are read and decoded twice."""


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """Settings of an export to GGUF.

    Attributes:
        base: The base model.
        is_quantised: Whether factors are written in Q8_0.
        modelfile: Model of Ollama that a Modelfile beside each adapter starts from; None to write no Modelfile.
    """

    base: BaseModel
    is_quantised: bool
    modelfile: str | None


def gguf_plan(base_config: BaseConfig | None, is_quantised: bool, modelfile: str | None) -> GgufPlan:
    """Return the settings of an export to GGUF; raise `OptionError` if the base model's config is missing or unusable.

    Args:
        base_config: Folder with the base model's `config.json`, that file, or its fields.
        is_quantised: Whether factors are written in Q8_0.
        modelfile: Model of Ollama that a Modelfile beside each adapter starts from.
    """
    if modelfile is not None and not _OLLAMA_MODEL.fullmatch(modelfile):
        raise OptionError(
            f"modelfile is {modelfile!r}; the name of a model or the path of a GGUF file without spaces was expected."
        )
    return GgufPlan(formats.base_for(base_config), is_quantised, modelfile)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Adapters to export.

    Attributes:
        directory: Folder of the exported adapters.
        formats: Format of each adapter, by name.
        dtype: Dtype of the factors; None for the dtype of each adapter's source.
        overwrite: True to replace existing files and folders.
        gguf: Settings of GGUF files; None if there are none.
    """

    directory: Path
    formats: Mapping[str, str]
    dtype: torch.dtype | None
    overwrite: bool
    gguf: GgufPlan | None = None

    @property
    def base_model(self) -> BaseModel | None:
        """Base model of GGUF files."""
        return None if self.gguf is None else self.gguf.base

    @property
    def targets(self) -> dict[str, Path]:
        """Folder or file of each adapter, by name."""
        suffixes = {name: formats.writable(target_format).suffix for name, target_format in self.formats.items()}
        return {name: self.directory / (keys.file_name(name) + suffix) for name, suffix in suffixes.items()}


def export_adapters(pack: PackContents, plan: ExportPlan, progress: Progress | None) -> dict[str, Path]:
    """Write adapters, and return the path of each, by name.

    Targets, names of modules, dtypes and the pack's bytes are checked for all adapters before the first is written.

    Args:
        pack: The pack.
        plan: Adapters, formats and folder.
        progress: Callback with the arguments (stage, done, total), called before each adapter.
    """
    targets = plan.targets
    by_path: dict[str, str] = {}
    for name, target in targets.items():
        same = by_path.setdefault(str(target).lower(), name)
        if same != name:
            raise AdapterNameError(
                f"{same!r} and {name!r} would both be exported to {target}. Export one of them to another folder."
            )
        writer.check_outside(target)
        atomic_files.recover(target)
        if formats.writable(plan.formats[name]).suffix:
            atomic_files.check_file_free(target, plan.overwrite)
            if plan.gguf is not None and plan.gguf.modelfile is not None:
                atomic_files.check_file_free(target.with_suffix(MODELFILE_SUFFIX), plan.overwrite)
        else:
            atomic_files.check_replaceable(target, formats.file_names(plan.formats[name]), plan.overwrite)
    progress = progress or (lambda stage, done, total: None)
    held = _check_all_writable(pack, plan, progress)
    if plan.directory.is_dir():
        staging.remove_abandoned(plan.directory)
    with atomic_files.defer_folder_syncs():
        for done, (name, target) in enumerate(targets.items()):
            progress("exporting adapters", done, len(targets))
            adapter = held.pop(name) if name in held else _unpacked(pack, name, plan.dtype)
            _write(adapter, target, plan.formats[name], plan)
    progress("exporting adapters", len(targets), len(targets))
    return targets


def _write(adapter: Adapter, target: Path, format: str, plan: ExportPlan) -> None:
    """Write an adapter, and its Modelfile if there is to be one."""
    if format != formats.GGUF or plan.gguf is None:
        formats.write_adapter(adapter, target, format=format, overwrite=plan.overwrite)
        return
    dtype = gguf_writer.Q8_0 if plan.gguf.is_quantised else None
    formats.write_adapter(
        adapter, target, format=format, dtype=dtype, overwrite=plan.overwrite, base_config=plan.gguf.base
    )
    if plan.gguf.modelfile is not None:
        text = f"FROM {plan.gguf.modelfile}\nADAPTER ./{target.name}\n"
        atomic_files.write_file(target.with_suffix(MODELFILE_SUFFIX), text.encode())


def _unpacked(pack: PackContents, name: str, dtype: torch.dtype | None) -> Adapter:
    """Return an adapter or a version in the dtype of its export."""
    if name in pack.history_store:
        return pack.adapter(name, dtype)
    packed = pack.packed(name)
    return unpack(packed, pack.subspace, factor_dtype(pack, packed, dtype))


def _check_all_writable(pack: PackContents, plan: ExportPlan, progress: Progress) -> dict[str, Adapter]:
    """Check that every adapter can be written, and return those that fit into `HELD_BYTES`, or the only one."""
    held: dict[str, Adapter] = {}
    held_bytes = 0
    for done, (name, target_format) in enumerate(plan.formats.items()):
        progress("checking adapters", done, len(plan.formats))
        if name in pack.history_store:
            _check_version_writable(pack, name, target_format, plan)
            continue
        adapter, size = _check_writable(pack, name, target_format, plan)
        held_bytes += size
        if held_bytes <= HELD_BYTES or len(plan.formats) == 1:
            held[name] = adapter
    progress("checking adapters", len(plan.formats), len(plan.formats))
    return held


def _check_writable(pack: PackContents, name: str, format: str, plan: ExportPlan) -> tuple[Adapter, int]:
    """Check that the format can name all modules and the dtype can represent all numbers.

    Returns:
        The adapter as it is exported, and its bytes in memory.
    """
    packed = pack.packed(name)
    chosen = factor_dtype(pack, packed, plan.dtype)
    adapter = unpack(packed, pack.subspace, chosen)
    formats.check_writable(adapter, format, plan.base_model)
    others = packed.record.head_bytes + packed.record.carried_bytes
    if torch.promote_types(chosen, pack.lossless_dtype) == chosen:
        return adapter, _coefficient_memory(packed) + others
    exact = unpack(packed, pack.subspace, torch.float64).modules
    narrowed = dict(narrowing.narrow_adapter(name, LazyMapping(packed.subspace_names, exact.__getitem__), chosen))
    if chosen != torch.float16:
        return adapter, _coefficient_memory(packed) + others
    # the factors that `unpack` would compute again
    modules = LazyMapping(adapter.specs, lambda module: narrowed.get(module) or adapter.modules[module])
    return replace(adapter, modules=modules), packed.record.lora_numbers * chosen.itemsize + others


def _coefficient_memory(packed: PackedAdapter) -> int:
    """Return the bytes of an adapter's coefficients in memory. Integers of a coded one take at most four bytes each."""
    payload = sum(tensor.nbytes for tensor in (packed.payload or {}).values())
    if isinstance(packed.coefficients, CodedCoefficients):
        return payload + 4 * packed.record.lora_numbers
    return payload + sum(module.stored_bytes for module in packed.coefficients.values())


def _check_version_writable(pack: PackContents, name: str, format: str, plan: ExportPlan) -> None:
    """Check that the format can name all modules of a version, and the dtype can represent all numbers."""
    adapter = pack.adapter(name)
    if plan.dtype is not None:
        for _ in narrowing.narrow_adapter(name, adapter.modules, plan.dtype):
            pass
    formats.check_writable(adapter, format, plan.base_model)


def factor_dtype(pack: PackContents, packed: PackedAdapter, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of an adapter's exported factors: `dtype`, else that of its source, else the lossless one."""
    return dtype or packed.source_dtype or pack.lossless_dtype


@dataclass(frozen=True, slots=True)
class ExportErrors:
    """Relative errors of one exported adapter, over the modules of the subspace.

    Attributes:
        dtype: Dtype of the factors, by name.
        delta_error: Error of the pack, relative to the norm of the source's update.
        rounding: Error of rounding the factors to `dtype`, relative to the norm of the pack's update.
    """

    dtype: str
    delta_error: float
    rounding: float

    @property
    def bound(self) -> float:
        """Upper bound of the relative error of the exported update against the source's.

        By the triangle inequality, the norm of the pack's update is at most 1 + delta_error times that of the source's.
        """
        return self.delta_error + (1 + self.delta_error) * self.rounding


def export_errors(pack: PackContents, name: str, dtype: torch.dtype | str | None) -> ExportErrors:
    """Return the errors of an adapter or version that is exported in `dtype`; None is the dtype of its source."""
    if isinstance(dtype, str):
        return _quantised_errors(pack, name)
    if name in pack.history_store:
        return _version_errors(pack, name, dtype)
    packed = pack.packed(name)
    chosen = factor_dtype(pack, packed, dtype)
    exact, rounded = (unpack(packed, pack.subspace, factor_type).modules for factor_type in (torch.float64, chosen))

    # the difference of two updates is exact only if their factors have the same scales
    def in_the_same_scale(module: str) -> LoRAFactors:
        return narrowing.balance(exact[module], chosen)

    # modules outside the subspace are not rounded, and `delta_error` leaves them out too
    rounding = metrics.rounding_error(LazyMapping(packed.subspace_names, in_the_same_scale), rounded)
    return ExportErrors(dtypes.name(chosen), packed.record.delta_error, rounding)


def _quantised_errors(pack: PackContents, name: str) -> ExportErrors:
    """Return the errors of an adapter or version that is exported in Q8_0."""
    delta_error = export_errors(pack, name, torch.float32).delta_error
    if name in pack.history_store:
        exact = pack.adapter(name, torch.float32)
        names = list(exact.specs)
    else:
        packed = pack.packed(name)
        exact = unpack(packed, pack.subspace, torch.float32)
        names = list(packed.subspace_names)
    scaled = gguf_writer.before_q8_0(exact)
    modules = LazyMapping(dict.fromkeys(names), scaled.__getitem__)
    rounded = LazyMapping(modules, lambda module: gguf_writer.round_q8_0(scaled[module]))
    return ExportErrors(gguf_writer.Q8_0, delta_error, metrics.rounding_error(modules, rounded))


def _version_errors(pack: PackContents, name: str, dtype: torch.dtype | None) -> ExportErrors:
    exact = pack.adapter(name)
    chosen = dtype or reduce(torch.promote_types, [spec.dtype for spec in exact.specs.values()] or [torch.float32])
    rounded = pack.adapter(name, dtype).modules
    same_scale = LazyMapping(exact.specs, lambda module: narrowing.balance(exact.modules[module], chosen))
    rounding = 0.0 if dtype is None else metrics.rounding_error(same_scale, rounded)
    return ExportErrors(dtypes.name(chosen), pack.history_store.find(name)[1].delta_error, rounding)
