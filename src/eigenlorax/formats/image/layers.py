"""Layers of a LoRA file to be written: their names in a dialect, and the modules that each layer contains.

A layer is one module of diffusers, except where FLUX's authors have one module for several modules of diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...core.adapter import Adapter
from ...errors import FormatError, OptionError
from . import families, flux, tensor_keys, unets
from .flux import Part, Rows
from .tensor_keys import DIFFUSERS, DIFFUSION_MODEL, FIRST_NAMES, KOHYA, LORA_DOWN, OLD, PROCESSORS, TRANSFORMER
from .underscored_names import dotted, underscored

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_TEXT_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_DOWN_UP = {
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}

Members = list[tuple[str, Part]]
"""Modules of a layer: name in the adapter, and part of the layer."""


@dataclass(frozen=True, slots=True)
class Naming:
    """Names of an adapter's layers in a file.

    Attributes:
        dialect: One of `tensor_keys.DIALECTS`.
        spelling: Some of `tensor_keys.SPELLINGS`.
        family: Image models that the adapter may belong to.
        canonical: Component and path in diffusers, by module name in the adapter.
    """

    dialect: str
    spelling: frozenset[str]
    family: frozenset[str]
    canonical: Mapping[str, str]

    @property
    def components(self) -> frozenset[str]:
        """Components of the pipeline that the adapter changes: unet, text_encoder, …"""
        return frozenset(module.partition(".")[0] for module in self.canonical.values())

    @property
    def is_xl(self) -> bool:
        """True for an adapter of Stable Diffusion XL."""
        return self.family == {families.XL} or families.is_like_xl(self.canonical.values())

    @property
    def is_flux(self) -> bool:
        """True for an adapter with modules of a transformer, as of FLUX."""
        return "transformer" in self.components


def naming(adapter: Adapter, dialect: str) -> Naming:
    """Return the naming of an adapter in a dialect, which is the naming of its file if it was read in this dialect.

    Raises:
        FormatError: The adapter has no module.
        OptionError: The adapter belongs to no image model, or has heads.
    """
    canonical = _canonical_names(adapter)
    family = families.families((path, adapter.specs[module].channels) for module, path in canonical.items())
    names = Naming(dialect, frozenset(), family, canonical)
    if adapter.origin is not None and adapter.origin.format == dialect:
        names = replace(names, spelling=frozenset(adapter.origin.spelling))
    elif dialect == DIFFUSION_MODEL:
        names = replace(names, spelling=frozenset({FIRST_NAMES, LORA_DOWN}))
    elif dialect == KOHYA and names.is_xl:
        names = replace(names, spelling=frozenset({FIRST_NAMES}))
    unet = [path.partition(".")[2] for path in canonical.values() if path.startswith("unet.")]
    if any(unets.to_first(path, xl=names.is_xl) is None for path in unet):
        # programs expect original names or diffusers' in a file, not a mixture
        names = replace(names, spelling=names.spelling - {FIRST_NAMES})
    return names


def _canonical_names(adapter: Adapter) -> dict[str, str]:
    """Return diffusers' component and path by module name in the adapter."""
    if not adapter.specs:
        raise FormatError(f"adapter {adapter.name!r} has no LoRA module, so there is nothing to write to a file.")
    canonical = {}
    for module in adapter.specs:
        layer = tensor_keys.layer(module, "lora_A", has_flux=False)
        if layer is None or len(layer.parts) != 1 or layer.dialect != DIFFUSERS:
            raise _no_image_model(adapter, module)
        canonical[module] = layer.parts[0].module
    from_image_file = adapter.origin is not None and adapter.origin.format in tensor_keys.DIALECTS
    # an adapter from such a file can always be written again, also if the model is unknown
    if not from_image_file and not any(map(tensor_keys.is_of_image_model, canonical.values())):
        raise _no_image_model(adapter, min(canonical))
    if adapter.heads:
        raise OptionError(
            f"adapter {adapter.name!r} has tensors beside its LoRA, such as {next(iter(adapter.heads))!r}, which "
            "single files cannot contain. Export it in the format 'peft'."
        )
    return canonical


def _no_image_model(adapter: Adapter, module: str) -> OptionError:
    return OptionError(
        f"adapter {adapter.name!r} does not belong to an image model: its module {module!r} has no name in files of "
        "kohya and diffusers. Export it in the format 'peft'."
    )


