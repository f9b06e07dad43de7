"""Which layers a LoRA file of an image model has, by the dialect: their names, and the modules each stands for.

One module by diffusers' name is one layer, but for those of FLUX that are parts of one of its authors'.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...core.adapter import Adapter
from ...errors import FormatError, OptionError
from . import families, flux, names, unets
from .flux import Part, Rows
from .names import DIFFUSERS, DIFFUSION_MODEL, FIRST_NAMES, KOHYA, LORA_DOWN, OLD, PROCESSORS, TRANSFORMER
from .words import dotted, underscored

_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_TEXT_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_DOWN_UP = {
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}

Members = list[tuple[str, Part]]
"""The modules that one layer stands for, by their own names, each with the part it is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides how an adapter's modules are called: the dialect, its spelling, and which model they are of.

    named: the adapter's own name of each module → diffusers' component and path.
    """

    dialect: str
    spelling: frozenset[str]
    family: frozenset[str]
    named: Mapping[str, str]

    @property
    def components(self) -> frozenset[str]:
        """Those that have modules."""
        return frozenset(module.partition(".")[0] for module in self.named.values())

    @property
    def is_xl(self) -> bool:
        return self.family == {families.XL} or families.is_like_xl(self.named.values())

    @property
    def is_flux(self) -> bool:
        return "transformer" in self.components


def kind(adapter: Adapter, dialect: str) -> Kind:
    """How the modules of an adapter are called in a dialect; as they were, where it came in this one. `OptionError` for
    one that is of no image model."""
    named = _canonical(adapter)
    family = families.families((module, adapter.specs[own].channels) for own, module in named.items())
    found = Kind(dialect, frozenset(), family, named)
    if adapter.origin is not None and adapter.origin.format == dialect:
        found = replace(found, spelling=frozenset(adapter.origin.spelling))
    elif dialect == DIFFUSION_MODEL:
        found = replace(found, spelling=frozenset({FIRST_NAMES, LORA_DOWN}))
    elif dialect == KOHYA and found.is_xl:
        found = replace(found, spelling=frozenset({FIRST_NAMES}))
    unet = [module.partition(".")[2] for module in named.values() if module.startswith("unet.")]
    if any(unets.to_first(name, xl=found.is_xl) is None for name in unet):
        # programs take a file for one of these or of diffusers' names, not for a mixture
        found = replace(found, spelling=found.spelling - {FIRST_NAMES})
    return found


def _canonical(adapter: Adapter) -> dict[str, str]:
    """The adapter's own name of each module → diffusers' component and path."""
    if not adapter.specs:
        raise FormatError(f"adapter {adapter.name!r} has no LoRA of a module, so there is nothing to write to a file.")
    found = {}
    for module in adapter.specs:
        layer = names.layer(module, "lora_A", has_flux=False)
        if layer is None or len(layer.parts) != 1 or layer.dialect != DIFFUSERS:
            raise _of_no_image_model(adapter, module)
        found[module] = layer.parts[0].module
    came_so = adapter.origin is not None and adapter.origin.format in names.DIALECTS
    # what came in a file of an image model goes out as it came, whichever model it is of
    if not came_so and not any(map(names.is_of_image_model, found.values())):
        raise _of_no_image_model(adapter, min(found))
    if adapter.heads:
        raise OptionError(
            f"adapter {adapter.name!r} has tensors beside its LoRA, such as {next(iter(adapter.heads))!r}, for which "
            "single files have no place. Export it in the format 'peft'."
        )
    return found


def _of_no_image_model(adapter: Adapter, module: str) -> OptionError:
    return OptionError(
        f"adapter {adapter.name!r} is not of an image model: its module {module!r} has no name in the files of "
        "kohya's and diffusers' programs. Export it in the format 'peft'."
    )


def layers(adapter: Adapter, kind: Kind) -> dict[str, Members]:
    """The layers of the file by name."""
    found: dict[str, Members] = {}
    for own, module in sorted(kind.named.items()):
        stem, part = _stem(module, kind)
        if stem is None:
            raise OptionError(
                f"adapter {adapter.name!r}: module {module!r} has no name in the dialect {kind.dialect!r}. Export it "
                "in the format 'diffusers' or 'peft'."
            )
        found.setdefault(stem, []).append((own, part))
    for stem, members in found.items():
        if len(members) > 1 and any(part.rows is Rows.ALL for _, part in members):
            raise OptionError(
                f"adapter {adapter.name!r}: modules {members[0][0]!r} and {members[1][0]!r} have one name in the "
                f"dialect {kind.dialect!r}, {stem!r}."
            )
    return found


def _stem(module: str, kind: Kind) -> tuple[str | None, Part]:
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


def _prefixed(name: str | None, prefix: str, kind: Kind) -> str | None:
    if name is None:
        return None
    if kind.dialect == DIFFUSION_MODEL:
        return f"diffusion_model.{name}"
    # what does not come back would be another module's
    return prefix + underscored(name) if dotted(underscored(name)) == name else None


def _dotted_stem(component: str, name: str, kind: Kind) -> str:
    if kind.dialect == OLD and PROCESSORS in kind.spelling:
        if match := re.fullmatch(r"(.+\.attn\d?)\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj)", name):
            if component in ("unet", "transformer"):
                name = f"{match[1]}.processor.{match[2].removesuffix('.0')}_lora"
        elif component.startswith("text_encoder") and (match := re.fullmatch(r"(.+\.self_attn)\.(\w+)", name)):
            name = f"{match[1]}.{_TEXT_PROJECTIONS.get(match[2], match[2])}_lora"
    # also where a file came without a component: no `load_lora_weights` reads it so any more
    return f"{component}.{name}"


def factor_keys(stem: str, kind: Kind) -> tuple[str, str]:
    """The keys of a layer's two factors, down and up."""
    if kind.dialect == OLD:
        if stem.endswith("_lora"):
            return f"{stem}.down.weight", f"{stem}.up.weight"
        style = "lora_linear_layer" if stem.startswith("text_") else "lora.down"
    else:
        style = "lora_down" if kind.dialect == KOHYA or LORA_DOWN in kind.spelling else "lora_A"
    down, up = _DOWN_UP[style]
    return f"{stem}.{down}", f"{stem}.{up}"


def place(part: Part) -> int:
    """Which of the parts of a layer it is, from above."""
    return 3 if part.rows is Rows.REST else part.index


def heights(adapter: Adapter, members: Members) -> list[int]:
    """How many rows each part of a layer has, those that the adapter lacks included."""
    known = {place(part): adapter.specs[own].out_features for own, part in members}
    n_in = adapter.specs[members[0][0]].in_features
    thirds = members[0][1].rows is Rows.THIRD
    if thirds:
        return [next(iter(known.values()))] * 3
    # FLUX's hidden layers are four times as wide as its model
    return [n_in, n_in, n_in, known.get(3, 4 * n_in)]
