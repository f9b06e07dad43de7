"""Image models that a LoRA may belong to, by the names and widths of its modules.

They show that adapters belong to different models before shapes are compared, and also if no module name is shared.
"""

import re
from collections.abc import Iterable, Mapping

from . import flux, tensor_keys

SD1, SD2, XL, FLUX = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "FLUX"
TRANSFORMER, UNET = "another diffusion transformer", "another UNet"

_UNETS = {768: SD1, 1024: SD2, 2048: XL}
"""UNets by the width of the text embedding in their cross-attention."""
_ENCODERS: Mapping[tuple[str, int], frozenset[str]] = {
    ("text_encoder", 768): frozenset({SD1, XL, FLUX, TRANSFORMER}),
    ("text_encoder", 1024): frozenset({SD2}),
    ("text_encoder_2", 1280): frozenset({XL, TRANSFORMER}),
}
_CROSS_ATTENTION = re.compile(r"^unet\..*\.attn2\.to_[kv]$")
_OF_FLUX = ("single_transformer_blocks.", "time_text_embed.")
_AS_IN_XL = re.compile(r"^unet\.(.*\.transformer_blocks\.[1-9]|add_embedding\.)")


def families(modules: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Return the image models that modules may belong to; empty if no module identifies a model.

    Args:
        modules: Name and input width of each module.
    """
    modules = _of_image_models(list(modules))
    # Two kinds of modules identify a model: cross-attention by its width, and modules that FLUX lacks. Names alone do
    # not: a custom UNet may be as deep as SDXL's, and other transformers have many names of FLUX.
    decisive = [
        (module, width) for module, width in modules if _CROSS_ATTENTION.search(module) or _is_not_of_flux(module)
    ]
    models: frozenset[str] = frozenset()
    for module, width in decisive or modules:
        candidates = _families(module, width)
        if candidates:
            models = (models & candidates or candidates) if models else candidates
    return models


def _of_image_models(modules: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the modules in components of image models, which have a module name of that structure."""
    components = {module.partition(".")[0] for module, _ in modules if tensor_keys.is_of_image_model(module)}
    return [(module, width) for module, width in modules if module.partition(".")[0] in components]


def is_like_xl(modules: Iterable[str]) -> bool:
    """Return whether a module has a name that SDXL's UNet has and the UNets of earlier versions lack."""
    return any(map(_AS_IN_XL.match, modules))


def describe(family: frozenset[str]) -> str:
    """Return the models of a family as text."""
    return " or ".join(sorted(family))


def _is_not_of_flux(module: str) -> bool:
    """Return whether a module belongs to a diffusion transformer other than FLUX."""
    component, _, name = module.partition(".")
    return component == "transformer" and flux.to_authors(name) is None


def _families(module: str, width: int) -> frozenset[str]:
    """Return the models that may have a module of this name and input width."""
    component, _, name = module.partition(".")
    if component == "unet":
        if _CROSS_ATTENTION.search(module):
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
