"""Training: a planted rule is learned, the pack has what was learned, and a training that was disturbed ends alike."""

import json
import math
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, RobertaConfig, RobertaModel, set_seed

import eigenlorax as ex
import tiny
import trainable
from eigenlorax.core import registry
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import (
    AdapterNameError,
    DuplicateAdapterWarning,
    FormatError,
    HubError,
    MissingExtraError,
    ModuleNameError,
    NonFiniteError,
    OptionError,
    PackExistsError,
    PackMissingError,
    RankWarning,
    RowsWarning,
)
from eigenlorax.train import models, training_record
from eigenlorax.train.evaluate import evaluate
from eigenlorax.train.options import DEFAULTS, HEAD_LEARNING_RATE, Columns, Training
from eigenlorax.train.train import train as train_or_warn
from eigenlorax.train.training_record import RECORD
from eigenlorax.tuner import optim
from planted import factors_in, orthonormal

# what is tested here ends before much is learned: test_baselines.py has what becomes of that
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::eigenlorax.errors.BaselineWarning")]
K, RANK = 9, 4
QUICK = {"learning_rate": 0.1, "head_learning_rate": 0.1, "rank": RANK}


def train(*arguments, **options):
    return train_or_warn(*arguments, **{"force": True, **options})


def classify(place, **fields):
    asked = {"task": "text-classification", "train": place / "train.jsonl", "epochs": 1.0, **QUICK, **fields}
    return Training(**asked)


def model_language(place, **fields):
    asked = {"task": "causal-lm", "train": place / "lm-train.jsonl", "epochs": 1.0, **QUICK, **fields}
    return Training(**asked)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def base_of(place, kind, pack="pack"):
    return kind.from_pretrained(ex.Pack.open(place / pack).base_model)


@pytest.fixture
def ids():
    return torch.randint(4, len(trainable.VOCABULARY), (5, 9), generator=torch.Generator().manual_seed(3))


