"""A class-conditional diffusion model of small pictures: its parts, its training, and drawing with it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import images

Json = dict[str, Any]

TOKENS = 4
"""Number of tokens that a class is to the model."""
PATCH = 4
"""Side of the square of pixels that the model sees as one position with PATCH² channels."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures (n, 28, 28), from 0, the ground, to 1, the ink, and their classes (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> "Pictures":
        return Pictures(self.pixels[rows], self.labels[rows])


def read_pictures(data: Json, split: str) -> Pictures:
    """Read all classes of the sets. split: "train" or "held out"."""
    n = data["held_out"]
    rows = slice(-n, None) if split == "held out" else slice(None, -n)
    classes = [images.images_of(name, label)[rows] for name in data["sets"] for label in images.classes(name)]
    labels = torch.cat([torch.full((len(pixels),), label) for label, pixels in enumerate(classes)])
    return Pictures(torch.from_numpy(np.concatenate(classes)).float(), labels)


class ClassTokens(torch.nn.Module):
    """Maps classes (n,) to tokens (n, TOKENS, width). The last row of the table stands for no class."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(n_classes + 1, TOKENS * width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels).unflatten(1, (TOKENS, -1))

    @property
    def no_class(self) -> int:
        return self.table.num_embeddings - 1


def load_base(folder: Path) -> tuple[Any, ClassTokens]:
    """Load the model that `pretrain` saved."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    weights = load_file(folder / "classes.safetensors")
    rows, width = weights["table.weight"].shape
    classes = ClassTokens(rows - 1, width // TOKENS)
    classes.load_state_dict(weights)
    return _prepare(UNet2DConditionModel.from_pretrained(folder)).eval(), classes.eval()


def _prepare(unet: Any) -> Any:
    from diffusers.models.attention_processor import AttnProcessor

    # at these sizes, torch's fused attention is slower on a processor, its backward pass many times
    unet.set_attn_processor(AttnProcessor())
    return unet.to(memory_format=torch.channels_last)


@functools.cache
def noise_schedule() -> Any:
    """Return the noise schedule of training and drawing.

    It ends in noise alone, so that a bright ground can be drawn. The model predicts the picture under the noise: a
    small model has too few channels to predict the noise of every pixel.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def pack_pixels(pixels: Tensor) -> Tensor:
    """Return pictures from 0 to 1, (n, 28, 28), as the model sees them: (n, 16, 7, 7), from -1 to 1."""
    samples = functional.pixel_unshuffle(2 * pixels[:, None] - 1, PATCH)
    return samples.contiguous(memory_format=torch.channels_last)


def unpack_pixels(samples: Tensor) -> Tensor:
    return (functional.pixel_shuffle(samples, PATCH)[:, 0] / 2 + 0.5).clamp(0, 1)


def denoising_loss(
    unet: Any, classes: ClassTokens, batch: Pictures, generator: torch.Generator, dropped: float = 0.0
) -> Tensor:
    """Return the error of the predicted pictures at random times. dropped: fraction of pictures without their class."""
    samples, scheduler = pack_pixels(batch.pixels), noise_schedule()
    times = torch.randint(scheduler.config.num_train_timesteps, (len(batch),), generator=generator)
    noise = torch.randn(samples.shape, generator=generator).contiguous(memory_format=torch.channels_last)
    is_dropped = torch.rand(len(batch), generator=generator) < dropped
    labels = batch.labels.masked_fill(is_dropped, classes.no_class)
    with torch.autocast("cpu", torch.bfloat16):
        noisy = scheduler.add_noise(samples, noise, times)
        predicted = unet(noisy, times, classes(labels), class_labels=labels).sample
    return functional.mse_loss(predicted.float(), samples)


@torch.inference_mode()
def draw(unet: Any, classes: ClassTokens, labels: Tensor, start: Tensor, steps: int, guidance: float) -> Tensor:
    """Return pictures (n, 28, 28) of these classes. Nothing but the noise they start from is random."""
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps)
    samples = start.contiguous(memory_format=torch.channels_last)
    no_labels = torch.full_like(labels, classes.no_class)
    tokens, no_tokens = classes(labels), classes(no_labels)
    for time in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            guided = unet(samples, time, tokens, class_labels=labels).sample.float()
            free = unet(samples, time, no_tokens, class_labels=no_labels).sample.float()
        samples = scheduler.step(free + guidance * (guided - free), time, samples).prev_sample
    return unpack_pixels(samples)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the fraction of the learning rate: a linear rise, times half a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(
    unet: Any,
    classes: ClassTokens,
    pictures: Pictures,
    recipe: Json,
    learning_rate: Callable[[int], float],
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train all parameters that require gradients, and return the loss of each step.

    recipe: steps, batch_size and seed; optionally weight_decay, and dropped as in `denoising_loss`.
    """
    parameters = [p for module in (unet, classes) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=recipe.get("weight_decay", 0.0))
    generator = torch.Generator().manual_seed(recipe["seed"])
    unet.train()
    losses = []
    for step in range(recipe["steps"]):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        batch = pictures[torch.randint(len(pictures), (recipe["batch_size"],), generator=generator)]
        loss = denoising_loss(unet, classes, batch, generator, recipe.get("dropped", 0.0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        after_step(step)
    unet.eval()
    return losses


def pretrain(config: Json, folder: Path) -> Json:
    """Train the base model on plain pictures, and save a moving average of its weights."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    base, pictures = config["base"], read_pictures(config["data"], "train")
    torch.manual_seed(base["seed"])
    unet = _prepare(UNet2DConditionModel(**config["model"]))
    classes = ClassTokens(int(pictures.labels.max()) + 1, config["model"]["cross_attention_dim"])
    model = torch.nn.ModuleList([unet, classes])
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def learning_rate(step: int) -> float:
        cooling = min(1.0, (base["steps"] - step) / base["cooling"])
        return base["learning_rate"] * warmup_cosine(step, base["horizon"], base["warmup"]) * cooling

    @torch.no_grad()
    def update_average(step: int) -> None:
        # a short memory at first, because the first weights are far from the last ones
        decay = min(base["decay"], (step + 1) / (step + 10))
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter, 1 - decay)

    losses = train(unet, classes, pictures, {**base, "weight_decay": 0.01}, learning_rate, update_average)
    model.load_state_dict(average)
    unet.save_pretrained(folder)
    save_file(classes.state_dict(), folder / "classes.safetensors")
    return {"train": {"num_parameters": sum(p.numel() for p in model.parameters()), "losses": mean_losses(losses, 50)}}


def train_adapter(model: Any, classes: ClassTokens, pictures: Pictures, recipe: Json) -> Json:
    """Train the adapter of a PEFT model whose other weights are frozen. Returns what the record says of it."""
    steps, warmup = recipe["steps"], recipe["warmup"]
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = train(
        model,
        classes.requires_grad_(False),
        pictures,
        recipe,
        lambda step: recipe["learning_rate"] * warmup_cosine(step, steps, warmup),
    )
    return {"num_trainable": numbers, "losses": mean_losses(losses, 22)}


def mean_losses(losses: list[float], steps: int) -> list[float]:
    """Return the mean loss of every so many steps."""
    chunks = [losses[start : start + steps] for start in range(0, len(losses), steps)]
    return [round(sum(chunk) / len(chunk), 5) for chunk in chunks]
