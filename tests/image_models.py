"""Image models made from configs: Stable Diffusion 1.5, XL and FLUX without weights, and tiny ones that run."""

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SD1_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
XL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"num_attention_heads": 12, "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}
CLIP_G = {
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
}

Shape = tuple[int, ...]
"""Of a module's weight."""


def shapes(model: nn.Module, component: str) -> dict[str, Shape]:
    """The linear and convolutional modules of a model, by the names they have in files, with their weights' shapes."""
    found = {
        f"{component}.{name}": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    if component.startswith("text_encoder"):
        # files have the component that transformers has dropped
        found = {_in_files(name, component): shape for name, shape in found.items()}
    return found


def _in_files(name: str, component: str) -> str:
    rest = name.removeprefix(f"{component}.")
    return name if rest.startswith(("text_model.", "text_projection")) else f"{component}.text_model.{rest}"


def stable_diffusion() -> dict[str, Shape]:
    """The modules of Stable Diffusion 1.5."""
    with torch.device("meta"):
        return shapes(UNet2DConditionModel(**SD1_UNET), "unet") | shapes(
            CLIPTextModel(CLIPTextConfig(**CLIP_L)), "text_encoder"
        )


def stable_diffusion_xl() -> dict[str, Shape]:
    """The modules of Stable Diffusion XL."""
    with torch.device("meta"):
        return (
            shapes(UNet2DConditionModel(**XL_UNET), "unet")
            | shapes(CLIPTextModel(CLIPTextConfig(**CLIP_L)), "text_encoder")
            | shapes(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)), "text_encoder_2")
        )


def flux() -> dict[str, Shape]:
    """The modules of FLUX.1 and of its first text encoder."""
    with torch.device("meta"):
        return shapes(FluxTransformer2DModel(guidance_embeds=True), "transformer") | shapes(
            CLIPTextModel(CLIPTextConfig(**CLIP_L)), "text_encoder"
        )


def tiny_pipeline(kind: str):
    """A pipeline of diffusers that runs at once: "sd", "xl" or "flux", with seeded random weights in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"sd": _tiny_sd, "xl": _tiny_xl, "flux": _tiny_flux}[kind]()


def _clip(cls, width: int, **fields):
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=99,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=2,
        **fields,
    )
    return cls(config).eval()


def _tiny_sd():
    from diffusers import StableDiffusionPipeline

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    text = _clip(CLIPTextModel, 24)
    return StableDiffusionPipeline(None, text, None, unet, None, None, None, requires_safety_checker=False)


def _tiny_xl():
    from diffusers import StableDiffusionXLPipeline

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=56,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        norm_num_groups=8,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    ).eval()
    text, text_2 = _clip(CLIPTextModel, 24), _clip(CLIPTextModelWithProjection, 32, projection_dim=32)
    return StableDiffusionXLPipeline(None, text, text_2, None, None, unet, None)


def _tiny_flux():
    from diffusers import FluxPipeline

    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    t5 = T5EncoderModel(T5Config(d_model=20, d_kv=5, d_ff=28, num_layers=1, num_heads=4, vocab_size=99)).eval()
    return FluxPipeline(None, None, _clip(CLIPTextModel, 24), None, t5, None, transformer)


def components(pipe) -> dict[str, nn.Module]:
    """Its models that may have LoRAs, by the components' names."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: model for name, model in found.items() if model is not None and not isinstance(model, T5EncoderModel)}


def deltas(pipe) -> dict[str, torch.Tensor]:
    """Each module's update, as the pipeline's PEFT layers have it, by the names in files; convolutions flattened."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for component, model in components(pipe).items():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                (adapter,) = module.lora_A
                name = f"{component}.{name}"
                name = _in_files(name, component) if component.startswith("text_encoder") else name
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                found[name] = (
                    module.scaling[adapter] * up.detach().double().flatten(1) @ down.detach().double().flatten(1)
                )
    return found


@torch.no_grad()
def outputs(pipe) -> dict[str, torch.Tensor]:
    """What its models give for fixed inputs, by component."""
    found = {}
    for component, model in components(pipe).items():
        generator = torch.Generator().manual_seed(1)
        if component.startswith("text_encoder"):
            ids = torch.tensor([[0, 5, 7, 9, 2]])
            found[component] = model(ids, output_hidden_states=True).hidden_states[-1]
        elif component == "unet":
            config = model.config
            sample = torch.randn(2, 4, 8, 8, generator=generator)
            text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
            added = None
            if config.addition_embed_type:
                added = {
                    "text_embeds": torch.randn(2, 32, generator=generator),
                    "time_ids": torch.rand(2, 6, generator=generator),
                }
            found[component] = model(sample, torch.tensor(7), text, added_cond_kwargs=added).sample
        else:
            config = model.config
            found[component] = model(
                hidden_states=torch.randn(1, 6, config.in_channels, generator=generator),
                encoder_hidden_states=torch.randn(1, 5, config.joint_attention_dim, generator=generator),
                pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(5, 3),
                guidance=torch.tensor([3.5]),
            ).sample
    return found


def merged(pipe, updates: dict[str, torch.Tensor]):
    """The pipeline with updates, (out, in) or flattened convolutions, added to its weights: what a LoRA stands for."""
    for component, model in components(pipe).items():
        for name, module in model.named_modules():
            key = f"{component}.{name}"
            key = _in_files(key, component) if component.startswith("text_encoder") else key
            if key in updates:
                weight = module.weight
                weight.data = (weight.double() + updates[key].reshape(weight.shape)).float()
    return pipe
