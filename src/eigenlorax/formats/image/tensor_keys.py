"""Tensor keys in LoRA files of image models, parsed into a module and the part of its LoRA.

In memory a module has the same name in all dialects: diffusers' component and path, such as
`unet.mid_block.attentions.0.proj_in`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...core import keys
from ...errors import FormatError
from . import flux, unets
from .flux import Part
from .underscored_names import dotted

DOWN, UP, MID, ALPHA, MAGNITUDE, BIAS = "down", "up", "mid", "alpha", "magnitude", "bias"

KOHYA, DIFFUSERS, OLD, DIFFUSION_MODEL = "kohya", "diffusers", "diffusers-old", "diffusion-model"
DIALECTS = (KOHYA, DIFFUSERS, OLD, DIFFUSION_MODEL)
"""Conventions for the names of tensors.

- kohya: `lora_unet_…lora_down.weight`.
- diffusers: `unet.….lora_A.weight`.
- diffusers-old: `unet.….lora.down.weight`.
- diffusion-model: `diffusion_model.….lora_A.weight`, as ComfyUI and others write it.
"""

FIRST_NAMES, PROCESSORS, LORA_DOWN = "first-names", "processors", "lora-down"
TRANSFORMER, TE1 = "transformer", "te1"
SPELLINGS = (FIRST_NAMES, PROCESSORS, LORA_DOWN, TRANSFORMER, TE1)
"""Variants within a dialect.

- first-names: names of the original code for the modules of a UNet.
- processors: `.processor.to_q_lora`.
- lora-down: `lora_down.weight` instead of `lora_A.weight`.
- transformer: `lora_transformer_` before diffusers' names of FLUX.
- te1: `lora_te1_` before modules of the first text encoder.
"""

_TAILS = (
    # style of the factors, and the end of the key with the part
    ("lora_down", re.compile(r"(?P<stem>.+)\.lora_(?P<part>down|up|mid)(\.weight)?")),
    ("lora_A", re.compile(r"(?P<stem>.+)\.lora_(?P<part>[AB])(\.(?!bias$|weight$)[^.]+)?(\.weight)?")),
    ("lora.down", re.compile(r"(?P<stem>.+)\.lora(_linear_layer)?\.(?P<part>down|up)\.weight")),
    ("_lora.down", re.compile(r"(?P<stem>.+)_lora\.(?P<part>down|up)\.weight")),
    ("_lora.down", re.compile(r"(?P<stem>.+_lora[12])\.(?P<part>down|up)\.weight")),
    ("", re.compile(r"(?P<stem>.+?)(_lora)?\.(?P<part>alpha)")),
    ("", re.compile(r"(?P<stem>.+)\.(?P<part>dora_scale)")),
    ("", re.compile(r"(?P<stem>.+)\.(?P<part>lora_magnitude_vector)(\.[^.]+)*")),
    ("", re.compile(r"(?P<stem>.+)\.(?P<part>lora_B(\.[^.]+)?\.bias)")),
)
_PARTS = {"A": DOWN, "B": UP, "dora_scale": MAGNITUDE, "lora_magnitude_vector": MAGNITUDE}

# Other kinds of files by a pattern in a key. The first match gives the name in the error message.
_OTHER_KINDS = (
    ("a LoHa (LyCORIS), whose update is a product of two low-rank matrices entry by entry", r"\.hada_"),
    ("a LoKr (LyCORIS), whose update is a Kronecker product", r"\.lokr_"),
    ("a GLoRA (LyCORIS)", r"\.[ab][12]\.weight$"),
    ("an (IA)³ adapter, which scales activations", r"\.on_input$|\.ia3_"),
    ("an OFT adapter, which rotates weights", r"\.oft_|\.oft_R"),
    ("a ControlLoRA", r"^lora_controlnet$|query_norm\.scale$|^control_model\."),
    (
        "a file with whole differences of weights (.diff, .diff_b), which have no low rank",
        r"\.diff(_b)?$|\.set_weight$",
    ),
    ("a file with trained norms (LyCORIS)", r"\.[wb]_norm$"),
    (
        "a file of the first `lora` package, whose layers have numbers instead of names",
        r"^(unet|text_encoder):\d+:(up|down)$",
    ),
    (
        "a file with embeddings of new words (textual inversion), which a LoRA does not contain",
        r"^string_to_(param|token)|^emb_params$|^bundle_emb\.|^clip_[lg]$|^<.+>$",
    ),
    (
        "a whole checkpoint, not a LoRA",
        r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.|^conditioner\.embedders\.",
    ),
)
_OTHER_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _OTHER_KINDS)

_KOHYA = re.compile(r"lora_(?P<which>unet|transformer|te[123]?)[_.](?P<name>.+)")
_COMFY_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_2"}
_COMFY = re.compile(r"text_encoders\.(?P<which>clip_l|clip_g|t5xxl)\.transformer\.(?P<name>.+)")
_XLABS = re.compile(
    r"(diffusion_model\.)?(?P<kind>double|single)_blocks\.(?P<block>\d+)\.processor\.(?P<layer>qkv|proj)"
    r"(_lora(?P<stream>[12]))?"
)
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("unet", "transformer", *_TEXT_ENCODERS)
_TRANSFORMER_HEADS = frozenset(
    {"transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "time_text_embed"}
    | {"norm_out", "proj_out"}
)
_TEXT_HEADS = frozenset({"text_model", "text_projection"})
_T5_HEADS = frozenset({"encoder"})
_IMAGE_MODULES = {
    "unet": re.compile(
        rf"({'|'.join(sorted(unets.DIFFUSERS_HEADS))}|encoder_hid_proj|class_embedding|transformer_in)(\..+)?"
    ),
    # All transformers of diffusers use the same names for attention projections and feed-forward layers. GPT-2, Falcon,
    # MPT and others, whose modules start with `transformer.` too, use different ones.
    "transformer": re.compile(
        rf"(({'|'.join(sorted(_TRANSFORMER_HEADS))}|joint_transformer_blocks|context_refiner|noise_refiner)(\..+)?"
        r"|.+\.(to_[qkv]|to_qkv\w*|to_out(\.0)?|to_add_out|add_[qkv]_proj|ff\w*\.net\.\d+(\.proj)?))"
    ),
    # CLIP and T5
    "text_encoder": re.compile(
        r"(text_model|text_projection)(\..+)?|encoder\.layers\.\d+\.(self_attn|mlp)\..+"
        r"|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)\..+"
    ),
}
"""Patterns of module paths in diffusers' models, by component."""
# the oldest files name the projections of a text encoder like those of a UNet
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Key:
    """A parsed key.

    Attributes:
        stem: Name of the layer in the file.
        part: Part of its LoRA: `DOWN`, `UP`, `MID`, `ALPHA`, `MAGNITUDE` or `BIAS`.
        style: Spelling of the part; empty if all styles have the same.
    """

    stem: str
    part: str
    style: str


