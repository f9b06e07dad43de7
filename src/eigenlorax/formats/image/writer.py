"""LoRA files of image models, written: the factors of each layer, what goes with them, and the bytes of the file.

Modules of FLUX that are parts of one layer become one LoRA whose rank is the sum of theirs, or theirs where their
inputs are weighed alike.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
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
from . import layers, names
from .flux import Rows
from .layers import Kind, Members
from .names import DIFFUSERS, DIFFUSION_MODEL, KOHYA, OLD
from .reader import METADATA, metadata_matches

_HASHES = re.compile(r"(sshs_(model|legacy)_hash|modelspec\.hash_sha256)")
"""What is true of the bytes of one file alone."""
_MODEL_HASH = "sshs_model_hash"
_ALIKE = 1e-6
"""How much inputs that are weighed alike may differ, relative to their norm: what is lost by rounding to float32."""


def write(
    adapter: Adapter, path: Path, dialect: str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """One safetensors file; an existing one is refused unless it may be replaced."""
    path = path if path.name.lower().endswith(keys.LORA_SUFFIX) else path.with_name(path.name + keys.LORA_SUFFIX)
    atomic_files.check_file_free(path, overwrite)
    data = to_bytes(adapter, dialect, dtype=dtype)
    with atomic_files.ensure_folder(path.parent):
        atomic_files.write_file(path, data)
    return path


def check(adapter: Adapter, dialect: str) -> None:
    """Raise the error that writing an adapter in a dialect would raise."""
    _tensors(adapter, layers.kind(adapter, dialect), _one_alpha(adapter, dialect), None)


def to_bytes(adapter: Adapter, dialect: str, *, dtype: torch.dtype | None = None) -> bytes:
    """The file of an adapter in a dialect: factors, alphas where they are tensors, DoRA's magnitudes, and metadata."""
    kind, alpha = layers.kind(adapter, dialect), _one_alpha(adapter, dialect)
    if dialect == KOHYA and (alpha is None or adapter.carried):
        _warn_of_misreading(adapter, kind.named)
    tensors = _tensors(adapter, kind, alpha, dtype)
    metadata = _metadata(adapter, kind)
    data = safetensors_file.to_bytes(tensors, metadata)
    if adapter.origin is not None and _MODEL_HASH in adapter.origin.metadata:
        body = data[8 + int.from_bytes(data[:8], "little") :]
        data = safetensors_file.to_bytes(tensors, {**metadata, _MODEL_HASH: sha256(body).hexdigest()})
    return data


