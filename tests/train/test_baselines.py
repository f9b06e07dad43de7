"""A result beside what needs no training: when it is better, and what becomes of an adapter that is not."""

import itertools
import json
import math
import os
import random
import re
import stat
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

import eigenlorax as ex
import trainable
from eigenlorax.errors import BaselineWarning, FormatError
from eigenlorax.train import baselines, data, evaluate, examples, figures, metrics, models, trainer
from eigenlorax.train.data import Labels
from eigenlorax.train.options import MAX_POINTS, MIN_STEPS, Columns, Training
from eigenlorax.train.train import CHECKPOINTS, train
from eigenlorax.train.training_record import RECORD

IDLE = {"learning_rate": 1e-9, "head_learning_rate": 1e-9, "epochs": 1.0, "rank": 3}
"""A training that learns nothing."""
QUICK = {"learning_rate": 0.1, "head_learning_rate": 0.1, "rank": 3}


def classify(place, **fields):
    return Training(**{"task": "text-classification", "train": place / "train.jsonl", **fields})


def model_language(place, **fields):
    return Training(**{"task": "causal-lm", "train": place / "lm-train.jsonl", **fields})


@pytest.mark.parametrize(
    ("right", "rows", "rate"),
    [
        (0, 3, 0.5),
        (3, 3, 0.5),
        (5, 9, 0.5),
        (5, 9, 0.6),
        (9, 9, 1.0),
        (0, 9, 1.0),
        (24, 120, 35 / 120),
        (700, 1000, 0.67),
    ],
)
def test_the_binomial_test(right, rows, rate):
    share = Fraction(rate)
    ways = (math.comb(rows, one) * share**one * (1 - share) ** (rows - one) for one in range(right, rows + 1))
    assert figures.binomial_test(right, rows, rate) == pytest.approx(float(sum(ways)), rel=1e-9)


def measured(pairs, metric=metrics.ACCURACY):
    """Figures of (class, answer)."""
    wanted, answers = map(np.array, zip(*pairs, strict=True))
    return figures.classification_figures(wanted, np.eye(3)[answers], 1.0, Labels(("a", "b", "c")), metric)


@pytest.mark.parametrize(
    ("pairs", "better"),
    [
        # all right, but so few that guessing does it as well
        ([(0, 0)] * 3 + [(1, 1)] * 2, False),
        ([(0, 0)] * 3 + [(1, 1)] * 3, True),
        # the most frequent class alone
        ([(0, 0)] * 60 + [(1, 0)] * 40, False),
        # as many right, other ones
        ([(0, 1)] * 10 + [(0, 0)] * 50 + [(1, 1)] * 10 + [(1, 0)] * 30, False),
        # more right, by a few rows and by many
        ([(0, 1)] * 27 + [(0, 0)] * 33 + [(1, 1)] * 32 + [(1, 0)] * 8, False),
        ([(0, 1)] * 5 + [(0, 0)] * 55 + [(1, 1)] * 30 + [(1, 0)] * 10, True),
        # one class, in which nothing can be told apart
        ([(0, 0)] * 40, False),
        # 24 of 120 right, where 61 are of one class
        ([(0, 1)] * 35 + [(1, 1)] * 24 + [(1, 2)] * 61, False),
    ],
)
def test_an_accuracy_is_better_where_chance_does_not_explain_it(pairs, better):
    random.Random(0).shuffle(pairs)
    found = baselines.classification_baseline(measured(pairs), trained_on=False)
    assert found.better is better
    assert found.score == pytest.approx(sum(one == other for one, other in pairs) / len(pairs))
    assert f"{found.score:.4f}, and the most frequent class alone would reach {found.baseline:.4f}" in found.sentence()


def test_the_permutation_test():
    """Against all orders of five rows."""
    predictions, labels = np.eye(3)[[0, 1, 1, 2, 0]], np.array([0, 1, 2, 2, 0])
    metric = metrics.find("f1_macro", 3)
    score = metric.score(predictions, labels)
    orders = [metric.score(predictions, labels[list(order)]) for order in itertools.permutations(range(5))]
    exact = sum(other >= score for other in orders) / len(orders)
    assert 0.02 < exact < 0.5
    # three standard errors of a share of 999 draws
    error = 3 * math.sqrt(exact * (1 - exact) / figures.PERMUTATIONS)
    assert figures.permutation_test(metric, predictions, labels) == pytest.approx(exact, abs=error)


