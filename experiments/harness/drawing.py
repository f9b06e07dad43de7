"""Pictures in many styles: the base model, a LoRA of every style, and one pack in their place."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

import eigenlorax as ex
from eigenlorax import tuner
from eigenlorax.train import methods

from . import diffusion, easel, judges, record, training
from . import styles as looks
from .easel import BASE, adapter_folder, judge_file, pack_folder
from .jobs import Job

Json = dict[str, Any]

BASES = ("core", "random")
"""What coefficients alone are over: the pack's directions, or as many that nobody has trained."""


def pretrain(config: Json) -> Iterator[Job]:
    job = {name: config[name] for name in ("model", "data", "base")}
    yield Job("diffusion/pretrain/base", job, pretrained, (BASE / "classes.safetensors",))


def pretrained(config: Json) -> Json:
    return diffusion.pretrained(config, BASE, lambda line: print(line, flush=True))


def judging(config: Json) -> Iterator[Job]:
    """The networks that look at pictures."""
    for what in judges.KINDS:
        job = {
            "what": what,
            "styles": config["styles"]["known"],
            "data": config["data"],
            "judges": config["judges"],
        }
        yield Job(f"diffusion/judges/{what}", job, judged, (judge_file(what),))


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
    recipe = {**config["lora"]["recipe"], "learning_rate": config["lora"]["learning_rate"]}
    options = config["lora"]["options"]
    job = {"name": name, "style": style, "seed": seed, "data": config["data"], "options": options, "recipe": recipe}
    return Job(f"diffusion/styles/{name}", job, styled, (adapter_folder(name) / "adapter_model.safetensors",))


def slug(style: str) -> str:
    return style.replace(" ", "-")


def styled(config: Json) -> Json:
    """A LoRA that draws in one style, kept as PEFT's folder."""
    from peft import LoraConfig

    found, model = trained(LoraConfig(**config["options"]), config)
    model.save_pretrained(adapter_folder(config["name"]))
    return {"train": found}


def trained(method: Any, config: Json) -> tuple[Json, Any]:
    """The base model with an adapter of PEFT's, trained on a style."""
    from peft import get_peft_model

    unet, classes = diffusion.saved_model(BASE)
    torch.manual_seed(config["seed"])
    model = get_peft_model(unet.requires_grad_(False), method)
    return diffusion.adapted(model, classes, rows_in(config, "train"), config["recipe"], config["seed"]), model


def rows_in(config: Json, part: str) -> diffusion.Glyphs:
    """The pictures to "train" on, or those that are "held out", in the style."""
    plain = diffusion.glyphs(config["data"], part)
    return diffusion.Glyphs(torch.from_numpy(looks.styled(plain.pixels.numpy(), config["style"])), plain.labels)


def packs(config: Json) -> Iterator[Job]:
    """One pack of all fitted styles for every k."""
    for k in config["pack"]["k"]:
        yield Job(
            f"diffusion/packs/k{k}", {"pack": pack_spec(config, k)}, packed, (pack_folder(k) / "subspace_config.json",)
        )


def pack_spec(config: Json, k: int) -> Json:
    return {"sources": fitted(config), "k": k, "weighting": config["pack"]["weighting"]}


def fitted(config: Json) -> list[str]:
    return [slug(style) for style in config["styles"]["fitted"]]


def packed(config: Json) -> Json:
    asked = config["pack"]
    sources = {name: adapter_folder(name) for name in asked["sources"]}
    if "ratio" in asked:
        pack, folder = ex.fit(sources, ratio=asked["ratio"], warn_above=1.0), easel.ratio_folder(asked["ratio"])
    else:
        size = {"n_components": asked["k"], "weighting": asked["weighting"], "dtype": "float32"}
        pack, folder = ex.fit(sources, **size, warn_above=1.0), pack_folder(asked["k"])
    pack.save(folder, overwrite=True)
    return {
        "subspace": training.subspace(pack),
        "bytes": asdict(pack.summary.bytes),
        "delta_errors": {name: one.delta_error for name, one in pack.records.items()},
        "sources": {name: one.source_sha256 for name, one in pack.records.items()},
    }


def ratios(config: Json) -> Iterator[Job]:
    """One pack of all fitted styles for every number of bytes."""
    for ratio in config["bytes"]["ratios"]:
        job = {"pack": {"sources": fitted(config), "ratio": ratio}}
        yield Job(f"diffusion/ratios/{ratio}", job, packed, (easel.ratio_folder(ratio) / "subspace_config.json",))


def by_bytes(config: Json) -> Iterator[Job]:
    """Every style's pictures, drawn by its LoRA and by what such packs keep of it."""
    for style in config["styles"]["fitted"]:
        job = {
            "name": slug(style),
            "style": style,
            "sources": fitted(config),
            **{key: config[key] for key in ("drawing", "model", "styles")},
            **config["bytes"],
        }
        yield Job(f"diffusion/bytes/{slug(style)}", job, easel.by_bytes, (easel.pictures_file(f"{slug(style)}-bytes"),))


