r"""Modules that transformers has renamed, under one name: an adapter that was trained with transformers 4 names its
modules otherwise than a model of transformers 5 does, and the other way round. Names alone: no torch, no transformers.

The table holds what transformers' own one has (`transformers.conversion_mapping`) of modules that were renamed and are
otherwise what they were. Names are compared in the newest form. A module that no model has renamed keeps its name, or
gets another one on both sides.
"""

import re
from functools import lru_cache

_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
# each is one component of a name or more, and stands between dots
_RENAMINGS: tuple[tuple[str, str], ...] = (
    # ViT, DeiT, BEiT, ViT-MAE, ViT-MSN, ViViT, AST, I-JEPA; DINOv2 keeps `encoder.layer`
    (r"encoder\.layer\.(\d+)", r"layers.\1"),
    *((rf"attention\.attention\.{old}", f"attention.{new}") for old, new in _QKV.items()),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    # SegFormer
    (r"encoder\.patch_embeddings\.(\d+)", r"stages.\1.patch_embeddings"),
    (r"encoder\.block\.(\d+)", r"stages.\1.blocks"),
    (r"attention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
    (r"mlp\.dense([12])", r"mlp.fc\1"),
    # Swin and SegFormer; in BERT, queries are still called so
    *((rf"blocks\.(\d+)\.attention\.self\.{old}", rf"blocks.\1.attention.{new}") for old, new in _QKV.items()),
    # DETR and its kin
    (r"layers\.(\d+)\.fc([12])", r"layers.\1.mlp.fc\2"),
    (r"(self_attn|encoder_attn)\.out_proj", r"\1.o_proj"),
    # LLaVA and its kin: `language_model.model`, and `model.language_model` now
    (r"language_model\.model", "language_model"),
)
_PATTERNS = tuple((re.compile(rf"(?:(?<=\.)|^){old}(?=\.|$)"), new) for old, new in _RENAMINGS)


@lru_cache(maxsize=65536)
def newest_name(name: str) -> str:
    """The name in the newest form."""
    for pattern, new in _PATTERNS:
        name = pattern.sub(new, name)
    return name


@lru_cache(maxsize=65536)
def count_renamings(name: str) -> int:
    """How many of the renamings a name is behind."""
    return sum(pattern.search(name) is not None for pattern, _ in _PATTERNS)
