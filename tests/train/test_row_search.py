"""Search by loss: the losses of `evaluate`, in order, and adapters that the rows do not fit."""

import json

import pytest
import torch

import eigenlorax as ex
import tiny
import trainable
from eigenlorax.errors import FormatError, OptionError
from eigenlorax.train.evaluate import evaluate
from planted import random_factors

pytestmark = pytest.mark.slow


def classifier(name, n, seed, base, **fields):
    """An adapter for n classes, with a random head."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        module: random_factors(tiny.RANK, tiny.IN, tiny.IN, seed=seed + place, dtype=torch.float32, size=0.5)
        for place, module in enumerate(tiny.BERT)
    }
    heads = {
        "base_model.model.classifier.weight": torch.randn(n, tiny.IN, generator=generator),
        "base_model.model.classifier.bias": torch.randn(n, generator=generator),
    }
    return ex.from_factors(name, modules, heads=heads, base_model=base, **fields)


@pytest.fixture
def classifiers(place):
    """The pack with adapters `two-a` and `two-b` for two classes, `three` for three, and four without a head."""
    base = ex.Pack.open(place / "pack").base_model
    with ex.Pack.edit(place / "pack") as pack:
        for name, n, seed in (("two-a", 2, 50), ("two-b", 2, 60), ("three", 3, 70)):
            pack.add(classifier(name, n, seed, base), warn_above=1)
    return place / "pack"


def test_losses_are_those_of_evaluate_in_order(place, classifiers):
    task = "text-classification"
    options = {"task": task, "labels": ["bad", "good"]}
    found = ex.rank_by_loss(ex.Pack.open(classifiers), place / "eval.jsonl", **options)
    losses = {}
    for name in ("two-a", "two-b"):
        figures = evaluate(classifiers, name, place / "eval.jsonl", **options).figures
        losses[name] = figures.loss
        (match,) = [match for match in found.matches if match.name == name]
        assert match.reason.startswith(f"Mean loss per row {figures.loss:.4f}, accuracy {figures.accuracy:.4f}; ")
    assert {match.name: match.score for match in found.matches} == pytest.approx(losses, abs=1e-5)
    assert [match.name for match in found.matches] == sorted(losses, key=losses.get)
    assert (found.task, found.rows) == (task, 57)
    assert sorted(found.skipped) == ["a0", "a1", "a2", "a3", "three"]
    assert "has no head" in found.skipped["a0"]
    assert found.skipped["three"] == "2 labels are named, and the adapter's head has 3: bad, good."
    assert (
        ex.rank_by_loss(ex.Pack.open(classifiers), place / "eval.jsonl", **options, top=1).matches == found.matches[:1]
    )


def test_heads_of_several_sizes(place, classifiers):
    """Labels that are numbers fit every head with as many classes, or more."""
    rows = [{**row, "label": ("bad", "good").index(row["label"])} for row in trainable.keyword_rows(23, seed=3)]
    trainable.write_jsonl(place / "rows.jsonl", rows)
    found = ex.rank_by_loss(ex.Pack.open(classifiers), place / "rows.jsonl", task="text-classification")
    expected = {
        name: evaluate(classifiers, name, place / "rows.jsonl", task="text-classification").figures.loss
        for name in ("two-a", "two-b", "three")
    }
    assert {match.name: match.score for match in found.matches} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{"n_components": 9}, {"max_error": 0.1}], ids=["floats", "coded"])
def test_language_models_beside_the_base_model(place, options):
    base = ex.Pack.open(place / "lm-pack").base_model
    _, adapters = tiny.make_pack(tiny.GPT2, n=3)
    zero = {m: ex.LoRAFactors(f.down, torch.zeros_like(f.up), f.scaling) for m, f in adapters[0].modules.items()}
    with pytest.warns(match="untrained"):
        pack = ex.fit([*adapters, ex.from_factors("zero", zero)], warn_above=1, **options)
    pack.base_model = base
    path = pack.save(place / "new-pack")
    found = ex.rank_by_loss(ex.Pack.open(path), place / "lm-eval.jsonl", task="causal-lm")
    losses = {name: evaluate(path, name, place / "lm-eval.jsonl", task="causal-lm").figures.loss for name in pack.names}
    assert {match.name: match.score for match in found.matches} == pytest.approx(losses, abs=1e-5)
    for match in found.matches:
        assert match.reason == (
            f"Mean loss per token {match.score:.4f}; {losses['zero']:.4f} without its update, as the base model."
        )


def test_tasks_of_the_adapters(place):
    pack = ex.Pack.open(place / "pack")
    base = pack.base_model
    with pytest.raises(
        OptionError, match=r"no adapter of the pack can be evaluated on these rows. a3: .*--task.*3 more"
    ):
        ex.rank_by_loss(pack, place / "eval.jsonl")
    for name, task, seed in (("c", "SEQ_CLS", 40), ("d", "CAUSAL_LM", 50)):
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "task_type": task, "target_modules": ["query", "value"]}
        pack.add(classifier(name, 2, seed, base, source_config=json.dumps(config)), warn_above=1)
    with pytest.raises(OptionError, match="adapters for causal-lm and text-classification, whose losses cannot"):
        ex.rank_by_loss(pack, place / "eval.jsonl")
    pack.remove("d")
    found = ex.rank_by_loss(pack, place / "eval.jsonl", labels=["bad", "good"])
    assert [match.name for match in found.matches] == ["c"]
    assert found.task == "text-classification"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"task": "chess"}, OptionError, "no task 'chess'"),
        ({"top": 0}, OptionError, "at least 1, got 0"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1"),
        ({"labels": ["bad", "bad"]}, OptionError, "'bad' appears twice"),
        ({"rows": "none.jsonl"}, FormatError, "does not exist"),
        ({"labels": ["a", "b", "c", "d"]}, OptionError, "no adapter of the pack can be evaluated"),
    ],
)
def test_what_is_refused(place, classifiers, options, error, match):
    arguments = {"task": "text-classification", **options}
    with pytest.raises(error, match=match):
        ex.rank_by_loss(ex.Pack.open(classifiers), place / arguments.pop("rows", "eval.jsonl"), **arguments)