class TestClassification:
    @pytest.mark.parametrize("core", [False, True])
    def test_learns_the_rule_and_adds_what_it_has_learned(self, place, ids, core):
        metric = "balanced_accuracy" if core else None
        training = classify(place, evaluation=place / "eval.jsonl", epochs=5.0, core=core, metric=metric)
        found = train(place / "pack", training, place / "out" / "new")
        assert found.baseline.metric == found.figures.metric == (metric or "accuracy")
        assert found.figures.score == found.baseline.score == found.history[-1][f"eval_{metric or 'accuracy'}"] > 0.95
        assert found.figures.f1_macro == pytest.approx(found.history[-1]["eval_f1_macro"])
        assert (found.figures.majority_score == 0.5) is core
        assert found.figures.accuracy > 0.95
        assert found.figures.majority < 0.7
        assert (found.labels, found.rows, found.figures.rows) == (["bad", "good"], 192, 57)
        per_module = K * K if core else 2 * K * RANK
        assert (found.modules, found.numbers) == (len(tiny.BERT), len(tiny.BERT) * per_module)
        assert found.head_numbers == 2 * tiny.IN + 2
        assert found.delta_error < 1e-6
        assert (found.steps, found.epochs) == (60, 5.0)
        losses = [entry["loss"] for entry in found.history if "loss" in entry]
        assert losses[-1] < 0.2 < losses[0]
        opened = ex.Pack.open(place / "pack")
        opened.verify()
        assert "new" in opened.names

        # the adapter's folder, the pack's adapter, and the LoRA that comes out of the pack
        def logits(adapter):
            model = AutoModelForSequenceClassification.from_pretrained(opened.base_model, num_labels=2)
            return PeftModel.from_pretrained(model, adapter).eval()(ids).logits

        wanted = logits(place / "out" / "new")
        torch.testing.assert_close(logits(place / "pack" / "adapters" / "new"), wanted, atol=1e-5, rtol=0)
        lora = opened.export(place / "loras", ["new"])["new"]
        torch.testing.assert_close(logits(lora), wanted, atol=1e-5, rtol=0)
        assert wanted.std() > 0.1
        # and what was counted at the end of the training is what is counted afterwards
        again = evaluate(place / "pack", "new", place / "eval.jsonl", labels=["bad", "good"])
        assert again.figures.accuracy > 0.95
        assert again.figures.loss == pytest.approx(found.figures.loss, abs=1e-5)

    def test_the_folder_says_what_it_is_and_where_it_is_not(self, place):
        found = train(place / "pack", classify(place), place / "out", name="other.name")
        config = json.loads((place / "out" / "adapter_config.json").read_text())
        opened = ex.Pack.open(place / "pack")
        assert config["base_model_name_or_path"] == opened.base_model
        assert config["subspace"] is None
        assert config["subspace_fingerprint"] == opened.info.fingerprint
        record = training_record.read(place / "out")
        assert record["labels"] == ["bad", "good"]
        assert record["result"]["numbers"] == found.numbers
        assert not (place / "out" / "tokenizer.json").exists()
        assert found.name == "other.name"
        assert "other.name" in opened.names

    def test_without_adding(self, place):
        before = ex.Pack.open(place / "pack").names
        found = train(place / "pack", classify(place), place / "out", add=False)
        assert found.delta_error is None
        assert ex.Pack.open(place / "pack").names == before
        # another process can still add it
        registry.clear()
        with ex.Pack.edit(place / "pack") as opened:
            assert opened.add(place / "out", name="later").delta_error < 1e-6

    def test_in_the_basis_of_a_coded_pack(self, place):
        opened = ex.Pack.open(place / "pack")
        originals = [opened.adapter(name) for name in opened.names]
        coded = ex.fit(originals, max_error=0.1, basis=K, same_base=True)
        coded.base_model = opened.base_model
        coded.save(place / "coded")
        training = classify(place, evaluation=place / "eval.jsonl", epochs=5.0)
        found = train(place / "coded", training, place / "out" / "new")
        assert found.figures.accuracy > 0.95
        assert found.numbers == len(tiny.BERT) * 2 * K * RANK
        assert found.delta_error <= 0.1
        again = ex.Pack.open(place / "coded")
        again.verify()
        assert "new" in again.names
        assert again.basis.info == coded.basis.info
        assert json.loads((place / "out" / "new" / "adapter_config.json").read_text())["subspace_fingerprint"] == (
            coded.basis.info.fingerprint
        )
        scored = evaluate(place / "coded", "new", place / "eval.jsonl", labels=["bad", "good"])
        assert scored.figures.accuracy > 0.95

    def test_a_coded_pack_of_few_components_says_what_gives_more(self, place):
        shapes = {"layer.0": (64, 48), "layer.1": (80, 56)}
        shared = {m: (orthonormal(2, n_in, 5), orthonormal(2, n_out, 6)) for m, (n_out, n_in) in shapes.items()}
        originals = [
            from_factors(
                f"a{seed}",
                {m: factors_in(bases, 2, seed=10 * seed) for m, bases in shared.items()},
                base_model="org/base",
            )
            for seed in range(12)
        ]
        ex.fit(originals, max_error=0.1).save(place / "coded")
        said = r"few components to train: no module has more than 2 on both sides.*--basis 32.*--for training"
        # the rows are read after the warning
        with pytest.warns(RankWarning, match=said), pytest.raises(FormatError):
            train(place / "coded", classify(place, train=place / "missing.jsonl"), place / "out" / "new")

    def test_a_pack_in_half_precision_says_what_it_rounds(self, place):
        trainable.bert_pack(place / "half", place.parent / "none", dtype="float16")
        found = train(
            place / "half", classify(place, model=ex.Pack.open(place / "pack").base_model), place / "out", name="new"
        )
        assert 1e-5 < found.delta_error < 1e-3
        assert found.rounding_error == pytest.approx(found.delta_error, rel=0.05)

    def test_seeds(self, place):
        before = torch.get_rng_state()
        for name, seed in (("a", 5), ("b", 5), ("c", 6)):
            train(place / "pack", classify(place, seed=seed), place / name, add=False)
        one, same, other = (weights(place / name) for name in "abc")
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert all(not torch.equal(one[key], other[key]) for key in one)
        assert torch.equal(torch.get_rng_state(), before)

    def test_seeds_are_set_inside_the_call_alone(self):
        def states():
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

        # whatever a test before has left
        set_seed(4)
        before = states()
        with models.preserved_random_state():
            set_seed(3)
            assert all(one != other for one, other in zip(states(), before, strict=True))
        assert states() == before

    def test_a_second_text(self, place):
        rows = [
            {"one": text, "two": word, "gold": int(word in text.split())}
            for index, row in enumerate(trainable.keyword_rows(48, seed=5))
            for text, word in [(row["text"], ("good", "bad")[index % 2])]
        ]
        training = classify(
            place,
            train=trainable.write_jsonl(place / "pairs.jsonl", rows),
            columns=Columns(text="one", pair="two", label="gold"),
        )
        found = train(place / "pack", training, place / "out")
        assert found.labels == ["0", "1"]
        figures = evaluate(
            place / "pack", "out", place / "pairs.jsonl", columns=Columns(text="one", pair="two", label="gold")
        ).figures
        assert figures.rows == 48

    def test_a_decoder_without_a_token_to_pad_with(self, place):
        training = classify(place, evaluation=place / "eval.jsonl")
        found = train(place / "lm-pack", training, place / "out")
        again = evaluate(place / "lm-pack", "out", place / "eval.jsonl", labels=found.labels, batch_size=1)
        # padded or not
        assert again.figures.loss == pytest.approx(found.figures.loss, abs=1e-5)

    def test_a_head_of_two_layers(self, place):
        config = RobertaConfig(
            vocab_size=53,
            hidden_size=tiny.IN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=tiny.INNER,
            max_position_embeddings=40,
            pad_token_id=0,
        )
        with torch.random.fork_rng():
            RobertaModel(config).save_pretrained(place / "roberta")
        trainable.make_tokenizer().save_pretrained(place / "roberta")
        modules = [f"roberta.encoder.layer.0.attention.self.{part}" for part in ("query", "value")]
        pack, _ = tiny.make_pack(dict.fromkeys(modules, (tiny.IN, tiny.IN)))
        pack.base_model = str(place / "roberta")
        pack.save(place / "roberta-pack")
        found = train(place / "roberta-pack", classify(place, evaluation=place / "eval.jsonl"), place / "out")
        assert found.head_numbers == tiny.IN * tiny.IN + tiny.IN + 2 * tiny.IN + 2
        again = evaluate(place / "roberta-pack", "out", place / "eval.jsonl", labels=found.labels)
        assert again.figures.loss == pytest.approx(found.figures.loss, abs=1e-5)


