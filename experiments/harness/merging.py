"""Merged adapters on the tasks of their sources, each with its own head, by each method."""

import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.core.adapter import Adapter, from_factors
from eigenlorax.merging.comparison import random_update
from eigenlorax.merging.methods import METHODS

from . import records, text, training
from .jobs import Job
from .metrics import METRICS
from .pages import table

Json = dict[str, Any]
Updates = dict[str, Tensor]
"""Update of each module, (out, in)."""


@dataclass
class Bench:
    """The base model with the head of one task, whose weights get an update.

    model: The model. weights: Its adapted weights before any update. rows: Encoded rows by split.
    """

    model: Any
    weights: Updates
    rows: Mapping[str, list[Json]]
    metric: str

    @torch.inference_mode()
    def score(self, updates: Updates, scale: float, split: str) -> float:
        """Return the score on the rows of a split with `scale` times the updates added to the weights."""
        for module, weight in self.weights.items():
            update = scale * updates[module] if module in updates else 0.0
            self.model.get_submodule(module).weight.data = (weight + update).to(torch.bfloat16)
        logits, collate = [], text.collate()
        for start in range(0, len(self.rows[split]), 64):
            inputs = collate([dict(row) for row in self.rows[split][start : start + 64]])
            inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(self.model(**inputs).logits.float())
        labels = torch.tensor([row["labels"] for row in self.rows[split]]).numpy()
        return METRICS[self.metric](torch.cat(logits).numpy(), labels)


def source(config: Json, task: str) -> Adapter:
    """Return the adapter of a source task."""
    return ex.read_adapter(
        training.adapter_folder(config["sources"]["experiment"], f"{task}-{config['sources']['set']}")
    )


def bench(config: Json, task: str) -> Bench:
    """Return the base model with the task's head, and its rows, sorted by length."""
    recipe = config["recipe"]
    model = text.new_base(task, {**recipe, "dropout": 0.0}).eval()
    adapter = source(config, task)
    heads = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter.heads.items()}
    for name, head in heads.items():
        model.get_parameter(name).data.copy_(head)
    weights = {module: model.get_submodule(module).weight.data.clone() for module in adapter.specs}
    splits = {
        "test": text.test_rows(task, recipe["test_rows"]),
        "development": text.train_rows(task, recipe["development_rows"], 0),
    }
    rows = {name: sorted(text.encoded(split, recipe["max_length"]), key=text.length) for name, split in splits.items()}
    return Bench(text.in_half(model.requires_grad_(False)), weights, rows, text.metric(task))


def dense(adapter: Adapter) -> Updates:
    return {module: factors.scaling * factors.up @ factors.down for module, factors in adapter.modules.items()}


def with_random_others(adapters: list[Adapter], kept: int) -> list[Adapter]:
    """Return random adapters of the same ranks and norms in the place of all but one."""
    return [
        adapter
        if place == kept
        else from_factors(
            adapter.name,
            {module: random_update(factors, 0, f"{module} {place}") for module, factors in adapter.modules.items()},
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
    adapters = [source(config, task) for task in config["group"]]
    own = [each.score(dense(adapter), 1.0, "test") for each, adapter in zip(benches, adapters, strict=True)]
    updates = updates_by_task(config, adapters)
    pairs = list(zip(benches, updates, strict=True))
    by_scale = {
        scale: fmean(each.score(update, scale, "development") for each, update in pairs)
        for scale in config["recipe"]["scales"]
    }
    best = max(by_scale, key=lambda scale: by_scale[scale])
    at_best = [each.score(update, best, "test") for each, update in pairs]
    at_one = [each.score(update, 1.0, "test") for each, update in pairs]
    return {
        "test": {
            "metric": "accuracy",
            "own": own,
            "scale": best,
            "scores": at_best,
            "scores_at_scale_1": at_one,
            "score": fmean(score / alone for score, alone in zip(at_best, own, strict=True)),
            "score_at_scale_1": fmean(score / alone for score, alone in zip(at_one, own, strict=True)),
        }
    }


def groups(config: Json) -> Iterator[Job]:
    """Yield every method on every group of tasks."""
    spec, shared = config["groups"], {name: config[name] for name in ("recipe", "sources")}
    for size in spec["sizes"]:
        for draw in spec["draws"]:
            drawn = sorted(random.Random(f"merging {size} {draw}").sample(config["sources"]["tasks"], size))
            for name, method in config["methods"].items():
                fields = {key: value for key, value in method.items() if key != "label"}
                job = {**shared, "name": name, "method": fields, "group": drawn, "draw": draw}
                yield Job(f"merging/groups/{name}--{size}--{draw}", job, functools.partial(run))


STAGES = {"groups": groups}


def blocks(config: Json) -> Mapping[str, Any]:
    """Return functions that write the blocks of the pages, by their names."""
    return {"merging-groups": lambda: groups_table(config)}


def groups_table(config: Json) -> str:
    """Write the mean normalised accuracy of each method by the number of adapters."""
    found: dict[tuple[str, int], list[Json]] = {}
    for record in records.of("merging/groups"):
        job = records.config_of(record)
        found.setdefault((job["name"], len(job["group"])), []).append(record["test"])
    if not found:
        return "Not run yet: `python experiments/run.py merging groups`."
    rows = []
    for name, method in config["methods"].items():
        cells = []
        for size in config["groups"]["sizes"]:
            tests = found.get((name, size), [])
            cells.append(f"{100 * fmean(test['score'] for test in tests):.1f}" if tests else "–")
            cells.append(f"{100 * fmean(test['score_at_scale_1'] for test in tests):.1f}" if tests else "–")
        rows.append([method["label"], *cells])
    header = ["", *(cell for size in config["groups"]["sizes"] for cell in (f"{size} adapters", "scale 1"))]
    recipe = config["recipe"]
    return (
        f"{table(header, rows)}\n\nAccuracy on each task of a group, with its own head, as a share of that of its own "
        f"adapter; mean over tasks and {len(config['groups']['draws'])} groups of each size, {recipe['test_rows']} "
        f"test rows a task, merges of rank {recipe['rank']} but for those on weights. The scale of a merge is the best "
        f"of {', '.join(map(str, recipe['scales']))} on {recipe['development_rows']} training rows a task. "
        f"{records.source_line('merging/groups')}"
    )
