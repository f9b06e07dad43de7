"""Write adapter folders of mlx-lm, and adapters of mlx-lm for PEFT.

mlx-lm has one rank and one scale for all modules. An adapter with several is written with the largest rank, for which
factors are padded with zeros, and the most common scale, for which up factors are multiplied.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core import atomic_files, keys, narrowing
from ...core.adapter import Adapter, LazyMapping, LoRAFactors, padded
from ...errors import FormatError, OptionError, SourceWarning
from .. import safetensors_file
from ..lora_config import ScalingConfig
from ..peft import base_weight_hint, finite, owned
from . import config
from .reader import LORA_A, LORA_B, MAGNITUDE

_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
# names of transformers that mlx-lm's models have too
_KNOWN_NAME = re.compile(r"(language_model\.)?(model\.layers\.\d+\..+|model\.embed_tokens|lm_head)")


@dataclass(frozen=True, slots=True)
class _Contents:
    """Tensors to write, by module.

    Attributes:
        factors: Factors of linear layers and embeddings.
        scalings: Their rank and scaling.
        magnitudes: Key of the magnitude among the carried tensors.
        experts: Keys of the two factors of stacked experts among the carried tensors.
    """

    factors: Mapping[str, LoRAFactors]
    scalings: Mapping[str, tuple[int, float]]
    magnitudes: Mapping[str, str]
    experts: Mapping[str, tuple[str, str]]

    @property
    def modules(self) -> list[str]:
        """Names of all modules."""
        return [*self.scalings, *self.experts]


def write(adapter: Adapter, path: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write a folder that mlx-lm's `load_adapters` loads, and return it.

    The config of an adapter that was read from such a folder is written unchanged, if it still fits.

    Args:
        adapter: The adapter.
        path: The folder, which is written completely or not at all.
        dtype: Dtype of the factors. Default: the dtype of the adapter.
        overwrite: Whether an existing folder is replaced.

    Raises:
        OptionError: mlx-lm has no such tensor or module; the message names it.
        NonFiniteError: A factor has NaN or Inf, or overflows `dtype`.
    """
    atomic_files.write_folder(path, to_files(adapter, dtype=dtype), overwrite=overwrite)
    return path


def check(adapter: Adapter) -> None:
    """Raise the errors that writing an adapter would raise for its tensors and names."""
    _contents(adapter)