class TestLanguageModelling:
    @pytest.mark.parametrize("core", [False, True])
    def test_learns_what_follows_and_adds_what_it_has_learned(self, place, ids, core):
        training = model_language(place, evaluation=place / "lm-eval.jsonl", epochs=8.0, batch_size=8, core=core)
        found = train(place / "lm-pack", training, place / "out")
        uniform = math.log(base_of(place, AutoModelForCausalLM, "lm-pack").config.vocab_size)
        assert found.figures.loss < 0.7 * uniform
        assert found.figures.perplexity == pytest.approx(math.exp(found.figures.loss))
        assert (found.labels, found.head_numbers, found.modules) == (None, 0, len(tiny.GPT2))
        assert found.numbers == len(tiny.GPT2) * (K * K if core else 2 * K * RANK)
        # one batch of the Trainer's holds all rows, so that its mean is the one of all tokens
        assert found.history[-1]["eval_loss"] == pytest.approx(found.figures.loss, abs=1e-4)
        base = base_of(place, AutoModelForCausalLM, "lm-pack").eval()
        wanted = PeftModel.from_pretrained(base_of(place, AutoModelForCausalLM, "lm-pack"), place / "out").eval()
        packed = PeftModel.from_pretrained(
            base_of(place, AutoModelForCausalLM, "lm-pack"), place / "lm-pack" / "adapters" / "out"
        ).eval()
        assert (wanted(ids).logits - base(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(packed(ids).logits, wanted(ids).logits, atol=1e-5, rtol=0)
        again = evaluate(place / "lm-pack", "out", place / "lm-eval.jsonl")
        assert again.task == "causal-lm"
        assert again.figures.loss == pytest.approx(found.figures.loss, abs=1e-5)


class StoppedError(Exception):
    pass


def stopping_at(step):
    def report(stage, done, total):
        if stage == "training" and done == step:
            raise StoppedError

    return report


class TestResuming:
    def test_ends_as_an_undisturbed_training_does(self, place):
        base = str(ex.Pack.open(place / "pack").base_model).replace("/bert", "/dropping-bert")
        training = classify(place, evaluation=place / "eval.jsonl", model=base, epochs=3.0)
        whole = train(place / "pack", training, place / "whole")
        with pytest.raises(StoppedError):
            train(place / "pack", training, place / "halves", progress=stopping_at(20))
        # between two checkpoints; and a third one, whose writer was killed
        assert [path.name for path in (place / "halves" / "checkpoints").iterdir()] == ["checkpoint-12"]
        (place / "halves" / "checkpoints" / "checkpoint-19").mkdir()
        (place / "halves" / "checkpoints" / "checkpoint-19" / "trainer_state.json").write_text('{"best')
        assert "halves" not in ex.Pack.open(place / "pack").names
        steps = []
        with pytest.warns(DuplicateAdapterWarning, match=r"^halves has the same update as whole\.$"):
            resumed = train(
                place / "pack",
                training,
                place / "halves",
                resume=True,
                progress=lambda stage, done, total: steps.append(done) if stage == "training" else None,
            )
        assert min(steps) == 12
        assert (resumed.steps, resumed.epochs, resumed.history) == (whole.steps, whole.epochs, whole.history)
        one, other = weights(place / "whole"), weights(place / "halves")
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert resumed.figures == whole.figures
        opened = ex.Pack.open(place / "pack")
        assert opened.records["halves"].source_sha256 == opened.records["whole"].source_sha256

    def test_a_training_that_is_done_is_only_added(self, place):
        train(place / "pack", classify(place), place / "out", add=False)
        before = weights(place / "out")
        found = train(place / "pack", classify(place), place / "out", resume=True, progress=stopping_at(1))
        assert "out" in ex.Pack.open(place / "pack").names
        assert found.steps == 12
        after = weights(place / "out")
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_one_that_was_stopped_before_its_first_checkpoint_begins_again(self, place):
        whole = train(place / "pack", classify(place), place / "whole", add=False)
        with pytest.raises(StoppedError):
            train(place / "pack", classify(place), place / "out", progress=stopping_at(3))
        found = train(place / "pack", classify(place), place / "out", resume=True)
        assert found.history == whole.history

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"learning_rate": 0.2}, "was started with learning_rate=0.1, and now it is 0.2"),
            ({"core": True}, "was started with core=False"),
            ({"train": "eval.jsonl"}, "was started with train="),
            ({"trainer_options": {"weight_decay": 0.1}}, "was started with trainer_options="),
        ],
    )
    def test_another_training_does_not_go_on_from_it(self, place, fields, match):
        with pytest.raises(StoppedError):
            train(place / "pack", classify(place), place / "out", progress=stopping_at(2))
        if "train" in fields:
            fields = {"train": place / fields["train"]}
        with pytest.raises(OptionError, match=match):
            train(place / "pack", classify(place, **fields), place / "out", resume=True)

    def test_not_without_the_optimizer_s_state(self, place):
        training = classify(place, trainer_options={"save_only_model": True})
        with pytest.raises(StoppedError):
            train(place / "pack", training, place / "out", progress=stopping_at(2))
        with pytest.raises(OptionError, match="save_only_model lack the optimizer's state"):
            train(place / "pack", training, place / "out", resume=True)

    def test_nothing_to_resume(self, place):
        with pytest.raises(OptionError, match=r"has no training.json, so there is no training to resume"):
            train(place / "pack", classify(place), place / "out", resume=True)
        assert not (place / "out").exists()


