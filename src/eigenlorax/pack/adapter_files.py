"""Files of one adapter in a pack, which form a PEFT adapter of our own type: docs/pack-format.md."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..codec import bitstream
from ..codec.storage.base import ModuleSlot, Storage
from ..codec.storage.coded import codes_digest, coefficient_metadata, with_parent_codes
from ..codec.storage.sizes import ModuleSizes
from ..codec.tensor_codes import References
from ..core import dtypes, keys, limits
from ..core.adapter import is_valid_kernel
from ..core.json_dataclasses import from_json
from ..core.keys import Kind
from ..core.subspace import Subspace
from ..formats import files as lora_files
from ..formats import lora_config, peft, safetensors_file
from . import origin_json, source_configs
from .manifest import Entry
from .outside_tensors import file_tensors, from_file
from .packed_adapter import PackedAdapter
from .record import Record

KEPT_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
)
"""Fields of a LoRA's config that apply to its coefficients too."""
DEFAULTS: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "subspace_modules": {},
    "carried": False,
}
"""Values of fields that a config does without, because they are the defaults of `EigenLoraxConfig`."""


@dataclass(frozen=True, slots=True)
class WritingContext:
    """Properties of a pack that the files of its adapters depend on.

    Attributes:
        fingerprint: Fingerprint of the current subspace, for adapters that do not refer to an earlier one.
        storage: Storage of the pack's coefficients.
        modules: Names of all modules of the subspace.
        source_fields: Fields that most sources' configs share.
    """

    fingerprint: str
    storage: Storage
    modules: Collection[str]
    source_fields: Mapping[str, Any]


def to_files(packed: PackedAdapter, context: WritingContext) -> dict[str, bytes]:
    """Return the files of an adapter's folder in a pack, by name."""
    storage = context.storage
    stored: Mapping[str, Tensor] = {}
    if packed.parent is None:
        stored = packed.payload if packed.payload is not None else storage.adapter_tensors(packed.coefficients)
    files = {
        keys.ADAPTER_CONFIG: _to_json(adapter_config(packed, context)),
        keys.ADAPTER_WEIGHTS: _to_safetensors({**file_tensors(packed.heads, keys.CODED_HEADS), **stored}),
        keys.SOURCE_CONFIG: source_configs.to_bytes(packed.source_config, context.source_fields, context.modules),
    }
    if packed.carried:
        files[keys.CARRIED] = _to_safetensors(file_tensors(packed.carried, keys.CODED_CARRIED))
    if packed.origin is not None:
        files[keys.SOURCE_FILE] = origin_json.to_bytes(packed.origin)
    return files


def adapter_config(packed: PackedAdapter, context: WritingContext) -> dict[str, Any]:
    """Return the config of our PEFT type: fields of the source that still apply, and the reference to the subspace.

    It has no `target_modules` if the adapter has all modules of the subspace, under their names there.
    """
    source = json.loads(packed.source_config)
    metadata = coefficient_metadata(packed.coefficients)
    kernels = {module: list(each.kernel) for module, each in metadata.items() if each.kernel}
    has_all_modules = packed.subspace_names == {module: module for module in context.modules}
    config = {
        **{field: source[field] for field in KEPT_FIELDS if field in source},
        **({keys.KERNELS: kernels} if kernels else {}),
        **_residual_fields({module: each.residual_sides for module, each in metadata.items()}, context.storage),
        **({} if context.storage.is_float else {keys.COEFFICIENT_DTYPE: context.storage.name}),
        **({keys.SOURCE_DTYPE: dtypes.name(packed.source_dtype)} if packed.source_dtype is not None else {}),
        **({} if packed.parent is None else {keys.PARENT: _parent_fields(packed)}),
        "peft_type": keys.PEFT_TYPE,
        "inference_mode": True,
        **({} if has_all_modules else {keys.TARGET_MODULES: sorted(packed.coefficients)}),
        "subspace_modules": {module: name for module, name in packed.subspace_names.items() if module != name},
        "subspace": keys.INSIDE_PACK,
        "subspace_fingerprint": packed.subspace or context.fingerprint,
        "carried": bool(packed.carried),
    }
    return {name: value for name, value in config.items() if name not in DEFAULTS or DEFAULTS[name] != value}


def _residual_fields(sides: Mapping[str, Collection[str]], storage: Storage) -> dict[str, Any]:
    """Return the field with the sides of each module that have a residual; none if there are no residuals."""
    if not any(sides.values()):
        return {}
    if storage.is_coded:
        # most modules of a coded adapter have residuals, so that their names would be most of its config
        bits = [sum(1 << bit for bit, side in enumerate(keys.SIDES) if side in sides[name]) for name in sorted(sides)]
        return {keys.RESIDUAL_DIGITS: "".join(map(str, bits))}
    return {keys.RESIDUAL_SIDES: {module: list(each) for module, each in sides.items() if each}}


