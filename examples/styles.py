"""Store a folder of image styles (LoRA files) in one pack, load it into a pipeline, and export it: offline, a minute.

    pip install ".[diffusers]" && python examples/styles.py          # writes styles-out/

The pipeline is a tiny Stable Diffusion with random weights, and so are the styles: its images are noise, but every step
is that of a real one. In your program, `pipeline()` is `StableDiffusionPipeline.from_pretrained("…")`, and the folder
has LoRA files in any of the supported formats.
"""

import json
import logging
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import eigenlorax as ex

OUT = Path("styles-out")
STYLES = {"toy": 1, "sketch": 2, "clay": 3, "neon": 4, "ink": 5, "pixel": 6}
SHARED, RANK, WIDTH = 10, 4, 32


def pipeline() -> StableDiffusionPipeline:
    """Return a tiny pipeline, the same each time."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    ids = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "max_position_embeddings": 77}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    made = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**ids, **heads)).eval(),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_end=0.001, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of single letters."""
    folder = OUT / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def write_style(pipe: StableDiffusionPipeline, name: str, seed: int) -> None:
    """Write a LoRA of rank 4 on attention and on the text encoder, as diffusers saves one.

    All styles share ten components in every layer.
    """
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)

    def layers(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        found = {}
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear) and ("attn" in layer):
                down = torch.randn(SHARED, module.in_features, generator=common)
                up = torch.randn(module.out_features, SHARED, generator=common)
                found[f"{prefix}{layer}.lora_A.weight"] = 0.1 * torch.randn(RANK, SHARED, generator=own) @ down
                found[f"{prefix}{layer}.lora_B.weight"] = 0.1 * up @ torch.randn(SHARED, RANK, generator=own)
        return found

    StableDiffusionPipeline.save_lora_weights(
        OUT / "styles",
        unet_lora_layers=layers(pipe.unet),
        text_encoder_lora_layers=layers(pipe.text_encoder, "text_model."),
        weight_name=f"{name}.safetensors",
    )


def picture(pipe: StableDiffusionPipeline) -> Tensor:
    """Return the latents of an image; a real pipeline has `.images`."""
    noise = torch.Generator().manual_seed(0)
    found: Tensor = pipe("a cat", num_inference_steps=4, generator=noise, height=32, width=32, output_type="latent")[0]
    return found


def apart(one: Tensor, other: Tensor) -> str:
    return f"{float((one - other).abs().max()):.1e}"


# diffusers and transformers warn of LoRAs that are loaded one after the other
for library in ("diffusers", "transformers"):
    logging.getLogger(library).setLevel(logging.ERROR)
pipe = pipeline()
for name, seed in STYLES.items():
    write_style(pipe, name, seed)

# in the shell: eigenlorax fit styles-out/styles/*.safetensors -o styles-out/pack -k 10
# as many components as these styles share; styles of different authors lose something, and `inspect` prints how much
ex.fit(OUT / "styles", n_components=SHARED).save(OUT / "pack", overwrite=True)
pack = ex.Pack.open(OUT / "pack")
summary = pack.summary
print(f"{len(pack)} styles, the worst has lost {summary.in_fit.worst:.4f}; files ÷ pack = {summary.bytes.ratio:.2f}")

plain = picture(pipe)
ex.load_into(pipe, pack)
print("in the pipeline:", ", ".join(pipe.get_list_adapters()["unet"]))

# compare with the same file as diffusers loads it
loras = pipeline()
loras.load_lora_weights(OUT / "styles", weight_name="sketch.safetensors", adapter_name="sketch")
pipe.set_adapters("sketch")
sketch = picture(pipe)
print(f"sketch: {apart(sketch, picture(loras))} from its own file, {apart(sketch, plain)} from no style")

# blend several styles; other styles, other weights, or none compile nothing again
pipe.unet.compile(backend="eager")  # on a GPU: pipe.unet.compile()
pipe.set_adapters(["toy", "sketch"], adapter_weights=[0.7, 0.5])
blended = picture(pipe)
with torch._dynamo.config.patch(error_on_recompile=True):
    pipe.set_adapters(["neon", "clay", "ink"], adapter_weights=[0.2, 0.9, 0.3])
    picture(pipe)
    pipe.disable_lora()
    print(f"disabled: {apart(picture(pipe), plain)} from no style")
    pipe.enable_lora()
    pipe.set_adapters(["toy", "sketch"], adapter_weights=[0.7, 0.5])
    print(f"toy and sketch again: {apart(picture(pipe), blended)} from the first time")

# export for A1111 and ComfyUI; format="diffusers" is for load_lora_weights
written = pack.export(OUT / "loras", ["sketch"], format="kohya", overwrite=True)
loras.delete_adapters("sketch")
loras.load_lora_weights(OUT / "loras", weight_name="sketch.safetensors", adapter_name="sketch")
pipe.set_adapters("sketch")
print(f"exported: {written['sketch']}, {apart(picture(loras), picture(pipe))} from the pack's")
