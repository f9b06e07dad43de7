"""Write LoRA files of image models.

Modules of FLUX that are parts of one layer become one LoRA. Its rank is the sum of their ranks, or their common rank if
they have the same down factor.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import atomic_files, keys, module_patterns, narrowing
from ...core.adapter import Adapter, LazyMapping, LoRAFactors
from ...errors import OptionError, ShapeError, SourceWarning
from .. import lora_config, safetensors_file
from ..peft import finite, owned
from . import layers, tensor_keys
from .flux import Rows
from .layers import Members, Naming
from .reader import METADATA, metadata_matches
from .tensor_keys import DIFFUSERS, DIFFUSION_MODEL, KOHYA, OLD

_HASHES = re.compile(r"(sshs_(model|legacy)_hash|modelspec\.hash_sha256)")
"""Metadata keys that are only valid for the bytes of one file."""
_MODEL_HASH = "sshs_model_hash"
_SAME_FACTOR = 1e-6
"""Relative difference up to which two down factors are treated as equal: the error of rounding to float32."""


def write(
    adapter: Adapter, path: Path, dialect: str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write an adapter as one safetensors file, and return its path.

    Args:
        adapter: The adapter.
        path: The file. The suffix is added if it is missing.
        dialect: One of `tensor_keys.DIALECTS`.
        dtype: Dtype of the factors. Default: the dtype of the adapter.
        overwrite: Whether an existing file is replaced.

    Raises:
        OptionError: The adapter does not belong to an image model, or the dialect cannot represent one of its tensors.
        ShapeError: A convolution has one or three dimensions.
        NonFiniteError: A factor has NaN or Inf, or overflows `dtype`.
    """
    content = partial(to_bytes, adapter, dialect, dtype=dtype)
    return atomic_files.write_new_file(path, keys.LORA_SUFFIX, content, overwrite=overwrite)


def check(adapter: Adapter, dialect: str) -> None:
    """Raise the errors that writing an adapter in a dialect would raise."""
    _tensors(adapter, layers.naming(adapter, dialect), _common_alpha(adapter, dialect), None)


def to_bytes(adapter: Adapter, dialect: str, *, dtype: torch.dtype | None = None) -> bytes:
    """Return the file as bytes: factors, alphas if the dialect stores them as tensors, DoRA magnitudes and metadata."""
    naming, alpha = layers.naming(adapter, dialect), _common_alpha(adapter, dialect)
    if dialect == KOHYA and (alpha is None or adapter.carried):
        _warn_of_misreading(adapter, naming.canonical)
    tensors = _tensors(adapter, naming, alpha, dtype)
    metadata = _metadata(adapter, naming)
    data = safetensors_file.to_bytes(tensors, metadata)
    if adapter.origin is not None and _MODEL_HASH in adapter.origin.metadata:
        # kohya's programs hash the tensors without the header
        body = data[8 + int.from_bytes(data[:8], "little") :]
        data = safetensors_file.to_bytes(tensors, {**metadata, _MODEL_HASH: sha256(body).hexdigest()})
    return data