class TestStarts:
    def start(self, place, start, **fields):
        options = {"trainer_options": {"max_steps": 1}, "learning_rate": 1e-9, "rank": 3, "alpha": 3.0}
        found = train(place / "pack", classify(place, start=start, **{**options, **fields}), place / "out")
        assert found.steps == 1
        return ex.Pack.open(place / "pack")

    def test_at_an_adapter_of_the_pack(self, place):
        opened = self.start(place, "a2")
        for name, wanted in opened.adapter("a2").modules.items():
            factors = opened.adapter("out").modules[name]
            got = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(got, wanted.scaling * wanted.up @ wanted.down, atol=1e-4, rtol=0)

    def test_at_a_lora_in_a_folder(self, place):
        ex.Pack.open(place / "pack").export(place / "loras", ["a1"])
        opened = self.start(place, str(place / "loras" / "a1"))
        for name, wanted in opened.adapter("a1").modules.items():
            factors = opened.adapter("out").modules[name]
            got = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(got, wanted.scaling * wanted.up @ wanted.down, atol=1e-4, rtol=0)

    def test_nowhere(self, place):
        with pytest.raises(OptionError, match="start='nope' is neither"):
            train(place / "pack", classify(place, start="nope"), place / "out")
        assert not (place / "out").exists()


