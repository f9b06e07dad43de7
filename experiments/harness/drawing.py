"""Pictures in many styles: the base model, a LoRA of every style, and one pack in their place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import diffusion, judges, record
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


STAGES = {
    "pretrain": pretrain,
    "judges": judging,
}
