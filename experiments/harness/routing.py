"""How often a router finds the adapter of a text, and what is answered then, by classifiers and by a language model."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

import eigenlorax as ex

from . import language, records, text, training
from .jobs import Job
from .metrics import row_losses
from .pages import table
from .text import Rows

Json = dict[str, Any]
Choices = Mapping[str, Sequence[str | None]]
"""Adapter of each text by the name of the task that the text is of; None is the base model."""
BATCH = 25


@dataclass(frozen=True)
class Texts:
    """Rows of the tasks of the adapters, and texts of no adapter.

    learn, calibrate, test: Rows by task. others, others_test: Texts of the calibration and of tests. new: Texts by
    task that the calibration has not seen.
    """

    learn: Mapping[str, Rows]
    calibrate: Mapping[str, Rows]
    test: Mapping[str, Rows]
    others: list[str]
    others_test: list[str]
    new: Mapping[str, list[str]]


def texts_of(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


def by_name(rows: Mapping[str, Rows]) -> dict[str, list[str]]:
    """Return the texts of each task."""
    return {name: texts_of(each) for name, each in rows.items()}


def drawn(config: Json, name: str, split: str, n: int) -> Rows:
    """Return rows of a task or texts of a kind, the same in every run."""
    if config["kind"] == "language":
        rows = [{"text": each} for each in language.texts_of(name, split) if len(each) > 20]
    else:
        rows = list(text.rows_of(name, split))
    return random.Random(f"routing {name} {split}").sample(rows, min(n, len(rows)))


def read_texts(config: Json) -> Texts:
    """Draw all texts of the experiment."""
    learn, n_others = config["learn"], config["others_rows"]
    training_rows = {name: drawn(config, name, "train", learn + config["calibrate"]) for name in config["names"]}

    def others(names: Sequence[str], split: str) -> list[str]:
        return [each for name in names for each in texts_of(drawn(config, name, split, n_others))]

    return Texts(
        learn={name: rows[:learn] for name, rows in training_rows.items()},
        calibrate={name: rows[learn:] for name, rows in training_rows.items()},
        test={name: drawn(config, name, "test", config["test"]) for name in config["names"]},
        others=others(config["others"], "train"),
        others_test=others(config["others"], "test"),
        new={name: others([name], "test") for name in config["new_others"]},
    )


class Answers(Protocol):
    """What models answer: the mean score over tasks. Higher is better."""

    def routed(self, chosen: Choices) -> float:
        """Return the score with the adapter that was chosen for each text."""

    def same(self) -> dict[str, float]:
        """Return the scores of updates that are the same for every text, with the heads of the tasks given."""


@dataclass(frozen=True)
class Setting:
    """The adapters and their model. mean: The mean of the adapters, of any rank."""

    config: Json
    pack: ex.Pack
    bank: ex.AdapterBank
    model: Any
    tokenizer: Any
    test: Mapping[str, Rows]

    @functools.cached_property
    def mean(self) -> ex.Adapter:
        return self.pack.merge(self.config["names"], "mean", rank=self.config["k"]).adapter

    def tokens(self, rows: Rows) -> Iterator[Any]:
        """Yield padded batches of texts."""
        for start in range(0, len(rows), BATCH):
            batch = texts_of(rows[start : start + BATCH])
            length = self.config["max_length"]
            yield self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")


@dataclass(frozen=True)
class ClassifierAnswers:
    """Classifiers: the share of texts whose label is named. The base model without a head names none."""

    setting: Setting

    def routed(self, chosen: Choices) -> float:
        """Return the mean accuracy with the adapter that was chosen for each text, and its head."""
        accuracies = []
        for name, rows in self.setting.test.items():
            logits = self._logits(rows, chosen[name])
            named = [
                None if adapter is None else text.meta(adapter)["labels"][int(row.argmax())]
                for adapter, row in zip(chosen[name], logits, strict=True)
            ]
            labels = text.meta(name)["labels"]
            accuracies.append(fmean(said == labels[row["label"]] for said, row in zip(named, rows, strict=True)))
        return fmean(accuracies)

    def same(self) -> dict[str, float]:
        """Return the mean accuracy of updates that are the same for every text, each task with its own head."""
        names, found = self.setting.config["names"], dict[str, list[float]]()
        for name, rows in self.setting.test.items():
            model = self._with_head(name)
            bank = ex.AdapterBank(model, self.setting.pack)
            found.setdefault("base model", []).append(self._accuracy(model, rows))
            with bank.mixing(names, top=self.setting.config["arrow_top"]):
                found.setdefault("Arrow", []).append(self._accuracy(model, rows))
            merged = self._with_head(name)
            add_update(merged, self.setting.mean)
            found.setdefault("mean adapter", []).append(self._accuracy(merged, rows))
        return {f"{what}, head given": fmean(scores) for what, scores in found.items()}

    @torch.inference_mode()
    def _logits(self, rows: Rows, chosen: Sequence[str | None]) -> list[Tensor]:
        logits: list[Tensor] = []
        for tokens in self.setting.tokens(rows):
            names = list(chosen[len(logits) : len(logits) + len(tokens["input_ids"])])
            logits += list(self.setting.bank(**tokens, adapter_names=names).logits)
        return logits

    def _with_head(self, name: str) -> Any:
        """Return the base model with the head of an adapter."""
        from transformers import AutoModelForSequenceClassification

        heads = {key.removeprefix("base_model.model."): head for key, head in self.setting.pack[name].heads.items()}
        model = AutoModelForSequenceClassification.from_pretrained(text.base_model(), num_labels=text.n_labels(name))
        for key, head in heads.items():
            model.get_parameter(key).data.copy_(head)
        return model.eval()

    @torch.inference_mode()
    def _accuracy(self, model: Any, rows: Rows) -> float:
        answers = torch.cat([model(**tokens).logits.argmax(-1) for tokens in self.setting.tokens(rows)])
        return float((answers == torch.tensor([row["label"] for row in rows])).double().mean())


@dataclass(frozen=True)
class LanguageAnswers:
    """A language model: the mean log-likelihood of a token, of texts first and of kinds then."""

    setting: Setting

    def routed(self, chosen: Choices) -> float:
        """Return the mean log-likelihood with the adapter that was chosen for each text."""
        return fmean(self._kind(name, chosen[name]) for name in self.setting.test)

    def same(self) -> dict[str, float]:
        """Return the mean log-likelihoods of updates that are the same for every text."""
        setting, nobody = self.setting, {name: [None] * len(rows) for name, rows in self.setting.test.items()}
        found = {"base model": self.routed(nobody)}
        with setting.bank.mixing(setting.config["names"], top=setting.config["arrow_top"]):
            found["Arrow"] = fmean(self._kind(name, None) for name in setting.test)
        add_update(setting.model, setting.mean)
        found["mean adapter"] = self.routed(nobody)
        return found

    @torch.inference_mode()
    def _kind(self, name: str, chosen: Sequence[str | None] | None) -> float:
        losses: list[float] = []
        for tokens in self.setting.tokens(self.setting.test[name]):
            places = slice(len(losses), len(losses) + len(tokens["input_ids"]))
            if chosen is None:
                logits = self.setting.model(**tokens).logits
            else:
                logits = self.setting.bank(**tokens, adapter_names=list(chosen[places])).logits
            labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, language.IGNORED)
            losses += row_losses(logits, labels).tolist()
        return -fmean(losses)


def add_update(model: Any, adapter: ex.Adapter) -> None:
    """Add an adapter's update to the weights of a model."""
    for module, factors in adapter.modules.items():
        model.get_submodule(module).weight.data += factors.scaling * factors.up @ factors.down


