"""AdaLoRA checkpoints of PEFT, presented as the LoRAs with the same updates.

A module has r triplets: a row of `lora_A`, a column of `lora_B` and a number of `lora_E`. Its update is
lora_alpha / (init_r + 1e-5) · B diag(E) A (Zhang et al., arXiv:2303.10512, with the scaling of PEFT's implementation).
The LoRA has A' = diag(E) A. Triplets with E = 0, which the rank allocation has masked, are dropped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import keys
from ..core.adapter import Adapter, ModuleSpec
from ..core.options import format_value
from ..errors import FormatError, ShapeError
from . import lora_config
from .files import Header, Load, OpenedFolder, Weights

# PEFT's defaults, for configs without the field
_DEFAULT_INIT_RANK, _DEFAULT_ALPHA = 12, 8
# Upper limit of both, far above any in use, so that floats can represent them
_LARGEST = 2**31


class _RankConfig:
    """Ranks and scalings of modules by the config of an AdaLoRA checkpoint.

    Args:
        config: The parsed `adapter_config.json`.
        where: Path of the file, for error messages.

    Raises:
        FormatError: A field is not of the type that PEFT writes.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.init_rank: int = config.get("init_r", _DEFAULT_INIT_RANK)
        self._alpha = config.get("lora_alpha", _DEFAULT_ALPHA)
        is_rank = type(self.init_rank) is int and 1 <= self.init_rank < _LARGEST
        if not is_rank or type(self._alpha) not in (int, float) or not abs(self._alpha) < _LARGEST:
            raise FormatError(
                f"{where}: init_r={format_value(self.init_rank)} and lora_alpha={format_value(self._alpha)} in "
                f"{keys.ADAPTER_CONFIG} are not usable numbers: init_r is a whole number of at least 1, and lora_alpha "
                f"a number, both below {_LARGEST:,}."
            )
        pattern = config.get("rank_pattern") or {}
        if not isinstance(pattern, dict) or not all(_is_mask(mask) for mask in pattern.values()):
            raise FormatError(
                f"{where}: rank_pattern in {keys.ADAPTER_CONFIG} must be lists of true and false by name of a "
                f"{keys.ADALORA_VALUES}, as PEFT writes it for AdaLoRA."
            )
        # releases of PEFT differ in whether the name of the adapter follows
        self._ranks = {name.partition(f".{keys.ADALORA_VALUES}")[0]: sum(mask) for name, mask in pattern.items()}

    def rank(self, module: str) -> int:
        """Return the number of triplets that the file has of a module."""
        return self._ranks.get(module, self.init_rank)

    def scaling(self, module: str) -> float:
        """Return the scaling, with init_r + 1e-5 in float32, as PEFT computes it whatever the module's rank is."""
        alpha = self._alpha if self._alpha > 0 else self.rank(module)
        return alpha / float(torch.tensor(float(self.init_rank), dtype=torch.float32) + 1e-5)


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, list) and all(type(is_kept) is bool for is_kept in mask)


@dataclass(frozen=True, slots=True)
class _Module:
    """One module of a checkpoint.

    Attributes:
        tensors: Name in the file of `lora_A`, `lora_B` and `lora_E`.
        triplets: Positions of the triplets that the LoRA has; empty if the file has none of this module.
        spec: Shape, scaling and dtype of the LoRA. Its rank is at least 1, since no LoRA has a rank of 0.
    """

    tensors: Mapping[str, str]
    triplets: tuple[int, ...]
    spec: ModuleSpec


def as_lora(opened: OpenedFolder) -> OpenedFolder:
    """Return an AdaLoRA checkpoint as the folder of a LoRA. Factors are computed at each access.

    Args:
        opened: The checkpoint. Its `lora_E` are read.

    Raises:
        FormatError: A tensor of a module is missing, occurs twice or has another meaning, or the config has no usable
            ranks and scalings.
        ShapeError: The tensors of a module do not fit each other or the config.
    """
    weights = opened.weights
    names, others = _tensor_names(opened)
    if not names:
        raise FormatError(f"{weights.path} has no LoRA tensor at all.")
    numbers = _RankConfig(opened.config, weights.path)
    modules = {module: _module(module, tensors, weights, numbers) for module, tensors in sorted(names.items())}
    headers = {name: weights.headers[name] for name in others}
    for module, described in modules.items():
        spec = described.spec
        headers[keys.lora_key(module, "down")] = Header((spec.rank, spec.in_features), spec.dtype)
        headers[keys.lora_key(module, "up")] = Header((spec.out_features, spec.rank), spec.dtype)
    specs = {module: described.spec for module, described in modules.items()}
    base_model, revision = (opened.config.get(field) for field in ("base_model_name_or_path", "revision"))
    adapter = Adapter(opened.name, specs, {}, base_model, revision)
    config = lora_config.derived(adapter, opened.config)
    load = partial(_load, weights.load, modules)
    return OpenedFolder(opened.name, config, json.loads(config), replace(weights, headers=headers, load=load))


