"""Stages of the experiment on pictures: a base model, a LoRA for each style, and one pack in their place."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

import eigenlorax as ex
from eigenlorax import tuner

from . import diffusion, judges, record, sampler, styles, training
from .jobs import Job
from .sampler import adapter_folder, base_folder, judge_file, pack_folder, pictures_file

Json = dict[str, Any]

BASES = ("core", "random")
"""Bases that coefficients are trained over: those of the pack, or random ones of the same size."""


def slug(style: str) -> str:
    """Return a style's name in names of files."""
    return style.replace(" ", "-")


def fitted(config: Json) -> list[str]:
    """Return the names of the adapters in the packs."""
    return [slug(style) for style in config["styles"]["fitted"]]


def pick(config: Json, *names: str) -> Json:
    return {name: config[name] for name in names}


# --- stages: a job says everything that its result depends on ---------------------------------------------------------


def pretraining(config: Json) -> Iterator[Job]:
    """The base model."""
    needs = (base_folder() / "classes.safetensors",)
    yield Job("diffusion/pretrain/base", pick(config, "model", "data", "base"), pretrain, needs)


def judging(config: Json) -> Iterator[Job]:
    """The networks that look at pictures."""
    for kind in judges.KINDS:
        job = {"what": kind, "styles": config["styles"]["known"], **pick(config, "data", "judges")}
        yield Job(f"diffusion/judges/{kind}", job, train_judge, (judge_file(kind),))


def loras(config: Json) -> Iterator[Job]:
    """A LoRA of each style, and of some a second one. Each has its own seed."""
    lora, names = config["lora"], config["styles"]
    adapters = [(style, slug(style)) for style in [*names["fitted"], *names["left_out"]]]
    adapters += [(style, f"{slug(style)}-twin") for style in lora["twins"]]
    for seed, (style, name) in enumerate(adapters, lora["seed"]):
        recipe = {**lora["recipe"], "learning_rate": lora["learning_rate"]}
        job = {"name": name, "style": style, "seed": seed, "options": lora["options"], "recipe": recipe}
        needs = (adapter_folder(name) / "adapter_model.safetensors",)
        yield Job(f"diffusion/styles/{name}", {**job, "data": config["data"]}, train_lora, needs)


def packs(config: Json) -> Iterator[Job]:
    """A pack of all fitted styles for each k."""
    for k in config["pack"]["k"]:
        yield pack_job(f"packs/k{k}", pack_spec(config, k))


def ratio_packs(config: Json) -> Iterator[Job]:
    """A pack of all fitted styles for each ratio."""
    for ratio in config["bytes"]["ratios"]:
        yield pack_job(f"ratios/{ratio}", {"sources": fitted(config), "ratio": ratio})


def pack_job(name: str, spec: Json) -> Job:
    return Job(f"diffusion/{name}", {"pack": spec}, fit_pack, (pack_folder(spec) / "subspace_config.json",))


def pack_spec(config: Json, k: int) -> Json:
    return {"sources": fitted(config), "k": k, "weighting": config["pack"]["weighting"]}


def base_drawings(config: Json) -> Iterator[Job]:
    """The same pictures without an adapter."""
    job = pick(config, "model", "drawing", "styles")
    yield Job("diffusion/plain/base", job, sampler.draw_base, (pictures_file("plain"),))


def recycled(config: Json) -> Iterator[Job]:
    """Pictures by the LoRA of each style, and by what packs of several k and other methods make of it."""
    for style in [*config["styles"]["fitted"], *config["styles"]["left_out"]]:
        name = slug(style)
        job = {
            "name": name,
            "style": style,
            "seen": name in fitted(config),
            "sources": fitted(config),
            "twin": f"{name}-twin" if style in config["lora"]["twins"] else None,
            **pick(config, "pack", "drawing", "model", "styles"),
        }
        yield Job(f"diffusion/recycled/{name}", job, sampler.recycle, (pictures_file(name),))


def by_bytes(config: Json) -> Iterator[Job]:
    """Pictures by the LoRA of each style, and by packs of several ratios."""
    for style in config["styles"]["fitted"]:
        name = slug(style)
        job = {"name": name, "style": style, "sources": fitted(config), **config["bytes"]}
        job |= pick(config, "drawing", "model", "styles")
        yield Job(f"diffusion/bytes/{name}", job, sampler.recycle_by_bytes, (pictures_file(f"{name}-bytes"),))


def rates(config: Json) -> Iterator[Job]:
    """Coefficients at several learning rates, on a style that is in no other stage."""
    for basis in BASES:
        for rate in config["new"]["rates"]:
            yield rate_job(config, basis, rate)


def rate_job(config: Json, basis: str, rate: float) -> Job:
    # rates are chosen on training pictures: the held-out ones are for the targets
    return new_style(config, f"rates/{basis}", config["styles"]["development"], rate, "train", f"--{rate:g}")


