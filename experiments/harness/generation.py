"""A generation task: the language model writes the name of a label after a text, and must write all of it."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eigenlorax.train.comparison_run import RunData
from eigenlorax.train.examples import IGNORED

from . import language, metrics, text, training
from . import rates as learning
from .jobs import Job

Json = dict[str, Any]
ANSWER = "\nAnswer:"


def encoded(rows: list[Json], labels: list[str], max_length: int) -> list[Json]:
    """Return the tokens of prompts and answers. Only those of the answer and of the line break after it are predicted.

    labels: names of the labels, by their numbers. max_length: of the text, in tokens; longer ones lose their end.
    """
    tokenizer, examples = language.tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["text"])["input_ids"][:max_length] + tokenizer(ANSWER)["input_ids"]
        answer = tokenizer(f" {labels[row['label']]}\n")["input_ids"]
        examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return examples


def collate(rows: list[Json]) -> dict[str, Tensor]:
    """Pad on the right. The last tokens of a row see nothing of the padding, because attention is causal."""

    def padded(sequences: list[list[int]], filling: int) -> Tensor:
        length = max(map(len, sequences))
        return torch.tensor([[*sequence, *[filling] * (length - len(sequence))] for sequence in sequences])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def matches(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each row whose answer greedy decoding would write, and 0 for the others.

    Greedy decoding writes the answer exactly where each token of it is the likeliest after the tokens before.
    """
    next_tokens = labels[:, 1:]
    right = (logits[:, :-1].argmax(-1) == next_tokens) | (next_tokens == IGNORED)
    return right.all(-1).float()


def train(experiment: str, config: Json) -> Json:
    """Do one run on a generation task: a method, a learning rate, a seed. experiment: the one of the pack's sources."""
    task, recipe = config["task"], config["recipe"]
    pack = training.pack_of(experiment, config["pack"]) if config["pack"] else None
    model = language.make_model(config, pack)
    labels = text.meta(task)["labels"]
    rows = encoded(text.train_rows(task, recipe["rows"], config["seed"]), labels, recipe["max_length"])
    test = encoded(text.test_rows(task, recipe["test_rows"]), labels, recipe["max_length"])
    test.sort(key=text.length)
    run_data = RunData(rows, test[: recipe["rows_on_the_way"]], test, collate, metrics.mean_matches, matches)
    run = training.train(text.in_half(model), run_data, config)
    return {
        "train_info": training.train_info(run, model, "exact match", lambda score: round(score, 5)),
        "test": {
            "metric": "exact match",
            "score": run.score,
            "rows": len(test),
            "resampled": language.record.resampled(metrics.mean_matches, run.predictions, np.zeros(len(test))),
        },
    }


def job(config: Json, stage: str, name: str, task: str, seed: int, rate: float) -> Job:
    """Return a training of a method on a generation task."""
    settings = language.method_config(config, name, task, seed, rate, config["generation"]["recipe"])
    return Job(f"{config['name']}/{stage}", settings, functools.partial(train, config["name"]))


def rates(config: Json) -> Iterator[Job]:
    """Yield every method at each of its learning rates on the development task."""
    spec = config["generation"]
    for name, method in config["methods"].items():
        for rate in method["rates"]:
            path = f"generation-rates/{name}--{spec['development']}--{rate:g}"
            yield job(config, path, name, spec["development"], config["development"]["seed"], rate)


def chosen_rate(config: Json, name: str) -> float:
    """Return the rate with the best score on the development task; of equals, the lowest."""
    means = learning.means(job for job in rates(config) if job.config["method"] == name)
    learning.check_edges(name, means)
    return learning.best(means)


def targets(config: Json) -> Iterator[Job]:
    """Yield every method on the generation task, at the rate that was chosen for it."""
    spec = config["generation"]
    for seed in config["targets"]["seeds"]:
        for name in config["methods"]:
            path = f"generation/{name}--{spec['task']}--{seed}"
            yield job(config, path, name, spec["task"], seed, chosen_rate(config, name))
