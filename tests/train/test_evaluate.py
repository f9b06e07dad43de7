"""Evaluation: equal to a count by hand, and clear about what it cannot count."""

import json
import math
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
import tiny
import trainable
from eigenlorax.errors import AdapterNameError, FormatError, NonFiniteError, OptionError, PackMissingError
from eigenlorax.train.evaluate import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture
def classifier(place):
    """The pack with an adapter `c` for three classes: random coefficients and a random head."""
    opened = ex.Pack.open(place / "pack")
    generator = torch.Generator().manual_seed(2)
    lora = opened.adapter("a1")
    with ex.Pack.edit(place / "pack") as edited:
        edited.add(
            ex.from_factors(
                "c",
                dict(lora.modules.items()),
                heads={
                    "base_model.model.classifier.weight": torch.randn(3, tiny.IN, generator=generator),
                    "base_model.model.classifier.bias": torch.randn(3, generator=generator) * 0.1,
                },
                base_model=opened.base_model,
            )
        )
    return place / "pack"


@pytest.fixture
def rows(place):
    """Three classes, of which one is missing; lengths differ, so that batches are padded."""
    found = [{**row, "label": index % 5 % 2 * 2} for index, row in enumerate(trainable.keyword_rows(31, seed=4))]
    trainable.write_jsonl(place / "rows.jsonl", found)
    return found


class TestClassification:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_equals_a_count_by_hand(self, place, classifier, rows, batch_size):
        got = evaluate(classifier, "c", place / "rows.jsonl", task="text-classification", batch_size=batch_size)
        base = ex.Pack.open(classifier).base_model
        tokenizer = AutoTokenizer.from_pretrained(base)
        # what comes out of the pack as an ordinary LoRA, a row at a time
        lora = ex.Pack.open(classifier).export(place / "loras", ["c"])["c"]
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        model = PeftModel.from_pretrained(model, lora)
        model.base_model.model.classifier.weight.data = (
            ex.Pack.open(classifier).packed("c").heads["base_model.model.classifier.weight"]
        )
        model.base_model.model.classifier.bias.data = (
            ex.Pack.open(classifier).packed("c").heads["base_model.model.classifier.bias"]
        )
        right, loss, confusion = 0, 0.0, [[0] * 3 for _ in range(3)]
        for row in rows:
            logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits[0].detach()
            right += int(logits.argmax()) == row["label"]
            loss -= float(logits.double().log_softmax(dim=0)[row["label"]])
            confusion[row["label"]][int(logits.argmax())] += 1
        assert 0 < right < 31
        figures = got.figures
        assert (figures.rows, figures.accuracy, figures.confusion) == (31, right / 31, confusion)
        assert figures.loss == pytest.approx(loss / 31, abs=1e-6)
        assert figures.majority == max(sum(line) for line in confusion) / 31
        assert (got.name, got.task, got.model) == ("c", "text-classification", base)

    def test_names_of_classes(self, place, classifier, rows):
        numbers = evaluate(classifier, "c", place / "rows.jsonl", task="text-classification").figures
        names = ["good", "bad", "ugly"]
        named = trainable.write_jsonl(place / "named.jsonl", [{**row, "label": names[row["label"]]} for row in rows])
        with pytest.raises(
            OptionError, match="labels such as 'good', and an adapter does not store .* its 3 .*--labels"
        ):
            evaluate(classifier, "c", named, task="text-classification")
        got = evaluate(classifier, "c", named, task="text-classification", labels=names).figures
        assert (got.confusion, got.labels) == (numbers.confusion, names)
        # numbers are numbers whatever the classes are called
        got = evaluate(classifier, "c", place / "rows.jsonl", task="text-classification", labels=names).figures
        assert got.confusion == numbers.confusion
        for labels, match in (
            (["good", "bad"], "2 labels are named, and the adapter's head has 3"),
            (["good", "bad", "bad"], "good, bad, bad are not names of classes: 'bad' appears twice"),
            (["good", "", "bad"], "are not names of classes: one of them is empty"),
        ):
            with pytest.raises(OptionError, match=match):
                evaluate(classifier, "c", named, task="text-classification", labels=labels)

    def test_many_classes_have_no_table(self, place):
        with ex.Pack.edit(place / "pack") as edited:
            lora = edited.adapter("a1")
            heads = {"base_model.model.classifier.weight": torch.randn(21, tiny.IN)}
            edited.add(ex.from_factors("many", dict(lora.modules.items()), heads=heads, base_model=edited.base_model))
        trainable.write_jsonl(place / "rows.jsonl", [{"text": "w1", "label": 20}, {"text": "w2 w3", "label": 0}])
        figures = evaluate(place / "pack", "many", place / "rows.jsonl", task="text-classification").figures
        assert figures.confusion is None
        assert len(figures.labels) == 21

    @pytest.mark.parametrize(
        ("name", "options", "error", "match"),
        [
            ("gone", {}, AdapterNameError, "no adapter named 'gone' in the pack. It has: a0, a1, a2, a3, c"),
            ("c", {}, OptionError, "adapter 'c' has the task type None. Pass one of text-classification, causal-lm"),
            ("c", {"task": "chess"}, OptionError, "no task 'chess'"),
            ("c", {"batch_size": 0}, OptionError, "batch_size must be at least 1"),
            ("c", {"max_length": 0}, OptionError, "max_length must be at least 2, got 0"),
            (
                "c",
                {"task": "causal-lm"},
                OptionError,
                "'c' has a head, classifier.bias, that a bert model for causal-lm",
            ),
            ("a1", {"task": "text-classification"}, AdapterNameError, "adapter 'a1' has no head"),
            ("c", {"task": "text-classification", "rows": "lm-eval.jsonl"}, OptionError, "no column 'label'"),
            ("c", {"task": "text-classification", "rows": "high.jsonl"}, FormatError, "label 3 is not one of the 3 cl"),
            ("c", {"task": "text-classification", "max_length": 90}, OptionError, "more than the 32 tokens"),
        ],
    )
    def test_what_cannot_be_counted(self, place, classifier, rows, name, options, error, match):
        trainable.write_jsonl(place / "high.jsonl", [{"text": "w1", "label": 3}])
        file = place / options.pop("rows", "rows.jsonl")
        with pytest.raises(error, match=re.escape(match)):
            evaluate(classifier, name, file, **options)

    def test_no_pack(self, place):
        with pytest.raises(PackMissingError, match="nowhere is not a pack"):
            evaluate(place / "nowhere", "c", place / "eval.jsonl")

    def test_the_head_of_another_model(self, place, rows):
        with ex.Pack.edit(place / "pack") as edited:
            lora = edited.adapter("a1")
            heads = {"base_model.model.classifier.weight": torch.randn(3, tiny.IN + 1)}
            edited.add(ex.from_factors("odd", dict(lora.modules.items()), heads=heads, base_model=edited.base_model))
        with pytest.raises(FormatError, match=r"classifier.weight of shape \(3, 25\), does not fit a bert model"):
            evaluate(place / "pack", "odd", place / "rows.jsonl", task="text-classification")


