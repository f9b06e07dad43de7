"""Write LoRAs in GGUF, as llama.cpp's `convert_lora_to_gguf.py` does.

llama.cpp multiplies each update with alpha / rank, where alpha is one number of the file and the rank that of the
tensor. Modules with another scaling are written with a rescaled up factor.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import atomic_files, keys, narrowing
from ...core.adapter import Adapter, LazyMapping, LoRAFactors
from ...errors import FormatError, OptionError
from .. import hub_client, lora_config
from ..lora_config import ScalingConfig
from ..peft import base_weight_hint, finite
from . import row_order
from .architectures import OUTPUT, BaseModel, package
from .reader import ALORA_TOKENS, EMBEDDING, SIDES

Q8_0 = "q8_0"
"""Name of the dtype with eight-bit integers and a scale for each 32 of them."""
_ROUNDING = 2.0**-24
"""Relative error of rounding to float32, which the alpha of a file is."""
_WRITTEN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight of the base model that the adapter changes.

    Attributes:
        stem: Its name in GGUF.
        key: Name of its down factor in a PEFT file, by which llama.cpp's converter orders modules.
        factors: Its factors.
        n_heads: Number of heads by which its rows are permuted; None if they are not.
        is_embedding: Whether it is the token embedding, whose down factor is transposed.
    """

    stem: str
    key: str
    factors: LoRAFactors
    n_heads: int | None
    is_embedding: bool


def write(
    adapter: Adapter,
    path: Path,
    *,
    base: BaseModel,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as one file, and return its path.

    Args:
        adapter: The adapter.
        path: The file. The suffix is added if it is missing.
        base: The base model.
        dtype: float32, float16, bfloat16, or `Q8_0`. Default: the dtype of the adapter, float32 for float64.
        overwrite: Whether an existing file is replaced.

    Raises:
        OptionError: llama.cpp has no module of this name, or cannot apply a tensor.
        ShapeError: The rows of a module are not those of the base model's heads.
        NonFiniteError: A factor has NaN or Inf, or overflows the dtype.
    """
    content = partial(to_bytes, adapter, base, dtype=dtype)
    return atomic_files.write_new_file(path, keys.GGUF_SUFFIX, content, overwrite=overwrite)


def check(adapter: Adapter, base: BaseModel) -> None:
    """Raise the errors that writing an adapter would raise, except for those about its numbers."""
    _check_complete(adapter, base)
    for module, spec in adapter.specs.items():
        _stem(adapter, base, module)
        heads = base.n_heads(module)
        if heads is not None:
            row_order.check(spec.out_features, heads, f"adapter {adapter.name!r}: module {module}")
    _alora_tokens(adapter)


def to_bytes(adapter: Adapter, base: BaseModel, *, dtype: torch.dtype | str | None = None) -> bytes:
    """Return the file as bytes; see `write` for the arguments and errors."""
    check(adapter, base)
    gguf = package()
    kind, factor_dtype = _type(adapter, dtype)
    updates = {**_embeddings(adapter, base), **adapter.modules}
    alpha = _alpha((len(factors.down), factors.scaling) for factors in updates.values())
    exact = LazyMapping(updates, lambda module: _rescaled(updates[module], alpha))
    writer = gguf.GGUFWriter(path=None, arch=base.architecture.gguf)
    weights = []
    for module, factors in narrowing.narrow_adapter(adapter.name, exact, factor_dtype):
        is_embedding = module == base.architecture.embedding
        key = f"{keys.MODEL_PREFIX}{module}.{EMBEDDING['down']}" if is_embedding else keys.lora_key(module, "down")
        weights.append(_Weight(_stem(adapter, base, module), key, factors, base.n_heads(module), is_embedding))
    for weight in sorted(weights, key=lambda weight: weight.key):
        for side, factor in zip(keys.SIDES, _tensors(adapter, weight), strict=True):
            quantised, quantised_kind = quantise(factor, kind)
            writer.add_tensor(weight.stem + SIDES[side], quantised, raw_dtype=quantised_kind)
    _add_metadata(writer, adapter, alpha)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"adapter{keys.GGUF_SUFFIX}")
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def before_q8_0(adapter: Adapter) -> Mapping[str, LoRAFactors]:
    """Return the factors that a file in Q8_0 has before they are rounded: with the scaling of the file's alpha."""
    alpha = _alpha((spec.rank, spec.scaling) for spec in adapter.specs.values())
    return LazyMapping(adapter.specs, lambda module: _rescaled(adapter.modules[module], alpha))


def round_q8_0(factors: LoRAFactors) -> LoRAFactors:
    """Return factors as they are read from a file in Q8_0, to measure the error of rounding.

    It is the same for the permuted rows of a file, since blocks are parts of rows.

    Args:
        factors: Factors from `before_q8_0`.
    """
    gguf = package()
    factors = narrowing.narrow(factors, torch.float32)
    rounded = []
    for tensor in (factors.down, factors.up):
        data, kind = quantise(tensor, gguf.GGMLQuantizationType.Q8_0)
        rounded.append(torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), dtype=np.float32)))
    return replace(factors, down=rounded[0], up=rounded[1])