def _tensors(adapter: Adapter, kind: Kind, alpha: float | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of the file. alpha: that of all layers, where it is one."""
    _check_kernels(adapter)
    carried = _carried(adapter, kind)
    tensors: dict[str, Tensor] = {}
    members_of = layers.layers(adapter, kind)

    def factors(stem: str) -> LoRAFactors:
        whole = _whole(adapter, members_of[stem])
        if kind.dialect == OLD:
            # no program reads an alpha there
            return _rescaled(adapter, whole, 1.0, stem)
        return whole if alpha is None else _rescaled(adapter, whole, alpha / len(whole.down), stem)

    exact = LazyMapping(members_of, factors)
    for stem, kept in exact.items() if dtype is None else narrowing.narrow_adapter(adapter.name, exact, dtype):
        for key, tensor in zip(layers.factor_keys(stem, kind), kept.weights, strict=True):
            tensors[key] = finite(tensor, f"{adapter.name!r}, module {members_of[stem][0][0]}")
        if kind.dialect in (KOHYA, DIFFUSION_MODEL):
            tensors[f"{stem}.alpha"] = torch.tensor(lora_config.alpha_of(len(kept.down), kept.scaling))
        tensors |= _magnitude(adapter, stem, kind, members_of[stem], carried)
    return tensors


def _check_kernels(adapter: Adapter) -> None:
    """Raise `ShapeError` for a convolution of one or three dimensions, which no program reads from such a file."""
    for module, spec in adapter.specs.items():
        if len(spec.kernel) not in (0, 2):
            raise ShapeError(
                f"module {module} of adapter {adapter.name!r} is a convolution with the kernel {spec.kernel}. LoRA "
                "files of image models hold linear layers and convolutions of two dimensions: export with "
                "format='peft' (--format peft)."
            )


def _one_alpha(adapter: Adapter, dialect: str) -> float | None:
    """The alpha that all layers of a kohya file get where the adapter came otherwise and has several: diffusers gives
    one to all attention layers of such a file. Alphas that came in this dialect stay what they are."""
    if dialect != KOHYA or (adapter.origin is not None and adapter.origin.format == KOHYA):
        return None
    alphas = Counter(lora_config.alpha_of(spec.rank, spec.scaling) for spec in adapter.specs.values())
    common = alphas.most_common(1)[0][0]
    return common if len(alphas) > 1 and common else None


def _warn_of_misreading(adapter: Adapter, named: Mapping[str, str]) -> None:
    """Say what of a kohya file diffusers does not read as it is: magnitudes; and alphas of attention layers of a UNet,
    and of text encoders, that are not the commonest of their model."""
    if adapter.carried:
        warnings.warn(
            f"{adapter.name}: its DoRA magnitudes are written as kohya's programs and ComfyUI read them. diffusers "
            "loads such a file without them, the original as well: for load_lora_weights, export with "
            "format='diffusers' (--format diffusers).",
            SourceWarning,
            stacklevel=6,
        )
    alphas = {own: lora_config.alpha_of(adapter.specs[own].rank, adapter.specs[own].scaling) for own in named}
    misread: list[str] = []
    for component in {module.partition(".")[0] for module in named.values()} - {"transformer"}:
        inside = [own for own, module in named.items() if module.partition(".")[0] == component]
        common = Counter(alphas[own] for own in inside).most_common(1)[0][0]
        misread += [own for own in inside if alphas[own] != common and (component != "unet" or ".attn" in own)]
    if misread:
        warnings.warn(
            f"{adapter.name}: its alphas are written as they came, key by key. {len(misread)} of them, such as that of "
            f"{min(misread)}, diffusers does not find in a kohya file, in the original neither: for load_lora_weights, "
            "export with format='diffusers' (--format diffusers).",
            SourceWarning,
            stacklevel=6,
        )


def _rescaled(adapter: Adapter, factors: LoRAFactors, scaling: float, module: str) -> LoRAFactors:
    """The same update with another scaling."""
    if factors.scaling == scaling:
        return factors
    exact = replace(factors, up=factors.up.double() * (factors.scaling / scaling), scaling=scaling)
    return narrowing.narrow_checked(exact, factors.spec.dtype, f"{adapter.name!r}, module {module}").factors


def _whole(adapter: Adapter, members: Members) -> LoRAFactors:
    """The LoRA of a layer."""
    if members[0][1].rows is Rows.ALL:
        return adapter.modules[members[0][0]]
    if members[0][1].rows is Rows.SWAPPED:
        found = adapter.modules[members[0][0]]
        return replace(found, up=torch.cat(tuple(reversed(found.up.chunk(2)))))
    scaling = adapter.specs[members[0][0]].scaling or 1.0
    factors = {own: _rescaled(adapter, adapter.modules[own], scaling, own) for own, _ in members}
    heights = layers.heights(adapter, members)
    first = next(iter(factors.values())).down
    alike = all(
        one.down.shape == first.shape
        and torch.linalg.norm(one.down.double() - first.double()) <= _ALIKE * torch.linalg.norm(first.double())
        for one in factors.values()
    )
    downs = [first] if alike else [one.down for one in factors.values()]
    rank = sum(map(len, downs))
    up = torch.zeros(sum(heights), rank, dtype=first.dtype)
    column = 0
    for own, part in members:
        row = sum(heights[: layers.place(part)])
        part_up = factors[own].up
        width = part_up.shape[1]
        up[row : row + len(part_up), column : column + width] = part_up
        column += 0 if alike else width
    # alpha / rank is the scaling, whatever the rank is
    return LoRAFactors(torch.cat(downs), up, scaling)


def _carried(adapter: Adapter, kind: Kind) -> dict[str, Tensor]:
    """DoRA's magnitudes by module; an error for anything else that is carried."""
    found = {}
    for key in adapter.carried:
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if part != "lora_magnitude_vector" or module not in kind.named:
            raise OptionError(
                f"adapter {adapter.name!r} has {key!r}, for which the dialect {kind.dialect!r} has no place. Export it "
                "in the format 'peft'."
            )
        found[module] = adapter.carried[key]
    return found


def _magnitude(
    adapter: Adapter, stem: str, kind: Kind, members: Members, carried: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The magnitudes of a layer, under the key and in the shape of its dialect; empty where it has none."""
    magnitudes = [carried[module] for module, _ in members if module in carried]
    if not magnitudes:
        return {}
    where = f"{adapter.name!r}, module {members[0][0]}"
    if len(magnitudes) != len(members):
        raise OptionError(f"adapter {where}: only some of the parts of {stem!r} have a DoRA magnitude.")
    spec, rows = adapter.specs[members[0][0]], members[0][1].rows
    n_out = spec.out_features if rows in (Rows.ALL, Rows.SWAPPED) else sum(layers.heights(adapter, members))
    by_output = all(is_by_output(one) for one in magnitudes)
    if kind.dialect in (KOHYA, DIFFUSION_MODEL):
        if not by_output:
            return {f"{stem}.dora_scale": owned(magnitudes[0])}
        whole = torch.cat([one.reshape(-1) for one in magnitudes])
        if rows is Rows.SWAPPED:
            whole = torch.cat(tuple(reversed(whole.chunk(2))))
        if len(whole) != n_out:
            raise OptionError(f"adapter {where}: its DoRA magnitude has {len(whole)} numbers, not {n_out}.")
        return {f"{stem}.dora_scale": owned(whole.reshape(n_out, *[1] * max(1, 1 + len(spec.kernel))))}
    # diffusers renames its own models' keys; those of text encoders go to transformers as they are
    tail = ".weight" if stem.startswith("text_encoder") else ""
    return {f"{stem}.lora_magnitude_vector{tail}": owned(as_peft(magnitudes[0], spec.kernel, where))}


def is_by_output(magnitude: Tensor) -> bool:
    """Whether a magnitude has a number for each output, as PEFT's have: LyCORIS has one for each input too."""
    if magnitude.ndim == 4 and magnitude.shape[0] == 1:
        return magnitude.numel() == magnitude.shape[1]
    return magnitude.ndim == 1 or magnitude.shape[0] == magnitude.numel()


def as_peft(magnitude: Tensor, kernel: tuple[int, ...], where: str) -> Tensor:
    """A magnitude in PEFT's shape: (out,), or (1, out, 1, 1) of a convolution."""
    if not is_by_output(magnitude):
        raise OptionError(
            f"adapter {where}: its DoRA magnitude is {tuple(magnitude.shape)}, one number for each input, which only "
            "kohya's dialect has. Export it in the format 'kohya'."
        )
    flat = magnitude.reshape(-1)
    return flat.reshape(1, -1, *[1] * len(kernel)) if kernel else flat


def _metadata(adapter: Adapter, kind: Kind) -> dict[str, str]:
    """What the file says of itself: what its source said, as far as it is still true."""
    given = dict(adapter.origin.metadata) if adapter.origin is not None else {}
    text = given.pop(METADATA, None)
    found = {key: value for key, value in given.items() if not _HASHES.fullmatch(key)}
    found.setdefault("format", "pt")
    if kind.dialect != DIFFUSERS:
        return found
    if text is not None and metadata_matches(text, {module: adapter.specs[own] for own, module in kind.named.items()}):
        found[METADATA] = text
    elif any(spec.scaling != 1 for spec in adapter.specs.values()) or adapter.carried:
        found[METADATA] = json.dumps(_lora_metadata(adapter, kind.named), indent=2, sort_keys=True)
    return found


def _lora_metadata(adapter: Adapter, named: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's fields, with the component before each, as diffusers reads them for alphas."""
    fields: dict[str, Any] = {}
    for component in sorted({module.partition(".")[0] for module in named.values()}):
        modules = {own: module for own, module in named.items() if module.startswith(f"{component}.")}
        specs = {own: adapter.specs[own] for own in modules}
        config = json.loads(lora_config.make(replace(adapter, specs=specs)))
        has_dora = any(key.removeprefix(keys.MODEL_PREFIX).rpartition(".")[0] in modules for key in adapter.carried)
        short = {
            own: module.removeprefix(f"{component}.").removeprefix("text_model.") for own, module in modules.items()
        }
        own_of = {module_patterns.exact_pattern(own): own for own in modules}
        for pattern in ("rank_pattern", "alpha_pattern"):
            # not anchored in a text encoder: transformers has its modules with and without `text_model.`
            config[pattern] = {
                module_patterns.exact_pattern(short[own_of[key]])
                if component in ("unet", "transformer")
                else re.escape(short[own_of[key]]): value
                for key, value in config[pattern].items()
            }
        kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        fields |= {f"{component}.{name}": config[name] for name in kept}
        fields |= {
            f"{component}.target_modules": sorted(short.values()),
            f"{component}.lora_dropout": 0.0,
            f"{component}.bias": "none",
            f"{component}.use_dora": has_dora,
        }
    return fields


def for_peft(adapter: Adapter) -> Adapter:
    """The adapter as a folder of PEFT's has it: for the model itself where it is of one component, with the components'
    names otherwise; magnitudes in PEFT's shape."""
    components = {module.partition(".")[0] for module in adapter.specs}
    alone = f"{next(iter(components))}." if len(components) == 1 and components <= set(names.COMPONENTS) else ""
    specs = {module.removeprefix(alone): spec for module, spec in adapter.specs.items()}
    modules = LazyMapping(specs, lambda name: adapter.modules[alone + name])
    carried = {}
    for key in adapter.carried:
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        tensor = adapter.carried[key]
        if part == "lora_magnitude_vector":
            tensor = as_peft(tensor, adapter.specs[module].kernel, f"{adapter.name!r}, module {module}")
        carried[f"{keys.MODEL_PREFIX}{key.removeprefix(keys.MODEL_PREFIX).removeprefix(alone)}"] = tensor
    found = replace(adapter, specs=specs, modules=modules, carried=carried, origin=None)
    config = json.loads(lora_config.make(found))
    uses_dora = any(key.endswith("lora_magnitude_vector") for key in carried)
    text = json.dumps({**config, **({"use_dora": True} if uses_dora else {})}, indent=2, sort_keys=True)
    return replace(found, source_config=text)
