"""Image classification: LoRAs of a small ViT on disjoint subsets of classes, and methods on other classes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from . import images, vit
from . import rates as learning
from .images import Task
from .jobs import Job

Json = dict[str, Any]


def tasks(config: Json, role: str) -> dict[str, Task]:
    """Return the tasks of a role by name. They are disjoint subsets of classes."""
    by_name = {}
    for image_set, sizes in config["classes"].items():
        rows = config["rows"][image_set]
        for n, (name, classes) in enumerate(images.dealt(image_set, sizes, role).items()):
            by_name[name] = Task(image_set, classes, rows[role][n % len(rows[role])], rows["test"], rows["copies"])
    return by_name


def pretrain(config: Json) -> Iterator[Job]:
    job = {**config["pretraining"], "kind": "full", "model": config["model"]}
    job["recipe"] = {**config["recipe"], **job.pop("recipe"), "head_learning_rate": job["learning_rate"]}
    yield Job("vision/pretrain/base", job, vit.pretrained, (vit.base_folder() / "model.safetensors",))


def method_job(
    stage: str,
    name: str,
    method: Json,
    task: Task,
    seed: int,
    rate: float,
    config: Json,
    pack: Json | None,
    saved: bool,
) -> Job:
    """Return the training of a method on a task. saved: save the adapter under the run's name."""
    job = {
        "name": name if saved else None,
        "method": method["label"],
        "task": asdict(task),
        "kind": method["kind"],
        "options": method["options"],
        "learning_rate": rate,
        "optimizer": method.get("optimizer", "adamw"),
        "seed": seed,
        "pack": pack,
        "recipe": config["recipe"],
    }
    return Job(f"vision/{stage}/{name}", job, vit.train, (vit.weights_of(name),) if saved else ())


def sources(config: Json) -> Iterator[Job]:
    """Yield a LoRA of every source task, each with its own seed."""
    spec = config["sources"]
    for n, (name, task) in enumerate(tasks(config, "source").items()):
        seed = spec["seed"] + n
        method = {"label": "LoRA", "kind": "lora", "options": spec["options"]}
        yield method_job("sources", name, method, task, seed, spec["learning_rate"], config, None, True)


def rates(config: Json) -> Iterator[Job]:
    """Yield every method at three learning rates on the development tasks."""
    for name in config["methods"]:
        yield from rates_of(config, name)


def rates_of(config: Json, name: str) -> Iterator[Job]:
    method = config["methods"][name]
    for rate in method["rates"]:
        for task_name, task in tasks(config, "development").items():
            for seed in config["development"]["seeds"]:
                yield target(config, "rates", name, task_name, task, seed, rate, f"--{rate:g}")


def target(
    config: Json, stage: str, name: str, task_name: str, task: Task, seed: int, rate: float, end: str = ""
) -> Job:
    method = {"options": {}, **config["methods"][name]}
    pack = None
    if "basis" in method:
        pack = {"sources": list(tasks(config, "source")), **config["pack"]}
        if method["basis"] == "random":
            pack["random"] = 0
    saved = stage == "targets" and method.get("saved", False)
    return method_job(stage, f"{name}--{task_name}--{seed}{end}", method, task, seed, rate, config, pack, saved)


def chosen_rate(config: Json, name: str) -> float:
    """Return the learning rate of a method on targets, chosen as in the experiment on text."""
    return learning.steadiest(learning.means(rates_of(config, name)))


def targets(config: Json) -> Iterator[Job]:
    """Yield every method on every target and seed, at its chosen rate."""
    chosen = {name: chosen_rate(config, name) for name in config["methods"]}
    for seed in config["targets"]["seeds"]:
        for name, rate in chosen.items():
            for task_name, task in tasks(config, "target").items():
                yield target(config, "targets", name, task_name, task, seed, rate)


def zero_shot(config: Json) -> Iterator[Job]:
    """Yield the targets' own LoRAs, projected on a basis of other classes, with their heads."""
    for name, method in config["methods"].items():
        if method.get("saved", False):
            for seed in config["targets"]["seeds"]:
                for task_name, task in tasks(config, "target").items():
                    yield kept(config, "zero_shot", f"{name}--{task_name}--{seed}", task)


def recycles(config: Json) -> Iterator[Job]:
    """Yield the sources in bases that have seen them, and in bases that have not."""
    for name, task in tasks(config, "source").items():
        yield kept(config, "recycled", name, task)


def kept(config: Json, stage: str, name: str, task: Task) -> Job:
    job = {
        "name": name,
        "task": asdict(task),
        "sources": list(tasks(config, "source")),
        "k": config["recycled"]["components"],
        "weighting": config["pack"]["weighting"],
    }
    return Job(f"vision/{stage}/{name}", job, vit.recycle)


STAGES = {
    "pretrain": pretrain,
    "sources": sources,
    "rates": rates,
    "targets": targets,
    "zero_shot": zero_shot,
    "recycled": recycles,
}