@pytest.mark.parametrize(
    ("pairs", "better", "said"),
    [
        # a rare class is found, at the price of more errors than the most frequent class alone makes
        (
            [(0, 0)] * 80 + [(0, 1)] * 10 + [(1, 1)] * 8 + [(1, 0)] * 2,
            True,
            r"f1_macro on the 100 .* is better",
        ),
        (
            [(0, 0)] * 90 + [(1, 0)] * 10,
            False,
            r"is 0.4737, and the most .* reach 0.4737: .* is not better",
        ),
        ([(0, 0)] * 3 + [(1, 1)], False, r"is 1.0000, and .* 0.4286: with so few rows, that may be chance \(p = 0.2"),
    ],
)
def test_another_metric_decides(pairs, better, said):
    found = baselines.classification_baseline(measured(pairs, metrics.find("f1_macro", 3)), trained_on=False)
    assert (found.metric, found.better) == ("f1_macro", better)
    assert re.search(said, found.sentence())


def test_a_metric_that_the_most_frequent_class_alone_does_not_have():
    metric = metrics.NamedMetric("auc", lambda logits, labels: math.nan if (logits == logits[0]).all() else 0.9)
    found = baselines.classification_baseline(measured([(0, 0)] * 5 + [(1, 1)] * 5, metric), trained_on=False)
    assert (found.baseline, found.better) == (None, False)
    assert re.search(r"the auc on the 10 evaluation rows is 0.9000: with so few rows", found.sentence())


@pytest.mark.parametrize(
    ("losses", "better", "said"),
    [
        ((2.0, 3.0), True, "7.389, and .* 20.09: .* is better"),
        ((3.0, 3.0), False, "is not better"),
        ((2.9999, 3.0), False, "is not better"),
        ((3.1, 3.0), False, "is not better"),
        ((800.0, 900.0), True, "too large to represent.* is better"),
    ],
)
def test_a_perplexity_is_better_where_it_is_lower(losses, better, said):
    mine, base = (figures.LanguageModelFigures(5, 90, loss, figures.perplexity(loss)) for loss in losses)
    found = baselines.language_model_baseline(mine, base, trained_on=True)
    assert found.better is better
    assert found.trained_on
    assert re.search(said, found.sentence())


@pytest.mark.parametrize(
    ("metric", "options", "expected"),
    [
        (None, {}, (None, None)),
        # the Trainer alone would take the lowest value of what ends with "loss"
        ("neg_log_loss", {}, ("neg_log_loss", True)),
        ("f1_macro", {"metric_for_best_model": "loss"}, ("loss", False)),
    ],
)
def test_the_metric_chooses_the_best_checkpoint(place, metric, options, expected):
    training = classify(place, evaluation=place / "eval.jsonl", metric=metric, trainer_options=options)
    arguments = trainer.arguments(training, place / "out", 9)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == expected


class TestTheDefaultNumberOfEpochs:
    """The Trainer's own count is the truth."""

    def made(self, place, rows, **fields):
        training = classify(place, **fields)
        return trainer.arguments(training, place / "checkpoints", rows)

    @pytest.mark.parametrize(
        ("rows", "epochs", "interval"),
        [
            (16 * 100, 3.0, None),
            (16 * 50, 3.0, None),
            # 13 steps an epoch
            (200, 12.0, None),
            # 4 steps an epoch: 38 epochs, in points of 4
            (50, 40.0, 16),
            (1, 156.0, 13),
        ],
    )
    def test_comes_to_enough_steps(self, place, rows, epochs, interval):
        found = self.made(place, rows, evaluation=place / "eval.jsonl")
        assert found.num_train_epochs == epochs
        steps = trainer.steps_per_epoch(found, rows) * epochs
        assert steps >= MIN_STEPS
        kinds = ("eval", "save", "logging")
        strategies = {str(getattr(found, f"{kind}_strategy").value) for kind in kinds}
        if interval is None:
            assert strategies == {"epoch"}
        else:
            assert strategies == {"steps"}
            assert {getattr(found, f"{kind}_steps") for kind in kinds} == {interval}
            assert steps % interval == 0
            assert steps / interval <= MAX_POINTS

    @pytest.mark.parametrize(
        ("fields", "epochs", "steps"),
        [
            ({"epochs": 1.0}, 1.0, -1),
            ({"epochs": 3.0}, 3.0, -1),
            ({"trainer_options": {"num_train_epochs": 2}}, 2.0, -1),
            ({"trainer_options": {"max_steps": 7}}, 3.0, 7),
            ({"batch_size": 1}, 3.0, -1),
            ({"trainer_options": {"gradient_accumulation_steps": 13}}, 156.0, -1),
            ({"trainer_options": {"dataloader_drop_last": True}}, 14.0, -1),
        ],
    )
    def test_is_for_who_asks_for_none(self, place, fields, epochs, steps):
        found = self.made(place, 200, **fields)
        assert (found.num_train_epochs, found.max_steps) == (epochs, steps)

    def test_points_that_were_asked_for_stay(self, place):
        found = self.made(place, 8, trainer_options={"save_strategy": "steps", "save_steps": 5})
        assert (found.num_train_epochs, found.save_steps, found.logging_strategy.value) == (150.0, 5, "epoch")

    def test_is_what_the_trainer_does(self, place):
        unseen = trainable.read_jsonl(place / "eval.jsonl")
        rows = trainable.write_jsonl(place / "few.jsonl", trainable.keyword_rows(40, seed=3, without=unseen))
        options = {"save_total_limit": 1}
        training = classify(place, train=rows, evaluation=place / "eval.jsonl", trainer_options=options, **QUICK)
        found = train(place / "pack", training, place / "out")
        # 3 steps an epoch, 50 epochs, 5 at a time
        assert (found.steps, found.epochs) == (150, 50.0)
        assert [entry["step"] for entry in found.history if "eval_loss" in entry] == [*range(15, 151, 15)]
        assert found.figures.accuracy > 0.8
        # the schedule ends with the steps
        state = json.loads((place / "out" / CHECKPOINTS / "checkpoint-150" / "trainer_state.json").read_text())
        rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0.1 / 150)