def key(name: str) -> Key | None:
    """Parse the name of a tensor; return None for a tensor that does not belong to a LoRA."""
    for style, tail in _TAILS:
        if match := tail.fullmatch(name):
            part = BIAS if match["part"].endswith(".bias") else _PARTS.get(match["part"], match["part"])
            return Key(match["stem"], part, style)
    return None


def is_lora(names: Iterable[str]) -> bool:
    """Return whether a file with tensors of these names is an adapter.

    Adapters of other kinds are included, so that reading them raises the error that names the kind.
    """
    names = list(names)
    checkpoint = next(pattern for kind, pattern in _OTHER_PATTERNS if "checkpoint" in kind)
    if any(checkpoint.search(name) for name in names):
        return False
    return any((parsed := key(name)) is not None and parsed.part in (DOWN, UP) for name in names) or any(
        re.search(r"\.(hada|lokr|oft|ia3)_", name) for name in names
    )


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of a file that is not a LoRA, and a tensor that shows it; None if no pattern matches."""
    names = list(names)
    for kind, pattern in _OTHER_PATTERNS:
        for name in names:
            if pattern.search(name):
                return kind, name
    return None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a file.

    Attributes:
        parts: Modules of the layer.
        dialect: Dialect of its name.
        spelling: Variants within the dialect that its name uses.
    """

    parts: list[Part]
    dialect: str
    spelling: frozenset[str] = frozenset()