def quantise(factor: Tensor, kind: Any) -> tuple[Any, Any]:
    """Return a factor as an array of a type of ggml, and the type: F16 where rows are too short for blocks of Q8_0."""
    gguf = package()
    array = factor.to(torch.float32).contiguous().numpy()
    if kind == gguf.GGMLQuantizationType.Q8_0 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(array, kind), kind


def _type(adapter: Adapter, dtype: torch.dtype | str | None) -> tuple[Any, torch.dtype]:
    """Return the type of ggml, and the dtype to which factors are rounded before."""
    kinds = package().GGMLQuantizationType
    if dtype == Q8_0:
        return kinds.Q8_0, torch.float32
    if dtype is None:
        stated = {spec.dtype for spec in adapter.specs.values()} | {tensor.dtype for tensor in adapter.carried.values()}
        dtype = stated.pop() if len(stated) == 1 else torch.float32
        dtype = torch.float32 if dtype == torch.float64 else dtype
    names = dict(zip(_WRITTEN, (kinds.F32, kinds.F16, kinds.BF16), strict=True))
    if not isinstance(dtype, torch.dtype) or dtype not in names:
        raise OptionError(f"dtype is {dtype}; for GGUF, float32, float16, bfloat16 or {Q8_0} was expected.")
    return names[dtype], dtype


def _check_complete(adapter: Adapter, base: BaseModel) -> None:
    """Raise `OptionError` for a tensor or an option that llama.cpp does not apply."""
    embedding = {f"{keys.MODEL_PREFIX}{base.architecture.embedding}.{part}" for part in EMBEDDING.values()}
    for key in (*adapter.heads, *adapter.carried):
        if key not in embedding:
            raise OptionError(
                f"adapter {adapter.name!r} has {key!r}, which llama.cpp does not apply: of an adapter, it takes the "
                f"factors lora_A and lora_B of linear layers and of the token embedding.{base_weight_hint(key)} Merge "
                "the adapter into the base model, and convert that, or export it in the format 'peft'."
            )
    for option in ("use_dora", "layer_replication"):
        if adapter.config.get(option):
            raise OptionError(f"adapter {adapter.name!r} has {option}, which llama.cpp does not apply.")
    if embedding & set(adapter.carried) and not embedding <= set(adapter.carried):
        raise FormatError(f"adapter {adapter.name!r} has only one of {', '.join(sorted(embedding))}.")
    for module, spec in adapter.specs.items():
        if spec.kernel:
            raise OptionError(f"adapter {adapter.name!r}: module {module} is a convolution, which GGUF has no LoRA of.")
    if not adapter.specs and not adapter.carried:
        raise FormatError(f"adapter {adapter.name!r} has no LoRA tensor at all.")


