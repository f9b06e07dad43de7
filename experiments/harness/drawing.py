"""Pictures in many styles: the base model, a LoRA of every style, and one pack in their place."""

from collections.abc import Iterator
from typing import Any

from . import diffusion, record
from .jobs import Job

Json = dict[str, Any]

WORK = record.ROOT / "experiments" / "work" / "diffusion"
BASE = WORK / "base"


def pretrain(config: Json) -> Iterator[Job]:
    job = {name: config[name] for name in ("model", "data", "base")}
    yield Job("diffusion/pretrain/base", job, pretrained, (BASE / "classes.safetensors",))


def pretrained(config: Json) -> Json:
    return diffusion.pretrained(config, BASE, lambda line: print(line, flush=True))


STAGES = {
    "pretrain": pretrain,
}