def embeddings(setting: Setting, rows: Rows) -> Tensor:
    """Return the normalised mean of the base model's last hidden states of each text."""
    vectors = []
    for tokens in setting.tokens(rows):
        with torch.inference_mode():
            hidden = setting.model(**tokens, output_hidden_states=True).hidden_states[-1]
        mask = tokens["attention_mask"][..., None]
        vectors.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)


def nearest(setting: Setting, learn: Mapping[str, Rows]) -> Choices:
    """Return the task of the nearest text by embedding, for each test text."""
    owners = [name for name, rows in learn.items() for _ in rows]
    learned = embeddings(setting, [row for rows in learn.values() for row in rows])
    return {
        name: [owners[int(place)] for place in (embeddings(setting, rows) @ learned.mT).argmax(-1)]
        for name, rows in setting.test.items()
    }


def make_setting(config: Json, test: Mapping[str, Rows]) -> Setting:
    """Load the model, and fit a pack to the adapters."""
    suffix = f"-{config['set']}" if "set" in config else ""
    sources = {name: training.adapter_folder(config["experiment"], f"{name}{suffix}") for name in config["names"]}
    pack = ex.fit(sources, n_components=config["k"], dtype="float32", warn_above=1.0)
    if config["kind"] == "language":
        model, tokenizer = language.new_base().eval(), language.tokenizer()
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    else:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(text.base_model()).eval()
        tokenizer = text.tokenizer()
    return Setting(config, pack, ex.AdapterBank(model, pack), model, tokenizer, test)


