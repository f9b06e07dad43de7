"""Pictures in many styles: the base model, a LoRA of every style, and one pack in their place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import diffusion, judges, record
from . import styles as looks
from .jobs import Job

Json = dict[str, Any]

WORK = record.ROOT / "experiments" / "work" / "diffusion"
BASE = WORK / "base"


def pretrain(config: Json) -> Iterator[Job]:
    job = {name: config[name] for name in ("model", "data", "base")}
    yield Job("diffusion/pretrain/base", job, pretrained, (BASE / "classes.safetensors",))


def pretrained(config: Json) -> Json:
    return diffusion.pretrained(config, BASE, lambda line: print(line, flush=True))


def judging(config: Json) -> Iterator[Job]:
    """The networks that look at pictures."""
    styles = ["plain", *config["styles"]["fitted"], *config["styles"]["left_out"]]
    for what in judges.KINDS:
        job = {"what": what, "styles": styles, "data": config["data"], "judges": config["judges"]}
        yield Job(f"diffusion/judges/{what}", job, judged, (judge_file(what),))


def judge_file(what: str) -> Path:
    return WORK / "judges" / f"{what}.safetensors"


def judged(config: Json) -> Json:
    return judges.train(config, judge_file(config["what"]))


def styles(config: Json) -> Iterator[Job]:
    """A LoRA of every style, each from a seed of its own; some styles twice."""
    names = [*config["styles"]["fitted"], *config["styles"]["left_out"]]
    for n, style in enumerate(names):
        yield lora(config, style, slug(style), config["lora"]["seed"] + n)
    for n, style in enumerate(config["lora"]["twins"]):
        yield lora(config, style, f"{slug(style)}-twin", config["lora"]["seed"] + len(names) + n)


def lora(config: Json, style: str, name: str, seed: int) -> Job:
    recipe = {key: config["lora"][key] for key in ("options", "steps", "batch_size", "learning_rate", "warmup")}
    job = {"name": name, "style": style, "seed": seed, "data": config["data"], "lora": recipe}
    return Job(f"diffusion/styles/{name}", job, styled, (adapter_folder(name) / "adapter_model.safetensors",))


def slug(style: str) -> str:
    return style.replace(" ", "-")


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def styled(config: Json) -> Json:
    """A LoRA that draws in one style, kept as PEFT's folder."""
    from peft import LoraConfig, get_peft_model

    unet, classes = diffusion.saved_model(BASE)
    torch.manual_seed(config["seed"])
    model = get_peft_model(unet.requires_grad_(False), LoraConfig(**config["lora"]["options"]))
    found = diffusion.adapted(model, classes, rows_in(config), config["lora"], config["seed"])
    model.save_pretrained(adapter_folder(config["name"]))
    return {"train": found}


def rows_in(config: Json) -> diffusion.Glyphs:
    """What there is to train on, in the style."""
    plain = diffusion.glyphs(config["data"], "train")
    return diffusion.Glyphs(torch.from_numpy(looks.styled(plain.pixels.numpy(), config["style"])), plain.labels)


STAGES = {
    "pretrain": pretrain,
    "judges": judging,
    "styles": styles,
}