def _tensor_names(opened: OpenedFolder) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names in the file of each module's tensors, and the names of heads and other tensors."""
    where = opened.weights.path
    names: dict[str, dict[str, str]] = {}
    others = []
    for name in sorted(opened.weights.headers):
        parsed = keys.parse_adalora_key(name)
        if parsed is None:
            if keys.is_factor_key(name):
                raise FormatError(
                    f"{where}: tensor {name!r} belongs to a LoRA, but {keys.ADAPTER_CONFIG} says AdaLoRA, whose "
                    "tensors have no '.weight'. Correct peft_type, or take the config that was saved with this file."
                )
            others.append(name)
            continue
        module, part = parsed
        tensors = names.setdefault(module, {})
        if part in tensors:
            raise FormatError(
                f"{where}: tensors {tensors[part]!r} and {name!r} are both {part} of {module}. Remove one of them."
            )
        tensors[part] = name
    for module, tensors in names.items():
        missing = [part for part in keys.ADALORA_PARTS if part not in tensors]
        if missing:
            raise FormatError(f"{where}: module {module} has no {missing[0]}: the file is incomplete.")
    return names, others


def _module(module: str, tensors: Mapping[str, str], weights: Weights, numbers: _RankConfig) -> _Module:
    """Return the description of a module; its `lora_E` is read."""
    down, up, values = (weights.headers[tensors[part]] for part in keys.ADALORA_PARTS)
    rank = values.shape[0] if values.shape[1:] == (1,) else None
    if (len(down.shape), len(up.shape)) != (2, 2) or not down.shape[0] == up.shape[1] == rank:
        raise ShapeError(
            f"{weights.path}: module {module} has lora_A {down.shape}, lora_B {up.shape} and lora_E {values.shape}: "
            "(rank, in), (out, rank) and (rank, 1) must share one rank."
        )
    if rank != numbers.rank(module):
        raise ShapeError(
            f"{weights.path}: module {module} has {rank} triplets, but {keys.ADAPTER_CONFIG} says "
            f"{numbers.rank(module)} (init_r and rank_pattern). PEFT would reject it: correct the config."
        )
    dtype = torch.float32
    for part, header in zip(keys.ADALORA_PARTS, (down, up, values), strict=True):
        if header.dtype is None:
            raise FormatError(f"{weights.path}: tensor {tensors[part]!r} is not float64, float32, float16 or bfloat16.")
        dtype = torch.promote_types(dtype, header.dtype)
    (stored,) = weights.load([tensors[keys.ADALORA_VALUES]])
    # the first triplet alone is the zero update; NaN is not zero, and is found where all numbers are checked
    triplets = tuple(stored.flatten().nonzero().flatten().tolist()) or tuple(range(min(rank, 1)))
    spec = ModuleSpec(max(len(triplets), 1), down.shape[1], up.shape[0], numbers.scaling(module), dtype)
    return _Module(tensors, triplets, spec)


# Module functions, not closures: an adapter has to be picklable.


def _load(load: Load, modules: Mapping[str, _Module], names: list[str]) -> list[Tensor]:
    """Load tensors of the LoRA, or of the file, by name."""
    return [_tensor(load, modules, name) for name in names]


def _tensor(load: Load, modules: Mapping[str, _Module], name: str) -> Tensor:
    if not keys.is_factor_key(name):
        return load([name])[0]
    parsed = keys.parse_peft_key(name)
    module = modules[parsed.module]
    spec, triplets = module.spec, list(module.triplets)
    down, up, values = (tensor.to(spec.dtype) for tensor in load([module.tensors[part] for part in keys.ADALORA_PARTS]))
    if parsed.kind is keys.Kind.DOWN:
        return (down * values)[triplets] if triplets else down.new_zeros(spec.rank, spec.in_features)
    return up[:, triplets] if triplets else up.new_zeros(spec.out_features, spec.rank)