def targets(config: Json) -> Iterator[Job]:
    """New styles by coefficients, at the rate chosen in `rates`, by their LoRAs, and by the base model."""
    for style in config["styles"]["left_out"]:
        for basis in BASES:
            yield new_style(config, f"targets/{basis}", style, chosen_rate(config, basis), "held out")
        job = {"style": style, **checked(config, "held out")}
        lora = {**job, "name": slug(style), "lora": config["lora"]}
        yield Job(f"diffusion/targets/lora--{slug(style)}", lora, score_lora)
        yield Job(f"diffusion/targets/base--{slug(style)}", {**job, "name": f"base-{slug(style)}"}, score_base)


def chosen_rate(config: Json, basis: str) -> float:
    losses = {}
    for rate in config["new"]["rates"]:
        job = rate_job(config, basis, rate)
        if not job.done():
            raise SystemExit(f"{job.name} has not been run: python experiments/run.py diffusion rates")
        losses[rate] = record.read(job.path)["test"]["loss"]
    return min(losses, key=lambda rate: losses[rate])


def new_style(config: Json, stage: str, style: str, rate: float, split: str, suffix: str = "") -> Job:
    """Return a training of coefficients on a style. stage: with the basis. split: pictures that it is scored on."""
    basis = stage.rpartition("/")[2]
    pack = pack_spec(config, config["pack"]["rival"])
    job = {
        "name": f"{basis}-{slug(style)}{suffix}",
        "style": style,
        **pick(config["new"], "seed", "options"),
        "pack": {**pack, "random": 0} if basis == "random" else pack,
        "recipe": {**config["lora"]["recipe"], "learning_rate": rate},
        **checked(config, split),
    }
    return Job(f"diffusion/{stage}--{slug(style)}{suffix}", job, train_coefficients)


def checked(config: Json, split: str) -> Json:
    """Return what a job needs to score a style."""
    return {**pick(config, "data", "drawing", "model", "styles"), "check": {**config["check"], "part": split}}


STAGES = {
    "pretrain": pretraining,
    "judges": judging,
    "styles": loras,
    "packs": packs,
    "ratios": ratio_packs,
    "plain": base_drawings,
    "bytes": by_bytes,
    "recycled": recycled,
    "rates": rates,
    "targets": targets,
}


# --- runs: the config of a job in, what its record says out -----------------------------------------------------------


def pretrain(config: Json) -> Json:
    return diffusion.pretrain(config, base_folder())


def train_judge(config: Json) -> Json:
    return judges.train(config, judge_file(config["what"]))


def train_lora(config: Json) -> Json:
    """Train a LoRA that draws in one style, and save it."""
    from peft import LoraConfig

    trained, model = train_adapter(LoraConfig(**config["options"]), config)
    model.save_pretrained(adapter_folder(config["name"]))
    return {"train": trained}


def train_adapter(peft_config: Any, config: Json) -> tuple[Json, Any]:
    """Train an adapter of PEFT's on a style. Returns what the record says of the training, and the model."""
    from peft import get_peft_model

    unet, classes = diffusion.load_base(base_folder())
    torch.manual_seed(config["seed"])
    model = get_peft_model(unet.requires_grad_(False), peft_config)
    recipe = {**config["recipe"], "seed": config["seed"]}
    return diffusion.train_adapter(model, classes, pictures_in_style(config, "train"), recipe), model


def pictures_in_style(config: Json, split: str) -> diffusion.Pictures:
    plain = diffusion.read_pictures(config["data"], split)
    return diffusion.Pictures(torch.from_numpy(styles.apply(config["style"], plain.pixels.numpy())), plain.labels)


def fit_pack(config: Json) -> Json:
    """Fit a pack of k components, or of a ratio, and save it."""
    spec = config["pack"]
    sources = {name: adapter_folder(name) for name in spec["sources"]}
    if "ratio" in spec:
        pack = ex.fit(sources, ratio=spec["ratio"], warn_above=1.0)
    else:
        pack = training.fit_pack(spec, adapter_folder)
    pack.save(pack_folder(spec), overwrite=True)
    return {
        "subspace": training.subspace(pack),
        "bytes": asdict(pack.summary.bytes),
        "delta_errors": {name: adapter.delta_error for name, adapter in pack.records.items()},
        "sources": {name: adapter.source_sha256 for name, adapter in pack.records.items()},
    }


def train_coefficients(config: Json) -> Json:
    """Train coefficients on a style, and score it."""
    pack = ex.Pack.open(pack_folder(config["pack"]))
    if "random" in config["pack"]:
        pack = ex.random_pack(pack, seed=config["pack"]["random"])
    trained, model = train_adapter(ex.EigenLoraxConfig(subspace=pack, **config["options"]), config)
    factors = dict(tuner.to_lora(model).modules)
    return {"train": trained, "subspace": training.subspace(pack), "test": score(config, factors)}


def score_lora(config: Json) -> Json:
    """Score the LoRA of a style."""
    factors = sampler.original_factors(config["name"])
    numbers = sum(module.spec.numbers for module in factors.values())
    return {"train": {"num_trainable": numbers}, "test": score(config, factors)}


def score_base(config: Json) -> Json:
    """Score the base model on a style."""
    return {"train": {"num_trainable": 0}, "test": score(config, {})}


def score(config: Json, factors: sampler.Factors) -> Json:
    return sampler.score_style(config, factors, pictures_in_style(config, config["check"]["part"]))
