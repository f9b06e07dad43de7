"""One adapter as coefficients, and the files of its folder in a pack.

The folder is a PEFT adapter of our own type: docs/pack-format.md.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..codec import bitstream
from ..codec.adapter_codes import AdapterCodes, ModuleLayout
from ..codec.group_integers import Payload
from ..codec.storage import coded
from ..codec.storage.base import ModuleSizes, ModuleSlot, Storage
from ..codec.storage.coded import CodedCoefficients, CoefficientMetadata, coefficient_metadata
from ..codec.storage.table import adapter_payload
from ..core import boundary, keys, metrics, narrowing, projection
from ..core import subspace as spaces
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec, Origin, is_valid_kernel
from ..core.batch import stack_factors
from ..core.coefficients import CoefficientBatch, Coefficients
from ..core.json_dataclasses import from_json
from ..core.metrics import AdapterError, ModuleError, UnroundedBases
from ..core.subspace import Subspace
from ..errors import NonFiniteError
from ..formats import files as lora_files
from ..formats import lora_config, peft, safetensors_file
from ..formats.checks import Scan


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of one adapter in a pack: bytes, and what was lost (docs/pack-format.md has each one's meaning).

    bound: delta_error was not measured, and is what it is at most: the pack was fitted again without the original.
    """

    delta_error: float
    rounding_error: float
    in_fit: bool
    untrained: bool
    ranks: list[int]
    modules: int
    lora_numbers: int
    coefficient_bytes: int
    carried_bytes: int
    head_bytes: int
    source_sha256: str
    source_file_bytes: int
    bound: bool = False


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter in the terms of a subspace. Module names are the adapter's own.

    places: each of its modules' name in the subspace.
    subspace: the fingerprint that the subspace had when these coefficients were found, which are as wide as its bases
        were then; None for what it has now.
    payload: what lies in the file in the place of the coefficients, by key, where that is not the numbers themselves
        (`codec.storage`). Who changes these takes it away.
    """

    name: str
    coefficients: Mapping[str, Coefficients]
    places: Mapping[str, str]
    heads: Mapping[str, Tensor]
    carried: Mapping[str, Tensor]
    source_config: str
    record: Record
    subspace: str | None = None
    origin: Origin | None = None
    payload: Payload | None = None


@dataclass(slots=True)
class Packing:
    """An adapter on its way into a subspace, filled module by module by `fit` and `Pack.add`."""

    adapter: Adapter
    scan: Scan
    coefficients: Mapping[str, Coefficients] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    errors: list[ModuleError] = field(default_factory=list)
    payload: dict[str, Tensor] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether the adapter changes no weight: every update is zero, and nothing else is carried."""
        return not any(self.scan.delta_squares.values()) and not self.adapter.carried

    def project(
        self,
        module: str,
        place: str,
        factors: LoRAFactors,
        bases: spaces.ModuleBases,
        storage: Storage,
        dual: projection.DualComponents | None = None,
        exact: UnroundedBases | None = None,
    ) -> None:
        """Take one module's update into its bases, those of `place` in the subspace, and note what that loses."""
        wide = storage.prepare(stack_factors([factors], [0.0]))
        found = storage.project(wide, bases, dual)
        (error,) = metrics.module_errors(wide, found, bases, exact, storage.exact_coefficients(wide, bases))
        self.take(module, place, found, 0, factors.kernel, error)

    def take(
        self, module: str, place: str, chunk: CoefficientBatch, row: int, kernel: tuple[int, ...], error: ModuleError
    ) -> None:
        """Note one module's coefficients in the bases of `place`, which are one row of a chunk, and what they lose."""
        self.places[module] = place
        found = Coefficients(chunk.down[row], chunk.up[row], float(chunk.scaling[row]), kernel)
        assert isinstance(self.coefficients, dict)
        self.coefficients[module] = found
        self.payload |= adapter_payload(chunk, row, module)
        self.errors.append(error)

    def take_codes(self, codes: AdapterCodes, places: Mapping[str, ModuleLayout], data: bytes, error: float) -> None:
        """Note all modules of an adapter that is coded, whose `places` in the subspace are known by now.

        data: the codes as bytes. error: what they lose, relative to the norm of it all. `NonFiniteError` where float32
        cannot hold them.
        """
        specs, squares = self.adapter.specs, self.scan.delta_squares
        size = sum(squares[module] for module in self.places) ** 0.25
        for module in self.places:
            scaling = abs(specs[module].scaling)
            if squares[module] and not (size / max(1.0, scaling) > 1e-36 and size / min(1.0, scaling) < 1e37):
                raise NonFiniteError(
                    f"adapter {self.adapter.name!r}, module {module}: its numbers are beyond float32, as which they "
                    "would be read. Leave it out, or fit with max_error and dtype float64."
                )
        slots = {
            module: ModuleSlot(place, specs[module].rank, specs[module].scaling, specs[module].kernel)
            for module, place in self.places.items()
        }
        self.coefficients = CodedCoefficients(codes, places, slots)
        self.payload = {keys.CODED: coded.blob(data)}
        # whatever is lost is lost by rounding to whole steps
        self.errors.append(ModuleError(1.0, error**2, error**2))

    def packed(self, *, in_fit: bool) -> PackedAdapter:
        """The adapter as a pack keeps it; modules that were not projected are carried as they are."""
        adapter = self.adapter
        carried = {key: adapter.carried[key] for key in adapter.carried}
        for module in adapter.modules:
            if module not in self.coefficients:
                for side, weight in zip(keys.SIDES, adapter.modules[module].weights, strict=True):
                    carried[keys.lora_key(module, side)] = weight
        heads = {key: adapter.heads[key] for key in adapter.heads}
        error = metrics.adapter_error(self.errors)
        record = Record(
            delta_error=error.delta_error,
            rounding_error=error.rounding_error,
            in_fit=in_fit,
            untrained=self.untrained,
            ranks=list(adapter.ranks),
            modules=len(self.coefficients),
            lora_numbers=sum(adapter.specs[module].numbers for module in self.coefficients),
            coefficient_bytes=coefficient_bytes(self.coefficients, self.payload or None),
            carried_bytes=sum(tensor.nbytes for tensor in carried.values()),
            head_bytes=sum(tensor.nbytes for tensor in heads.values()),
            source_sha256=self.scan.content_hash,
            source_file_bytes=adapter.file_bytes,
        )
        config = adapter.source_config if adapter.source_config is not None else lora_config.make(adapter)
        ranks = {module: one.rank for module, one in coefficient_metadata(self.coefficients).items()}
        if any(rank != adapter.specs[module].rank for module, rank in ranks.items()):
            config = lora_config.of_ranks(config, adapter, ranks)
        coefficients = self.coefficients
        if isinstance(coefficients, dict):
            coefficients = dict(sorted(coefficients.items()))
        places = dict(sorted(self.places.items()))
        return PackedAdapter(
            adapter.name,
            coefficients,
            places,
            heads,
            carried,
            config,
            record,
            origin=adapter.origin,
            payload=self.payload or None,
        )

    @property
    def error(self) -> AdapterError:
        return metrics.adapter_error(self.errors)


