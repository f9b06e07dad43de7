"""LoRA files of image models with planted updates, in the dialects of the programs that write them, spelled out here
once more: nothing of `formats` is used."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenlorax.core import adapter as adapters
from eigenlorax.core.adapter import Adapter, LoRAFactors

DIALECTS = ("kohya", "diffusers", "lora.down", "processor")


def planted(modules: Mapping[str, tuple[int, ...]], *, seed: int, mixed: bool = True, dtype=torch.float32) -> Adapter:
    """An adapter with random factors for modules with weights of these shapes. mixed: of several ranks and alphas."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (module, (n_out, *rest)) in enumerate(modules.items()):
        rank, alpha = ((2, 3, 4)[i % 3], (1.0, 4.0, 6.0, 3.0)[i % 4]) if mixed else (2, 2.0)
        down = torch.randn(rank, *rest, generator=generator) * 0.1
        up = torch.randn(n_out, rank, *[1] * (len(rest) - 1), generator=generator) * 0.1
        found[module] = LoRAFactors.from_weights(down.to(dtype), up.to(dtype), alpha / rank)
    return adapters.from_factors("planted", found)


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """Each module's update in float64, (out, in); of a convolution, `in` is channels · height · width."""
    return {name: one.scaling * one.up.double() @ one.down.double() for name, one in adapter.modules.items()}


def write(path: Path, adapter: Adapter, dialect: str, *, metadata: Mapping[str, str] | None = None) -> Path:
    """The file of an adapter of Stable Diffusion. In the dialects without alphas they are multiplied into the first
    factor."""
    tensors: dict[str, Tensor] = {}
    metadata = dict(metadata or {})
    for module, factors in adapter.modules.items():
        down, up = factors.weights
        rank, alpha = len(down), factors.scaling * len(down)
        component, _, name = module.partition(".")
        if dialect == "kohya":
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[component]
            if component == "text_encoder" and any(one.startswith("text_encoder_2") for one in adapter.specs):
                prefix = "lora_te1_"
            stem = prefix + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        elif dialect == "diffusers":
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            short = name.removeprefix("text_model.")
            fields |= {f"{component}.r": 1, f"{component}.lora_alpha": 1}
            fields.setdefault(f"{component}.target_modules", []).append(short)
            fields.setdefault(f"{component}.rank_pattern", {})[re.escape(short)] = rank
            fields.setdefault(f"{component}.alpha_pattern", {})[re.escape(short)] = alpha
            metadata["lora_adapter_metadata"] = json.dumps(fields)
        else:
            stem, parts = module, ("lora.down.weight", "lora.up.weight")
            if component != "unet":
                parts = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
            if dialect == "processor":
                attention, _, last = name.rpartition(".attn1.") if ".attn1." in name else name.rpartition(".attn2.")
                if component == "unet" and attention:
                    which = "attn1" if ".attn1." in name else "attn2"
                    stem = f"{component}.{attention}.{which}.processor.{last.removesuffix('.0')}_lora"
                    parts = ("down.weight", "up.weight")
                elif ".self_attn." in name:
                    layer, _, last = name.rpartition(".")
                    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[last]
                    stem, parts = f"{component}.{layer}.{old}_lora", ("down.weight", "up.weight")
            tensors |= {f"{stem}.{parts[0]}": down * factors.scaling, f"{stem}.{parts[1]}": up}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata=metadata or None)
    return path
