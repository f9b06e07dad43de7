"""A method comparison: rates are chosen on training rows alone, and a resumed comparison ends alike."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eigenlorax as ex
import tiny
import trainable
from eigenlorax.cli.compare import parse_rates
from eigenlorax.errors import FormatError, NonFiniteError, OptionError, PackExistsError, RowsWarning
from eigenlorax.train import comparison_duration, method_comparison, method_presets, models, row_split, run_plan
from eigenlorax.train.comparison_duration import MethodTimes
from eigenlorax.train.data import Labels, Table
from eigenlorax.train.method_presets import TargetModule
from eigenlorax.train.options import MAX_POINTS, MIN_STEPS
from eigenlorax.train.search_space import LEARNING_RATES, ComparisonOptions

pytestmark = pytest.mark.slow

K, RANK, MODULES = 9, 4, len(tiny.BERT)
FACTORS = MODULES * RANK * 2 * K


def few(place):
    """Of few rows, and quick."""
    trainable.write_jsonl(place / "few.jsonl", trainable.keyword_rows(40, seed=0))
    trainable.write_jsonl(place / "test.jsonl", trainable.keyword_rows(23, seed=1))
    return ComparisonOptions(
        place / "few.jsonl",
        place / "test.jsonl",
        methods=["lora", "core"],
        rates={"lora": [0.01, 0.1], "core": [0.1]},
        seeds=2,
        rank=RANK,
        epochs=1.0,
    )


@pytest.fixture
def asked(place):
    return few(place)


def run(place, asked, name="out.json", *, resume=False, progress=None):
    with warnings.catch_warnings():
        # that chance has a hand in rates where rows are few is tested once
        warnings.simplefilter("ignore", RowsWarning)
        prepared = method_comparison.prepare(place / "pack", asked, place / name, resume=resume)
    return method_comparison.run(prepared, progress)


def test_by_default_it_trains_as_long_as_train_does(place, asked):
    """Of 40 rows, three epochs of batches of 16 would be nine steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RowsWarning)
        prepared = method_comparison.prepare(place / "pack", replace(asked, epochs=None), place / "out.json")
    assert prepared.epochs == prepared.settings["epochs"] == MIN_STEPS / 3
    assert f"of {MIN_STEPS // 3} epochs" in prepared.plan
    assert run_plan.evaluations(prepared.epochs) == MAX_POINTS


@pytest.fixture(scope="module")
def ended(_made, tmp_path_factory):
    """Where a comparison has ended in `out.json`, what it was asked, and what it found; its tests leave all this be."""
    place = tmp_path_factory.mktemp("comparison")
    trainable.copy_all(_made, place)
    asked = few(place)
    return place, asked, run(place, asked)


def trainings(path):
    """What a file has of each training, but for the seconds it took."""
    found = json.loads(path.read_text("utf-8"))["trainings"]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def choices(path):
    return [one for one in trainings(path) if one["seed"] is None]


def test_the_estimated_duration_counts_every_step_and_every_evaluated_row(place, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RowsWarning)
        prepared = method_comparison.prepare(place / "pack", asked, place / "out.json")
    state = torch.get_rng_state()
    measured = comparison_duration.measure(prepared)
    assert torch.equal(torch.get_rng_state(), state)
    assert measured.keys() == {"lora", "core"}
    assert all(min(times.loading, times.step, times.evaluated_row) > 0 for times in measured.values())
    times = {"lora": MethodTimes(1.0, 0.1, 0.01), "core": MethodTimes(2.0, 0.2, 0.02)}
    # two rates on 33 rows, scored on 7 twice; two seeds on 40 rows, scored on 23 three times
    search, final = 1 + 3 * 0.1 + 2 * 7 * 0.01, 1 + 3 * 0.1 + 3 * 23 * 0.01
    assert comparison_duration.total_seconds(prepared, times) == pytest.approx(2 * search + 2 * final + 2 * 2 * final)


