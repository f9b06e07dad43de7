"""Modules that transformers 5 has renamed, so that adapters trained with transformers 4 match newer models.

The table is the part of transformers' own one (`transformers.conversion_mapping`) that renames modules and leaves their
weights as they are. Two names are compared in their newest forms. The table is applied to names of any model: where a
rule should not have applied, it changes both names alike.
"""

import re
from functools import lru_cache

_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
# (old, new): regular expressions of one or several whole components of a name
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
    # Swin and SegFormer; BERT keeps `attention.self.query`
    *((rf"blocks\.(\d+)\.attention\.self\.{old}", rf"blocks.\1.attention.{new}") for old, new in _QKV.items()),
    # DETR and models derived from it
    (r"layers\.(\d+)\.fc([12])", r"layers.\1.mlp.fc\2"),
    (r"(self_attn|encoder_attn)\.out_proj", r"\1.o_proj"),
    # LLaVA and models derived from it: `language_model.model`, now `model.language_model`
    (r"language_model\.model", "language_model"),
)
_PATTERNS = tuple((re.compile(rf"(?:(?<=\.)|^){old}(?=\.|$)"), new) for old, new in _RENAMINGS)


@lru_cache(maxsize=65536)
def newest_name(name: str) -> str:
    """Return the name that the newest transformers gives the module."""
    for pattern, new in _PATTERNS:
        name = pattern.sub(new, name)
    return name


@lru_cache(maxsize=65536)
def count_renamings(name: str) -> int:
    """Return how many renamings separate a name from its newest form."""
    return sum(pattern.search(name) is not None for pattern, _ in _PATTERNS)