def _stem(adapter: Adapter, base: BaseModel, module: str) -> str:
    """Return the name of a module's weight; raise `OptionError` if llama.cpp has no such weight."""
    stem = base.stem(module)
    architecture = base.architecture
    if stem is None:
        raise OptionError(
            f"adapter {adapter.name!r} has {keys.lora_key(module, 'down')!r}, and llama.cpp has no weight of this "
            f"name: {base.where} describes {base.n_layers} layers {architecture.layers}.N with "
            f"{', '.join(architecture.modules)}, {architecture.embedding} and {OUTPUT}. Pass the config of "
            "the adapter's base model."
        )
    if module == OUTPUT and base.is_tied:
        raise OptionError(
            f"adapter {adapter.name!r} has {keys.lora_key(module, 'down')!r}, but llama.cpp has no output layer to "
            f"apply it to: by {base.where}, it shares the weights of {architecture.embedding} (tie_word_embeddings). "
            "Merge the adapter into the base model, and convert that."
        )
    return stem


def _embeddings(adapter: Adapter, base: BaseModel) -> dict[str, LoRAFactors]:
    """Return the LoRA of the token embedding, by module; it is carried since PEFT names its factors differently."""
    module = base.architecture.embedding
    names = [f"{keys.MODEL_PREFIX}{module}.{EMBEDDING[side]}" for side in keys.SIDES]
    if names[0] not in adapter.carried:
        return {}
    down, up = (adapter.carried[name] for name in names)
    _, scaling = ScalingConfig(adapter.config, adapter.name).rank_and_scaling(module, down.shape[0])
    return {module: LoRAFactors(down, up, scaling)}


def _alpha(scalings: Iterable[tuple[int, float]]) -> float:
    """Return the alpha of the file: the most common one, rounded to float32. scalings: rank and scaling by module."""
    alphas = Counter(float(np.float32(lora_config.lora_alpha(rank, scaling))) for rank, scaling in scalings)
    # llama.cpp takes an alpha of 0 as a scaling of 1
    usable = {alpha: count for alpha, count in alphas.items() if alpha and np.isfinite(alpha)}
    return max(usable, key=lambda alpha: usable[alpha]) if usable else 1.0


def _rescaled(factors: LoRAFactors, alpha: float) -> LoRAFactors:
    """Return the same update with the scaling that llama.cpp computes from the alpha of the file."""
    scaling = alpha / len(factors.down)
    factor = factors.scaling / scaling
    if abs(factor - 1) <= _ROUNDING:
        return factors
    return replace(factors, up=factors.up.double() * factor, scaling=scaling)


def _tensors(adapter: Adapter, weight: _Weight) -> tuple[Tensor, Tensor]:
    """Return the two factors of a weight as llama.cpp has them."""
    where = f"{adapter.name!r}, {weight.stem}"
    down, up = finite(weight.factors.down, where), finite(weight.factors.up, where)
    if weight.n_heads is not None:
        up = row_order.interleave(up, weight.n_heads, where)
    return (down.mT if weight.is_embedding else down), up


def _alora_tokens(adapter: Adapter) -> list[int] | None:
    """Return the tokens that activate an aLoRA; None for any other LoRA."""
    tokens = adapter.config.get(ALORA_TOKENS)
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**32 for token in tokens):
        raise OptionError(f"adapter {adapter.name!r}: {ALORA_TOKENS} is {tokens!r}; a list of tokens was expected.")
    return tokens or None


def _add_metadata(writer: Any, adapter: Adapter, alpha: float) -> None:
    """Add the metadata in the order of llama.cpp's converter."""
    gguf = package()
    name = keys.file_name(adapter.name)
    is_on_hub = adapter.base_model is not None and hub_client.parsed(adapter.base_model) is not None
    card = {"base_model": adapter.base_model} if is_on_hub else None
    n_parameters = writer.get_total_parameter_count()[0]
    # names only: no file of this path is read
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, None, Path(name), n_parameters)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    metadata.set_gguf_meta_model(writer)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    tokens = _alora_tokens(adapter)
    if tokens:
        types = gguf.GGUFValueType
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, types.ARRAY, types.UINT32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