class TestFurtherDirections:
    def test_are_trained_but_not_added(self, place):
        with pytest.raises(OptionError, match=r"augment .*/pack --n-extra 2 --seed 8 -o PACK2.*--no-add"):
            train(place / "pack", classify(place, n_extra=2, extra_seed=8), place / "out")
        assert not (place / "out").exists()
        found = train(place / "pack", classify(place, n_extra=2, extra_seed=8), place / "out", add=False)
        assert found.numbers == len(tiny.BERT) * 2 * (K + 2) * RANK

    def test_of_an_augmented_pack_are_added(self, place):
        ex.Pack.open(place / "pack").augment(2, 8).save(place / "wide")
        found = train(place / "wide", classify(place), place / "out")
        assert found.numbers == len(tiny.BERT) * 2 * (K + 2) * RANK
        assert found.delta_error < 1e-6


class TestGradientComponents:
    def test_are_trained_and_added_with_a_residual(self, place):
        found = train(place / "pack", classify(place, n_gradient=2), place / "out")
        assert found.numbers == len(tiny.BERT) * 2 * (K + 2) * RANK
        # the pack stores float32
        assert found.delta_error < 1e-5
        without = train(place / "pack", classify(place), place / "plain")
        assert without.numbers == len(tiny.BERT) * 2 * K * RANK

    def test_are_those_of_the_interrupted_training_when_it_is_resumed(self, place):
        training = classify(place, n_gradient=2, epochs=2.0)
        with pytest.raises(StoppedError):
            train(place / "pack", training, place / "out", add=False, progress=stopping_at(14))
        train(place / "pack", training, place / "out", add=False, resume=True)
        train(place / "pack", training, place / "whole", add=False)
        assert (place / "out" / "adapter_model.safetensors").read_bytes() == (
            place / "whole" / "adapter_model.safetensors"
        ).read_bytes()

    def test_need_a_pack_that_can_store_a_residual(self, place):
        ex.Pack.open(place / "pack").export(place / "loras")
        ex.fit(place / "loras", n_components=K, dtype="int8", same_base=True).save(place / "int8")
        with pytest.raises(OptionError, match="needs coefficients in floats, and this pack stores them as int8"):
            train(place / "int8", classify(place, n_gradient=2), place / "out")
        assert not (place / "out").exists()