def coefficient_bytes(coefficients: Mapping[str, Coefficients], payload: Payload | None) -> int:
    """Tensor bytes of an adapter's coefficients, as they lie in its file."""
    if payload is not None:
        return sum(tensor.nbytes for tensor in payload.values())
    return sum(one.stored_bytes for one in coefficients.values())


def unpacked(packed: PackedAdapter, subspace: Subspace, dtype: torch.dtype) -> Adapter:
    """An ordinary LoRA again, its factors in `dtype`; what was carried comes back to the bit."""
    carried = peft.from_tensors(
        packed.name, packed.source_config, {**packed.heads, **packed.carried}, where=packed.name
    )
    bases = {module: subspace.modules[place] for module, place in packed.places.items()}

    def factors(module: str) -> LoRAFactors:
        if module in bases:
            # all but float16 have float32's range, in which no update that was trained comes near the ends
            if dtype != torch.float16:
                return projection.reconstruct(packed.coefficients[module], bases[module], dtype)
            return narrowing.narrow(projection.reconstruct(packed.coefficients[module], bases[module]), dtype)
        return carried.modules[module]

    outlines = coefficient_metadata(packed.coefficients)
    specs = {module: _spec(one, bases[module], dtype) for module, one in outlines.items()}
    specs |= carried.specs
    return Adapter(
        name=packed.name,
        specs=dict(sorted(specs.items())),
        modules=LazyMapping(dict(sorted(specs.items())), factors),
        base_model=carried.base_model,
        revision=carried.revision,
        heads=packed.heads,
        carried=carried.carried,
        source_config=packed.source_config,
        origin=packed.origin,
    )


