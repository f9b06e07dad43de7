"""Pictures that the base model draws with an adapter's update in its weights, and how far they are from the original's.

Every adapter, and every way to store it, draws the same classes from the same noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenlorax as ex

from . import diffusion, judges, record, recycled
from .recycled import Factors

Json = dict[str, Any]

WORK = record.ROOT / "experiments" / "work" / "diffusion"


def base_folder() -> Path:
    return WORK / "base"


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def judge_file(kind: str) -> Path:
    return WORK / "judges" / f"{kind}.safetensors"


def pack_folder(spec: Json) -> Path:
    return WORK / "packs" / (f"ratio{spec['ratio']}" if "ratio" in spec else f"k{spec['k']}")


def pictures_file(name: str) -> Path:
    """Return the file of all pictures that belong to one adapter: way to store it → pictures as bytes."""
    return WORK / "pictures" / f"{name}.safetensors"


def save_pictures(name: str, pictures: dict[str, Tensor]) -> None:
    pictures_file(name).parent.mkdir(parents=True, exist_ok=True)
    rounded = {method: (255 * pixels).round().byte().contiguous() for method, pixels in pictures.items()}
    save_file(rounded, pictures_file(name))


def original_factors(name: str) -> Factors:
    return dict(ex.read_adapter(adapter_folder(name)).modules)


class Sampler:
    """The base model with an update in its weights. labels: classes of the pictures that it draws."""

    def __init__(self, config: Json) -> None:
        self.unet, self.classes = diffusion.load_base(base_folder())
        self.weights = {
            name: module.weight.detach().clone()
            for name, module in self.unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        self.drawing, model = config["drawing"], config["model"]
        self.labels = torch.arange(self.classes.no_class).repeat_interleave(self.drawing["per_class"])
        generator = torch.Generator().manual_seed(self.drawing["seed"])
        shape = (len(self.labels), model["in_channels"], model["sample_size"], model["sample_size"])
        self.start = torch.randn(shape, generator=generator)

    @torch.no_grad()
    def draw(self, factors: Factors) -> Tensor:
        """Replace the update in the weights by this one, and return pictures (n, 28, 28)."""
        for name, base_weight in self.weights.items():
            weight = self.unet.get_submodule(name).weight
            weight.copy_(base_weight)
            if name in factors:
                update = factors[name].scaling * factors[name].up.double() @ factors[name].down.double()
                weight += update.reshape(weight.shape).float()
        steps, guidance = self.drawing["steps"], self.drawing["guidance"]
        return diffusion.draw(self.unet, self.classes, self.labels, self.start, steps, guidance)


class Judges:
    """The judges of class and style, and the answers that are right for an adapter's pictures."""

    def __init__(self, config: Json, labels: Tensor) -> None:
        style = config["styles"]["known"].index(config["style"])
        self.judges = {kind: judges.load(judge_file(kind)) for kind in judges.KINDS}
        self.right = {"class": labels, "style": torch.full_like(labels, style)}

    @torch.inference_mode()
    def compare(self, pictures: Tensor, original: Tensor) -> Json:
        """Compare pictures with those of the original adapter.

        rmse: of pixels from 0 to 1. For each judge, features: mean distance of its features; right: fraction of
        pictures that it classifies right; same: fraction that it classifies as the original's.
        """
        figures: Json = {"rmse": round((pictures - original).square().mean().sqrt().item(), 5)}
        for kind, judge in self.judges.items():
            features, original_features = judge.features(pictures), judge.features(original)
            answers, original_answers = judge.head(features).argmax(-1), judge.head(original_features).argmax(-1)
            figures[kind] = {
                "features": round((features - original_features).norm(dim=1).mean().item(), 4),
                "right": (answers == self.right[kind]).float().mean().item(),
                "same": (answers == original_answers).float().mean().item(),
            }
        return figures


def draw_base(config: Json) -> Json:
    """Draw without an adapter."""
    sampler = Sampler(config)
    pictures = sampler.draw({})
    save_pictures("plain", {"base": pictures})
    figures = Judges({**config, "style": "plain"}, sampler.labels).compare(pictures, pictures)
    return {"test": {"pictures": len(pictures), **figures}}


