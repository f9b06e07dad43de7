"""Merged adapters on the tasks of their sources, each with its own head, by each method.

A language model has no heads. Its adapters are of kinds of text, and the score is the mean log-likelihood of a token.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.core.adapter import Adapter, LoRAFactors, delta_square, from_factors
from eigenlorax.core.basis import seeded_normal_rows
from eigenlorax.merging.methods import METHODS

from . import language, records, text, training
from .jobs import Job
from .metrics import METRICS
from .pages import table

Json = dict[str, Any]
Updates = dict[str, Tensor]
"""Update of each module, (out, in)."""


@dataclass
class Bench:
    """The base model, with the head of one task if it has one, whose weights get an update.

    model: The model. weights: Its adapted weights before any update. rows: Encoded rows by split. measure: Function
    that scores the model on rows; higher is better.
    """

    model: Any
    weights: Updates
    rows: Mapping[str, list[Json]]
    measure: Callable[[Any, list[Json]], float]

    @torch.inference_mode()
    def score(self, updates: Updates, scale: float, split: str) -> float:
        """Return the score on the rows of a split with `scale` times the updates added to the weights."""
        for module, weight in self.weights.items():
            update = scale * updates[module] if module in updates else 0.0
            self.model.get_submodule(module).weight.data = (weight + update).to(torch.bfloat16)
        return self.measure(self.model, self.rows[split])


def task_score(metric: str, model: Any, rows: list[Json]) -> float:
    """Return a metric of the model's logits."""
    logits, collate = [], text.collate()
    for start in range(0, len(rows), 64):
        inputs = collate([dict(row) for row in rows[start : start + 64]])
        inputs.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(**inputs).logits.float())
    labels = torch.tensor([row["labels"] for row in rows]).numpy()
    return METRICS[metric](torch.cat(logits).numpy(), labels)


def log_likelihood(model: Any, rows: list[Json]) -> float:
    """Return the mean log-likelihood of a token, in nats."""
    return -float(language.losses(model, rows, batch_size=8).mean())


def source(config: Json, task: str) -> Adapter:
    """Return the adapter of a source task or kind of text."""
    sources = config["sources"]
    name = f"{task}-{sources['set']}" if "set" in sources else task
    return ex.read_adapter(training.adapter_folder(sources["experiment"], name))


def bench(config: Json, task: str) -> Bench:
    """Return the base model with the task's head, and its rows, sorted by length."""
    recipe = config["recipe"]
    model = text.new_base(task, {**recipe, "dropout": 0.0}).eval()
    adapter = source(config, task)
    heads = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter.heads.items()}
    for name, head in heads.items():
        model.get_parameter(name).data.copy_(head)
    splits = {
        "test": text.test_rows(task, recipe["test_rows"]),
        "development": text.train_rows(task, recipe["development_rows"], 0),
    }
    rows = {name: sorted(text.encoded(split, recipe["max_length"]), key=text.length) for name, split in splits.items()}
    measure = functools.partial(task_score, text.metric(task))
    return Bench(text.in_half(model.requires_grad_(False)), weights_of(model, adapter), rows, measure)


def language_benches(config: Json) -> list[Bench]:
    """Return one language model with the blocks of each kind of text of the group."""
    recipe, model = config["recipe"], language.new_base().eval().requires_grad_(False)
    weights = weights_of(model, source(config, config["group"][0]))
    benches = []
    for kind in config["group"]:
        rows = {
            "test": language.blocks(kind, "test", recipe["test_blocks"], recipe["length"]),
            "development": language.blocks(kind, "train", recipe["development_blocks"], recipe["length"], 0),
        }
        benches.append(Bench(text.in_half(model), weights, rows, log_likelihood))
    return benches


def weights_of(model: Any, adapter: Adapter) -> Updates:
    """Return copies of the weights that an adapter changes."""
    return {module: model.get_submodule(module).weight.data.clone() for module in adapter.specs}


