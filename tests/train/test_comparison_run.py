"""One training with scores on the way: points where they are due, what is said of it, and the same twice."""

import math

import numpy as np
import pytest
import torch

import tiny
import trainable
from eigenlorax.errors import NonFiniteError
from eigenlorax.train import comparison_run, examples, methods, metrics
from eigenlorax.train.comparison_run import Recipe, RunData
from eigenlorax.train.methods import CommonConfig

pytestmark = pytest.mark.slow

QUICK = {"learning_rate": 0.02, "head_learning_rate": 0.02, "epochs": 2.0, "batch_size": 8, "evaluations": 3}
LABELS = ("bad", "good", "odd")


@pytest.fixture(scope="module")
def tokenizer():
    made = trainable.make_tokenizer()
    examples.prepare_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def encoded(tokenizer):
    def rows(n, seed):
        found = trainable.keyword_rows(n, seed, LABELS, words=9)
        ids = tokenizer([row["text"] for row in found])
        return [
            {**{name: ids[name][place] for name in ids}, "labels": LABELS.index(row["label"])}
            for place, row in enumerate(found)
        ]

    return rows(44, 0), rows(37, 1)


def run(encoded, tokenizer, seed=3, **changed):
    rows, test = encoded
    torch.manual_seed(seed)
    base = tiny.make_bert(len(LABELS))
    model = methods.apply_method("lora", {"r": 2}, base, CommonConfig(["query", "value"], "SEQ_CLS"))
    recipe = Recipe(**{**QUICK, **changed})
    return model, comparison_run.run(
        model,
        RunData(rows, test[:11], test, examples.collator("text-classification", tokenizer)),
        recipe,
        seed=seed,
    )


@pytest.fixture(scope="module")
def done(encoded, tokenizer):
    return run(encoded, tokenizer)


def test_points_are_equal_steps_apart_and_the_last_is_the_end(done):
    _, found = done
    # two epochs of six steps, a third of them each
    assert [point.step for point in found.checkpoints] == [4, 8, 12]
    assert [point.epoch for point in found.checkpoints] == pytest.approx([4 / 6, 8 / 6, 2.0])
    assert all(math.isfinite(point.loss) for point in found.checkpoints)
    seconds = [point.seconds for point in found.checkpoints]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == found.seconds


def test_predictions_are_in_the_order_of_the_rows(done, encoded):
    model, found = done
    _, test = encoded
    assert len({len(row["input_ids"]) for row in test}) > 5
    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in test]
    np.testing.assert_allclose(found.predictions, np.stack(alone), atol=1e-4)
    wanted = np.array([row["labels"] for row in test])
    assert found.score == metrics.accuracy(found.predictions, wanted)
    assert found.checkpoints[-1].score == metrics.accuracy(found.predictions[:11], wanted[:11])


def test_numbers_are_counted(done):
    _, found = done
    assert (found.parameters, found.head_parameters) == (4 * 2 * 2 * tiny.IN, 3 * tiny.IN + 3)


def test_the_same_seed_gives_the_same_twice_and_another_one_does_not(done, encoded, tokenizer):
    _, found = done
    _, again = run(encoded, tokenizer)
    assert (again.predictions == found.predictions).all()
    assert [(point.loss, point.score) for point in again.checkpoints] == [
        (one.loss, one.score) for one in found.checkpoints
    ]
    _, other = run(encoded, tokenizer, seed=4)
    assert (other.predictions != found.predictions).any()


def test_at_a_rate_of_zero_everything_stays(encoded, tokenizer):
    _, found = run(encoded, tokenizer, learning_rate=0.0, head_learning_rate=0.0, evaluations=2)
    _, test = encoded
    with torch.inference_mode():
        base = tiny.make_bert(len(LABELS))
        wanted = np.stack([base(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in test])
    np.testing.assert_allclose(found.predictions, wanted, atol=1e-5)
    assert len({point.score for point in found.checkpoints}) == 1


def test_heads_have_a_rate_of_their_own(encoded, tokenizer):
    model, _ = run(encoded, tokenizer, learning_rate=0.0, epochs=0.5, evaluations=1)
    fresh = tiny.make_bert(len(LABELS)).classifier.weight
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert (head != fresh).any()
    assert all(not one.any() for name, one in model.named_parameters() if "lora_B" in name)


def test_a_training_that_diverges_is_an_error(encoded, tokenizer):
    with pytest.raises(NonFiniteError, match="the training diverged"):
        run(encoded, tokenizer, learning_rate=1e30, head_learning_rate=1e30, epochs=1.0, evaluations=1)