def compare_drawings(config: Json, stored: Sequence[tuple[Json, Factors]], file: str) -> tuple[int, list[Json]]:
    """Draw with an adapter as it was stored in several ways, the first of which is the original.

    stored: fields of the row, and factors. Returns the number of pictures, and a row for each way and for the base
    model.
    """
    sampler = Sampler(config)
    judge, drawn, rows = Judges(config, sampler.labels), {}, []
    original_factors, original = stored[0][1], sampler.draw(stored[0][1])
    for fields, factors in stored:
        pictures = sampler.draw(factors)
        drawn[fields["way"] if fields["k"] is None else f"{fields['way']} {fields['k']}"] = pictures
        error = round(recycled.delta_error(original_factors, factors), 5)
        rows.append({**fields, "delta_error": error, **judge.compare(pictures, original)})
    save_pictures(file, drawn)
    base = load_file(pictures_file("plain"))["base"] / 255
    rows.append({"way": "base", "k": None, "delta_error": 1.0, **judge.compare(base, original)})
    return len(sampler.labels), rows


def recycle(config: Json) -> Json:
    """Compare the pictures of one LoRA with those of packs of several k, and of what else could replace it."""
    name, sources, rival = config["name"], config["sources"], config["pack"]["rival"]
    original = original_factors(name)
    stored: list[tuple[Json, Factors]] = [({"way": "original", "k": None}, original)]
    if config["twin"]:
        stored.append(({"way": "another seed", "k": None}, original_factors(config["twin"])))
    subspaces = {}
    for k in config["pack"]["k"]:
        pack = ex.Pack.open(pack_folder({"k": k}))
        subspaces[k] = pack.info.fingerprint
        if not config["seen"]:
            stored.append(({"way": "left out", "k": k}, recycled.projected(original, pack)))
            continue
        numbers = recycled.numbers(original, pack, len(sources))
        stored.append(({"way": "seen", "k": k, **numbers}, dict(pack.adapter(name).modules)))
        if k == rival:
            truncated = recycled.truncated(original, numbers["numbers_an_adapter"])
            random_pack = ex.random_pack(pack, seed=0)
            stored.append(({"way": "truncated", "k": k}, truncated))
            stored.append(({"way": "random", "k": k}, recycled.projected(original, random_pack)))
    n_pictures, rows = compare_drawings(config, stored, name)
    numbers_of_lora = sum(factors.spec.numbers for factors in original.values())
    return {"subspaces": subspaces, "test": {"pictures": n_pictures, "numbers": numbers_of_lora, "ways": rows}}


def recycle_by_bytes(config: Json) -> Json:
    """Compare the pictures of one LoRA with those of packs of several ratios."""
    name = config["name"]
    stored: list[tuple[Json, Factors]] = [({"way": "original", "k": None}, original_factors(name))]
    subspaces = {}
    for ratio in config["ratios"]:
        pack = ex.Pack.open(pack_folder({"ratio": ratio}))
        subspaces[ratio] = pack.info.fingerprint
        stored.append(({"way": "bytes", "k": ratio}, dict(pack.adapter(name).modules)))
    n_pictures, rows = compare_drawings(config, stored, f"{name}-bytes")
    return {"subspaces": subspaces, "test": {"pictures": n_pictures, "ways": rows[1:]}}


@torch.inference_mode()
def score_style(config: Json, factors: Factors, pictures: diffusion.Pictures) -> Json:
    """Return how well a new style was learned: the base model's loss on pictures of it, and the judges' answers."""
    sampler, check = Sampler(config), config["check"]
    drawn = sampler.draw(factors)
    rows = torch.arange(0, len(pictures), len(pictures) // check["rows"])[: check["rows"]]
    generator = torch.Generator().manual_seed(check["seed"])
    loss = 0.0
    for chunk in rows.split(100):
        batch = pictures[chunk]
        loss += len(chunk) * diffusion.denoising_loss(sampler.unet, sampler.classes, batch, generator).item()
    figures = Judges(config, sampler.labels).compare(drawn, drawn)
    save_pictures(f"{config['name']}-learned", {"learned": drawn})
    return {"loss": round(loss / len(rows), 6), "rows": len(rows), "pictures": len(drawn), **figures}