def dense(adapter: Adapter) -> Updates:
    return {module: factors.scaling * factors.up @ factors.down for module, factors in adapter.modules.items()}


def random_update(update: LoRAFactors, label: str) -> LoRAFactors:
    """Return a random update of the same shape, rank and Frobenius norm. Other labels have other numbers."""
    r = update.down.shape[0]
    down = torch.from_numpy(seeded_normal_rows(r, update.down.shape[1], 0, f"merge down {label}"))
    up = torch.from_numpy(seeded_normal_rows(r, update.up.shape[0], 0, f"merge up {label}"))
    random_factors = LoRAFactors(down, up.mT.contiguous(), 1.0)
    return LoRAFactors(down, random_factors.up, math.sqrt(delta_square(update) / delta_square(random_factors)))


def with_random_others(adapters: list[Adapter], kept: int) -> list[Adapter]:
    """Return random adapters of the same ranks and norms in the place of all but one."""
    return [
        adapter
        if place == kept
        else from_factors(
            adapter.name,
            {module: random_update(factors, f"{module} {place}") for module, factors in adapter.modules.items()},
            base_model=adapter.base_model,
        )
        for place, adapter in enumerate(adapters)
    ]


def on_weights(adapters: list[Adapter], method: str) -> Updates:
    """Return TIES or DARE of the weights' own entries, not cut to a rank."""
    density = METHODS[method].density
    assert density is not None
    merged: Updates = {}
    generator = torch.Generator().manual_seed(0)
    for module in adapters[0].specs:
        updates = torch.stack([dense(adapter)[module].double() for adapter in adapters])
        if method == "dare":
            kept = torch.rand(updates.shape, generator=generator) < density
            merged[module] = (updates * kept / density).sum(0).float()
        else:
            thresholds = updates.abs().flatten(1).quantile(1 - density, dim=1)
            trimmed = updates * (updates.abs() >= thresholds[:, None, None])
            agree = trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
            merged[module] = ((trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)).float()
    return merged


def updates_by_task(config: Json, adapters: list[Adapter]) -> list[Updates]:
    """Return the update that is tried on the task of each adapter."""
    method, rank = config["method"], config["recipe"]["rank"]
    if "method" not in method:
        return [{} for _ in adapters]
    if method.get("full"):
        return [on_weights(adapters, method["method"])] * len(adapters)
    if method.get("random"):
        groups = [with_random_others(adapters, place) for place in range(len(adapters))]
        return [dense(ex.merge(group, method["method"], rank=rank).adapter) for group in groups]
    return [dense(ex.merge(adapters, method["method"], rank=rank).adapter)] * len(adapters)


def run(config: Json) -> Json:
    """Score a merge of one group on the tasks of the group, at the scale that is best on development rows."""
    benches = [bench(config, task) for task in config["group"]]
    return {"test": {"metric": "accuracy", **measured(config, benches, [0.0] * len(benches))}}


def run_language(config: Json) -> Json:
    """Score a merge of one group of kinds of text: the share of the gain in log-likelihood that it keeps."""
    benches = language_benches(config)
    base = [each.score({}, 1.0, "test") for each in benches]
    return {"test": {"metric": "log-likelihood", "base": base, **measured(config, benches, base)}}


def measured(config: Json, benches: list[Bench], base: list[float]) -> Json:
    """Return the scores of a merge, and the shares of those of the own adapters, both counted from `base`."""
    adapters = [source(config, task) for task in config["group"]]
    own = [each.score(dense(adapter), 1.0, "test") for each, adapter in zip(benches, adapters, strict=True)]
    pairs = list(zip(benches, updates_by_task(config, adapters), strict=True))
    by_scale = {
        scale: fmean(each.score(update, scale, "development") for each, update in pairs)
        for scale in config["recipe"]["scales"]
    }
    best = max(by_scale, key=lambda scale: by_scale[scale])
    scores = {scale: [each.score(update, scale, "test") for each, update in pairs] for scale in {best, 1.0}}

    def share(scale: float) -> float:
        kept = [(score - low) / (alone - low) for score, alone, low in zip(scores[scale], own, base, strict=True)]
        return fmean(kept)

    return {
        "own": own,
        "scale": best,
        "scores": scores[best],
        "scores_at_scale_1": scores[1.0],
        "score": share(best),
        "score_at_scale_1": share(1.0),
    }