class TestAnAdapterOfNoUse:
    def test_is_saved_and_not_added(self, place):
        before = ex.Pack.open(place / "pack").names
        with pytest.warns(
            BaselineWarning, match=r"accuracy on the 57 evaluation rows is 0.\d+, and the most .* is not better"
        ):
            found = train(place / "pack", classify(place, evaluation=place / "eval.jsonl", **IDLE), place / "out")
        assert (found.added, found.delta_error, found.baseline.better) == (False, None, False)
        assert found.baseline.baseline == found.figures.majority
        assert found.baseline.score == found.figures.accuracy
        assert ex.Pack.open(place / "pack").names == before
        with ex.Pack.edit(place / "pack") as pack:
            assert pack.add(place / "out", name="even-so").delta_error < 1e-6

    def test_is_added_by_force(self, place):
        with pytest.warns(BaselineWarning, match="is not better"):
            found = train(
                place / "pack", classify(place, evaluation=place / "eval.jsonl", **IDLE), place / "out", force=True
            )
        assert found.added
        assert "out" in ex.Pack.open(place / "pack").names
        assert json.loads((place / "out" / RECORD).read_text())["result"]["added"] is True

    def test_is_known_by_the_rows_of_the_training_where_there_are_no_others(self, place):
        with pytest.warns(BaselineWarning, match="accuracy on the 192 training rows is"):
            found = train(place / "pack", classify(place, **IDLE), place / "out")
        assert (found.figures, found.baseline.trained_on, found.baseline.rows) == (None, True, 192)
        assert not found.added

    def test_has_learned_rows_by_heart(self, place):
        rows, chance = trainable.keyword_rows(60, seed=3, words=9), random.Random(5)
        for row in rows:
            row["label"] = chance.choice(["bad", "good"])
        training = classify(
            place, train=trainable.write_jsonl(place / "noise.jsonl", rows), evaluation=place / "eval.jsonl", **QUICK
        )
        with pytest.warns(BaselineWarning, match="the 57 evaluation rows"):
            assert not train(place / "pack", training, place / "out").added

    def test_is_a_language_model_no_better_than_the_base_model(self, place):
        training = model_language(place, evaluation=place / "lm-eval.jsonl", **IDLE)
        with pytest.warns(BaselineWarning, match="perplexity on the 29 evaluation rows is .* without the adapter"):
            found = train(place / "lm-pack", training, place / "out", add=False)
        assert found.baseline.baseline == pytest.approx(found.figures.perplexity, rel=1e-4)

    def test_may_be_added_when_the_training_has_ended(self, place):
        with pytest.warns(BaselineWarning, match="is not better"):
            first = train(place / "pack", classify(place, **IDLE), place / "out")
        stages = []
        with pytest.warns(BaselineWarning, match="is not better"):
            again = train(
                place / "pack",
                classify(place, **IDLE),
                place / "out",
                resume=True,
                force=True,
                progress=lambda stage, done, total: stages.append(stage),
            )
        assert "training" not in stages
        assert "evaluating" not in stages
        assert (again.baseline, again.history, again.added) == (first.baseline, first.history, True)