def _parent_fields(packed: PackedAdapter) -> dict[str, Any]:
    """Return the name of the parent and the digest of its codes, for readers of the adapter's folder alone."""
    assert packed.payload is not None
    return {"name": packed.parent, "sha256": codes_digest(packed.payload[keys.CODED])}


@dataclass(frozen=True, slots=True)
class ReadingContext:
    """Properties of a pack that the files of its adapters refer to.

    Subspaces are named by fingerprint: the current one and the earlier ones.

    Attributes:
        lineage: Fingerprints, the current one last.
        sizes: Function of (fingerprint, name of a module in the subspace) to the sizes of its bases.
        at: Function of the fingerprint to the subspace, whose tensors it reads.
        references: Function that reads the reference tensors of coded heads.
        modules: Names of all modules of the subspace.
        source_fields: Fields that most sources' configs share.
    """

    lineage: tuple[str | None, ...]
    sizes: Callable[[str, str], ModuleSizes]
    at: Callable[[str], Subspace]
    references: Callable[[], References]
    modules: Collection[str]
    source_fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Config:
    """Fields of an adapter's config that are needed to read its tensors."""

    target_modules: list[str]
    subspace_modules: dict[str, str]
    subspace_fingerprint: str
    kernels: dict[str, list[int]]
    source_dtype: str | None
    parent: dict[str, str]

    @property
    def subspace_names(self) -> dict[str, str]:
        """Name in the subspace of each module; `ValueError` if two modules have the same name there."""
        names = {module: self.subspace_modules.get(module, module) for module in self.target_modules}
        if len(set(names.values())) < len(names):
            raise ValueError("two modules of the adapter are in one place of the subspace")
        return names


def from_files(
    name: str,
    files: Mapping[str, bytes],
    entry: Entry,
    storage: Storage,
    context: ReadingContext,
    parent_codes: Tensor | None = None,
) -> PackedAdapter:
    """Read an adapter from the files that `to_files` wrote, whose digests were checked before.

    Errors of parsers are not translated here: call it within `limits.damaged_on_error`.

    Args:
        name: Name of the adapter.
        files: Contents of the files, by name.
        entry: Entry of the adapter in the manifest.
        storage: Storage of the pack's coefficients.
        context: Properties of the pack.
        parent_codes: Codes in the parent's file; None if the adapter has no parent.
    """
    tensors = safetensors_file.from_bytes(files[keys.ADAPTER_WEIGHTS], keys.ADAPTER_WEIGHTS)
    carried: Mapping[str, Tensor] = {}
    if keys.CARRIED in files:
        carried = _decoded(safetensors_file.from_bytes(files[keys.CARRIED], keys.CARRIED), keys.CODED_CARRIED, context)
    source_config, source = source_configs.from_bytes(files[keys.SOURCE_CONFIG], context.source_fields, context.modules)
    lora_files.check_config(source, keys.SOURCE_CONFIG)
    config = from_json(_Config, _read_fields(files[keys.ADAPTER_CONFIG], context.modules), keys.ADAPTER_CONFIG)
    in_config = config.parent.get("name")
    if in_config != entry.parent:
        raise ValueError(f"the parent is {entry.parent!r} in the manifest, and {in_config!r} in {keys.ADAPTER_CONFIG}")
    if entry.parent is not None and parent_codes is not None:
        tensors = with_parent_codes(tensors, parent_codes, config.parent.get("sha256"), entry.parent)
    subspace_names, fingerprint = config.subspace_names, config.subspace_fingerprint
    if fingerprint not in context.lineage:
        raise ValueError(f"subspace_fingerprint is {fingerprint!r}, which the subspace never had")
    slots = _module_slots(config, lora_config.ScalingConfig(source, name), context)
    if storage.pads_rank:
        _check_padding(entry.record, list(slots.values()))
    factors = [slot.rank * sum(slot.sizes.widths) for slot in slots.values() if slot.sizes is not None]
    limits.check_factor_memory(sum(factors), "the factors of the adapter")
    # removes the coefficients from `tensors`, which then contains only the heads
    coefficients, payload = storage.read_adapter(tensors, slots, lambda: context.at(fingerprint))
    heads = _decoded(tensors, keys.CODED_HEADS, context)
    _check_names(config.target_modules, [*heads, *carried])
    _check_heads(heads, source)
    return PackedAdapter(
        name=name,
        coefficients=coefficients,
        subspace_names=subspace_names,
        heads=heads,
        carried=carried,
        source_config=source_config,
        record=entry.record,
        subspace=fingerprint,
        origin=origin_json.from_bytes(files[keys.SOURCE_FILE]) if keys.SOURCE_FILE in files else None,
        payload=payload,
        source_dtype=dtypes.parse(config.source_dtype),
        parent=entry.parent,
        license=entry.license,
    )