class TestAComparison:
    def test_shows_who_has_learned_a_planted_rule(self, place):
        asked = ComparisonOptions(
            place / "train.jsonl",
            place / "eval.jsonl",
            methods=["head", "factors"],
            rates={"head": [0.1], "factors": [0.1]},
            seeds=1,
            rank=RANK,
            epochs=5.0,
        )
        found = run(place, asked)
        head, factors = found.methods
        # a row or none is wrong, as the processor rounds
        assert factors.mean > 0.95
        assert head.mean < 0.85
        assert (found.yardstick, factors.difference.is_noise) == ("head", False)
        assert (found.rows, found.evaluated, found.rows_on_the_way) == (192, 57, 57)
        assert (found.steps, found.steps_per_epoch, len(factors.curve)) == (60, 12, 10)
        assert found.points == [n / 2 for n in range(1, 11)]
        assert (head.numbers, factors.numbers) == (0, FACTORS)
        assert head.head_numbers == factors.head_numbers == 2 * tiny.IN + 2
        assert factors.file_bytes > 4 * (factors.numbers + factors.head_numbers)
        assert found.basis_bytes == ex.Pack.open(place / "pack").info.stored_bytes
        assert 0.5 <= found.majority < 0.7
        assert factors.curve[-1] == factors.mean

    def test_is_in_the_basis_of_a_coded_pack(self, place, asked):
        opened = ex.Pack.open(place / "pack")
        coded = ex.fit([opened.adapter(name) for name in opened.names], max_error=0.1, basis=5, same_base=True)
        coded.base_model = opened.base_model
        shutil.rmtree(place / "pack")
        coded.save(place / "pack")
        asked = replace(asked, methods=["core", "random"], rates={"core": [0.1], "random": [0.1]}, seeds=1)
        found = run(place, asked)
        assert found.basis_bytes == coded.basis.info.stored_bytes
        # one core of the components of the basis for each module, or two factors
        numbers = {method.method: method.numbers for method in found.methods}
        assert numbers == {"core": MODULES * 5 * 5, "random": MODULES * RANK * 2 * 5}

    def test_says_after_how_many_epochs_scores_were_taken(self, place, asked):
        """Of one and a half epochs of three steps each, no point is at the end of one."""
        found = run(place, replace(asked, methods=["head"], rates={"head": [0.1]}, seeds=1, epochs=1.5))
        assert (found.steps, found.steps_per_epoch) == (5, 3)
        assert found.points == [0.667, 1.333, 1.667]
        assert len(found.methods[0].curve) == 3

    def test_has_a_line_in_its_file_for_every_training(self, ended):
        place, _, found = ended
        made = trainings(place / "out.json")
        keys = [(one["method"], one["learning_rate"], one["seed"]) for one in made]
        best = found.methods[0].learning_rate
        assert keys == [("lora", 0.01, None), ("lora", 0.1, None), *[("lora", best, n) for n in (0, 1)]] + [
            ("core", 0.1, n) for n in (0, 1)
        ]
        assert found.trainings == 6
        assert [len(one["right"]) for one in made] == [0, 0, 23, 23, 23, 23]
        # two points an epoch of three steps
        assert made[-1]["steps"] == [2, 3]
        assert found.methods[0].rates == {"0.01": made[0]["score"], "0.1": made[1]["score"]}
        assert found.methods[1].rates == {"0.1": None}
        result = json.loads((place / "out.json").read_text("utf-8"))["result"]
        assert result["findings"] == found.findings
        assert result["methods"][1]["scores"] == found.methods[1].scores

    def test_chooses_no_rate_by_the_rows_for_evaluation(self, ended):
        place, asked, _ = ended
        rows = trainable.keyword_rows(23, seed=1)
        other = {"bad": "good", "good": "bad"}
        turned = trainable.write_jsonl(place / "turned.jsonl", [{**row, "label": other[row["label"]]} for row in rows])
        found = run(place, replace(asked, evaluation=turned), "other.json")
        assert choices(place / "other.json") == choices(place / "out.json")
        for one, turned in zip(trainings(place / "out.json")[2:], trainings(place / "other.json")[2:], strict=True):
            assert turned["learning_rate"] == one["learning_rate"]
            assert turned["score"] == pytest.approx(1 - one["score"])
        assert found.methods[0].learning_rate in (0.01, 0.1)

    def test_that_is_resumed_ends_like_one_that_was_not_disturbed(self, ended):
        place, asked, _ = ended

        def stop(stage, done, total):
            assert total == 6
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(place, asked, "stopped.json", progress=stop)
        assert len(trainings(place / "stopped.json")) == 3
        assert run(place, asked, "stopped.json", resume=True).trainings == 3
        assert trainings(place / "stopped.json") == trainings(place / "out.json")

    def test_that_is_resumed_with_more_trains_no_more_than_that(self, ended):
        place, asked, before = ended
        shutil.copy(place / "out.json", place / "more.json")
        more = replace(asked, methods=["lora", "core", "head"], rates={**asked.rates, "head": [0.1]}, seeds=3)
        found = run(place, more, "more.json", resume=True)
        assert found.trainings == 1 + 1 + 3
        assert [line.scores[:2] for line in found.methods[:2]] == [line.scores for line in before.methods]
        # fewer are a part of it
        assert run(place, asked, "more.json", resume=True).trainings == 0

    def test_that_began_with_something_else_is_not_resumed(self, place, asked):
        quick = replace(asked, methods=["head"], rates={"head": [0.1]}, seeds=1)
        run(place, quick)
        with pytest.raises(OptionError, match=r"was started with epochs=1.0, and now it is 2.0"):
            run(place, replace(quick, epochs=2.0), resume=True)
        trainable.write_jsonl(place / "test.jsonl", trainable.keyword_rows(23, seed=2))
        with pytest.raises(OptionError, match="was started with other test rows. resume=True .--resume"):
            run(place, quick, resume=True)
        with pytest.raises(
            PackExistsError, match="out.json exists. Choose another file, or continue it with resume=True .--resume"
        ):
            run(place, quick)
        with pytest.raises(OptionError, match="is a folder. Name a file for the results"):
            run(place, quick, "pack")
        (place / "odd.txt").write_text("")
        with pytest.raises(PackExistsError, match=r"odd\.txt exists and is not a folder"):
            run(place, quick, "odd.txt/out.json")
        with pytest.raises(OptionError, match="gone.json does not exist"):
            run(place, quick, "gone.json", resume=True)
        (place / "odd.json").write_text('{"trainings": 1}')
        with pytest.raises(FormatError, match="odd.json is not a file of `eigenlorax compare`"):
            run(place, quick, "odd.json", resume=True)

    def test_of_rates_that_diverge(self, place, asked):
        one = replace(asked, methods=["lora"], seeds=1, rates={"lora": [0.01, 1e30]})
        found = run(place, one)
        assert found.methods[0].learning_rate == 0.01
        assert found.methods[0].rates["1e+30"] is None
        with pytest.raises(NonFiniteError, match="lora diverged at each of the learning rates 1e\\+30, 2e\\+30"):
            run(place, replace(one, rates={"lora": [1e30, 2e30]}), resume=True)
        with pytest.raises(NonFiniteError, match="lora diverged with seed 0 at the learning rate 1e\\+30"):
            run(place, replace(one, rates={"lora": [1e30]}), resume=True)
        # what was good is kept
        assert run(place, one, resume=True).trainings == 0


