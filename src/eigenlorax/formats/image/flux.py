"""Names of FLUX's modules in diffusers and in the authors' code, which has one module for query, key and value.

A module of the authors may correspond to several modules of diffusers. They have the same input, and each is a block of
its rows.
"""

import re
from dataclasses import dataclass
from enum import Enum


class Rows(Enum):
    """Rows of an authors' module that correspond to one module of diffusers."""

    ALL = "all"
    THIRD = "third"
    """One of three equal parts."""
    FIRST_THREE = "first three"
    """One of three parts with as many rows as the input is wide. `REST` follows them."""
    REST = "rest"
    SWAPPED = "swapped"
    """All rows with the halves exchanged: scale and shift are in the opposite order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module of diffusers as rows of an authors' module.

    Attributes:
        module: Name of the module in diffusers.
        rows: Rows of the authors' module.
        index: Index of the part among three, from the top.
    """

    module: str
    rows: Rows = Rows.ALL
    index: int = 0


_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")

HEADS = frozenset({"double_blocks", "single_blocks", _SWAPPED[0].partition(".")[0]}) | {
    name.partition(".")[0] for name in _ENDS
}
"""First components of the authors' names."""

_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_FUSED = {part: (stem, i) for stem, parts in _QKV.items() for i, part in enumerate(parts)}
_BACK_DOUBLE = {back: name for name, back in _DOUBLE.items()}
_BACK_SINGLE = {back: name for name, back in _SINGLE.items()}
_BACK_ENDS = {back: name for name, back in _ENDS.items()}


def to_diffusers(name: str) -> list[Part]:
    """Return the modules of diffusers that an authors' module consists of; empty if FLUX has no such module."""
    if name in _ENDS:
        return [Part(_ENDS[name])]
    if name == _SWAPPED[0]:
        return [Part(_SWAPPED[1], Rows.SWAPPED)]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return []
    kind, block, path = match.groups()
    if kind == "double":
        prefix = f"transformer_blocks.{block}"
        if path in _QKV:
            return [Part(f"{prefix}.{name}", Rows.THIRD, i) for i, name in enumerate(_QKV[path])]
        return [Part(f"{prefix}.{_DOUBLE[path]}")] if path in _DOUBLE else []
    prefix = f"single_transformer_blocks.{block}"
    if path == "linear1":
        qkv = [Part(f"{prefix}.attn.to_{letter}", Rows.FIRST_THREE, i) for i, letter in enumerate("qkv")]
        return [*qkv, Part(f"{prefix}.proj_mlp", Rows.REST)]
    return [Part(f"{prefix}.{_SINGLE[path]}")] if path in _SINGLE else []


def from_xlabs(kind: str, block: str, layer: str, stream: str | None) -> list[Part]:
    """Return the modules of an XLabs LoRA layer, such as `double_blocks.0.processor.qkv_lora1` (attention layers only).

    Args:
        kind: "double" or "single".
        block: Number of the block.
        layer: "qkv" or "proj".
        stream: In a double block, "1" for the image and "2" for the text.
    """
    if kind == "double":
        return to_diffusers(f"double_blocks.{block}.{'txt' if stream == '2' else 'img'}_attn.{layer}")
    prefix = f"single_transformer_blocks.{block}"
    if layer == "qkv":
        return [Part(f"{prefix}.attn.to_{letter}", Rows.THIRD, i) for i, letter in enumerate("qkv")]
    return [Part(f"{prefix}.proj_out")]


def to_authors(module: str) -> str | None:
    """Return the authors' module that contains a module of diffusers; None if FLUX has no such module."""
    if module in _BACK_ENDS:
        return _BACK_ENDS[module]
    if module == _SWAPPED[1]:
        return _SWAPPED[0]
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        return None
    single, block, path = match.groups()
    if single:
        if path == "proj_mlp" or re.fullmatch(r"attn\.to_[qkv]", path):
            return f"single_blocks.{block}.linear1"
        return f"single_blocks.{block}.{_BACK_SINGLE[path]}" if path in _BACK_SINGLE else None
    stem = _FUSED[path][0] if path in _FUSED else _BACK_DOUBLE.get(path)
    return f"double_blocks.{block}.{stem}" if stem is not None else None


def span(part: Part, n_out: int, n_in: int) -> tuple[int, int] | None:
    """Return the rows (begin, end) of a part in an authors' module of shape (n_out, n_in).

    None if FLUX has no such module of that shape. `SWAPPED` includes all rows.
    """
    match part.rows:
        case Rows.THIRD if n_out % 3 == 0:
            return part.index * n_out // 3, (part.index + 1) * n_out // 3
        case Rows.FIRST_THREE if n_out > 3 * n_in:
            return part.index * n_in, (part.index + 1) * n_in
        case Rows.REST if n_out > 3 * n_in:
            return 3 * n_in, n_out
        case Rows.ALL:
            return 0, n_out
        case Rows.SWAPPED if n_out % 2 == 0:
            return 0, n_out
    return None