def run(config: Json) -> Json:
    """Calibrate a router, and score its choices and the answers beside those of other choices."""
    texts = read_texts(config)
    setting = make_setting(config, texts.test)
    names = config["names"]
    router = ex.Router.from_pack(setting.pack, names, model=setting.bank, tokenizer=setting.tokenizer)
    test = by_name(texts.test)
    uncalibrated = router.evaluate(test).signals["prototypes"]
    router.add_centroids(by_name(texts.learn))
    router.train(by_name(texts.learn))
    router.calibrate(by_name(texts.calibrate), texts.others)
    figures = router.evaluate(test)
    assert router.calibration is not None

    routes = {name: router.route(rows) for name, rows in test.items()}
    best = {
        name: [max(route.scores, key=route.scores.__getitem__) for route in found] for name, found in routes.items()
    }
    chosen = {name: [route.adapter for route in found] for name, found in routes.items()}
    neighbours = nearest(setting, texts.learn)
    answers: Answers = (LanguageAnswers if config["kind"] == "language" else ClassifierAnswers)(setting)

    def share(picks: Choices) -> float:
        return fmean(fmean(adapter == owner for adapter in found) for owner, found in picks.items())

    def routed_share(sentences: Sequence[str]) -> float:
        return fmean(route.adapter is not None for route in router.route(list(sentences)))

    scores = {
        "oracle": answers.routed({name: [name] * len(rows) for name, rows in test.items()}),
        "router, without abstention": answers.routed(best),
        "router": answers.routed(chosen),
        "nearest neighbour": answers.routed(neighbours),
    }
    return {
        "test": {
            "top1": {
                "prototypes, without calibration": uncalibrated,
                **figures.signals,
                "nearest neighbour of the embedding": share(neighbours),
                "calibrated": figures.accuracy,
            },
            "weights": dict(router.calibration.weights),
            "reached": share(chosen),
            "abstentions": figures.abstentions,
            "false_accepts": routed_share(texts.others_test),
            "false_accepts_new": {name: routed_share(each) for name, each in texts.new.items()},
            "scores": {**scores, **answers.same()},
        }
    }


def stage(config: Json, name: str) -> Iterator[Job]:
    """Yield the one run of a stage."""
    yield Job(f"routing/{name}/all", config[name], run)


STAGES: dict[str, Callable[[Json], Iterator[Job]]] = {
    name: functools.partial(stage, name=name) for name in ("tasks", "texts")
}


def blocks(config: Json) -> Mapping[str, Callable[[], str]]:
    """Return functions that write the blocks of the pages, by their names."""
    return {f"routing-{name}": functools.partial(markdown, config[name], name) for name in STAGES}


def markdown(spec: Json, name: str) -> str:
    """Write which adapter is chosen, what is answered then, and which texts of no adapter are routed."""
    test = records.of(f"routing/{name}")[0]["test"]
    choices = [[what, f"{value:.3f}"] for what, value in test["top1"].items()]
    answers = [[what, f"{value:.3f}"] for what, value in test["scores"].items()]
    weights = ", ".join(f"{signal} {weight:.2f}" for signal, weight in test["weights"].items() if weight)
    new = ", ".join(f"{task} {value:.2f}" for task, value in test["false_accepts_new"].items())
    score = "log-likelihood, nats a token" if spec["kind"] == "language" else "accuracy, mean over tasks"
    wrong = "" if spec["kind"] == "language" else ", which counts as a wrong answer"
    return (
        f"{table(('adapter found by', 'share of the test texts'), choices)}\n\n{table(('answers', score), answers)}\n\n"
        f"{len(spec['names'])} adapters; {spec['learn']} texts of each to learn from, {spec['calibrate']} to calibrate "
        f"on, {spec['test']} to test. Calibrated weights: {weights}. With the threshold {test['reached']:.2f} of the "
        f"test texts reach their adapter and {test['abstentions']:.2f} go to the base model{wrong}. Of texts of no "
        f"adapter, routed: {test['false_accepts']:.2f} on the data sets of the calibration, and of others: {new}. "
        f"{records.source_line(f'routing/{name}')}"
    )