def layers(adapter: Adapter, naming: Naming) -> dict[str, Members]:
    """Return the layers of the file by name.

    Raises:
        OptionError: A module has no name in the dialect, or two modules have the same name.
    """
    members_by_stem: dict[str, Members] = {}
    for module, path in sorted(naming.canonical.items()):
        stem, part = _stem(path, naming)
        if stem is None:
            raise OptionError(
                f"adapter {adapter.name!r}: module {path!r} has no name in the dialect {naming.dialect!r}. Export it "
                "in the format 'diffusers' or 'peft'."
            )
        members_by_stem.setdefault(stem, []).append((module, part))
    for stem, members in members_by_stem.items():
        if len(members) > 1 and any(part.rows is Rows.ALL for _, part in members):
            raise OptionError(
                f"adapter {adapter.name!r}: modules {members[0][0]!r} and {members[1][0]!r} have the same name in "
                f"the dialect {naming.dialect!r}, {stem!r}. Export it in the format 'peft'."
            )
    return members_by_stem


def _stem(path: str, naming: Naming) -> tuple[str | None, Part]:
    """Return the name of a module's layer, None if it has none, and the part of the layer that the module is."""
    component, _, name = path.partition(".")
    whole = Part(path)
    if naming.dialect in (DIFFUSERS, OLD):
        return _dotted_stem(component, name, naming), whole
    if component == "unet":
        unet_name = unets.to_first(name, xl=naming.is_xl) if FIRST_NAMES in naming.spelling else name
        return _prefixed(unet_name, "lora_unet_", naming), whole
    if component == "transformer":
        if TRANSFORMER in naming.spelling:
            return _prefixed(name, "lora_transformer_", naming), whole
        authors = flux.to_authors(name)
        parts = flux.to_diffusers(authors) if authors is not None else []
        part = next((part for part in parts if part.module == name), whole)
        return _prefixed(authors, "lora_unet_", naming), part
    if naming.dialect == DIFFUSION_MODEL:
        encoder = "t5xxl" if component == "text_encoder_2" and naming.is_flux else _ENCODERS.get(component)
        return (f"text_encoders.{encoder}.transformer.{name}" if encoder is not None else None), whole
    number = component.removeprefix("text_encoder").removeprefix("_")
    if not number:
        is_numbered = (
            naming.is_xl
            or naming.is_flux
            or "text_encoder_2" in naming.components
            or tensor_keys.TE1 in naming.spelling
        )
        number = "1" if is_numbered else ""
    elif naming.is_flux and number == "2":
        number = "3"
    return _prefixed(name, f"lora_te{number}_", naming), whole


def _prefixed(name: str | None, prefix: str, naming: Naming) -> str | None:
    if name is None:
        return None
    if naming.dialect == DIFFUSION_MODEL:
        return f"diffusion_model.{name}"
    # without a name that `dotted` does not restore, which could be read as another module
    return prefix + underscored(name) if dotted(underscored(name)) == name else None


def _dotted_stem(component: str, name: str, naming: Naming) -> str:
    if naming.dialect == OLD and PROCESSORS in naming.spelling:
        if match := re.fullmatch(r"(.+\.attn\d?)\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj)", name):
            if component in ("unet", "transformer"):
                name = f"{match[1]}.processor.{match[2].removesuffix('.0')}_lora"
        elif component.startswith("text_encoder") and (match := re.fullmatch(r"(.+\.self_attn)\.(\w+)", name)):
            name = f"{match[1]}.{_TEXT_PROJECTIONS.get(match[2], match[2])}_lora"
    # with the component, also if the source had none, because current `load_lora_weights` requires it
    return f"{component}.{name}"


def factor_keys(stem: str, naming: Naming) -> tuple[str, str]:
    """Return the keys of a layer's factors, down and up."""
    if naming.dialect == OLD:
        if stem.endswith("_lora"):
            return f"{stem}.down.weight", f"{stem}.up.weight"
        style = "lora_linear_layer" if stem.startswith("text_") else "lora.down"
    else:
        style = "lora_down" if naming.dialect == KOHYA or LORA_DOWN in naming.spelling else "lora_A"
    down, up = _DOWN_UP[style]
    return f"{stem}.{down}", f"{stem}.{up}"


def row_block(part: Part) -> int:
    """Return the position of a part among the row blocks of its layer, from the top."""
    return 3 if part.rows is Rows.REST else part.index


def heights(adapter: Adapter, members: Members) -> list[int]:
    """Return the number of rows of each part of a layer, including parts that the adapter lacks."""
    heights_by_block = {row_block(part): adapter.specs[module].out_features for module, part in members}
    n_in = adapter.specs[members[0][0]].in_features
    if members[0][1].rows is Rows.THIRD:
        return [next(iter(heights_by_block.values()))] * 3
    # the feed-forward layers of FLUX are four times as wide as its input
    return [n_in, n_in, n_in, heights_by_block.get(3, 4 * n_in)]