class TestTheTrainersOptions:
    def test_are_the_trainer_s(self, place):
        options = {
            "max_steps": 5,
            # YAML reads it as a text
            "weight_decay": "1e-2",
            "warmup_steps": 1,
            "lr_scheduler_type": "cosine",
            "gradient_accumulation_steps": 2,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "save_strategy": "no",
        }
        found = train(place / "pack", classify(place, trainer_options=options), place / "out")
        assert [entry["step"] for entry in found.history] == [1, 2, 3, 4, 5]
        assert not list((place / "out" / "checkpoints").glob("checkpoint-*"))

    def test_the_best_of_the_checkpoints(self, place):
        options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "lr_scheduler_type": "constant"}
        training = classify(
            place, evaluation=place / "eval.jsonl", epochs=4.0, learning_rate=0.3, trainer_options=options
        )
        found = train(place / "pack", training, place / "out")
        losses = [entry["eval_loss"] for entry in found.history if "eval_loss" in entry]
        assert found.figures.loss == pytest.approx(min(losses), abs=1e-4)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
    def test_gradient_checkpointing_gives_the_same(self, place):
        train(place / "pack", classify(place), place / "plain")
        train(place / "pack", classify(place, trainer_options={"gradient_checkpointing": True}), place / "thrifty")
        one, other = weights(place / "plain"), weights(place / "thrifty")
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-4, rtol=1e-4)

    def test_an_optimizer_takes_the_place_of_ours(self, place):
        """SOAP moves no coefficient in its first step, and AdamW does."""
        first = {"max_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
        train(place / "pack", classify(place, trainer_options=first), place / "ours", add=False)
        options = {**first, "optim": "adamw_torch"}
        train(place / "pack", classify(place, head_learning_rate=None, trainer_options=options), place / "theirs")
        moved = {
            name: any(tensor.any() for key, tensor in weights(place / name).items() if "eigenlorax_up" in key)
            for name in ("ours", "theirs")
        }
        assert moved == {"ours": False, "theirs": True}

    def test_heads_have_a_rate_of_their_own(self, place):
        options = {"max_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
        heads = {}
        for name, rate in (("small", 1e-6), ("large", 1e-1)):
            train(
                place / "pack",
                classify(place, head_learning_rate=rate, trainer_options=options),
                place / name,
                add=False,
            )
            heads[name] = weights(place / name)["base_model.model.classifier.weight"]
        apart = (heads["small"] - heads["large"]).abs()
        # Adam's first step is as long as the rate, whatever the gradient is
        assert apart.max() == pytest.approx(0.1, rel=1e-3)

    def test_rates_are_those_of_the_optimizer(self):
        """The command's help does not import torch, so that they stand in two places."""
        assert (DEFAULTS["learning_rate"], HEAD_LEARNING_RATE) == (optim.LEARNING_RATE, optim.HEAD_LEARNING_RATE)

    def test_decay_and_moments_are_given_to_ours(self, place):
        options = {"max_steps": 3, "save_strategy": "no", "seed": 5}
        found = {}
        for name, more in {"plain": {}, "decay": {"weight_decay": 0.5}, "moments": {"adam_beta1": 0.1}}.items():
            train(place / "pack", classify(place, trainer_options={**options, **more}), place / name)
            found[name] = weights(place / name)
        for name in ("decay", "moments"):
            assert any(not torch.equal(found["plain"][key], found[name][key]) for key in found[name])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"weigth_decay": 0.1},
                "'weigth_decay' is not a field of transformers' TrainingArguments. Did you mean 'weight_decay'?",
            ),
            ({"output_dir": "x"}, "output_dir is set by eigenlorax. Remove it"),
            ({"weight_decay": "much"}, "the Trainer's weight_decay must be float, got 'much'"),
            ({"max_steps": 1.5}, "the Trainer's max_steps must be int, got 1.5"),
            ({"use_cpu": 1}, "the Trainer's use_cpu must be bool, got 1"),
            ({"lr_scheduler_type": "zigzag"}, "the Trainer rejects its options: zigzag is not a valid"),
            ({"eval_strategy": "steps"}, "needs evaluation rows, and there are none. Pass evaluation= (--eval)"),
            ({"adam_beta2": 1.5}, "the Trainer rejects its options: betas must be two numbers"),
            ({"learning_rate": 0.1}, "'learning_rate' is among the Trainer's options, and learning_rate was passed"),
        ],
    )
    def test_what_is_none_is_said_before_anything_is_done(self, place, options, match):
        with pytest.raises(OptionError, match=re.escape(match)):
            train(place / "pack", classify(place, trainer_options=options), place / "out")
        assert not (place / "out").exists()


