"""A class-conditional diffusion model of small pictures: its parts, the loss it is trained on, and drawing by it. Which
pictures and which adapters, drawing.py says."""

import math
from collections.abc import Callable, Iterator
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
PATCH = 4
KEPT_EVERY = 200


@dataclass(frozen=True)
class Glyphs:
    """Pictures (n, 28, 28), from 0, the ground, to 1, the ink, and their classes (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def glyphs(data: Json, part: str) -> Glyphs:
    """All pictures to "train" on, or those that are "held out"."""
    n = data["held_out"]
    chosen = slice(-n, None) if part == "held out" else slice(None, -n)
    classes = [images.images_of(one, name)[chosen] for one in data["sets"] for name in images.classes(one)]
    labels = torch.cat([torch.full((len(one),), label) for label, one in enumerate(classes)])
    return Glyphs(torch.from_numpy(np.concatenate(classes)).float(), labels)


class Classes(torch.nn.Module):
    """What each class is to the model: a few tokens. The last row is for no class at all."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(n_classes + 1, TOKENS * width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels).unflatten(1, (TOKENS, -1))

    @property
    def none(self) -> int:
        return self.table.num_embeddings - 1


def new_model(model: Json, n_classes: int) -> tuple[Any, Classes]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**model)
    return prepared(unet), Classes(n_classes, model["cross_attention_dim"])


def saved_model(folder: Path) -> tuple[Any, Classes]:
    """The trained base, as `pretrained` left it."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = UNet2DConditionModel.from_pretrained(folder)
    rows = load_file(folder / "classes.safetensors")
    n, width = rows["table.weight"].shape
    classes = Classes(n - 1, width // TOKENS)
    classes.load_state_dict(rows)
    return prepared(unet).eval(), classes.eval()


def prepared(unet: Any) -> Any:
    from diffusers.models.attention_processor import AttnProcessor

    # at these sizes, torch's fused attention is slower on a processor, its backward pass many times
    unet.set_attn_processor(AttnProcessor())
    return unet.to(memory_format=torch.channels_last)


def scheduler() -> Any:
    """Noise in training and drawing: a cosine schedule that ends in noise alone, so that a bright ground can be drawn.
    The model says what picture is under the noise: a small one has too few channels to say the noise of every pixel."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def packed(pixels: Tensor) -> Tensor:
    """Pictures from 0 to 1 (n, 28, 28) as the model sees them (n, 16, 7, 7), from -1 to 1."""
    found = functional.pixel_unshuffle(2 * pixels[:, None] - 1, PATCH)
    return found.contiguous(memory_format=torch.channels_last)


def unpacked(samples: Tensor) -> Tensor:
    return (functional.pixel_shuffle(samples, PATCH)[:, 0] / 2 + 0.5).clamp(0, 1)


def loss(unet: Any, classes: Classes, batch: Glyphs, noise: Any, dropped: float, drawn: torch.Generator) -> Tensor:
    """The error of what the model says of a batch at random times."""
    samples = packed(batch.pixels)
    times = torch.randint(noise.config.num_train_timesteps, (len(batch),), generator=drawn)
    random = torch.randn(samples.shape, generator=drawn).contiguous(memory_format=torch.channels_last)
    without = torch.rand(len(batch), generator=drawn) < dropped
    labels = batch.labels.masked_fill(without, classes.none)
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(noise.add_noise(samples, random, times), times, classes(labels), class_labels=labels).sample
    return functional.mse_loss(found.float(), samples)


def batches(rows: Glyphs, size: int, steps: int, drawn: torch.Generator) -> Iterator[Glyphs]:
    for _ in range(steps):
        chosen = torch.randint(len(rows), (size,), generator=drawn)
        yield Glyphs(rows.pixels[chosen], rows.labels[chosen])


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The part of the learning rate: up in a line, down in half a cosine."""
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def cooled(step: int, steps: int, cooling: int) -> float:
    """What is left of the rate in the last steps: down to nothing in a line."""
    return min(1.0, (steps - step) / cooling)


def noises(n: int, model: Json, seed: int) -> Tensor:
    """Where n pictures start."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(n, model["in_channels"], model["sample_size"], model["sample_size"], generator=drawn)