def plain(config: Json) -> Iterator[Job]:
    """What the base model draws: the same noise, and no adapter."""
    job = {key: config[key] for key in ("model", "drawing", "styles")}
    yield Job("diffusion/plain/base", job, easel.plain, (easel.pictures_file("plain"),))


def recycled(config: Json) -> Iterator[Job]:
    """Every style's pictures, drawn by its LoRA and by what is kept of it."""
    twins = config["lora"]["twins"]
    for style in [*config["styles"]["fitted"], *config["styles"]["left_out"]]:
        name = slug(style)
        job = {
            "name": name,
            "style": style,
            "seen": name in fitted(config),
            "sources": fitted(config),
            "twin": f"{name}-twin" if style in twins else None,
            "pack": config["pack"],
            "drawing": config["drawing"],
            "model": config["model"],
            "styles": config["styles"],
        }
        yield Job(f"diffusion/recycled/{name}", job, easel.recycle, (easel.pictures_file(name),))


def rates(config: Json) -> Iterator[Job]:
    """Coefficients alone, at several rates, on a style that is in no other stage."""
    for basis in BASES:
        for rate in config["new"]["rates"]:
            yield new_style(config, "rates", basis, config["styles"]["development"], rate, f"--{rate:g}")


def targets(config: Json) -> Iterator[Job]:
    """Coefficients alone on the styles that no basis has seen, at the rate that was best on the other one; their LoRAs,
    trained for as many steps; and no adapter at all."""
    for style in config["styles"]["left_out"]:
        for basis in BASES:
            yield new_style(config, "targets", basis, style, chosen_rate(config, basis))
        job = {"name": slug(style), "style": style, "lora": config["lora"], **checked(config, "held out")}
        yield Job(f"diffusion/targets/lora--{slug(style)}", job, known)
        job = {"name": f"base-{slug(style)}", "style": style, **checked(config, "held out")}
        yield Job(f"diffusion/targets/base--{slug(style)}", job, untrained)


def chosen_rate(config: Json, basis: str) -> float:
    found = {}
    for rate in config["new"]["rates"]:
        job = new_style(config, "rates", basis, config["styles"]["development"], rate, f"--{rate:g}")
        if not job.done():
            raise SystemExit(f"{job.name} has not been run: python experiments/run.py diffusion rates")
        found[rate] = record.read(job.path)["test"]["loss"]
    return min(found, key=lambda rate: found[rate])


def new_style(config: Json, stage: str, basis: str, style: str, rate: float, end: str = "") -> Job:
    pack = pack_spec(config, config["pack"]["rival"])
    job = {
        "name": f"{basis}-{slug(style)}{end}",
        "style": style,
        "seed": config["new"]["seed"],
        "options": config["new"]["options"],
        "pack": {**pack, "random": 0} if basis == "random" else pack,
        "recipe": {**config["lora"]["recipe"], "learning_rate": rate},
        # rates are chosen on pictures that are trained on: what is held out is for the targets
        **checked(config, "train" if stage == "rates" else "held out"),
    }
    return Job(f"diffusion/{stage}/{basis}--{slug(style)}{end}", job, learned)


def checked(config: Json, part: str) -> Json:
    """What a job has to know to say how well a style was learned."""
    asked = {key: config[key] for key in ("data", "drawing", "model", "styles")}
    return {**asked, "check": {**config["check"], "part": part}}


def learned(config: Json) -> Json:
    """A style learned on coefficients alone: the loss on pictures of it, and what the judges say of what it draws."""
    pack = ex.Pack.open(pack_folder(config["pack"]["k"]))
    if "random" in config["pack"]:
        pack = methods.random_basis(pack, seed=config["pack"]["random"])
    found, model = trained(ex.EigenLoraxConfig(subspace=pack, **config["options"]), config)
    factors = dict(tuner.to_lora(model).modules)
    return {"train": found, "subspace": training.subspace(pack), "test": tested(config, factors)}


def known(config: Json) -> Json:
    """The same of a LoRA that has been trained already."""
    factors = dict(ex.read_adapter(adapter_folder(config["name"])).modules)
    numbers = sum(one.spec.numbers for one in factors.values())
    return {"train": {"num_trainable": numbers}, "test": tested(config, factors)}


def untrained(config: Json) -> Json:
    """The same of the base."""
    return {"train": {"num_trainable": 0}, "test": tested(config, {})}


def tested(config: Json, factors: Any) -> Json:
    return easel.learned(config, factors, rows_in(config, config["check"]["part"]))


STAGES = {
    "pretrain": pretrain,
    "judges": judging,
    "styles": styles,
    "packs": packs,
    "ratios": ratios,
    "bytes": by_bytes,
    "plain": plain,
    "recycled": recycled,
    "rates": rates,
    "targets": targets,
}