class TestRows:
    @staticmethod
    def table(counts):
        rows = [
            {"text": f"w{n % 12} {trainable.FILLERS[n // 12]}", "label": label}
            for n, label in enumerate(label for label, count in counts.items() for _ in range(count))
        ]
        return Table(Path("rows"), rows, [f"line {n}" for n in range(len(rows))])

    def divide(self, place, asked, counts, test=None):
        tokenizer = models.load_tokenizer(str(ex.Pack.open(place / "pack").base_model), None)
        tables = self.table(counts), self.table(test or counts)
        tables = [replace(one, path=place / name) for one, name in zip(tables, ("a", "b"), strict=True)]
        return row_split.split_rows(asked, *tables, Labels(tuple(sorted(counts))), tokenizer, 32)

    def test_a_fifth_of_each_class_is_held_out(self, place, asked):
        with pytest.warns(RowsWarning) as told:
            found = self.divide(place, asked, {"a": 61, "b": 20, "c": 3, "d": 1})
        held = [row["labels"] for row in found.held_out]
        assert [held.count(number) for number in range(4)] == [12, 4, 1, 0]
        key = [tuple(row["input_ids"]) for row in found.train]
        assert sorted(tuple(row["input_ids"]) for row in found.search_train + found.held_out) == sorted(key)
        assert found.validation == found.test
        texts = [str(one.message) for one in told]
        assert any("85 of 85 rows of" in text and "memorised rows" in text for text in texts)
        assert any("chosen on 17 rows held out of 85: with so few" in text for text in texts)

    def test_scores_on_the_way_are_of_some(self, place, asked, monkeypatch):
        monkeypatch.setattr(row_split, "MAX_VALIDATION_ROWS", 7)
        with pytest.warns(RowsWarning):
            found = self.divide(place, asked, {"a": 30, "b": 20})
        assert len(found.validation) == 7
        assert all(row in found.test for row in found.validation)

    def test_one_row_a_class_is_too_few_to_choose_by(self, place, asked):
        with (
            pytest.warns(RowsWarning),
            pytest.raises(FormatError, match="has fewer than two classes with two rows or more"),
        ):
            self.divide(place, asked, {"a": 1, "b": 1})
        with (
            pytest.warns(RowsWarning),
            pytest.raises(FormatError, match="one rate per method .rates=, --learning-rates"),
        ):
            self.divide(place, asked, {"a": 5, "b": 1})
        with pytest.warns(RowsWarning):
            found = self.divide(place, replace(asked, rates={"lora": [0.1], "core": [0.1]}), {"a": 1, "b": 1})
        assert (len(found.train), found.held_out) == (2, [])