def groups(config: Json) -> Iterator[Job]:
    """Yield every method on every group of tasks."""
    yield from jobs(config, "groups", config, run)


def texts(config: Json) -> Iterator[Job]:
    """Yield every method on every group of kinds of text."""
    yield from jobs(config, "texts", config["texts"], run_language)


def jobs(config: Json, stage: str, spec: Json, function: Callable[[Json], Json]) -> Iterator[Job]:
    """Yield every method on every group. spec: recipe, sources and groups of the stage."""
    shared = {name: spec[name] for name in ("recipe", "sources")}
    for size in spec["groups"]["sizes"]:
        for draw in spec["groups"]["draws"]:
            drawn = sorted(random.Random(f"merging {size} {draw}").sample(spec["sources"]["tasks"], size))
            for name, method in config["methods"].items():
                fields = {key: value for key, value in method.items() if key != "label"}
                job = {**shared, "name": name, "method": fields, "group": drawn, "draw": draw}
                yield Job(f"merging/{stage}/{name}--{size}--{draw}", job, functools.partial(function))


STAGES = {"groups": groups, "texts": texts}


def blocks(config: Json) -> Mapping[str, Any]:
    """Return functions that write the blocks of the pages, by their names."""
    return {"merging-groups": lambda: groups_table(config), "merging-texts": lambda: texts_table(config)}


def shares_table(config: Json, stage: str, spec: Json) -> str:
    """Write the mean share of each method by the number of adapters, at its best scale and at 1."""
    found: dict[tuple[str, int], list[Json]] = {}
    for record in records.of(f"merging/{stage}"):
        job = records.config_of(record)
        found.setdefault((job["name"], len(job["group"])), []).append(record["test"])
    rows = []
    for name, method in config["methods"].items():
        cells = []
        for size in spec["groups"]["sizes"]:
            tests = found.get((name, size), [])
            cells.append(f"{100 * fmean(test['score'] for test in tests):.1f}" if tests else "–")
            cells.append(f"{100 * fmean(test['score_at_scale_1'] for test in tests):.1f}" if tests else "–")
        rows.append([method["label"], *cells])
    header = ["", *(cell for size in spec["groups"]["sizes"] for cell in (f"{size} adapters", "scale 1"))]
    return table(header, rows)


def scales_said(recipe: Json) -> str:
    return f"The scale of a merge is the best of {', '.join(map(str, recipe['scales']))} on"


def groups_table(config: Json) -> str:
    """Write the mean normalised accuracy of each method by the number of adapters."""
    recipe = config["recipe"]
    return (
        f"{shares_table(config, 'groups', config)}\n\nAccuracy on each task of a group, with its own head, as a share "
        f"of that of its own adapter; mean over tasks and {len(config['groups']['draws'])} groups of each size, "
        f"{recipe['test_rows']} test rows a task, merges of rank {recipe['rank']} but for those on weights. "
        f"{scales_said(recipe)} {recipe['development_rows']} training rows a task. "
        f"{records.source_line('merging/groups')}"
    )


def texts_table(config: Json) -> str:
    """Write the mean share of the gain of each method by the number of adapters."""
    recipe = config["texts"]["recipe"]
    return (
        f"{shares_table(config, 'texts', config['texts'])}\n\nSmolLM2-135M: the gain in log-likelihood on each kind of "
        "text of a group, as a share of the gain of its own adapter; mean over kinds, one group of each size, "
        f"{recipe['test_blocks']} blocks of {recipe['length']} tokens, merges of rank {recipe['rank']} but for those "
        f"on weights. {scales_said(recipe)} {recipe['development_blocks']} training blocks a kind. "
        f"{records.source_line('merging/texts')}"
    )