def test_a_language_model_is_measured_beside_the_base_model(place):
    training = model_language(place, evaluation=place / "lm-eval.jsonl", epochs=6.0, batch_size=8, **QUICK)
    found = train(place / "lm-pack", training, place / "out")
    assert (found.added, found.baseline.better, found.baseline.trained_on) == (True, True, False)
    # an oracle: the base model by itself
    opened = ex.Pack.open(place / "lm-pack")
    with models.quiet():
        tokenizer = models.load_tokenizer(opened.base_model, None)
        base = models.load_model(opened.base_model, None, None, tokenizer)
        rows = examples.encode_language_model(data.read(place / "lm-eval.jsonl"), Columns(), tokenizer, 32)
        alone = evaluate.measure(base, rows, examples.collator("causal-lm", tokenizer), None, 7)
    assert found.baseline.baseline == pytest.approx(alone.perplexity, rel=1e-5)
    assert found.baseline.score == found.figures.perplexity


def modes(folder):
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


class StoppedError(Exception):
    pass


@pytest.mark.slow
class TestWhatIsLeft:
    @pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
    def umask(self, request):
        before = os.umask(request.param)
        yield request.param
        os.umask(before)

    @pytest.mark.skipif(os.name != "posix", reason="needs permissions")
    def test_is_the_adapter_and_its_record_for_whom_the_umask_says(self, place, umask):
        train(place / "pack", classify(place, **QUICK, epochs=2.0), place / "out")
        assert modes(place / "out") == dict.fromkeys(
            ["README.md", "adapter_config.json", "adapter_model.safetensors", RECORD], 0o666 & ~umask
        )

    @pytest.mark.skipif(os.name != "posix", reason="needs permissions")
    def test_after_an_interruption_are_checkpoints_for_whom_the_umask_says(self, place, umask):
        def stop(stage, done, total):
            if stage == "training" and done == 20:
                raise StoppedError

        training = classify(place, **QUICK, epochs=2.0)
        with pytest.raises(StoppedError):
            train(place / "pack", training, place / "out", progress=stop)
        files = {name: mode for name, mode in modes(place / "out" / CHECKPOINTS).items() if "." in name}
        assert "checkpoint-12/optimizer.pt" in files
        assert set(files.values()) == {0o666 & ~umask}
        train(place / "pack", training, place / "out", resume=True)
        assert not (place / "out" / CHECKPOINTS).exists()

    def test_are_as_many_checkpoints_as_were_asked_for(self, place):
        train(
            place / "pack", classify(place, **QUICK, epochs=3.0, trainer_options={"save_total_limit": 1}), place / "o"
        )
        assert [path.name for path in (place / "o" / CHECKPOINTS).iterdir()] == ["checkpoint-36"]

    def test_of_a_training_that_could_not_be_added_is_enough_to_add_it(self, place):
        """The name is taken while it trains."""

        def rival(stage, done, total):
            if (stage, done) == ("training", 6):
                with ex.Pack.edit(place / "pack") as pack:
                    pack.add(replace(pack.adapter("a1"), base_model=pack.base_model), name="out")

        training = classify(place, **QUICK, epochs=2.0)
        with pytest.raises(ex.EigenloraxError, match="trained adapter is in"):
            train(place / "pack", training, place / "out", progress=rival)
        assert not (place / "out" / CHECKPOINTS).exists()
        assert train(place / "pack", training, place / "out", name="mine", resume=True).added
        assert ex.Pack.open(place / "pack").records["mine"].delta_error < 1e-6

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda result: result.update(steps="many"), 'result.steps is "many"; int was expected'),
            (lambda result: result.pop("baseline"), "result.baseline is missing; dict was expected"),
            (lambda result: result["baseline"].update(more=1), "result.baseline has the fields"),
        ],
    )
    def test_with_a_record_that_is_none(self, place, change, match):
        training = classify(place, **QUICK, epochs=2.0)
        train(place / "pack", training, place / "out", add=False)
        record = json.loads((place / "out" / RECORD).read_text())
        change(record["result"])
        (place / "out" / RECORD).write_text(json.dumps(record))
        with pytest.raises(FormatError, match=match):
            train(place / "pack", training, place / "out", resume=True)


def test_a_sample_is_the_same_each_time_and_no_longer_than_asked_for():
    rows = list(range(50))
    assert baselines.sample(rows, 50) == rows
    assert len(set(baselines.sample(rows, 20))) == 20
    assert baselines.sample(rows, 20) == baselines.sample(rows, 20)
