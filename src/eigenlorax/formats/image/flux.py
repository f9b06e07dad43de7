"""The two ways to name FLUX's modules: by diffusers, and by its authors, who have one module for query, key and value.

One of theirs that stands for several of diffusers' has the same input; each of diffusers' is a part of its rows.
"""

import re
from dataclasses import dataclass
from enum import Enum


class Rows(Enum):
    """Which rows of a module of the authors' are diffusers'."""

    ALL = "all"
    THIRD = "third"
    """One of three equal parts."""
    FIRST_THREE = "first three"
    """One of three parts as tall as the input is wide, with the rest behind them."""
    REST = "rest"
    SWAPPED = "swapped"
    """The second half before the first: scale and shift."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module by diffusers' name, as rows of a module of the authors'. index: which of the three."""

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
"""With what the authors' names begin."""

_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_FUSED = {part: (stem, i) for stem, parts in _QKV.items() for i, part in enumerate(parts)}
_BACK_DOUBLE = {back: name for name, back in _DOUBLE.items()}
_BACK_SINGLE = {back: name for name, back in _SINGLE.items()}
_BACK_ENDS = {back: name for name, back in _ENDS.items()}


def to_diffusers(name: str) -> list[Part]:
    """The modules that one of the authors' stands for; none for what is no module of FLUX."""
    if name in _ENDS:
        return [Part(_ENDS[name])]
    if name == _SWAPPED[0]:
        return [Part(_SWAPPED[1], Rows.SWAPPED)]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return []
    kind, block, rest = match.groups()
    if kind == "double":
        place = f"transformer_blocks.{block}"
        if rest in _QKV:
            return [Part(f"{place}.{part}", Rows.THIRD, i) for i, part in enumerate(_QKV[rest])]
        return [Part(f"{place}.{_DOUBLE[rest]}")] if rest in _DOUBLE else []
    place = f"single_transformer_blocks.{block}"
    if rest == "linear1":
        first = [Part(f"{place}.attn.to_{one}", Rows.FIRST_THREE, i) for i, one in enumerate("qkv")]
        return [*first, Part(f"{place}.proj_mlp", Rows.REST)]
    return [Part(f"{place}.{_SINGLE[rest]}")] if rest in _SINGLE else []


def of_xlabs(kind: str, block: str, what: str, which: str | None) -> list[Part]:
    """The modules of a layer of XLabs' trainer, which has attention alone: `double_blocks.0.processor.qkv_lora1`.

    which: 1 for the image's part of a double block, 2 for the text's.
    """
    if kind == "double":
        return to_diffusers(f"double_blocks.{block}.{'txt' if which == '2' else 'img'}_attn.{what}")
    place = f"single_transformer_blocks.{block}"
    if what == "qkv":
        return [Part(f"{place}.attn.to_{one}", Rows.THIRD, i) for i, one in enumerate("qkv")]
    return [Part(f"{place}.proj_out")]


def to_authors(module: str) -> str | None:
    """The authors' module that diffusers' is one of the parts of; None for what is no module of FLUX."""
    if module in _BACK_ENDS:
        return _BACK_ENDS[module]
    if module == _SWAPPED[1]:
        return _SWAPPED[0]
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        return None
    single, block, rest = match.groups()
    if single:
        if rest == "proj_mlp" or re.fullmatch(r"attn\.to_[qkv]", rest):
            return f"single_blocks.{block}.linear1"
        return f"single_blocks.{block}.{_BACK_SINGLE[rest]}" if rest in _BACK_SINGLE else None
    stem = _FUSED[rest][0] if rest in _FUSED else _BACK_DOUBLE.get(rest)
    return f"double_blocks.{block}.{stem}" if stem is not None else None


def span(part: Part, n_out: int, n_in: int) -> tuple[int, int] | None:
    """From which row to before which a part goes, of a module (n_out, n_in) of the authors'; None where these rows
    are none of FLUX's. `SWAPPED` is all of them, in another order."""
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
