"""Drawing by an adapter and by what is kept of it, from the same noise; how far apart the pictures are, and what the
judges say of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.train import methods

from . import diffusion, judges, record, recycled
from .recycled import Factors

Json = dict[str, Any]

WORK = record.ROOT / "experiments" / "work" / "diffusion"
BASE = WORK / "base"


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def judge_file(what: str) -> Path:
    return WORK / "judges" / f"{what}.safetensors"


def pack_folder(k: int) -> Path:
    return WORK / "packs" / f"k{k}"


def ratio_folder(ratio: int) -> Path:
    return WORK / "packs" / f"ratio{ratio}"


def pictures_file(name: str) -> Path:
    """All that was drawn by one adapter: way → pictures as bytes."""
    return WORK / "pictures" / f"{name}.safetensors"


class Easel:
    """The base model, with any update in its weights: what it draws from the same noise each time."""

    def __init__(self, model: Json, asked: Json) -> None:
        self.unet, self.classes = diffusion.saved_model(BASE)
        self.weights = {name: one.weight.detach().clone() for name, one in self.unet.named_modules() if has_weight(one)}
        self.asked = asked
        n = self.classes.none
        self.labels = torch.arange(n).repeat_interleave(asked["per_class"])
        self.start = diffusion.noises(len(self.labels), model, asked["seed"])

    @torch.no_grad()
    def put(self, factors: Factors) -> None:
        """The base and this update, in the place of what was there."""
        for name, one in self.weights.items():
            weight = self.unet.get_submodule(name).weight
            delta = 0.0
            if name in factors:
                update = factors[name].scaling * factors[name].up.double() @ factors[name].down.double()
                delta = update.reshape(weight.shape).float()
            weight.copy_(one + delta)

    def draw(self, factors: Factors) -> Tensor:
        """Pictures (n, 28, 28), class by class."""
        self.put(factors)
        steps, guidance = self.asked["steps"], self.asked["guidance"]
        return diffusion.draw(self.unet, self.classes, self.labels, self.start, steps, guidance)


def has_weight(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Conv2d)


class Jury:
    """The judges, and the pictures of an original that others are compared with."""

    def __init__(self, style: str, styles: Json, labels: Tensor) -> None:
        self.judges = {what: judges.saved(judge_file(what)) for what in judges.KINDS}
        self.wanted = {"class": labels, "style": torch.full_like(labels, styles["known"].index(style))}

    @torch.inference_mode()
    def verdict(self, pictures: Tensor, original: Tensor) -> Json:
        """rmse: of pixels from 0 to 1; features: the mean distance, in the features of each judge; right: how often a
        judge sees what was asked for; same: how often it says of the two pictures the same."""
        found: Json = {"rmse": round((pictures - original).square().mean().sqrt().item(), 5)}
        for what, judge in self.judges.items():
            one, other = judge.features(pictures), judge.features(original)
            said, before = judge.head(one).argmax(-1), judge.head(other).argmax(-1)
            found[what] = {
                "features": round((one - other).norm(dim=1).mean().item(), 4),
                "right": (said == self.wanted[what]).float().mean().item(),
                "same": (said == before).float().mean().item(),
            }
        return found


def save(name: str, pictures: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    pictures_file(name).parent.mkdir(parents=True, exist_ok=True)
    rounded = {way: (255 * one).round().byte().contiguous() for way, one in pictures.items()}
    save_file(rounded, pictures_file(name))


def saved_pictures(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(pictures_file(name))


def plain(config: Json) -> Json:
    """What the base model draws, and what the judges say of it."""
    easel = Easel(config["model"], config["drawing"])
    drawn = easel.draw({})
    save("plain", {"base": drawn})
    return {"test": {"pictures": len(drawn), **Jury("plain", config["styles"], easel.labels).verdict(drawn, drawn)}}


def recycle(config: Json) -> Json:
    """The pictures of one LoRA, and of all that may be kept in its place."""
    name, n, rival = config["name"], len(config["sources"]), config["pack"]["rival"]
    original = dict(ex.read_adapter(adapter_folder(name)).modules)
    ways: list[tuple[Json, Factors]] = [({"way": "original", "k": None}, original)]
    if config["twin"]:
        twin = dict(ex.read_adapter(adapter_folder(config["twin"])).modules)
        ways.append(({"way": "another seed", "k": None}, twin))
    subspaces = {}
    for k in config["pack"]["k"]:
        pack = ex.Pack.open(pack_folder(k))
        subspaces[k] = pack.info.fingerprint
        if not config["seen"]:
            ways.append(({"way": "left out", "k": k}, recycled.projected(original, pack)))
            continue
        row = {"way": "seen", "k": k, **recycled.numbers(original, pack, n)}
        ways.append((row, dict(pack.adapter(name).modules)))
        if k == rival:
            cut = recycled.truncated(original, row["numbers_an_adapter"])
            ways.append(({"way": "truncated", "k": k}, cut))
            random = methods.random_basis(pack, seed=0)
            ways.append(({"way": "random", "k": k}, recycled.projected(original, random)))
    easel = Easel(config["model"], config["drawing"])
    jury, drawn, rows = Jury(config["style"], config["styles"], easel.labels), {}, []
    for row, factors in ways:
        pictures = easel.draw(factors)
        drawn[row["way"] if row["k"] is None else f"{row['way']} {row['k']}"] = pictures
        error = recycled.delta_error(original, factors)
        rows.append({**row, "delta_error": round(error, 5), **jury.verdict(pictures, drawn["original"])})
    base = saved_pictures("plain")["base"] / 255
    rows.append({"way": "base", "k": None, "delta_error": 1.0, **jury.verdict(base, drawn["original"])})
    save(name, drawn)
    numbers = sum(one.spec.numbers for one in original.values())
    return {
        "subspaces": subspaces,
        "test": {"pictures": len(easel.labels), "numbers": numbers, "ways": rows},
    }


def by_bytes(config: Json) -> Json:
    """The pictures of one LoRA, and of what packs of so many bytes keep of it."""
    name = config["name"]
    original = dict(ex.read_adapter(adapter_folder(name)).modules)
    easel = Easel(config["model"], config["drawing"])
    jury, subspaces, rows = Jury(config["style"], config["styles"], easel.labels), {}, []
    drawn = {"original": easel.draw(original)}
    for ratio in config["ratios"]:
        pack = ex.Pack.open(ratio_folder(ratio))
        subspaces[ratio] = pack.info.fingerprint
        factors = dict(pack.adapter(name).modules)
        drawn[f"ratio {ratio}"] = pictures = easel.draw(factors)
        error = round(recycled.delta_error(original, factors), 5)
        verdict = jury.verdict(pictures, drawn["original"])
        rows.append({"way": "bytes", "k": ratio, "delta_error": error, **verdict})
    save(f"{name}-bytes", drawn)
    base = saved_pictures("plain")["base"] / 255
    rows.append({"way": "base", "k": None, "delta_error": 1.0, **jury.verdict(base, drawn["original"])})
    return {"subspaces": subspaces, "test": {"pictures": len(easel.labels), "ways": rows}}


@torch.inference_mode()
def learned(config: Json, factors: Factors, rows: diffusion.Glyphs) -> Json:
    """How well a new style was learned: by the base's own loss, and by what it draws."""
    easel = Easel(config["model"], config["drawing"])
    pictures = easel.draw(factors)
    n, check = len(rows), config["check"]
    chosen = torch.arange(0, n, n // check["rows"])[: check["rows"]]
    drawn = torch.Generator().manual_seed(check["seed"])
    noise, lost = diffusion.scheduler(), 0.0
    for part in chosen.split(100):
        batch = diffusion.Glyphs(rows.pixels[part], rows.labels[part])
        lost += len(part) * diffusion.loss(easel.unet, easel.classes, batch, noise, 0.0, drawn).item()
    verdict = Jury(config["style"], config["styles"], easel.labels).verdict(pictures, pictures)
    save(f"{config['name']}-learned", {"learned": pictures})
    return {"loss": round(lost / len(chosen), 6), "rows": len(chosen), "pictures": len(pictures), **verdict}