class TestLanguageModelling:
    @pytest.fixture
    def texts(self, place):
        return [json.loads(line)["text"] for line in (place / "lm-eval.jsonl").read_text().splitlines()]

    @pytest.mark.parametrize("batch_size", [1, 6, 64])
    def test_equals_a_count_by_hand(self, place, texts, batch_size):
        got = evaluate(place / "lm-pack", "a2", place / "lm-eval.jsonl", task="causal-lm", batch_size=batch_size)
        base = ex.Pack.open(place / "lm-pack").base_model
        tokenizer = AutoTokenizer.from_pretrained(base)
        lora = ex.Pack.open(place / "lm-pack").export(place / "loras", ["a2"])["a2"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
        loss, tokens = 0.0, 0
        for text in texts:
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            shares = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(dim=-1)
            for position, token in enumerate(ids[1:]):
                loss -= float(shares[position, token])
                tokens += 1
        assert (got.figures.rows, got.figures.tokens) == (29, tokens)
        assert got.figures.loss == pytest.approx(loss / tokens, abs=1e-6)
        assert got.figures.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)

    def test_a_completion(self, place, texts):
        pairs = [{"prompt": text[:5], "completion": text[5:]} for text in texts]
        trainable.write_jsonl(place / "pairs.jsonl", pairs)
        whole = evaluate(place / "lm-pack", "a2", place / "lm-eval.jsonl", task="causal-lm").figures
        part = evaluate(place / "lm-pack", "a2", place / "pairs.jsonl", task="causal-lm").figures
        # three letters of each text are given, of which the last two would have been predicted
        assert part.tokens == whole.tokens - 2 * len(texts)

    def test_a_loss_that_is_no_number(self, place):
        with ex.Pack.edit(place / "lm-pack") as edited:
            lora = edited.adapter("a1")
            modules = {
                name: type(one)(one.down * 1e18, one.up * 1e18, one.scaling) for name, one in lora.modules.items()
            }
            edited.add(ex.from_factors("wild", modules, base_model=edited.base_model))
        with pytest.raises(NonFiniteError, match="loss on these rows is NaN or Inf"):
            evaluate(place / "lm-pack", "wild", place / "lm-eval.jsonl", task="causal-lm")
