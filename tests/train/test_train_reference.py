"""Training from a trained LoRA, the reference: it goes on from its weights and head, and the result is a member."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
import trainable
from adapters import change_tensors
from eigenlorax.core import keys
from eigenlorax.errors import (
    AdapterNameError,
    BaselineWarning,
    EigenloraxError,
    FormatError,
    ModuleNameError,
    OptionError,
    PackMissingError,
)
from eigenlorax.train import demo, new_task
from eigenlorax.train.options import Training
from eigenlorax.train.train import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::eigenlorax.errors.BaselineWarning")]

QUICK = {"learning_rate": 0.03, "head_learning_rate": 0.03, "epochs": 5.0}
UNCHANGED = {"learning_rate": 1e-12, "head_learning_rate": 1e-12, "trainer_options": {"max_steps": 1}}
LABELS = ("bad", "good")


def classify(place, **fields):
    asked = {"task": "text-classification", "train": place / "train.jsonl", "labels": LABELS, "epochs": 1.0, **fields}
    if "max_steps" in asked.get("trainer_options", {}):
        asked["epochs"] = None
    return Training(**asked)


def bert(place, n_labels=2):
    return AutoModelForSequenceClassification.from_pretrained(
        ex.Pack.open(place / "pack").base_model, num_labels=n_labels
    )


@pytest.fixture
def common(place):
    return trainable.save_common(place)


@pytest.fixture
def users(place, common):
    """A pack with the common adapter alone."""
    pack = ex.Pack.empty()
    pack.append(common, "common", name="members", max_error=0.002, head_error=0.002)
    return pack.save(place / "users")


def tensors(folder):
    return load_file(Path(folder) / keys.ADAPTER_WEIGHTS)


class TestStart:
    def test_is_the_reference_with_its_head_and_its_config(self, place, common):
        trained = train(None, classify(place, reference=str(common), **UNCHANGED), place / "out")
        before, after = tensors(common), tensors(place / "out")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, atol=1e-9, rtol=0)
        configs = [json.loads((folder / keys.ADAPTER_CONFIG).read_text()) for folder in (common, place / "out")]
        for field in ("r", "lora_alpha", "lora_dropout", "peft_type", "task_type", "base_model_name_or_path"):
            assert configs[0][field] == configs[1][field]
        assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])
        assert (trained.modules, trained.numbers, trained.head_numbers) == (4, 4 * 2 * 24 * 3, 2 * 24 + 2)
        assert (trained.labels, trained.added, trained.delta_error) == (["bad", "good"], False, None)

    def test_goes_on_as_peft_does(self, place, common):
        """Two steps on one batch are those of AdamW on the model that PEFT loads for training."""
        rows = trainable.keyword_rows(16, seed=3)
        options = {"max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
        training = classify(
            place,
            train=trainable.write_jsonl(place / "few.jsonl", rows),
            reference=str(common),
            batch_size=16,
            trainer_options={**options, "weight_decay": 0.1},
            learning_rate=0.01,
            head_learning_rate=0.02,
        )
        train(None, training, place / "out")

        model = PeftModel.from_pretrained(bert(place), common, is_trainable=True)
        tokenizer = AutoTokenizer.from_pretrained(ex.Pack.open(place / "pack").base_model)
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
        loras = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        heads = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
        optimizer = torch.optim.AdamW([{"params": loras, "lr": 0.01}, {"params": heads, "lr": 0.02}], weight_decay=0.1)
        for _ in range(2):
            model(**batch, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_([*loras, *heads], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(place / "expected")
        trained, start = tensors(place / "out"), tensors(common)
        for key, tensor in tensors(place / "expected").items():
            torch.testing.assert_close(trained[key], tensor, atol=1e-5, rtol=1e-4)
            assert not torch.equal(tensor, start[key])

    def test_that_is_a_version_has_the_same_update_in_mixed_rows(self, place, users):
        train(users, classify(place, reference="members@common", **UNCHANGED), place / "out", add=False)
        decoded, start = ex.Pack.open(users)["members@common"], ex.read_adapter(place / "out")
        for name, factors in start.modules.items():
            version = decoded.modules[name]
            torch.testing.assert_close(factors.up @ factors.down, version.up @ version.down, atol=1e-6, rtol=1e-5)
            # the rows of the version are orthogonal
            products = [each.down @ each.down.T for each in (version, factors)]
            shares = [(product - product.diag().diag()).norm() / product.norm() for product in products]
            assert shares[0] < 0.01 < 0.1 < shares[1]

    def test_with_a_module_of_zeros_is_trained_everywhere(self, place, common):
        """A version within an error bound has lost a module that hardly counts, and no gradient reaches two zeros."""
        module = "base_model.model.bert.encoder.layer.1.attention.self.value"
        change_tensors(common, lambda tensors: tensors[f"{module}.lora_B.weight"].mul_(1e-9))
        pack = ex.Pack.empty()
        pack.append(common, "common", name="members", max_error=0.002)
        users = pack.save(place / "users")
        assert not pack["members@common"].modules[module.removeprefix("base_model.model.")].down.any()
        train(users, classify(place, reference="members@common", **UNCHANGED), place / "start", add=False)
        down, up = (tensors(place / "start")[f"{module}.lora_{side}.weight"] for side in "AB")
        assert (down.any(), up.abs().max() < 1e-9) == (True, True)
        train(users, classify(place, reference="members@common", **QUICK), place / "out", force=True)
        assert tensors(place / "out")[f"{module}.lora_B.weight"].abs().max() > 1e-3
        assert "out" in ex.Pack.open(users).histories["members"].labels

    def test_may_be_an_adalora_checkpoint(self, place):
        config = AdaLoraConfig(
            init_r=5, target_r=3, total_step=9, target_modules=["query", "value"], task_type="SEQ_CLS"
        )
        folder = trainable.save_lora(place / "adalora", bert(place), config, ex.Pack.open(place / "pack").base_model)
        train(None, classify(place, reference=str(folder), **UNCHANGED), place / "out")
        assert json.loads((place / "out" / keys.ADAPTER_CONFIG).read_text())["peft_type"] == "LORA"
        expected, trained = ex.read_adapter(folder), ex.read_adapter(place / "out")
        for name, factors in trained.modules.items():
            wanted = expected.modules[name]
            torch.testing.assert_close(
                factors.scaling * factors.up @ factors.down, wanted.scaling * wanted.up @ wanted.down
            )

    def test_of_a_language_model(self, place):
        base = ex.Pack.open(place / "lm-pack").base_model
        config = LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
        common = trainable.save_lora(place / "common", AutoModelForCausalLM.from_pretrained(base), config, base)
        training = Training(
            task="causal-lm",
            train=place / "lm-train.jsonl",
            evaluation=place / "lm-eval.jsonl",
            reference=str(common),
            epochs=3.0,
            learning_rate=0.02,
        )
        trained = train(None, training, place / "out")
        assert trained.baseline.better
        assert trained.baseline.score == trained.figures.perplexity
        # the baseline is the reference, not the base model
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), common).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        losses, count = 0.0, 0
        for row in trainable.read_jsonl(place / "lm-eval.jsonl"):
            ids = tokenizer(row["text"] + " [SEP]", return_tensors="pt").input_ids
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert trained.figures.tokens == count
        assert trained.baseline.baseline == pytest.approx(torch.tensor(losses / count).exp().item(), rel=1e-4)
        pack = ex.fit([place / "out"], reference=common)
        assert pack["members@out"].ranks == (3,)


class TestMember:
    def test_of_rows_without_one_of_the_classes(self, place, common):
        rows = [row for row in trainable.keyword_rows(40, seed=4) if row["label"] == "good"]
        training = classify(
            place, train=trainable.write_jsonl(place / "one.jsonl", rows), reference=str(common), **QUICK
        )
        assert train(None, training, place / "out").labels == ["bad", "good"]

    def test_is_stored_by_fit_and_append(self, place, common, users):
        training = classify(place, reference=str(common), evaluation=place / "eval.jsonl", **QUICK)
        trained = train(None, training, place / "adapters" / "ann")
        assert trained.figures.accuracy > 0.9
        pack = ex.fit([place / "adapters"], reference=common)
        assert pack.histories["members"].labels == ["common", "ann"]
        record = pack.append(place / "adapters" / "ann", "twin", name="members")
        assert record.change_error <= 0.2
        with ex.Pack.edit(users) as opened:
            opened.append(place / "adapters" / "ann", "ann", name="members", max_bytes=4000)
        assert ex.Pack.open(users).histories["members"].is_population

    def test_is_appended_to_the_pack_of_its_reference(self, place, common, users):
        training = classify(place, reference="members@common", evaluation=place / "eval.jsonl", **QUICK)
        trained = train(users, training, place / "ann")
        assert (trained.name, trained.added, trained.rounding_error) == ("members@ann", True, None)
        pack = ex.Pack.open(users)
        pack.verify()
        record = pack.histories["members"]["ann"]
        assert (record.reference, trained.delta_error) == ("common", record.delta_error)
        assert record.change_error <= 0.2
        assert pack.histories["members"].is_population
        # the pack's adapter answers as the trained one does
        folder = pack.export(place / "loras", ["members@ann"])["members@ann"]
        tokenizer = AutoTokenizer.from_pretrained(pack.base_model)
        batch = tokenizer(
            [row["text"] for row in trainable.keyword_rows(57, seed=1)], padding=True, return_tensors="pt"
        )
        models = [PeftModel.from_pretrained(bert(place), path).eval() for path in (folder, place / "ann")]
        answers = [model(**batch).logits.argmax(dim=1) for model in models]
        assert (answers[0] == answers[1]).float().mean() > 0.9
        with pytest.raises(AdapterNameError, match="'members' already has a version 'ANN'"):
            train(users, training, place / "again", name="ANN")
        assert not (place / "again").exists()

    def test_that_is_no_better_than_the_reference_is_left_out(self, place, users):
        training = classify(place, reference="members@common", evaluation=place / "eval.jsonl", **UNCHANGED)
        said = r"on the 57 evaluation rows is (0\.\d+), and that of the reference members@common \1: .* not better"
        with pytest.warns(BaselineWarning, match=said):
            trained = train(users, training, place / "ann")
        assert (trained.added, trained.baseline.better, trained.baseline.p_value) == (False, False, None)
        assert ex.Pack.open(users).histories["members"].labels == ["common"]
        with pytest.warns(BaselineWarning, match=said):
            again = train(users, training, place / "ann", resume=True, force=True)
        assert (again.name, again.steps) == ("members@ann", 1)
        assert ex.Pack.open(users).histories["members"].labels == ["common", "ann"]

    def test_of_a_lossless_version_is_lossless(self, place, common):
        pack = ex.Pack.empty()
        pack.append(common, "1", name="run", lossless=True)
        pack.save(place / "history")
        train(place / "history", classify(place, reference="run@latest", **QUICK), place / "two", force=True)
        stored = ex.Pack.open(place / "history").restore("run@two", place / "restored")
        for key, tensor in tensors(place / "two").items():
            assert torch.equal(tensors(stored)[key], tensor)


class TestResuming:
    def test_ends_as_an_undisturbed_training_does(self, place, common):
        class StoppedError(Exception):
            pass

        def stop(stage, done, total):
            if stage == "training" and done == 20:
                raise StoppedError

        training = classify(place, reference=str(common), **{**QUICK, "epochs": 2.0})
        whole = train(None, training, place / "whole")
        with pytest.raises(StoppedError):
            train(None, training, place / "halves", progress=stop)
        halves = train(None, training, place / "halves", resume=True)
        assert (halves.history, halves.baseline) == (whole.history, whole.baseline)
        for key, tensor in tensors(place / "whole").items():
            assert torch.equal(tensor, tensors(place / "halves")[key])

    def test_needs_the_same_reference(self, place, common):
        training = classify(place, reference=str(common), **QUICK)
        train(None, training, place / "out")
        changed = {key: 2 * tensor for key, tensor in tensors(common).items()}
        save_file(changed, common / keys.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(OptionError, match="was started with reference='[0-9a-f]{64}', and now it is"):
            train(None, training, place / "out", resume=True)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        (
            {"rank": 4},
            OptionError,
            "rank= (--rank) has no effect with reference='common': rank, alpha, modules and initial values",
        ),
        ({"alpha": 4.0}, OptionError, "alpha= (--alpha) has no effect with reference"),
        ({"core": True}, OptionError, "core= (--core) has no effect with reference"),
        ({"start": "mean"}, OptionError, "start= (--start) has no effect with reference"),
        ({"n_extra": 2}, OptionError, "n_extra= (--n-extra) has no effect with reference"),
        ({"reference": None}, OptionError, "labels are the classes of a reference's head"),
        ({"reference": None, "labels": None}, OptionError, "neither a pack nor a reference to train from"),
        ({"labels": None}, OptionError, " and an adapter does not store class names. Pass its 2"),
        ({"labels": ("a", "b", "c")}, OptionError, "3 labels are named, and the adapter's head has 2"),
        ({"task": "causal-lm", "labels": None}, OptionError, "has the task type 'SEQ_CLS': it is not for causal-lm"),
        ({"reference": "nowhere"}, FormatError, "nowhere"),
        (
            {"reference": "users"},
            OptionError,
            "reference='users' (--reference) is a pack. To train from a version of it",
        ),
        ({"pack": "users"}, OptionError, "reference='common' (--reference) is no name of a version in"),
        (
            {"pack": "users", "reference": "members@none"},
            AdapterNameError,
            "no version 'none' in the history 'members'",
        ),
        ({"pack": "nowhere", "reference": "members@common"}, PackMissingError, "nowhere is not a pack"),
        ({"model": "gpt2"}, FormatError, "the head of adapter 'common'"),
        ({"model": "narrow"}, EigenloraxError, "belongs to a different base model"),
        ({"reference": "headless"}, AdapterNameError, "adapter 'headless' has no head, so it cannot classify"),
    ],
)
def test_is_refused_before_anything_is_written(place, common, users, monkeypatch, fields, error, match):
    monkeypatch.chdir(place)
    base = Path(ex.Pack.open("pack").base_model)
    config = LoraConfig(r=3, target_modules=["query", "value"])
    trainable.save_lora(place / "headless", bert(place), config, base)
    fields = {"reference": "common", **fields}
    if fields.get("model") == "gpt2":
        fields["model"] = str(base.parent / "gpt2")
    if fields.get("model") == "narrow":
        narrow = bert(place).config
        narrow.hidden_size, narrow.intermediate_size = 12, 20
        AutoModelForSequenceClassification.from_config(narrow).save_pretrained("narrow")
        trainable.make_tokenizer().save_pretrained("narrow")
    pack = fields.pop("pack", None)
    with pytest.raises(error, match=re.escape(match)):
        train(Path(pack) if pack else None, classify(place, **fields), place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused(place, common, layers):
    other = bert(place).config
    other.num_hidden_layers = layers
    AutoModelForSequenceClassification.from_config(other).save_pretrained(place / "other")
    trainable.make_tokenizer().save_pretrained(place / "other")
    with pytest.raises(ModuleNameError, match=r"^the model has (no place for )?4 .*another base model"):
        train(None, classify(place, reference=str(common), model=str(place / "other")), place / "out")
    assert not (place / "out").exists()


def test_on_minilm(tmp_path):
    """From a published adapter, two users with rules of their own, stored by `fit` and appended to the pack."""
    common = demo.shipped()["sms-spam-a"]
    for user, word in {"ann": "my", "bob": "is"}.items():
        texts = [text for text, _ in new_task.read().train if len(text) < 80]
        rows = [{"text": text, "label": int(word in text.lower().split())} for text in texts]
        trainable.write_jsonl(tmp_path / f"{user}.jsonl", rows[:64])

    def training(user, reference):
        return Training(
            task="text-classification",
            train=tmp_path / f"{user}.jsonl",
            reference=reference,
            model=str(demo.model_folder()),
            trainer_options={"max_steps": 16},
        )

    trained = train(None, training("ann", str(common)), tmp_path / "adapters" / "ann")
    assert trained.baseline.better
    ex.fit([tmp_path / "adapters"], reference=common).save(tmp_path / "users")
    member = train(tmp_path / "users", training("bob", "members@common"), tmp_path / "bob", force=True)
    assert member.name == "members@bob"
    pack = ex.Pack.open(tmp_path / "users")
    assert pack.histories["members"].is_population
    assert pack.base_model == json.loads((common / keys.ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    for name, folder in {"ann": tmp_path / "adapters" / "ann", "bob": tmp_path / "bob"}.items():
        record = pack.histories["members"][name]
        assert record.change_error <= 0.2
        assert record.file_bytes < record.source_file_bytes / 10
        assert ex.verify(pack, {f"members@{name}": ex.read_adapter(folder)}).holds
    # served, each row has its own member
    names = ["members@bob", "members@common", "members@ann"]
    exported = pack.export(tmp_path / "loras", names)
    base = AutoModelForSequenceClassification.from_pretrained(demo.model_folder(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    batch = tokenizer(["my order is late"] * 3, return_tensors="pt")
    with torch.no_grad():
        served = ex.AdapterBank(base.eval(), tmp_path / "users")(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            base = AutoModelForSequenceClassification.from_pretrained(demo.model_folder(), num_labels=2)
            alone = PeftModel.from_pretrained(base, exported[name]).eval()(**batch).logits[row]
            torch.testing.assert_close(served[row], alone, atol=5e-5, rtol=0)
    assert (served[0] - served[2]).abs().max() > 0.1