def layer(stem: str, style: str, *, has_flux: bool) -> Layer | None:
    """Resolve the name of a layer; return None if no supported model has it.

    Args:
        stem: The key without the part of the LoRA.
        style: Spelling of the factors; see `Key`.
        has_flux: Whether the file has modules of FLUX, whose second text encoder kohya numbers as the third.
    """
    if match := _KOHYA.fullmatch(stem):
        name = match["name"] if "." in match["name"] else dotted(match["name"])
        return _kohya(match["which"], name, has_flux) if name is not None else None
    if match := _XLABS.fullmatch(stem):
        parts = flux.from_xlabs(match["kind"], match["block"], match["layer"], match["stream"])
        return Layer([replace(part, module=f"transformer.{part.module}") for part in parts], DIFFUSERS)
    spelling = {LORA_DOWN} if style == "lora_down" else set()
    if stem.startswith("diffusion_model."):
        return _diffusion_model(stem.removeprefix("diffusion_model."), spelling)
    if match := _COMFY.fullmatch(stem):
        component = _COMFY_ENCODERS[match["which"]]
        return Layer([Part(f"{component}.{match['name']}")], DIFFUSION_MODEL, frozenset(spelling))
    component, _, name = stem.removeprefix(keys.MODEL_PREFIX).partition(".")
    if component not in COMPONENTS:
        name = stem.removeprefix(keys.MODEL_PREFIX)
        implied = _component(name.partition(".")[0])
        if implied is None:
            return _diffusion_model(name, spelling)
        component = implied
    # some programs save a model that is wrapped by PEFT
    name = name.removeprefix(keys.MODEL_PREFIX)
    # `lora_down.weight` is a spelling of kohya, never of diffusers
    spelling.discard(LORA_DOWN)
    if not name:
        return None
    if name.partition(".")[0] in unets.HEADS and component == "unet":
        return None
    old = style in ("lora.down", "_lora.down")
    if ".processor." in name or style == "_lora.down":
        spelling.add(PROCESSORS)
        name = name.replace(".processor.", ".")
        head, _, last = name.rpartition(".")
        if component.startswith("text_encoder"):
            last = _TEXT_PROJECTIONS.get(last, last)
        elif last == "to_out":
            last = "to_out.0"
        name = f"{head}.{last}" if head else last
    return Layer([Part(f"{component}.{name}")], OLD if old else DIFFUSERS, frozenset(spelling))


def is_of_image_model(module: str) -> bool:
    """Return whether a name, component and path, has the structure of names in diffusers' models.

    The component alone is not enough: GPT-2's `transformer.h.0.attn.c_attn` is below a `transformer` too.
    """
    component, _, path = module.partition(".")
    structure = _IMAGE_MODULES.get("text_encoder" if component in _TEXT_ENCODERS else component)
    return structure is not None and structure.fullmatch(path) is not None


def _component(head: str) -> str | None:
    """Return the component that the first part of a diffusers name implies, for a name without component."""
    if head in unets.DIFFUSERS_HEADS:
        return "unet"
    if head in _TEXT_HEADS:
        return "text_encoder"
    return "transformer" if head in _TRANSFORMER_HEADS else None


def _kohya(prefix: str, name: str, has_flux: bool) -> Layer | None:
    """Resolve a dotted name after kohya's prefix: unet, transformer, te, te1, te2 or te3."""
    head = name.partition(".")[0]
    if prefix.startswith("te"):
        index = prefix.removeprefix("te") or "1"
        if head not in _TEXT_HEADS | _T5_HEADS:
            return None
        if index == "3" and has_flux:
            index = "2"
        component = "text_encoder" if index == "1" else f"text_encoder_{index}"
        return Layer([Part(f"{component}.{name}")], KOHYA, frozenset({TE1} if prefix == "te1" else ()))
    if prefix == "transformer":
        is_known = head in _TRANSFORMER_HEADS
        return Layer([Part(f"transformer.{name}")], KOHYA, frozenset({TRANSFORMER})) if is_known else None
    return _denoiser(name, KOHYA, frozenset())


def _diffusion_model(name: str, spelling: Iterable[str]) -> Layer | None:
    return _denoiser(name, DIFFUSION_MODEL, frozenset(spelling))


def _denoiser(name: str, dialect: str, spelling: frozenset[str]) -> Layer | None:
    """Resolve a module of the UNet or transformer by its original name or diffusers' name."""
    head = name.partition(".")[0]
    if head in unets.HEADS:
        module = unets.to_diffusers(name)
        return Layer([Part(f"unet.{module}")], dialect, spelling | {FIRST_NAMES}) if module is not None else None
    if head in flux.HEADS:
        parts = [replace(part, module=f"transformer.{part.module}") for part in flux.to_diffusers(name)]
        return Layer(parts, dialect, spelling) if parts else None
    if head in unets.DIFFUSERS_HEADS:
        return Layer([Part(f"unet.{name}")], dialect, spelling)
    if head in _TRANSFORMER_HEADS:
        return Layer([Part(f"transformer.{name}")], dialect, spelling | {TRANSFORMER})
    return None


def refused(path: str, kind: str, example: str) -> FormatError:
    """Return the error for a file of another kind than a LoRA.

    Args:
        path: Path of the file.
        kind: The kind, as text.
        example: Name of a tensor that shows it.
    """
    return FormatError(
        f"{path} is {kind} (tensor {example!r}). Only LoRAs and LoCons, with lora_down and lora_up or lora_A and "
        "lora_B for each module, share a subspace. Remove the file from the sources."
    )