def _spec(c: CoefficientMetadata, bases: spaces.ModuleBases, dtype: torch.dtype) -> ModuleSpec:
    return ModuleSpec(c.rank, bases.down.dimension, bases.up.dimension, c.scaling, dtype, c.kernel)


def to_files(packed: PackedAdapter, fingerprint: str, storage: Storage) -> dict[str, bytes]:
    """The files of the adapter's folder. fingerprint: of the subspace, unless the adapter is of an earlier time.
    storage: of the pack's coefficients."""
    fingerprint = packed.subspace or fingerprint
    stored = packed.payload if packed.payload is not None else storage.adapter_tensors(packed.coefficients)
    tensors = {**packed.heads, **stored}
    files = {
        keys.ADAPTER_CONFIG: _dump(adapter_config(packed, fingerprint, storage)),
        keys.ADAPTER_WEIGHTS: to_safetensors(
            {key: peft.owned(tensor) for key, tensor in tensors.items()}, metadata={"format": "pt"}
        ),
        keys.SOURCE_CONFIG: packed.source_config.encode("utf-8"),
    }
    if packed.carried:
        files[keys.CARRIED] = to_safetensors(
            {key: peft.owned(tensor) for key, tensor in packed.carried.items()}, metadata={"format": "pt"}
        )
    if packed.origin is not None:
        files[keys.SOURCE_FILE] = _dump(asdict(packed.origin))
    return files


