"""Small convolutional networks that classify pictures: one says the class, one the style."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import diffusion, styles

Json = dict[str, Any]

KINDS = ("class", "style")
FEATURES = 128


class Judge(nn.Module):
    """Maps pictures (n, 28, 28) to features (n, FEATURES), and these to the logits of the classes or styles."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out, stride in ((1, 24, 1), (24, 32, 2), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, n_outputs)

    def features(self, pixels: Tensor) -> Tensor:
        return self.body(2 * pixels[:, None] - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


def labelled_pictures(config: Json, split: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return at most so many pictures, as bytes, in each style in turn, and their classes or numbers of styles."""
    pictures, names = diffusion.read_pictures(config["data"], split), config["styles"]
    pictures = pictures[torch.arange(0, len(pictures), max(len(pictures) // rows, 1))[:rows]]
    plain = pictures.pixels.numpy()
    pixels = torch.cat([torch.from_numpy(styles.apply(name, plain) * 255).round().byte() for name in names])
    if config["what"] == "class":
        return pixels, pictures.labels.repeat(len(names))
    return pixels, torch.arange(len(names)).repeat_interleave(len(pictures))


def train(config: Json, file: Path) -> Json:
    """Train one judge and save it. Returns its accuracy on pictures that nothing was trained on, by style."""
    from safetensors.torch import save_file

    recipe, names = config["judges"], config["styles"]
    pixels, labels = labelled_pictures(config, "train", recipe["rows"])
    torch.manual_seed(recipe["seed"])
    judge = Judge(int(labels.max()) + 1)
    batch_size = recipe["batch_size"]
    steps = recipe["epochs"] * len(pixels) // batch_size
    optimizer = torch.optim.AdamW(judge.parameters(), lr=recipe["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["learning_rate"], total_steps=steps)
    generator = torch.Generator().manual_seed(recipe["seed"])
    order = torch.cat([torch.randperm(len(pixels), generator=generator) for _ in range(recipe["epochs"])])
    for rows in order.split(batch_size)[:steps]:
        logits = judge(degrade(pixels[rows] / 255, recipe["worn"], generator))
        functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file)
    pixels, labels = labelled_pictures(config, "held out", 10**9)
    correct = predict(judge.eval(), pixels / 255) == labels
    by_style = correct.float().unflatten(0, (len(names), -1)).mean(1)
    return {
        "train": {"num_parameters": sum(p.numel() for p in judge.parameters()), "steps": steps},
        "test": {
            "accuracy": round(correct.float().mean().item(), 4),
            "rows": len(labels),
            "by_style": {name: round(accuracy, 4) for name, accuracy in zip(names, by_style.tolist(), strict=True)},
        },
    }


def degrade(pictures: Tensor, maxima: Json, generator: torch.Generator) -> Tensor:
    """Blur, fade and add noise to each picture, by random amounts up to the maxima.

    A model's drawings are so: a judge of clean pictures alone takes drawn hatching for outlines.
    """
    amounts = {name: maximum * torch.rand(len(pictures), 1, 1, generator=generator) for name, maximum in maxima.items()}
    smooth = functional.avg_pool2d(pictures[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    blurred = pictures + amounts["blurred"] * (smooth - pictures)
    noise = torch.randn(pictures.shape, generator=generator)
    return blurred * (1 - amounts["paler"]) + amounts["noise"] * noise


def load(file: Path) -> Judge:
    from safetensors.torch import load_file

    weights = load_file(file)
    judge = Judge(len(weights["head.bias"]))
    judge.load_state_dict(weights)
    return judge.eval()


@torch.inference_mode()
def predict(judge: Judge, pixels: Tensor) -> Tensor:
    return torch.cat([judge(chunk).argmax(-1) for chunk in pixels.split(1000)])