def _decoded(tensors: Mapping[str, Tensor], coded_key: str, context: ReadingContext) -> Mapping[str, Tensor]:
    """Return the tensors of a file, those that are coded decoded when they are used."""
    return from_file(tensors, coded_key, context.references()) if coded_key in tensors else tensors


def _module_slots(
    config: _Config, numbers: lora_config.ScalingConfig, context: ReadingContext
) -> dict[str, ModuleSlot]:
    """Return rank, scaling, kernel and sizes of every module; `ValueError` if one of them is impossible.

    Args:
        config: Config of the packed adapter.
        numbers: Ranks and scalings of the source's config.
        context: Properties of the pack.
    """
    slots = {}
    for module, subspace_name in config.subspace_names.items():
        rank, scaling = numbers.rank_and_scaling(module)
        sizes = context.sizes(config.subspace_fingerprint, subspace_name)
        n_in, n_out = sizes.widths
        kernel = tuple(config.kernels.get(module, ()))
        bitstream.check_rank(rank, (n_out, n_in))
        if not is_valid_kernel(kernel, n_in):
            raise ValueError(f"the kernel of module {module} is {kernel}, which its {n_in} inputs do not fit")
        slots[module] = ModuleSlot(subspace_name, rank, scaling, kernel, sizes)
    return slots


def _read_fields(data: bytes, modules: Collection[str]) -> dict[str, Any]:
    """Return the fields of `_Config` in an adapter's config, without PEFT's other fields.

    Args:
        data: The config as a file.
        modules: Names of all modules of the subspace, which an adapter has that names none.
    """
    config = {
        keys.TARGET_MODULES: sorted(modules),
        "subspace_modules": {},
        keys.KERNELS: {},
        keys.SOURCE_DTYPE: None,
        keys.PARENT: {},
        **limits.parse_json_object(data, keys.ADAPTER_CONFIG)[1],
    }
    return {name: config[name] for name in _Config.__dataclass_fields__ if name in config}


def _check_padding(record: Record, slots: Sequence[ModuleSlot]) -> None:
    """Raise `ValueError` unless ranks and widths agree with the manifest.

    A module without components takes no bytes of a file, so only the manifest limits the size of its factors.
    """
    ranks = {slot.rank for slot in slots}
    if not ranks <= set(record.ranks):
        raise ValueError(f"ranks are {record.ranks} in the manifest and {sorted(ranks)} in {keys.SOURCE_CONFIG}")
    widths = [(slot.rank, *slot.sizes.widths) for slot in slots if slot.sizes is not None]
    # modules may share a down factor, which counts once
    least = sum(rank * (n_in // len(widths) + n_out) for rank, n_in, n_out in widths)
    most = sum(rank * (n_in + n_out) for rank, n_in, n_out in widths)
    if not least <= record.lora_numbers <= most:
        raise ValueError(f"lora_numbers is {record.lora_numbers} in the manifest; the modules have {least} to {most}")


def _check_names(modules: Iterable[str], stored: Iterable[str]) -> None:
    """Raise `ValueError` if a tensor of the exported LoRA would have an invalid name.

    Args:
        modules: The adapter's own names of its modules.
        stored: Names of tensors that are exported unchanged.
    """
    factors = {module: keys.lora_key(module, "down") for module in modules}
    keys.check_tensor_names([*factors.values(), *stored], "the adapter")
    for module, key in factors.items():
        if keys.parse_peft_key(key).module != module:
            raise ValueError(f"{module!r} is no name of a module")


def _check_heads(heads: Iterable[str], source: Mapping[str, Any]) -> None:
    """Raise `FormatError` or `ValueError` if a head would not be one in the exported LoRA."""
    for key in heads:
        if keys.parse_peft_key(key, source.get("modules_to_save") or ()).kind is not Kind.HEAD:
            raise ValueError(f"{key!r} is no name of a head")


def _to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return to_safetensors({key: peft.owned(tensor) for key, tensor in tensors.items()}, metadata={"format": "pt"})


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode("utf-8")
