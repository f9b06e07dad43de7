"""Names of the modules of Stable Diffusion's UNets in diffusers and in the original code (`input_blocks.4.1`).

kohya's trainer uses the original names for SDXL. Every UNet of Stable Diffusion 1, 2 and XL has two layers per down
block and three per up block.
"""

import re

LAYERS = 2
"""Number of layers of a down block."""

_ENDS = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BACK = {back: name for name, back in {**_ENDS, **_RESNET}.items()}
_FIRST = re.compile(
    r"(?P<part>input_blocks|middle_block|output_blocks)\.(?P<block>\d+)(\.(?P<inner>\d+))?\.(?P<rest>.+)"
)
_DIFFUSERS = re.compile(
    r"(?P<part>down_blocks\.(?P<down>\d+)|mid_block|up_blocks\.(?P<up>\d+))"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)

HEADS = frozenset({"input_blocks", "middle_block", "output_blocks", "out", "time_embed", "label_emb"})
"""First components of the original names."""
DIFFUSERS_HEADS = frozenset(
    {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"}
)


def to_diffusers(name: str) -> str | None:
    """Return the diffusers name of a module of the original code; None if there is no such module.

    `input_blocks.4.1.proj_in` becomes `down_blocks.1.attentions.0.proj_in`.
    """
    if name in _ENDS:
        return _ENDS[name]
    match = _FIRST.fullmatch(name)
    if match is None:
        return None
    section, block, path = match["part"], int(match["block"]), match["rest"]
    if section == "middle_block":
        # its blocks are not sequences, so a second number belongs to the path inside the block
        inner = f"{match['inner']}.{path}" if match["inner"] else path
        if block == 1:
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{block // 2}.{_RESNET[inner]}" if block in (0, 2) and inner in _RESNET else None
    if match["inner"] is None:
        return None
    down = section == "input_blocks"
    level, layer = divmod(block - 1, LAYERS + 1) if down else divmod(block, LAYERS + 1)
    if level < 0:
        return None
    prefix = f"{'down' if down else 'up'}_blocks.{level}"
    if down and path == "op":
        return f"{prefix}.downsamplers.0.conv"
    if not down and path == "conv":
        return f"{prefix}.upsamplers.0.conv"
    if match["inner"] == "0":
        return f"{prefix}.resnets.{layer}.{_RESNET[path]}" if path in _RESNET else None
    return f"{prefix}.attentions.{layer}.{path}"


def to_first(name: str, *, xl: bool = True) -> str | None:
    """Return the original name of a module of diffusers, the inverse of `to_diffusers`; None if it has none.

    Args:
        name: Name of the module in diffusers.
        xl: Whether the UNet belongs to SDXL. Its first up block has attention before the upsampler, which changes the
            number of the upsampler.
    """
    if name in _BACK:
        return _BACK[name]
    match = _DIFFUSERS.fullmatch(name)
    if match is None:
        return None
    kind, layer, path = match["kind"], int(match["layer"]), match["rest"]
    inner = _BACK.get(path) if kind == "resnets" else path
    if inner is None:
        return None
    if match["part"] == "mid_block":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{inner}"
    if match["down"] is not None:
        first = f"input_blocks.{int(match['down']) * (LAYERS + 1) + layer + 1}"
        if kind == "downsamplers":
            return f"input_blocks.{(int(match['down']) + 1) * (LAYERS + 1)}.0.op"
    else:
        first = f"output_blocks.{int(match['up']) * (LAYERS + 1) + layer}"
        if kind == "upsamplers":
            level = int(match["up"])
            return f"output_blocks.{level * (LAYERS + 1) + LAYERS}.{2 if xl or level else 1}.conv"
    return f"{first}.{0 if kind == 'resnets' else 1}.{inner}"