def adapter_config(packed: PackedAdapter, fingerprint: str, storage: Storage) -> dict[str, Any]:
    """The config of our own PEFT type: the source's fields that still hold, and the reference to the subspace."""
    source = json.loads(packed.source_config)
    kept = (
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
    outlines = coefficient_metadata(packed.coefficients)
    kernels = {module: list(one.kernel) for module, one in outlines.items() if one.kernel}
    rests = {module: list(one.residual_sides) for module, one in outlines.items() if one.residual_sides}
    return {
        **{field_: source[field_] for field_ in kept if field_ in source},
        **({keys.KERNELS: kernels} if kernels else {}),
        **({keys.RESIDUAL_SIDES: rests} if rests else {}),
        **({} if storage.is_float else {keys.COEFFICIENT_DTYPE: storage.name}),
        "peft_type": keys.PEFT_TYPE,
        "inference_mode": True,
        "target_modules": sorted(packed.coefficients),
        "subspace_modules": {module: place for module, place in packed.places.items() if module != place},
        "subspace": keys.INSIDE_PACK,
        "subspace_fingerprint": fingerprint,
        "carried": bool(packed.carried),
    }


@dataclass(frozen=True, slots=True)
class References:
    """What the adapters of a pack may refer to, by the fingerprints that its subspace had.

    sizes: those of a module's bases, from a fingerprint and the module's name in the subspace. at: the subspace as it
    was; its tensors are read when this is called.
    """

    lineage: tuple[str | None, ...]
    sizes: Callable[[str, str], ModuleSizes]
    at: Callable[[str], Subspace]


def from_files(
    name: str, files: Mapping[str, bytes], record: Record, storage: Storage, references: References
) -> PackedAdapter:
    """The inverse of `to_files`; the digests of the bytes were checked before.

    Whatever a parser raises leaves this function: who calls it does so within `boundary.as_specified`.
    """
    tensors = safetensors_file.from_bytes(files[keys.ADAPTER_WEIGHTS], keys.ADAPTER_WEIGHTS)
    carried = safetensors_file.from_bytes(files[keys.CARRIED], keys.CARRIED) if keys.CARRIED in files else {}
    source_config, source = boundary.parse_json_object(files[keys.SOURCE_CONFIG], keys.SOURCE_CONFIG)
    lora_files.check_config(source, keys.SOURCE_CONFIG)
    config = from_json(_Config, _selected(files[keys.ADAPTER_CONFIG]), keys.ADAPTER_CONFIG)
    places = {module: config.subspace_modules.get(module, module) for module in config.target_modules}
    _check_names(places, [*tensors, *carried])
    if len(set(places.values())) < len(places):
        raise ValueError("two modules of the adapter are in one place of the subspace")
    if config.subspace_fingerprint not in references.lineage:
        raise ValueError(f"subspace_fingerprint is {config.subspace_fingerprint!r}, which the subspace never had")
    numbers, slots = lora_config.Numbers(source, name), {}
    for module, place in places.items():
        rank, scaling = numbers.of(module)
        sizes = references.sizes(config.subspace_fingerprint, place)
        kernel = tuple(config.kernels.get(module, ()))
        bitstream.check_rank(rank, (sizes.widths[1], sizes.widths[0]))
        if not is_valid_kernel(kernel, sizes.widths[0]):
            raise ValueError(
                f"the kernel of module {module} is {kernel}, which its {sizes.widths[0]} inputs do not fit"
            )
        slots[module] = ModuleSlot(place, rank, scaling, kernel, sizes)
    if storage.pads_rank:
        _check_padding(record, list(slots.values()))
    factors = [slot.rank * sum(slot.sizes.widths) for slot in slots.values() if slot.sizes is not None]
    boundary.check_factor_memory(sum(factors), "the factors of the adapter")
    coefficients, payload = storage.read_adapter(tensors, slots, lambda: references.at(config.subspace_fingerprint))
    origin = None
    if keys.SOURCE_FILE in files:
        origin = from_json(
            Origin, boundary.parse_json_object(files[keys.SOURCE_FILE], keys.SOURCE_FILE)[1], keys.SOURCE_FILE
        )
    return PackedAdapter(
        name,
        coefficients,
        places,
        tensors,
        carried,
        source_config,
        record,
        config.subspace_fingerprint,
        origin,
        payload,
    )


@dataclass(frozen=True, slots=True)
class _Config:
    """The fields of an adapter's config that say how its tensors are read."""

    target_modules: list[str]
    subspace_modules: dict[str, str]
    subspace_fingerprint: str
    kernels: dict[str, list[int]]


def _selected(data: bytes) -> dict[str, Any]:
    """The fields of `_Config` in an adapter's config; the others are for PEFT."""
    config = {keys.KERNELS: {}, **boundary.parse_json_object(data, keys.ADAPTER_CONFIG)[1]}
    return {name: config[name] for name in _Config.__dataclass_fields__ if name in config}


def _check_padding(record: Record, slots: Sequence[ModuleSlot]) -> None:
    """`ValueError` for ranks and widths that the manifest does not know of: a module without a component takes no byte
    of a file, and factors as large as these say."""
    ranks = {slot.rank for slot in slots}
    if not ranks <= set(record.ranks):
        raise ValueError(f"ranks are {record.ranks} in the manifest and {sorted(ranks)} in {keys.SOURCE_CONFIG}")
    widths = [(slot.rank, *slot.sizes.widths) for slot in slots if slot.sizes is not None]
    # modules may have a down factor in common, which counts once
    least = sum(rank * (n_in // len(widths) + n_out) for rank, n_in, n_out in widths)
    most = sum(rank * (n_in + n_out) for rank, n_in, n_out in widths)
    if not least <= record.lora_numbers <= most:
        raise ValueError(f"lora_numbers is {record.lora_numbers} in the manifest; the modules have {least} to {most}")


def _check_names(modules: Iterable[str], kept: Iterable[str]) -> None:
    """`ValueError` for a name that no tensor of a LoRA's file can have: the adapter would come out unreadable.

    kept: names of tensors that come out as they are.
    """
    factors = {module: keys.lora_key(module, "down") for module in modules}
    keys.check_tensor_names([*factors.values(), *kept], "the adapter")
    for module, key in factors.items():
        if keys.parse_peft_key(key).module != module:
            raise ValueError(f"{module!r} is no name of a module")


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("utf-8")
