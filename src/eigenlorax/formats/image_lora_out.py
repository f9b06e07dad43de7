"""LoRA files of image models, written: the layers of a file in each dialect, and their bytes.

One module by diffusers' name becomes one layer, but for those of FLUX that are parts of one of its authors': these
become one LoRA whose rank is the sum of theirs, or theirs where their inputs are weighed alike.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import keys, store
from ..adapter import Adapter, Lazy, LoRAFactors
from ..errors import FormatError, OptionError
from . import families, flux, lora_config, names, safetensors_file, unets
from .flux import Part, Rows
from .hf_peft import owned, rounded
from .image_lora import METADATA
from .names import (
    BARE,
    DIFFUSERS,
    DIFFUSION_MODEL,
    FIRST_NAMES,
    KOHYA,
    LORA_DOWN,
    OLD,
    PROCESSORS,
    TRANSFORMER,
)
from .words import dotted, underscored

_HASHES = re.compile(r"(sshs_(model|legacy)_hash|modelspec\.hash_sha256)")
"""What is true of the bytes of one file alone."""
_MODEL_HASH = "sshs_model_hash"
_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_TEXT_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_ALIKE = 1e-6
"""How much inputs that are weighed alike may differ, relative to their norm: what is lost by rounding to float32."""

_DOWN_UP = {
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What decides how modules are called: the dialect, its spelling, and which model it is."""

    dialect: str
    spelling: frozenset[str]
    family: frozenset[str]
    components: frozenset[str]

    @property
    def is_xl(self) -> bool:
        return self.family == {families.XL}

    @property
    def is_flux(self) -> bool:
        return "transformer" in self.components