def _tensors(adapter: Adapter, naming: Naming, alpha: float | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of the file by key.

    Args:
        adapter: The adapter.
        naming: Names of its layers.
        alpha: Alpha of all layers; None to keep the alpha of each.
        dtype: Dtype of the factors; None to keep it.
    """
    _check_kernels(adapter)
    carried = _carried(adapter, naming)
    tensors: dict[str, Tensor] = {}
    members_by_stem = layers.layers(adapter, naming)

    def layer_factors(stem: str) -> LoRAFactors:
        factors = _layer_factors(adapter, members_by_stem[stem])
        if naming.dialect == OLD:
            # programs that read this dialect read no alpha
            scaling = 1.0
        elif alpha is None:
            return factors
        else:
            scaling = alpha / len(factors.down)
        return narrowing.with_scaling(factors, scaling, f"{adapter.name!r}, module {stem}")

    exact = LazyMapping(members_by_stem, layer_factors)
    for stem, factors in exact.items() if dtype is None else narrowing.narrow_adapter(adapter.name, exact, dtype):
        for key, tensor in zip(layers.factor_keys(stem, naming), factors.weights, strict=True):
            tensors[key] = finite(tensor, f"{adapter.name!r}, module {members_by_stem[stem][0][0]}")
        if naming.dialect in (KOHYA, DIFFUSION_MODEL):
            tensors[f"{stem}.alpha"] = torch.tensor(lora_config.lora_alpha(len(factors.down), factors.scaling))
        tensors |= _magnitude(adapter, stem, naming, members_by_stem[stem], carried)
    return tensors


def _check_kernels(adapter: Adapter) -> None:
    """Raise `ShapeError` for convolutions with one or three dimensions, which no program reads from such a file."""
    for module, spec in adapter.specs.items():
        if len(spec.kernel) not in (0, 2):
            raise ShapeError(
                f"module {module} of adapter {adapter.name!r} is a convolution with the kernel {spec.kernel}. LoRA "
                "files of image models contain linear layers and 2D convolutions only: export with "
                "format='peft' (--format peft)."
            )


def _common_alpha(adapter: Adapter, dialect: str) -> float | None:
    """Return the common alpha of all layers of a kohya file, or None to keep the alpha of each.

    diffusers applies one alpha to all attention layers of a kohya file. So an adapter with several alphas is written
    with the most common one, and rescaled factors. The alphas of an adapter that was read in this dialect are kept.
    """
    if dialect != KOHYA or (adapter.origin is not None and adapter.origin.format == KOHYA):
        return None
    alphas = Counter(lora_config.lora_alpha(spec.rank, spec.scaling) for spec in adapter.specs.values())
    common = alphas.most_common(1)[0][0]
    return common if len(alphas) > 1 and common else None


def _warn_of_misreading(adapter: Adapter, canonical: Mapping[str, str]) -> None:
    """Warn of the tensors that diffusers ignores in a kohya file.

    These are DoRA magnitudes, and alphas of a text encoder or of a UNet's attention that are not the most common ones.
    """
    if adapter.carried:
        warnings.warn(
            f"{adapter.name}: its DoRA magnitudes are written as kohya's programs and ComfyUI read them. diffusers "
            "ignores them in such a file, also in the original: for load_lora_weights, export with "
            "format='diffusers' (--format diffusers).",
            SourceWarning,
            stacklevel=6,
        )
    alphas = {
        module: lora_config.lora_alpha(adapter.specs[module].rank, adapter.specs[module].scaling)
        for module in canonical
    }
    misread: list[str] = []
    for component in {path.partition(".")[0] for path in canonical.values()} - {"transformer"}:
        modules = [module for module, path in canonical.items() if path.partition(".")[0] == component]
        common = Counter(alphas[module] for module in modules).most_common(1)[0][0]
        misread += [
            module for module in modules if alphas[module] != common and (component != "unet" or ".attn" in module)
        ]
    if misread:
        warnings.warn(
            f"{adapter.name}: its alphas are written unchanged. diffusers ignores {len(misread)} of them in a kohya "
            f"file, also in the original, such as the alpha of {min(misread)}: for load_lora_weights, "
            "export with format='diffusers' (--format diffusers).",
            SourceWarning,
            stacklevel=6,
        )


def _layer_factors(adapter: Adapter, members: Members) -> LoRAFactors:
    """Return the LoRA of a layer, whose modules are blocks of rows in the up factor."""
    module, part = members[0]
    if part.rows is Rows.ALL:
        return adapter.modules[module]
    if part.rows is Rows.SWAPPED:
        swapped = adapter.modules[module]
        return replace(swapped, up=torch.cat(tuple(reversed(swapped.up.chunk(2)))))
    scaling = adapter.specs[module].scaling or 1.0
    factors = {
        module: narrowing.with_scaling(adapter.modules[module], scaling, f"{adapter.name!r}, module {module}")
        for module, _ in members
    }
    heights = layers.heights(adapter, members)
    first = factors[module].down
    tolerance = _SAME_FACTOR * torch.linalg.norm(first.double())
    # with one down factor, the up factors are stacked; with several, they are the blocks of a diagonal
    share_down = all(
        lora.down.shape == first.shape and torch.linalg.norm(lora.down.double() - first.double()) <= tolerance
        for lora in factors.values()
    )
    downs = [first] if share_down else [lora.down for lora in factors.values()]
    up = torch.zeros(sum(heights), sum(map(len, downs)), dtype=first.dtype)
    column = 0
    for module, part in members:
        row = sum(heights[: layers.row_block(part)])
        block = factors[module].up
        up[row : row + len(block), column : column + block.shape[1]] = block
        column += 0 if share_down else block.shape[1]
    # the alpha is computed from the scaling and the new rank later
    return LoRAFactors(torch.cat(downs), up, scaling)


def _carried(adapter: Adapter, naming: Naming) -> dict[str, Tensor]:
    """Return DoRA magnitudes by module; raise `OptionError` for any other carried tensor."""
    magnitudes = {}
    for key in adapter.carried:
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if part != "lora_magnitude_vector" or module not in naming.canonical:
            raise OptionError(
                f"adapter {adapter.name!r} has {key!r}, which the dialect {naming.dialect!r} cannot represent. "
                "Export it in the format 'peft'."
            )
        magnitudes[module] = adapter.carried[key]
    return magnitudes


def _magnitude(
    adapter: Adapter, stem: str, naming: Naming, members: Members, carried: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the DoRA magnitude of a layer by key, in the shape of its dialect; empty if it has none.

    Args:
        adapter: The adapter.
        stem: Name of the layer.
        naming: Names of the adapter's layers.
        members: Modules of the layer.
        carried: Magnitudes by module.
    """
    magnitudes = [carried[module] for module, _ in members if module in carried]
    if not magnitudes:
        return {}
    where = f"{adapter.name!r}, module {members[0][0]}"
    if len(magnitudes) != len(members):
        raise OptionError(f"adapter {where}: only some of the parts of {stem!r} have a DoRA magnitude.")
    spec, rows = adapter.specs[members[0][0]], members[0][1].rows
    n_out = spec.out_features if rows in (Rows.ALL, Rows.SWAPPED) else sum(layers.heights(adapter, members))
    by_output = all(map(is_by_output, magnitudes))
    if naming.dialect in (KOHYA, DIFFUSION_MODEL):
        if not by_output:
            return {f"{stem}.dora_scale": owned(magnitudes[0])}
        scale = torch.cat([magnitude.reshape(-1) for magnitude in magnitudes])
        if rows is Rows.SWAPPED:
            scale = torch.cat(tuple(reversed(scale.chunk(2))))
        if len(scale) != n_out:
            raise OptionError(f"adapter {where}: its DoRA magnitude has {len(scale)} numbers, not {n_out}.")
        return {f"{stem}.dora_scale": owned(scale.reshape(n_out, *[1] * max(1, 1 + len(spec.kernel))))}
    # diffusers renames keys of its own models only; transformers reads those of text encoders, with PEFT's suffix
    suffix = ".weight" if stem.startswith("text_encoder") else ""
    return {f"{stem}.lora_magnitude_vector{suffix}": owned(as_peft(magnitudes[0], spec.kernel, where))}


def is_by_output(magnitude: Tensor) -> bool:
    """Return whether a magnitude has one number per output, as in PEFT. LyCORIS also writes one per input."""
    if magnitude.ndim == 4 and magnitude.shape[0] == 1:
        return magnitude.numel() == magnitude.shape[1]
    return magnitude.ndim == 1 or magnitude.shape[0] == magnitude.numel()


def as_peft(magnitude: Tensor, kernel: tuple[int, ...], where: str) -> Tensor:
    """Return a magnitude in PEFT's shape: (out,), or (1, out, 1, 1) for a convolution."""
    if not is_by_output(magnitude):
        raise OptionError(
            f"adapter {where}: its DoRA magnitude has shape {tuple(magnitude.shape)}, one number per input, which "
            "only the dialect of kohya supports. Export it in the format 'kohya'."
        )
    flat = magnitude.reshape(-1)
    return flat.reshape(1, -1, *[1] * len(kernel)) if kernel else flat


def _metadata(adapter: Adapter, naming: Naming) -> dict[str, str]:
    """Return the metadata of the file: the metadata of its source, without hashes of the source."""
    source = dict(adapter.origin.metadata) if adapter.origin is not None else {}
    config_text = source.pop(METADATA, None)
    metadata = {key: text for key, text in source.items() if not _HASHES.fullmatch(key)}
    metadata.setdefault("format", "pt")
    if naming.dialect != DIFFUSERS:
        return metadata
    specs = {path: adapter.specs[module] for module, path in naming.canonical.items()}
    if config_text is not None and metadata_matches(config_text, specs):
        metadata[METADATA] = config_text
    elif any(spec.scaling != 1 for spec in adapter.specs.values()) or adapter.carried:
        metadata[METADATA] = json.dumps(_lora_metadata(adapter, naming.canonical), indent=2, sort_keys=True)
    return metadata


def _lora_metadata(adapter: Adapter, canonical: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a PEFT config for each component, from which diffusers reads the alphas.

    Args:
        adapter: The adapter.
        canonical: Component and path in diffusers, by module name in the adapter.
    """
    fields: dict[str, Any] = {}
    for component in sorted({path.partition(".")[0] for path in canonical.values()}):
        paths = {module: path for module, path in canonical.items() if path.startswith(f"{component}.")}
        specs = {module: adapter.specs[module] for module in paths}
        config = json.loads(lora_config.make(replace(adapter, specs=specs)))
        has_dora = any(key.removeprefix(keys.MODEL_PREFIX).rpartition(".")[0] in paths for key in adapter.carried)
        short_names = {
            module: path.removeprefix(f"{component}.").removeprefix("text_model.") for module, path in paths.items()
        }
        modules = {module_patterns.exact_pattern(module): module for module in paths}
        for field in ("rank_pattern", "alpha_pattern"):
            # not anchored in a text encoder: its modules have the prefix `text_model.` in some releases of transformers
            config[field] = {
                module_patterns.exact_pattern(short_names[modules[pattern]])
                if component in ("unet", "transformer")
                else re.escape(short_names[modules[pattern]]): value
                for pattern, value in config[field].items()
            }
        fields |= {
            f"{component}.{field}": config[field] for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        }
        fields |= {
            f"{component}.target_modules": sorted(short_names.values()),
            f"{component}.lora_dropout": 0.0,
            f"{component}.bias": "none",
            f"{component}.use_dora": has_dora,
        }
    return fields


def for_peft(adapter: Adapter) -> Adapter:
    """Return an adapter of an image model for a PEFT folder.

    If it changes one component, modules have their names in that model. Otherwise the names start with the component.
    Magnitudes have PEFT's shape.
    """
    components = {module.partition(".")[0] for module in adapter.specs}
    is_single = len(components) == 1 and components <= set(tensor_keys.COMPONENTS)
    prefix = f"{next(iter(components))}." if is_single else ""
    specs = {module.removeprefix(prefix): spec for module, spec in adapter.specs.items()}
    modules = LazyMapping(specs, lambda name: adapter.modules[prefix + name])
    carried = {}
    for key in adapter.carried:
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        tensor = adapter.carried[key]
        if part == "lora_magnitude_vector":
            tensor = as_peft(tensor, adapter.specs[module].kernel, f"{adapter.name!r}, module {module}")
        carried[f"{keys.MODEL_PREFIX}{key.removeprefix(keys.MODEL_PREFIX).removeprefix(prefix)}"] = tensor
    peft_adapter = replace(adapter, specs=specs, modules=modules, carried=carried, origin=None)
    config = json.loads(lora_config.make(peft_adapter))
    uses_dora = any(key.endswith("lora_magnitude_vector") for key in carried)
    text = json.dumps({**config, **({"use_dora": True} if uses_dora else {})}, indent=2, sort_keys=True)
    return replace(peft_adapter, source_config=text)