class TestSizes:
    places = tuple(TargetModule(f"m{n}", 24, 40 if n else 24) for n in range(3))

    def test_of_a_small_lora(self):
        # sides of 48, 64 and 64: a rank of all modules, or rank 1 of the last ones
        assert method_presets._small_lora(self.places, 2 * 176 + 5) == (2, ["m0", "m1", "m2"])
        assert method_presets._small_lora(self.places, 175) == (1, ["m2", "m1"])
        assert method_presets._small_lora(self.places, 70) == (1, ["m2"])
        assert method_presets._small_lora(self.places, 3) == (1, ["m2"])

    def test_of_others(self):
        assert method_presets._lora_xs_rank(self.places, 3 * 7**2) == 7
        assert method_presets._lora_xs_rank(self.places, 3 * 7**2 - 1) == 6
        assert method_presets._lora_xs_rank(self.places, 10**6) == 24
        assert method_presets._lora_xs_rank(self.places, 2) == 1
        # 8 divides 24 and 40; a vector is 8 numbers, and 4 · 176 / 8 = 88 logits
        assert method_presets._vblora_options(self.places, 5 * 96 + 1)["num_vectors"] == 5
        assert method_presets._vblora_options(self.places, 10)["num_vectors"] == 2
        assert method_presets._vblora_options(self.places, 10)["vector_length"] == 8

    def test_every_method_fits_the_model_and_small_ones_are_no_larger_than_factors(self, place):
        pack = ex.Pack.open(place / "pack")
        numbers = {}
        with models.quiet(), models.preserved_random_state():
            made = method_presets.make_presets(pack, list(LEARNING_RATES), [], RANK, tiny.make_bert)
            for name, entry in made.items():
                model = entry.apply(tiny.make_bert())
                numbers[name], heads = method_presets.methods.count_parameters(model)
                assert heads == 3 * tiny.IN + 3
                assert method_presets.methods.saved_bytes(model) >= 4 * heads
        assert numbers["factors"] == numbers["random"] == FACTORS
        assert numbers["core"] == MODULES * K * K
        assert numbers["lora"] == numbers["init"] == RANK * MODULES * 2 * tiny.IN
        assert numbers["vera"] == MODULES * (256 + tiny.IN)
        assert numbers["head"] == 0
        for name, least in (("lora-small", 0.5), ("lora-xs", 0.7), ("vblora", 0.6)):
            assert least * FACTORS < numbers[name] <= FACTORS
        bases = {name: made[name].common.subspace().info.fingerprint for name in ("random", "factors", "core")}
        assert bases["random"] != bases["factors"] == bases["core"] == pack.info.fingerprint

    def test_what_does_not_fit_is_said(self, place):
        pack = ex.Pack.open(place / "lm-pack")
        with (
            models.quiet(),
            pytest.raises(OptionError, match="lora-xs does not work on the modules of this pack: .*Lin"),
        ):
            method_presets.make_presets(pack, ["lora-xs"], ["lora-xs"], RANK, gpt2_with_a_head)


def gpt2_with_a_head():
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(tiny.make_gpt2().config)


class TestWhatIsAskedFor:
    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"task": "causal-lm"}, "compared by accuracy, which causal-lm does not have"),
            ({"task": "chess"}, "no task 'chess'"),
            ({"methods": []}, "no method is named"),
            ({"methods": ["lora", "magic"]}, "no method 'magic'. There are: lora, lora-small, core"),
            ({"methods": ["lora", "lora"]}, "the method 'lora' is named twice"),
            ({"rates": {"vera": [0.1]}}, "passed for 'vera', which is not one of the methods: lora, core."),
            ({"rates": {"lora": [0.0]}}, "must be numbers above 0, got 0.0 for lora"),
            ({"rates": {"lora": []}}, "must be numbers above 0"),
            ({"epochs": float("nan")}, "epochs must be a number above 0"),
            ({"seeds": 0}, "seeds must be at least 1, got 0"),
            ({"rank": 0}, "rank must be at least 1"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"max_length": 1}, "max_length must be at least 2"),
        ],
    )
    def test_has_to_make_sense(self, asked, fields, part):
        with pytest.raises(OptionError, match=part):
            replace(asked, **{"rates": {}, **fields})

    def test_rates(self, asked):
        assert parse_rates([], ["lora"]) == {}
        assert parse_rates(["core=0.1,0.2", "1e-3"], ["lora", "core"]) == {"lora": [1e-3], "core": [0.1, 0.2]}
        with pytest.raises(OptionError, match="'core=fast' are not learning rates"):
            parse_rates(["core=fast"], ["core"])
        with pytest.raises(OptionError, match="learning rates of core are given twice"):
            parse_rates(["core=0.1", "core=0.2"], ["core"])
        with pytest.raises(OptionError, match="learning rates of all are given twice"):
            parse_rates(["0.1", "0.2"], ["core"])
        assert replace(asked, rates={"lora": [0.2, 0.1, 0.2]}).learning_rates("lora") == [0.1, 0.2]
        assert asked.learning_rates("core") == [0.1]
        assert replace(asked, methods=["core", "head"], rates={}).baseline == "core"
        assert all(len(rates) == 3 for rates in LEARNING_RATES.values())