class TestWhatCannotBe:
    def test_is_said_before_anything_is_done(self, place):
        (place / "full").mkdir()
        (place / "full" / "theirs").touch()
        base = ex.Pack.open(place / "pack").base_model
        trainable.bert_pack(place / "nameless", "")
        cases = [
            ({"pack": "nowhere"}, PackMissingError, "nowhere is not a pack"),
            (
                {"output": "full"},
                PackExistsError,
                "full exists and is not empty. Choose another folder, or continue with resume=True (--resume)",
            ),
            ({"output": "pack/adapters/x"}, PackExistsError, "is in the pack"),
            ({"name": "A0"}, AdapterNameError, "already has an adapter named 'A0'"),
            ({"name": "a/b"}, AdapterNameError, "a/b"),
            ({"columns": Columns(text="body")}, OptionError, "no column 'body'"),
            ({"evaluation": place / "lm-eval.jsonl"}, OptionError, "lm-eval.jsonl has no column 'label'"),
            ({"model": "no/such-model"}, HubError, "the model no/such-model is not a local folder"),
            ({"model": str(place / "full")}, FormatError, "full is not a model that transformers can load"),
            ({"pack": "nameless"}, OptionError, "the pack does not say which base model it belongs to"),
            ({"pack": "lm-pack", "model": base}, ModuleNameError, "the model has none of the modules"),
            ({"max_length": 33}, OptionError, "more than the 32 tokens"),
            ({"rank": 0}, OptionError, "r must be an integer of at least 1"),
        ]
        for fields, error, match in cases:
            pack = fields.pop("pack", "pack")
            output, name = place / fields.pop("output", "out"), fields.pop("name", None)
            with pytest.raises(error, match=re.escape(match)):
                train(place / pack, classify(place, **fields), output, name=name)
            assert not (place / "out").exists(), match

    def test_rows_that_are_in_both_files_are_counted(self, place):
        both = trainable.read_jsonl(place / "train.jsonl")[:5] + trainable.read_jsonl(place / "eval.jsonl")
        rows = trainable.write_jsonl(place / "both.jsonl", both)
        with pytest.raises(RowsWarning, match=r"5 of 62 rows of .*both.jsonl are in .*train.jsonl too: scores include"):
            train(place / "pack", classify(place, evaluation=rows), place / "out")

    def test_labels_of_the_evaluation_that_are_not_in_the_training(self, place):
        trainable.write_jsonl(place / "odd.jsonl", [{"text": "x", "label": "odd"}])
        expected = r"odd.jsonl, line 1: label 'odd' is not one of the 2 classes: bad, good"
        with pytest.raises(FormatError, match=rf"{expected}\. The classes are the labels in .*train.jsonl\."):
            train(place / "pack", classify(place, evaluation=place / "odd.jsonl"), place / "out")
        assert not (place / "out").exists()

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"task": "chess"}, "no task 'chess'. There are: text-classification, causal-lm"),
            ({"epochs": 0.0}, "epochs must be a number above 0"),
            ({"head_learning_rate": 0.0}, "head_learning_rate must be a number above 0"),
            (
                {"head_learning_rate": 0.1, "trainer_options": {"optim": "sgd"}},
                "a single learning rate, and head_learning_rate belongs to the default",
            ),
            ({"learning_rate": math.nan}, "learning_rate must be a number above 0"),
            ({"alpha": -1.0}, "alpha must be"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"max_length": 1}, "max_length must be at least 2"),
            ({"seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_options_outside_their_range(self, place, fields, match):
        with pytest.raises(OptionError, match=re.escape(match)):
            classify(place, **fields)

    def test_an_encoder_is_no_language_model(self, place):
        match = (
            r"is a bert model, an encoder, .* Pass task='text-classification' \(--task text-classification\), or a dec"
        )
        with pytest.raises(OptionError, match=match):
            train(place / "pack", model_language(place), place / "out")
        assert not (place / "out").exists()

    def test_a_training_that_diverges_adds_nothing(self, place):
        with pytest.raises(NonFiniteError, match="diverged.*--learning-rate"):
            train(place / "pack", classify(place, learning_rate=1e30), place / "out")
        assert "out" not in ex.Pack.open(place / "pack").names
        assert not (place / "out" / "adapter_model.safetensors").exists()

    def test_a_name_that_was_taken_meanwhile_loses_nothing(self, place):
        lora = replace(ex.Pack.open(place / "pack").adapter("a1"), base_model=ex.Pack.open(place / "pack").base_model)

        def rival(stage, done, total):
            if (stage, done) == ("training", 6):
                with ex.Pack.edit(place / "pack") as opened:
                    opened.add(lora, name="out")

        with pytest.raises(
            AdapterNameError,
            match=r"trained adapter is in .*/out. To add it without .* resume=True \(--resume\), and another name=",
        ):
            train(place / "pack", classify(place), place / "out", progress=rival)
        again = train(place / "pack", classify(place), place / "out", name="mine", resume=True)
        assert (again.name, again.delta_error < 1e-6) == ("mine", True)

    def test_what_has_to_be_installed(self, place, monkeypatch):
        monkeypatch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(MissingExtraError, match=r"accelerate, which is not installed: pip install 'eigenlorax\[tr"):
            train(place / "pack", classify(place), place / "out")

    def test_a_record_that_is_none(self, place):
        with pytest.raises(FormatError, match=r"has no training.json: it was not written"):
            training_record.read(place)
        (place / RECORD).write_text("{")
        with pytest.raises(FormatError, match="is not JSON"):
            training_record.read(place)
        (place / RECORD).write_text("[]")
        with pytest.raises(FormatError, match="is not a record of `eigenlorax train`"):
            training_record.read(place)
