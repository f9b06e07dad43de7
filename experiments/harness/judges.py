"""Small convolutional networks that look at pictures: one says the class, one the style. They do not know who drew."""

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
    """Pictures (n, 28, 28) → features (n, 128), and from these the logits of the classes or styles."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, n)

    def features(self, pixels: Tensor) -> Tensor:
        return self.body(2 * pixels[:, None] - 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


def pictures(data: Json, names: list[str], part: str, rows: int, what: str) -> tuple[Tensor, Tensor]:
    """Some pictures of every class, as bytes, in one style after another; and their classes, or numbers of styles."""
    found = diffusion.glyphs(data, part)
    chosen = torch.arange(0, len(found), max(len(found) // rows, 1))[:rows]
    plain, labels = found.pixels[chosen].numpy(), found.labels[chosen]
    pixels = torch.cat([torch.from_numpy(styles.styled(plain, name) * 255).round().byte() for name in names])
    if what == "class":
        return pixels, labels.repeat(len(names))
    return pixels, torch.arange(len(names)).repeat_interleave(len(labels))


def train(config: Json, file: Path) -> Json:
    """One judge, kept in the file; its accuracy on pictures that nothing was trained on, by style."""
    from safetensors.torch import save_file

    asked, names, what = config["judges"], config["styles"], config["what"]
    pixels, wanted = pictures(config["data"], names, "train", asked["rows"], what)
    torch.manual_seed(asked["seed"])
    judge = Judge(int(wanted.max()) + 1)
    size = asked["batch_size"]
    steps = asked["epochs"] * len(pixels) // size
    optimizer = torch.optim.AdamW(judge.parameters(), lr=asked["learning_rate"], weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked["learning_rate"], total_steps=steps)
    drawn = torch.Generator().manual_seed(asked["seed"])
    order = torch.cat([torch.randperm(len(pixels), generator=drawn) for _ in range(asked["epochs"])])
    for step in range(steps):
        chosen = order[step * size : (step + 1) * size]
        lost = functional.cross_entropy(judge(worn(pixels[chosen] / 255, asked["worn"], drawn)), wanted[chosen])
        lost.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file)
    pixels, wanted = pictures(config["data"], names, "held out", 10**9, what)
    right = said(judge.eval(), pixels / 255) == wanted
    by_style = right.float().unflatten(0, (len(names), -1)).mean(1)
    return {
        "train": {"num_parameters": sum(one.numel() for one in judge.parameters()), "steps": steps},
        "test": {
            "accuracy": round(right.float().mean().item(), 4),
            "rows": len(wanted),
            "by_style": {name: round(one, 4) for name, one in zip(names, by_style.tolist(), strict=True)},
        },
    }


def worn(pictures: Tensor, most: Json, drawn: torch.Generator) -> Tensor:
    """The pictures, each somewhat blurred, paler and noisier, as a model's drawings are: else a judge of clean pictures
    is lost before these. most: how much of each at most."""
    much = {name: top * torch.rand(len(pictures), 1, 1, generator=drawn) for name, top in most.items()}
    smooth = functional.avg_pool2d(pictures[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    found = pictures + much["blurred"] * (smooth - pictures)
    found = found * (1 - much["paler"])
    return found + much["noise"] * torch.randn(found.shape, generator=drawn)


def saved(file: Path) -> Judge:
    from safetensors.torch import load_file

    weights = load_file(file)
    judge = Judge(len(weights["head.bias"]))
    judge.load_state_dict(weights)
    return judge.eval()


@torch.inference_mode()
def said(judge: Judge, pixels: Tensor) -> Tensor:
    return torch.cat([judge(one).argmax(-1) for one in pixels.split(1000)])
