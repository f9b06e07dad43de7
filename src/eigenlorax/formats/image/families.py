"""Which models a LoRA of an image model may be for, by the names and widths of its modules.

What cannot be fitted together is found before any shapes are compared, and also where no module is in both.
"""

import re
from collections.abc import Iterable, Mapping

from . import flux, names

SD1, SD2, XL, FLUX = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "FLUX"
TRANSFORMER, UNET = "another diffusion transformer", "another UNet"

_UNETS = {768: SD1, 1024: SD2, 2048: XL}
"""By the width of what their cross-attention reads."""
_ENCODERS: Mapping[tuple[str, int], frozenset[str]] = {
    ("text_encoder", 768): frozenset({SD1, XL, FLUX, TRANSFORMER}),
    ("text_encoder", 1024): frozenset({SD2}),
    ("text_encoder_2", 1280): frozenset({XL, TRANSFORMER}),
}
_READS = re.compile(r"^unet\..*\.attn2\.to_[kv]$")
_OF_FLUX = ("single_transformer_blocks.", "time_text_embed.")
_AS_IN_XL = re.compile(r"^unet\.(.*\.transformer_blocks\.[1-9]|add_embedding\.)")


def families(modules: Iterable[tuple[str, int]]) -> frozenset[str]:
    """The models that these modules, each with the width of its input, may be of; empty where nothing says so."""
    modules = _of_image_models(list(modules))
    # what a cross-attention reads says it for sure: a UNet of somebody's own may be as deep as SDXL's. So does a
    # module that FLUX does not have: other transformers have many of its modules too.
    sure = [(module, width) for module, width in modules if _READS.search(module) or _is_not_of_flux(module)]
    found: frozenset[str] = frozenset()
    for module, width in sure or modules:
        may_be = _families(module, width)
        if may_be:
            found = (found & may_be or may_be) if found else may_be
    return found


def _of_image_models(modules: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the modules of those components in which some name has the structure of an image model's."""
    known = {module.partition(".")[0] for module, _ in modules if names.is_of_image_model(module)}
    return [(module, width) for module, width in modules if module.partition(".")[0] in known]


def is_like_xl(modules: Iterable[str]) -> bool:
    """Whether modules of these names are in SDXL's UNet, or one built like it, and not in that of earlier ones."""
    return any(map(_AS_IN_XL.match, modules))


def called(family: frozenset[str]) -> str:
    """A family in words."""
    return " or ".join(sorted(family))


def _is_not_of_flux(module: str) -> bool:
    """Return whether a module of a diffusion transformer is one that FLUX lacks."""
    component, _, name = module.partition(".")
    return component == "transformer" and flux.to_authors(name) is None


def _families(module: str, width: int) -> frozenset[str]:
    component, _, name = module.partition(".")
    if component == "unet":
        if _READS.search(module):
            return frozenset({_UNETS.get(width, UNET)})
        if _AS_IN_XL.match(module):
            return frozenset({XL, UNET})
        return frozenset({SD1, SD2, UNET} if name.startswith("down_blocks.0.attentions.") else ())
    if component == "transformer":
        if _is_not_of_flux(module):
            return frozenset({TRANSFORMER})
        return frozenset({FLUX} if name.startswith(_OF_FLUX) else {FLUX, TRANSFORMER})
    if name.endswith(".self_attn.q_proj"):
        return _ENCODERS.get((component, width), frozenset())
    return frozenset()