@torch.inference_mode()
def draw(unet: Any, classes: Classes, labels: Tensor, start: Tensor, steps: int, guidance: float) -> Tensor:
    """Pictures (n, 28, 28) of some classes, each from its noise. Nothing else is random. guidance 1: none."""
    noise = scheduler()
    noise.set_timesteps(steps)
    samples = start.contiguous(memory_format=torch.channels_last)
    none = torch.full_like(labels, classes.none)
    tokens, nothing = classes(labels), classes(none)
    for time in noise.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(samples, time, tokens, class_labels=labels).sample.float()
            if guidance != 1:
                free = unet(samples, time, nothing, class_labels=none).sample.float()
                found = free + guidance * (found - free)
        samples = noise.step(found, time, samples).prev_sample
    return unpacked(samples)


def pretrained(config: Json, folder: Path, said: Callable[[str], None] = lambda line: None) -> Json:
    """The base model, trained on plain pictures and kept in the folder. It goes on where an interrupted run stopped."""
    from safetensors.torch import save_file

    asked = config["base"]
    rows = glyphs(config["data"], "train")
    torch.manual_seed(asked["seed"])
    unet, classes = new_model(config["model"], int(rows.labels.max()) + 1)
    unet.train()
    both = torch.nn.ModuleList([unet, classes])
    optimizer = torch.optim.AdamW(both.parameters(), lr=asked["learning_rate"], weight_decay=0.01)
    mean = {name: one.detach().clone() for name, one in both.named_parameters()}
    drawn = torch.Generator().manual_seed(asked["seed"])
    losses: list[float] = []
    kept = folder / "training.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        mean, losses = state["mean"], state["losses"]
        drawn.set_state(state["drawn"])
    noise, steps, first = scheduler(), asked["steps"], len(losses)
    for step, batch in enumerate(batches(rows, asked["batch_size"], steps - first, drawn), first):
        for group in optimizer.param_groups:
            group["lr"] = asked["learning_rate"] * rate_at(step, asked["horizon"], asked["warmup"])
            group["lr"] *= cooled(step, steps, asked["cooling"])
        one = loss(unet, classes, batch, noise, asked["dropped"], drawn)
        one.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(one.item())
        decay = min(asked["decay"], (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in both.named_parameters():
                mean[name].lerp_(parameter, 1 - decay)
        if (step + 1) % 50 == 0:
            said(f"{step + 1} {sum(losses[-50:]) / 50:.4f}")
        if (step + 1) % KEPT_EVERY == 0:
            state = {
                "model": both.state_dict(),
                "optimizer": optimizer.state_dict(),
                "mean": mean,
                "losses": losses,
                "drawn": drawn.get_state(),
            }
            torch.save(state, folder / "training.part")
            (folder / "training.part").replace(kept)
    both.load_state_dict(mean)
    unet.save_pretrained(folder)
    save_file(classes.state_dict(), folder / "classes.safetensors")
    kept.unlink(missing_ok=True)
    return {
        "train": {
            "num_parameters": sum(one.numel() for one in both.parameters()),
            "losses": means(losses, 50),
        }
    }


def means(losses: list[float], many: int) -> list[float]:
    """Of so many steps each."""
    parts = [losses[n : n + many] for n in range(0, len(losses), many)]
    return [round(sum(part) / len(part), 5) for part in parts]


def adapted(model: Any, classes: Classes, rows: Glyphs, recipe: Json, seed: int) -> Json:
    """Train what an adapter added to the model: all other weights must be frozen."""
    ours = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(ours, lr=recipe["learning_rate"], weight_decay=0.0)
    drawn = torch.Generator().manual_seed(seed)
    noise, steps = scheduler(), recipe["steps"]
    classes.requires_grad_(False)
    model.train()
    losses = []
    for step, batch in enumerate(batches(rows, recipe["batch_size"], steps, drawn)):
        for group in optimizer.param_groups:
            group["lr"] = recipe["learning_rate"] * rate_at(step, steps, recipe["warmup"])
        one = loss(model, classes, batch, noise, 0.0, drawn)
        one.backward()
        torch.nn.utils.clip_grad_norm_(ours, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(one.item())
    model.eval()
    return {
        "num_trainable": sum(one.numel() for one in ours),
        "losses": means(losses, 22),
    }
