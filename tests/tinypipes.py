"""Small pipelines of diffusers out of configs, styles for them, and the pictures that they make."""

import json
import logging
import warnings

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from planted import normal

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPT = "a toy cat"
CROSS = 20


def tokenizer(folder):
    """One that knows single letters; `folder` is for its files."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _text(width, kind=CLIPTextModel, projection=12):
    sizes = {"hidden_size": width, "intermediate_size": width + 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    return kind(CLIPTextConfig(**sizes, **ids, max_position_embeddings=16, projection_dim=projection)).eval()


def _vae(channels=4):
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=16, **blocks
    ).eval()


def _unet(cross, **fields):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        norm_num_groups=4,
        attention_head_dim=4,
        **fields,
    ).eval()


def make_sd(folder, cross=CROSS, seed=0):
    """A StableDiffusionPipeline: the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text(cross),
            tokenizer=tokenizer(folder),
            unet=_unet(cross),
            scheduler=DDIMScheduler(beta_end=0.001, steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl(folder, seed=0):
    """A StableDiffusionXLPipeline, whose two text encoders have layers of the same names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text(14),
            text_encoder_2=_text(18, CLIPTextModelWithProjection, projection=10),
            tokenizer=tokenizer(folder),
            tokenizer_2=tokenizer(folder),
            unet=_unet(32, **conditions, projection_class_embeddings_input_dim=10 + 6 * 2),
            scheduler=DDIMScheduler(beta_end=0.001, steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux(folder, seed=0):
    """A FluxPipeline without its T5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=CROSS,
            pooled_projection_dim=CROSS,
            axes_dims_rope=(4, 4, 8),
        )
        pipe = FluxPipeline(
            vae=_vae(1),
            text_encoder=_text(CROSS),
            tokenizer=tokenizer(folder),
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **fields):
    """The latents of a picture of two steps."""
    fields = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16, **fields}
    fields["generator"] = torch.Generator().manual_seed(5)
    if isinstance(pipe, FluxPipeline):
        tokens = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            found = pipe.text_encoder(tokens)
        embeddings = {"prompt_embeds": found.last_hidden_state, "pooled_prompt_embeds": found.pooler_output}
        return pipe(**embeddings, max_sequence_length=16, **fields).images
    return pipe(PROMPT, **fields).images


# linear layers of attention, and all of a text encoder's
def _wanted(part, name, module, convolutions):
    if isinstance(module, nn.Linear):
        return "attn" in name or ".mlp." in name
    return convolutions and isinstance(module, nn.Conv2d)


def style(pipe, name, seed, *, rank=3, scaling=1.5, parts=None, convolutions=False, size=0.25):
    """A LoRA of random factors for a pipeline, its modules named as files of LoRAs name them."""
    modules = {}
    for part in parts or [one for one in pipe._lora_loadable_modules if getattr(pipe, one, None) is not None]:
        for layer, module in getattr(pipe, part).named_modules():
            if not _wanted(part, layer, module, convolutions):
                continue
            weight, one = module.weight, 10_000 * seed + 2 * len(modules)
            down = size * normal(rank, *weight.shape[1:], seed=one).float()
            up = size * normal(len(weight), rank, *[1] * (weight.dim() - 2), seed=one + 1).float()
            # as files have it, and as transformers had it before its version 5
            own = f"text_model.{layer.removeprefix('text_model.')}" if part.startswith("text_encoder") else layer
            modules[f"{part}.{own}"] = LoRAFactors.from_weights(down, up, scaling)
    return ex.from_factors(name, modules)


def state(adapter):
    """A LoRA as diffusers loads it, its scaling in the factors."""
    found = {}
    for module, factors in adapter.modules.items():
        down, up = factors.weights
        found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = down.clone(), factors.scaling * up
    return found


def with_loras(pipe, adapters):
    """The pipeline with the LoRAs themselves, as diffusers loads them."""
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # PEFT's, that there are several adapters
        warnings.simplefilter("ignore", UserWarning)
        for adapter in adapters:
            pipe.load_lora_weights(state(adapter), adapter_name=adapter.name)
    return pipe