def to_files(adapter: Adapter, *, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """Return the content of the two files of a folder, by name; see `write` for arguments and errors."""
    contents = _contents(adapter)
    rank, scale = _common(contents, adapter)
    uniform = LazyMapping(
        contents.factors,
        lambda module: padded(narrowing.with_scaling(contents.factors[module], scale, repr(adapter.name)), rank),
    )
    tensors: dict[str, Tensor] = {}
    for module, factors in uniform.items() if dtype is None else narrowing.narrow_adapter(adapter.name, uniform, dtype):
        where = f"{adapter.name!r}, module {module}"
        tensors[f"{module}.{LORA_A}"] = finite(factors.down.mT, where)
        tensors[f"{module}.{LORA_B}"] = finite(factors.up.mT, where)
    for module, key in contents.magnitudes.items():
        tensors[f"{module}.{MAGNITUDE}"] = owned(adapter.carried[key])
    for module, pair in contents.experts.items():
        for part, key in zip((LORA_A, LORA_B), pair, strict=True):
            tensors[f"{module}.{part}"] = owned(adapter.carried[key])
    is_source = config.source_text(adapter) is not None
    metadata = dict(adapter.origin.metadata) if adapter.origin is not None and is_source else {"format": "mlx"}
    metadata.pop(keys.ADAPTER_CONFIG, None)
    return {
        keys.ADAPTER_CONFIG: _config(adapter, contents, rank, scale).encode("utf-8"),
        keys.MLX_WEIGHTS: safetensors_file.to_bytes(tensors, metadata),
    }


def for_peft(adapter: Adapter) -> Adapter:
    """Return an adapter of mlx-lm for a PEFT folder.

    Raises:
        OptionError: It has stacked experts or the magnitude of an embedding, whose layers PEFT computes differently.
    """
    embeddings = set()
    for key in adapter.carried:
        module, part = _split(key)
        if part in keys.LORA_PARTS.values():
            raise OptionError(
                f"adapter {adapter.name!r} has a LoRA of the stacked experts {module}, for which PEFT has no layer. "
                "Write it in the format 'mlx'."
            )
        if part in (_EMBEDDING_A, _EMBEDDING_B):
            embeddings.add(module)
    for key in adapter.carried:
        module, part = _split(key)
        if part == keys.MAGNITUDE and module in embeddings:
            raise OptionError(
                f"adapter {adapter.name!r} has {module}.{MAGNITUDE}, the magnitude of an embedding, which PEFT "
                "computes differently. Write it in the format 'mlx'."
            )
    if embeddings:
        warnings.warn(
            f"adapter {adapter.name!r} has a LoRA of the embedding {min(embeddings)}. If the base model computes its "
            "logits with the same weight (tie_word_embeddings), mlx-lm applies the LoRA there too, and PEFT does not.",
            SourceWarning,
            stacklevel=3,
        )
    return replace(adapter, origin=None)


def _split(key: str) -> tuple[str, str]:
    """Return module and part of the name of a carried tensor."""
    module, _, part = key.removeprefix(keys.MODEL_PREFIX).removesuffix(".weight").rpartition(".")
    return module, part


def _contents(adapter: Adapter) -> _Contents:
    """Sort an adapter's tensors; raise `OptionError` for one that mlx-lm cannot represent."""
    if adapter.heads:
        key = next(iter(adapter.heads))
        raise _no_place(adapter, f"the tensor {key!r} beside its LoRA", base_weight_hint(key))
    parts: dict[str, dict[str, str]] = {}
    for key in adapter.carried:
        module, part = _split(key)
        is_experts = part in keys.LORA_PARTS.values() and config.source_text(adapter) is not None
        if part not in (keys.MAGNITUDE, _EMBEDDING_A, _EMBEDDING_B) and not is_experts:
            raise _no_place(adapter, f"the tensor {key!r}")
        parts.setdefault(module, {})[part] = key
    factors, scalings = dict(_embeddings(adapter, parts)), {}
    for module, embedding in factors.items():
        scalings[module] = (embedding.spec.rank, embedding.scaling)
    for module, spec in adapter.specs.items():
        if spec.kernel:
            raise _no_place(adapter, f"a LoRA of the convolution {module!r}")
        scalings[module] = (spec.rank, spec.scaling)
    magnitudes = {module: names[keys.MAGNITUDE] for module, names in parts.items() if keys.MAGNITUDE in names}
    if magnitudes and (missing := sorted(scalings.keys() - magnitudes.keys())):
        raise _no_place(adapter, f"DoRA magnitudes of some modules, but none of {missing[0]!r}")
    if unknown := sorted(magnitudes.keys() - scalings.keys()):
        raise _no_place(adapter, f"the DoRA magnitude {magnitudes[unknown[0]]!r} without factors")
    down, up = keys.LORA_PARTS["down"], keys.LORA_PARTS["up"]
    experts = {module: (names[down], names[up]) for module, names in parts.items() if down in names and up in names}
    contents = _Contents(
        factors=LazyMapping(scalings, lambda module: factors[module] if module in factors else adapter.modules[module]),
        scalings=scalings,
        magnitudes=magnitudes,
        experts=experts,
    )
    _check_names(adapter, contents.modules)
    return contents


def _no_place(adapter: Adapter, tensor: str, hint: str = "") -> OptionError:
    return OptionError(
        f"adapter {adapter.name!r} has {tensor}, which adapters of mlx-lm cannot contain.{hint} Write it in the format "
        "'peft'."
    )


def _check_names(adapter: Adapter, modules: list[str]) -> None:
    """Raise `OptionError` for a module that mlx-lm's models name differently, or `FormatError` if there is none."""
    if not modules:
        raise FormatError(f"adapter {adapter.name!r} has no LoRA module, so there is nothing to write.")
    if config.source_text(adapter) is not None:
        return
    for module in modules:
        if _KNOWN_NAME.fullmatch(module) is None:
            raise OptionError(
                f"adapter {adapter.name!r} has a LoRA of {module!r}, for which no name in mlx-lm's models is known. "
                "Known are model.layers.N.…, model.embed_tokens and lm_head. Write it in the format 'peft'."
            )


def _embeddings(adapter: Adapter, parts: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, LoRAFactors]]:
    """Yield the factors of embeddings, whose scaling is that of the config."""
    for module, names in parts.items():
        if _EMBEDDING_A not in names and _EMBEDDING_B not in names:
            continue
        for part in (_EMBEDDING_A, _EMBEDDING_B):
            if part not in names:
                raise _no_place(adapter, f"a LoRA of the embedding {module!r} without {part}")
        scaling = _carried_scaling(adapter, module)[1]
        yield module, LoRAFactors(adapter.carried[names[_EMBEDDING_A]], adapter.carried[names[_EMBEDDING_B]], scaling)


def _carried_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    """Return rank and scaling of a module whose factors are carried, by the config of the adapter's source."""
    source = config.source_settings(adapter)
    if source is not None:
        return source.rank, source.scale
    return ScalingConfig(adapter.config, adapter.name).rank_and_scaling(module)


def _common(contents: _Contents, adapter: Adapter) -> tuple[int, float]:
    """Return the rank and the scale of the file; experts have those of their source."""
    ranks = [rank for rank, _ in contents.scalings.values()]
    scalings = Counter(scaling for _, scaling in contents.scalings.values() if scaling)
    for module, (key, _) in contents.experts.items():
        rank, scaling = _carried_scaling(adapter, module)
        if set(ranks) - {rank} or set(scalings) - {scaling}:
            raise _no_place(adapter, f"the experts {key!r} beside modules of another rank or scaling")
        ranks, scalings = [*ranks, rank], scalings or Counter([scaling])
    return max(ranks), (scalings.most_common(1)[0][0] if scalings else 1.0)


def _config(adapter: Adapter, contents: _Contents, rank: int, scale: float) -> str:
    """Return the text of the config: that of the source, if it states this rank and scale."""
    is_dora = bool(contents.magnitudes)
    text, source = config.source_text(adapter), config.source_settings(adapter)
    if text is not None and source is not None and (source.rank, source.scale) == (rank, scale):
        return text
    return config.make(adapter, contents.modules, rank, scale, is_dora=is_dora)