def write(
    adapter: Adapter, path: Path, dialect: str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """One safetensors file; an existing one is refused unless it may be replaced."""
    path = path if path.name.lower().endswith(keys.LORA_SUFFIX) else path.with_name(path.name + keys.LORA_SUFFIX)
    store.check_file_free(path, overwrite)
    data = to_bytes(adapter, dialect, dtype=dtype)
    with store.made(path.parent):
        store.write_file(path, data)
    return path


def to_bytes(adapter: Adapter, dialect: str, *, dtype: torch.dtype | None = None) -> bytes:
    """The file of an adapter in a dialect: factors, alphas where they are tensors, DoRA's magnitudes, and metadata."""
    named = _canonical(adapter)
    kind = _kind(adapter, dialect, named.values())
    layers = _layers(adapter, kind, named)
    carried = _carried(adapter, kind, named)
    tensors: dict[str, Tensor] = {}
    alpha = _one_alpha(adapter, dialect)
    for stem, members in layers.items():
        where = f"{adapter.name!r}, module {members[0][0]}"
        factors = _whole(adapter, members)
        if dialect == OLD or (dialect == DIFFUSERS and BARE in kind.spelling):
            # no program reads an alpha there
            factors = _rescaled(factors, 1.0)
        elif alpha is not None:
            factors = _rescaled(factors, alpha / len(factors.down))
        down, up = factors.weights
        for key, tensor in zip(_factor_keys(stem, kind), (down, up), strict=True):
            tensors[key] = rounded(tensor, dtype, where)
        if dialect in (KOHYA, DIFFUSION_MODEL):
            tensors[f"{stem}.alpha"] = torch.tensor(lora_config.alpha_of(len(factors.down), factors.scaling))
        magnitudes = [carried.pop(module) for module, _ in members if module in carried]
        if magnitudes:
            tensors |= _magnitude(stem, kind, members, magnitudes, factors, where)
    metadata = _metadata(adapter, kind, named)
    data = safetensors_file.to_bytes(tensors, metadata)
    if adapter.origin is not None and _MODEL_HASH in adapter.origin.metadata:
        body = data[8 + int.from_bytes(data[:8], "little") :]
        data = safetensors_file.to_bytes(tensors, {**metadata, _MODEL_HASH: sha256(body).hexdigest()})
    return data


def _canonical(adapter: Adapter) -> dict[str, str]:
    """The adapter's own name of each module → diffusers' component and path."""
    if not adapter.specs:
        raise FormatError(f"adapter {adapter.name!r} has no LoRA of a module, so there is nothing to write to a file.")
    found = {}
    for module in adapter.specs:
        layer = names.layer(module, "lora_A", has_flux=False)
        if layer is None or len(layer.parts) != 1 or layer.dialect != DIFFUSERS:
            raise OptionError(
                f"adapter {adapter.name!r} is not of an image model: its module {module!r} has no name in the files of "
                "kohya's and diffusers' programs. Export it in the format 'peft'."
            )
        found[module] = layer.parts[0].module
    if adapter.heads:
        raise OptionError(
            f"adapter {adapter.name!r} has tensors beside its LoRA, such as {next(iter(adapter.heads))!r}, for which "
            "single files have no place. Export it in the format 'peft'."
        )
    return found


def _kind(adapter: Adapter, dialect: str, modules: Iterable[str]) -> _Kind:
    modules = list(modules)
    components = frozenset(module.partition(".")[0] for module in modules)
    of = families.families((module, _width(adapter, own)) for own, module in _canonical(adapter).items())
    origin = adapter.origin
    spelling = frozenset(origin.spelling) if origin is not None and origin.format == dialect else None
    if spelling is None:
        spelling = frozenset()
        if (dialect == KOHYA and of == {families.XL}) or dialect == DIFFUSION_MODEL:
            spelling |= {FIRST_NAMES}
        if dialect == DIFFUSION_MODEL:
            spelling |= {LORA_DOWN}
    kind = _Kind(dialect, spelling, of, components)
    unet = [module.partition(".")[2] for module in modules if module.startswith("unet.")]
    if FIRST_NAMES in spelling and any(unets.to_first(name, xl=kind.is_xl) is None for name in unet):
        kind = replace(kind, spelling=spelling - {FIRST_NAMES})
    return kind


def _width(adapter: Adapter, module: str) -> int:
    spec = adapter.specs[module]
    size = 1
    for one in spec.kernel:
        size *= one
    return spec.in_features // size


Members = list[tuple[str, Part]]
"""The modules that one layer stands for, by their own names, each with the part it is."""


def _layers(adapter: Adapter, kind: _Kind, named: Mapping[str, str]) -> dict[str, Members]:
    """The layers of the file by name."""
    layers: dict[str, Members] = {}
    for own, module in sorted(named.items()):
        stem, part = _stem(module, kind)
        if stem is None:
            raise OptionError(
                f"adapter {adapter.name!r}: module {module!r} has no name in the dialect {kind.dialect!r}. Export it "
                "in the format 'diffusers' or 'peft'."
            )
        layers.setdefault(stem, []).append((own, part))
    for stem, members in layers.items():
        if len(members) > 1 and any(part.rows is Rows.ALL for _, part in members):
            raise OptionError(
                f"adapter {adapter.name!r}: modules {members[0][0]!r} and {members[1][0]!r} have one name in the "
                f"dialect {kind.dialect!r}, {stem!r}."
            )
    return layers


def _stem(module: str, kind: _Kind) -> tuple[str | None, Part]:
    """What a module's layer is called, and which part of it the module is."""
    component, _, name = module.partition(".")
    whole = Part(module)
    if kind.dialect in (DIFFUSERS, OLD):
        return _dotted_stem(component, name, kind), whole
    if component == "unet":
        found = unets.to_first(name, xl=kind.is_xl) if FIRST_NAMES in kind.spelling else name
        return _prefixed(found, "lora_unet_", kind), whole
    if component == "transformer":
        if TRANSFORMER in kind.spelling:
            return _prefixed(name, "lora_transformer_", kind), whole
        authors = flux.to_authors(name)
        parts = flux.to_diffusers(authors) if authors is not None else []
        part = next((one for one in parts if one.module == name), whole)
        return _prefixed(authors, "lora_unet_", kind), part
    if kind.dialect == DIFFUSION_MODEL:
        encoder = "t5xxl" if component == "text_encoder_2" and kind.is_flux else _ENCODERS.get(component)
        return (f"text_encoders.{encoder}.transformer.{name}" if encoder is not None else None), whole
    number = component.removeprefix("text_encoder").removeprefix("_")
    if not number:
        several = kind.is_xl or kind.is_flux or "text_encoder_2" in kind.components or names.TE1 in kind.spelling
        number = "1" if several else ""
    elif kind.is_flux and number == "2":
        number = "3"
    return _prefixed(name, f"lora_te{number}_", kind), whole


def _prefixed(name: str | None, prefix: str, kind: _Kind) -> str | None:
    if name is None:
        return None
    if kind.dialect == DIFFUSION_MODEL:
        return name if BARE in kind.spelling else f"diffusion_model.{name}"
    # what does not come back would be another module's
    return prefix + underscored(name) if dotted(underscored(name)) == name else None


def _dotted_stem(component: str, name: str, kind: _Kind) -> str:
    if kind.dialect == OLD and PROCESSORS in kind.spelling:
        if match := re.fullmatch(r"(.+\.attn\d?)\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj)", name):
            if component in ("unet", "transformer"):
                name = f"{match[1]}.processor.{match[2].removesuffix('.0')}_lora"
        elif component.startswith("text_encoder") and (match := re.fullmatch(r"(.+\.self_attn)\.(\w+)", name)):
            name = f"{match[1]}.{_TEXT_PROJECTIONS.get(match[2], match[2])}_lora"
    return name if BARE in kind.spelling else f"{component}.{name}"


def _factor_keys(stem: str, kind: _Kind) -> tuple[str, str]:
    if kind.dialect == OLD:
        if stem.endswith("_lora"):
            return f"{stem}.down.weight", f"{stem}.up.weight"
        style = "lora_linear_layer" if stem.startswith("text_") else "lora.down"
    else:
        style = "lora_down" if kind.dialect == KOHYA or LORA_DOWN in kind.spelling else "lora_A"
    down, up = _DOWN_UP[style]
    return f"{stem}.{down}", f"{stem}.{up}"


def _one_alpha(adapter: Adapter, dialect: str) -> float | None:
    """The alpha that all layers of a kohya file get where the adapter came otherwise and has several: diffusers gives
    one to all attention layers of such a file. Alphas that came in this dialect stay what they are."""
    if dialect != KOHYA or (adapter.origin is not None and adapter.origin.format == KOHYA):
        return None
    alphas = Counter(lora_config.alpha_of(spec.rank, spec.scaling) for spec in adapter.specs.values())
    common = alphas.most_common(1)[0][0]
    return common if len(alphas) > 1 and common else None


def _rescaled(factors: LoRAFactors, scaling: float) -> LoRAFactors:
    """The same update with another scaling."""
    if factors.scaling == scaling:
        return factors
    up = (factors.up.double() * (factors.scaling / scaling)).to(factors.up.dtype)
    return replace(factors, up=up, scaling=scaling)


def _whole(adapter: Adapter, members: Members) -> LoRAFactors:
    """The LoRA of a layer."""
    if members[0][1].rows is Rows.ALL:
        return adapter.modules[members[0][0]]
    if members[0][1].rows is Rows.SWAPPED:
        found = adapter.modules[members[0][0]]
        return replace(found, up=torch.cat(tuple(reversed(found.up.chunk(2)))))
    factors = {own: adapter.modules[own] for own, _ in members}
    scaling = next(iter(factors.values())).scaling or 1.0
    ups = {own: _rescaled(one, scaling).up for own, one in factors.items()}
    heights = _heights(adapter, members)
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
        row = sum(heights[: _place(part)])
        width = ups[own].shape[1]
        up[row : row + len(ups[own]), column : column + width] = ups[own]
        column += 0 if alike else width
    # alpha / rank is the scaling, whatever the rank is
    return LoRAFactors(torch.cat(downs), up, scaling)


def _place(part: Part) -> int:
    return 3 if part.rows is Rows.REST else part.index


def _heights(adapter: Adapter, members: Members) -> list[int]:
    """How many rows each part of a layer has, those that the adapter lacks included."""
    known = {_place(part): adapter.specs[own].out_features for own, part in members}
    n_in = adapter.specs[members[0][0]].in_features
    thirds = members[0][1].rows is Rows.THIRD
    if thirds:
        return [next(iter(known.values()))] * 3
    # FLUX's hidden layers are four times as wide as its model
    return [n_in, n_in, n_in, known.get(3, 4 * n_in)]


def _carried(adapter: Adapter, kind: _Kind, named: Mapping[str, str]) -> dict[str, Tensor]:
    """DoRA's magnitudes by module; an error for anything else that is carried."""
    found = {}
    for key in adapter.carried:
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if part != "lora_magnitude_vector" or module not in named:
            raise OptionError(
                f"adapter {adapter.name!r} has {key!r}, for which the dialect {kind.dialect!r} has no place. Export it "
                "in the format 'peft'."
            )
        found[module] = adapter.carried[key]
    return found


def _magnitude(
    stem: str, kind: _Kind, members: Members, magnitudes: list[Tensor], factors: LoRAFactors, where: str
) -> dict[str, Tensor]:
    """The magnitudes of a layer, under the key and in the shape of its dialect."""
    if len(magnitudes) != len(members):
        raise OptionError(f"adapter {where}: only some of the parts of {stem!r} have a DoRA magnitude.")
    n_out = len(factors.up)
    by_output = all(is_by_output(one) for one in magnitudes)
    if kind.dialect in (KOHYA, DIFFUSION_MODEL):
        if not by_output:
            return {f"{stem}.dora_scale": owned(magnitudes[0])}
        whole = torch.cat([one.reshape(-1) for one in magnitudes])
        if members[0][1].rows is Rows.SWAPPED:
            whole = torch.cat(tuple(reversed(whole.chunk(2))))
        if len(whole) != n_out:
            raise OptionError(f"adapter {where}: its DoRA magnitude has {len(whole)} numbers, not {n_out}.")
        return {f"{stem}.dora_scale": owned(whole.reshape(n_out, *[1] * max(1, 1 + len(factors.kernel))))}
    return {f"{stem}.lora_magnitude_vector": owned(as_peft(magnitudes[0], factors.kernel, where))}


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


def _metadata(adapter: Adapter, kind: _Kind, named: Mapping[str, str]) -> dict[str, str]:
    """What the file says of itself: what its source said, as far as it is still true."""
    given = dict(adapter.origin.metadata) if adapter.origin is not None else {}
    text = given.pop(METADATA, None)
    found = {key: value for key, value in given.items() if not _HASHES.fullmatch(key)}
    found.setdefault("format", "pt")
    if kind.dialect != DIFFUSERS or BARE in kind.spelling:
        return found
    came = text is not None and adapter.origin is not None and adapter.origin.format == DIFFUSERS
    if came:
        assert text is not None
        found[METADATA] = text
    elif any(spec.scaling != 1 for spec in adapter.specs.values()) or adapter.carried:
        found[METADATA] = json.dumps(_lora_metadata(adapter, named), indent=2, sort_keys=True)
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
        own_of = {keys.whole_name(own): own for own in modules}
        for pattern in ("rank_pattern", "alpha_pattern"):
            # not anchored in a text encoder: transformers has its modules with and without `text_model.`
            config[pattern] = {
                keys.whole_name(short[own_of[key]])
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
    modules = Lazy(specs, lambda name: adapter.modules[alone + name])
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
