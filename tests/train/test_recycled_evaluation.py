"""Original against recycled: equal to a count by hand in float64, and each adapter with its own head."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
import tiny
import trainable
from compared import classes_by_hand, dense, divergence, made, share, trained
from eigenlorax.cli import main
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import (
    AdapterNameError,
    DuplicateAdapterWarning,
    FormatError,
    NonFiniteError,
    OptionError,
    RowsWarning,
)
from eigenlorax.train import models
from eigenlorax.train.evaluate import evaluate
from eigenlorax.train.options import Columns
from eigenlorax.train.recycled_evaluation import prepare, run
from planted import normal, random_factors

pytestmark = pytest.mark.slow

FULL_RANK = 4 * tiny.RANK
CLASSES = {"a": 3, "b": 2, "c": 3, "d": 5}


def compare(pack, originals, files, progress=None, **options):
    """As `eigenlorax report` does it, with nothing measured in between."""
    return run(pack, originals, prepare(pack, originals, files, **options), progress)


@pytest.fixture(scope="module")
def base(_made):
    return _made / "bert"


@pytest.fixture(scope="module")
def originals(base):
    return {name: made(name, n, 100 * place, base) for place, (name, n) in enumerate(CLASSES.items())}


@pytest.fixture(scope="module")
def pack(originals):
    """So small that the recycled adapters say something else."""
    return ex.fit(list(originals.values()), n_components=6, dtype="float32")


@pytest.fixture(scope="module")
def lossless(originals):
    return ex.fit(list(originals.values()), n_components=FULL_RANK, dtype="float32")


@pytest.fixture
def rows(tmp_path):
    """Two classes; lengths differ, so that batches are padded."""
    found = [{**row, "label": index % 2} for index, row in enumerate(trainable.keyword_rows(31, seed=4, words=9))]
    trainable.write_jsonl(tmp_path / "rows.jsonl", found)
    return found


def check_against(got, base, original, recycled, texts, labels):
    """Every figure of a classification."""
    sides = [classes_by_hand(base, original.heads, one, texts) for one in (original, recycled, None)]
    answers = [one.argmax(dim=1) for one in sides]
    assert (got.agreement, got.without_agreement) == tuple(share(answers[0], one) for one in answers[1:])
    assert got.kl == pytest.approx(divergence(sides[0], sides[1]), rel=1e-4)
    assert got.without_kl == pytest.approx(divergence(sides[0], sides[2]), rel=1e-4)
    found = (got.original_accuracy, got.recycled_accuracy, got.without_accuracy)
    if labels is None:
        assert (found, got.labelled) == ((None, None, None), False)
    else:
        assert (found, got.labelled) == (tuple(share(one, torch.tensor(labels)) for one in answers), True)
    assert (got.rows, got.tokens, got.task) == (len(texts), None, "text-classification")
    assert (got.original_perplexity, got.recycled_perplexity, got.without_perplexity) == (None, None, None)
    # nothing above is right by being trivial
    assert 0 < got.agreement < 1
    assert 0.05 < got.kl != pytest.approx(got.without_kl, rel=0.05)


class TestClassification:
    @pytest.mark.parametrize("batch_size", [1, 7, 64])
    def test_equals_a_count_by_hand(self, tmp_path, base, pack, originals, rows, batch_size):
        file = tmp_path / "rows.jsonl"
        (got,) = compare(pack, originals, [("a", file)], batch_size=batch_size)
        texts = [(row["text"],) for row in rows]
        check_against(got, base, originals["a"], pack.adapter("a"), texts, [row["label"] for row in rows])
        assert (got.name, got.data) == ("a", str(file))

    def test_rows_without_labels(self, tmp_path, base, pack, originals, rows):
        file = trainable.write_jsonl(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows])
        found = compare(pack, originals, [(None, file)])
        assert [one.name for one in found] == ["a", "b", "c", "d"]
        for one in found:
            texts = [(row["text"],) for row in rows]
            check_against(one, base, originals[one.name], pack.adapter(one.name), texts, None)

    def test_pairs_of_texts_in_csv(self, tmp_path, base, pack, originals, rows):
        pairs = [(row["text"], other["text"]) for row, other in zip(rows, reversed(rows), strict=True)]
        lines = [f"{one},{other},{('no', 'yes')[row['label']]}" for (one, other), row in zip(pairs, rows, strict=True)]
        (tmp_path / "pairs.csv").write_text("\n".join(["first,second,gold", *lines]), "utf-8")
        columns = Columns("first", "gold", "second")
        names = {"b": ["no", "yes"]}
        (got,) = compare(pack, originals, [("b", tmp_path / "pairs.csv")], columns=columns, labels=names)
        check_against(got, base, originals["b"], pack.adapter("b"), pairs, [row["label"] for row in rows])

    def test_nothing_is_lost_at_full_rank(self, tmp_path, lossless, originals, rows):
        found = compare(lossless, originals, [(None, tmp_path / "rows.jsonl")])
        for one in found:
            assert one.agreement == 1
            assert one.kl < 1e-9
            assert one.without_kl > 0.01
            assert one.recycled_accuracy == one.original_accuracy
        assert min(one.without_agreement for one in found) < 0.9

    def test_is_what_evaluate_says(self, tmp_path, pack, originals, rows):
        ex.fit(list(originals.values()), n_components=6, dtype="float32").save(tmp_path / "pack")
        (got,) = compare(pack, originals, [("c", tmp_path / "rows.jsonl")])
        figures = evaluate(tmp_path / "pack", "c", tmp_path / "rows.jsonl").figures
        assert got.recycled_accuracy == figures.accuracy

    def test_adapters_do_not_touch_each_other(self, tmp_path, pack, originals, rows):
        """With their heads beside the model, and with a head that is written over the model's own."""
        over = replace(originals["c"], source_config=None, name="over")
        with pytest.warns(DuplicateAdapterWarning, match=r"^over has the same update as c\.$"):
            pack = ex.fit([*originals.values(), over], n_components=6, dtype="float32")
        everything, file = {**originals, "over": over}, tmp_path / "rows.jsonl"
        together = compare(pack, everything, [(None, file)])
        assert [one.name for one in together] == ["a", "b", "c", "d", "over"]
        assert len({one.kl for one in together}) >= 4
        alone = [compare(pack, everything, [(name, file)])[0] for name in pack.names]
        assert together == alone
        assert replace(together[4], name="c") == together[2]

    def test_one_base_model_for_each_number_of_classes(self, tmp_path, pack, originals, rows, monkeypatch):
        loaded = []
        load = models.load_model

        def counted(model, revision, labels, tokenizer):
            loaded.append(len(labels.names))
            return load(model, revision, labels, tokenizer)

        monkeypatch.setattr(models, "load_model", counted)
        file = tmp_path / "rows.jsonl"
        found = compare(pack, originals, [(None, file), ("d", file), ("a", file)])
        assert loaded == [2, 3, 5]
        assert [one.name for one in found] == ["a", "b", "c", "d", "d", "a"]
        assert (found[4], found[5]) == (found[3], found[0])

    def test_only_those_with_an_original(self, tmp_path, pack, originals, rows):
        some = {name: originals[name] for name in ("d", "b")}
        assert [one.name for one in compare(pack, some, [(None, tmp_path / "rows.jsonl")])] == ["b", "d"]

    def test_rows_that_are_cut_are_said_once(self, tmp_path, pack, originals, rows):
        with pytest.warns(RowsWarning, match="were cut after 5 tokens") as said:
            compare(pack, originals, [(None, tmp_path / "rows.jsonl")], max_length=5)
        assert len(said) == 1

    def test_a_column_that_may_be_the_labels_is_said(self, tmp_path, pack, originals, rows):
        file = trainable.write_jsonl(
            tmp_path / "other.jsonl", [{"text": row["text"], "gold": row["label"]} for row in rows]
        )
        with pytest.warns(
            RowsWarning,
            match="no column 'label': agreement is measured, .* text, gold. Name .* Columns.label=.* .--label-column",
        ) as said:
            found = compare(pack, originals, [(None, file)])
        assert len(said) == 1
        assert not any(one.labelled for one in found)
        (named,) = compare(pack, originals, [("a", file)], columns=Columns(label="gold"))
        (got,) = compare(pack, originals, [("a", tmp_path / "rows.jsonl")])
        assert replace(named, data=got.data) == got

    def test_from_the_shell(self, tmp_path, pack, originals, rows, capsys, monkeypatch):
        """With the names of the classes from what `train` has written."""
        ex.fit(list(originals.values()), n_components=6, dtype="float32").save(tmp_path / "pack")
        for name, one in originals.items():
            ex.write_adapter(one, tmp_path / "in" / name)
        named = [{**row, "label": ("no", "yes")[row["label"]]} for row in rows]
        file = trainable.write_jsonl(tmp_path / "named.jsonl", named)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "training.json").write_text('{"labels": ["no", "yes"]}')
        line = ["report", "pack", "-a", "in", "--evaluate", f"b={file}", "--labels", "b=out", "--json"]
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match="^0$"):
            main(line)
        (got,) = json.loads(capsys.readouterr().out)["evaluations"]
        (wanted,) = compare(pack, originals, [("b", tmp_path / "rows.jsonl")])
        assert got == {**asdict(wanted), "data": str(file)}
        (tmp_path / "out" / "training.json").write_text('{"labels": null}')
        with pytest.raises(SystemExit, match="^3$"):
            main(line)
        assert "out is a training without classes" in capsys.readouterr().err

    def test_progress_counts_rows(self, tmp_path, pack, originals, rows):
        seen = []
        file = tmp_path / "rows.jsonl"
        compare(pack, originals, [(None, file)], batch_size=20, progress=lambda *step: seen.append(step))
        assert {(stage, total) for stage, _, total in seen} == {("comparing predictions", 4 * 31)}
        counts = [done for _, done, _ in seen]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 4 * 31)


class TestKindsOfAdapter:
    """What PEFT itself has written."""

    @pytest.mark.parametrize(
        "options", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}], ids=str
    )
    def test_an_only_adapter_comes_back(self, tmp_path, base, rows, options):
        original = trained(tmp_path / "peft", base, **options)
        pack = ex.fit([original], n_components=tiny.RANK, dtype="float32")
        (got,) = compare(pack, {"one": original}, [(None, tmp_path / "rows.jsonl")])
        assert got.agreement == 1
        assert got.kl < 1e-9
        assert got.without_kl > 1e-3

    def test_magnitudes_are_a_part_of_the_update(self, tmp_path, base, rows):
        original = trained(tmp_path / "peft", base, use_dora=True)
        pack = ex.fit([original], n_components=tiny.RANK, dtype="float32")
        (got,) = compare(pack, {"one": original}, [(None, tmp_path / "rows.jsonl")])
        texts, labels = [(row["text"],) for row in rows], torch.tensor([row["label"] for row in rows])
        bare = classes_by_hand(base, original.heads, None, texts)
        assert got.without_accuracy == share(bare.argmax(dim=1), labels)

        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        model = PeftModel.from_pretrained(model, tmp_path / "peft").double().eval()
        said = [model(**tokenizer(*text, return_tensors="pt")).logits[0].detach() for text in texts]
        logs = torch.stack(said).log_softmax(dim=1)
        assert got.original_accuracy == share(logs.argmax(dim=1), labels)
        assert got.without_kl == pytest.approx(divergence(logs, bare), rel=1e-4)


@pytest.fixture(scope="module")
def made_of_gpt2(_made):
    pack, adapters = tiny.make_pack(tiny.GPT2, n_components=10)
    pack.base_model = str(_made / "gpt2")
    return pack, {one.name: one for one in adapters}


class TestLanguageModelling:
    @pytest.mark.parametrize("batch_size", [1, 6, 64])
    def test_equals_a_count_by_hand(self, place, made_of_gpt2, batch_size, monkeypatch):
        # a few tokens at a time
        monkeypatch.setattr("eigenlorax.train.recycled_evaluation._MAX_FLOAT64_LOGITS", 7 * 53)
        pack, originals = made_of_gpt2
        file = place / "lm-eval.jsonl"
        (got,) = compare(pack, originals, [("a2", file)], task="causal-lm", batch_size=batch_size)
        tokenizer = AutoTokenizer.from_pretrained(pack.base_model)
        texts = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        wanted = torch.tensor([token for row in ids for token in row[1:]])
        sides = []
        for adapter in (originals["a2"], pack.adapter("a2"), None):
            model = dense(AutoModelForCausalLM.from_pretrained(pack.base_model).double(), adapter)
            said = [model(torch.tensor([row])).logits[0, :-1].detach() for row in ids]
            sides.append(torch.cat(said).log_softmax(dim=1))
        losses = [-float(one.gather(1, wanted[:, None]).mean()) for one in sides]
        answers = [one.argmax(dim=1) for one in sides]
        assert (got.rows, got.tokens, got.task) == (29, len(wanted), "causal-lm")
        found = (got.original_perplexity, got.recycled_perplexity, got.without_perplexity)
        assert found == pytest.approx([math.exp(loss) for loss in losses], rel=1e-5)
        assert (got.agreement, got.without_agreement) == tuple(share(answers[0], one) for one in answers[1:])
        assert got.kl == pytest.approx(divergence(sides[0], sides[1]), rel=1e-4)
        assert got.without_kl == pytest.approx(divergence(sides[0], sides[2]), rel=1e-4)
        assert 0 < got.agreement < 1
        accuracies = (got.labelled, got.original_accuracy, got.recycled_accuracy, got.without_accuracy)
        assert accuracies == (False, None, None, None)

    def test_is_what_evaluate_says_of_completions(self, place, made_of_gpt2):
        pack, originals = made_of_gpt2
        tiny.make_pack(tiny.GPT2, n_components=10)[0].save(place / "lm")
        texts = [json.loads(line)["text"] for line in (place / "lm-eval.jsonl").read_text("utf-8").splitlines()]
        file = trainable.write_jsonl(
            place / "pairs.jsonl", [{"prompt": text[:5], "completion": text[5:]} for text in texts]
        )
        found = compare(pack, originals, [(None, file)], task="causal-lm")
        assert [one.name for one in found] == ["a0", "a1", "a2", "a3"]
        for one in found[:2]:
            figures = evaluate(place / "lm", one.name, file, task="causal-lm", model=pack.base_model).figures
            assert one.tokens == figures.tokens
            assert one.recycled_perplexity == pytest.approx(figures.perplexity, rel=1e-6)
        # one base model without an update
        assert len({one.without_perplexity for one in found}) == 1
        assert len({one.original_perplexity for one in found}) == 4


class TestWhatCannotBeCompared:
    @pytest.mark.parametrize(
        ("files", "options", "error", "match"),
        [
            ([("e", "rows")], {}, AdapterNameError, "no adapter named 'e' in the pack. It has: a, b, c, d"),
            ([("d", "rows")], {}, OptionError, "adapter 'd' cannot be compared without its original"),
            (
                [(None, "three")],
                {},
                OptionError,
                r"do not fit adapter 'b': .*label 2 is not one .*NAME=\S+three",
            ),
            ([("b", "three")], {}, FormatError, "^[^N]*label 2 is not one of the 2 classes: 0, 1.$"),
            ([("b", "named")], {}, OptionError, "labels such as 'good', and an adapter does not store class names"),
            ([(None, "named")], {"labels": ["bad", "good"]}, OptionError, "do not fit adapter 'a': 2 labels are named"),
            ([("a", "rows")], {"columns": Columns(label="gold")}, OptionError, "no column 'gold'. .*--label-column"),
            (
                [("a", "first")],
                {},
                FormatError,
                "line 1 has no 'label', which 30 of 31 rows have. Label all rows, or",
            ),
            (
                [("a", "last")],
                {},
                FormatError,
                "line 31 has no 'label', which 30 of 31 rows have. Label all rows, or",
            ),
            (
                [("b", "named")],
                {"labels": {"q": ["bad"]}},
                AdapterNameError,
                "no adapter named 'q' in the pack, though labels name it. It has: a, b, c, d",
            ),
            ([("b", "named")], {"labels": {"a": ["x", "y", "z"]}}, OptionError, "labels such as 'good'"),
            (
                [("a", "named")],
                {"labels": ["x", "y", "bad"]},
                FormatError,
                "label 'good' is not one of the 3 classes: x, y, bad",
            ),
            ([("a", "nowhere")], {}, FormatError, "nowhere.jsonl does not exist. Rows are read from .jsonl, .csv"),
            ([("a", "empty")], {}, FormatError, "empty.jsonl has no rows"),
            ([("a", "rows")], {"columns": Columns(text="gold")}, OptionError, "no column 'gold'"),
            ([("a", "rows")], {"task": "chess"}, OptionError, "no task 'chess'"),
            ([("a", "rows")], {"batch_size": 0}, OptionError, "batch_size must be at least 1"),
            ([("a", "rows")], {"max_length": 0}, OptionError, "max_length must be at least 2, got 0"),
            ([("a", "nowhere")], {"model": "nowhere/too"}, FormatError, "nowhere.jsonl does not exist"),
            ([("a", "rows"), ("b", "nowhere")], {"model": "nowhere/too"}, FormatError, "nowhere.jsonl does not exist"),
            (
                [("a", "rows")],
                {"task": "causal-lm"},
                OptionError,
                "'a' has the task type 'SEQ_CLS': it is not for causal",
            ),
            ([("a", "rows")], {"labels": ["x", "y", "x"]}, OptionError, "x, y, x are not .*: 'x' appears twice"),
            (
                [("a", "rows")],
                {"labels": {"a": ["x", "y", "x"]}},
                OptionError,
                "x, y, x are not .*: 'x' appears twice",
            ),
            ([("a", "rows")], {"max_length": 90}, OptionError, "more than the 32 tokens"),
        ],
    )
    def test_options(self, tmp_path, pack, originals, rows, files, options, error, match):
        trainable.write_jsonl(tmp_path / "three.jsonl", [{**row, "label": n % 3} for n, row in enumerate(rows)])
        trainable.write_jsonl(tmp_path / "named.jsonl", trainable.keyword_rows(5, seed=2))
        trainable.write_jsonl(tmp_path / "first.jsonl", [{"text": rows[0]["text"]}, *rows[1:]])
        trainable.write_jsonl(tmp_path / "last.jsonl", [*rows[:-1], {"text": rows[-1]["text"]}])
        trainable.write_jsonl(tmp_path / "empty.jsonl", [])
        at_hand = {name: originals[name] for name in "abc"}
        with pytest.raises(error, match=match):
            compare(pack, at_hand, [(name, tmp_path / f"{file}.jsonl") for name, file in files], **options)

    def test_no_original(self, tmp_path, pack, rows):
        with pytest.raises(OptionError, match="nothing to compare"):
            compare(pack, {}, [(None, tmp_path / "rows.jsonl")])

    def test_neither_task_nor_head(self, place):
        opened = ex.Pack.open(place / "pack")
        with pytest.raises(OptionError, match="adapter 'a0' has the task type None"):
            compare(opened, {"a0": opened.adapter("a0")}, [(None, place / "eval.jsonl")])

    def test_trained_biases_are_no_head(self, tmp_path, base, rows):
        bare = from_factors(
            "bare",
            {tiny.BERT[0]: random_factors(tiny.RANK, tiny.IN, tiny.IN, seed=1, dtype=torch.float32)},
            heads={f"base_model.model.{tiny.BERT[0]}.base_layer.bias": torch.ones(tiny.IN)},
            base_model=str(base),
        )
        pack = ex.fit([bare], n_components=2)
        with pytest.raises(FormatError, match="query.bias of shape .*, does not fit a bert model for classification"):
            compare(pack, {"bare": bare}, [(None, tmp_path / "rows.jsonl")])

    def test_a_model_that_is_not_the_base(self, tmp_path, pack, originals, rows, base):
        other, files = str(base.parent / "gpt2"), [("a", tmp_path / "rows.jsonl")]
        with pytest.raises(
            FormatError, match="the head of adapter 'a', .* does not fit a gpt2 .* different base model"
        ):
            compare(pack, originals, files, model=other)

    def test_a_model_that_has_other_modules(self, place, made_of_gpt2, base, tmp_path):
        pack, originals = made_of_gpt2
        decoder = Path(shutil.copytree(base, tmp_path / "decoder"))
        config = json.loads((decoder / "config.json").read_text("utf-8"))
        (decoder / "config.json").write_text(json.dumps({**config, "is_decoder": True}), "utf-8")
        with pytest.raises(
            FormatError, match="PEFT cannot load adapter 'a1' .* not found .* Does it belong to another base mod"
        ):
            compare(pack, originals, [("a1", place / "lm-eval.jsonl")], model=str(decoder), task="causal-lm")

    def test_a_head_is_not_for_language(self, tmp_path, base, rows):
        quiet = made("quiet", 3, 5, base, task_type=None)
        pack = ex.fit([quiet], n_components=tiny.RANK, dtype="float32")
        with pytest.raises(OptionError, match=r"'quiet' has a head, classifier.bias, that a bert model for causal-lm"):
            compare(pack, {"quiet": quiet}, [(None, tmp_path / "rows.jsonl")], task="causal-lm")

    def test_a_head_of_the_language_model_is(self, tmp_path, base, rows):
        bias = {"base_model.model.cls.predictions.bias": normal(len(trainable.VOCABULARY), seed=3)}
        spoken = from_factors("spoken", dict(made("x", 3, 5, base).modules), heads=bias, base_model=str(base))
        pack = ex.fit([spoken], n_components=tiny.RANK, dtype="float32")
        checked = prepare(pack, {"spoken": spoken}, [(None, tmp_path / "rows.jsonl")], task="causal-lm")
        assert [job.task for job in checked.jobs] == ["causal-lm"]

    def test_what_is_no_number(self, tmp_path, pack, originals, rows):
        wild = {
            name: replace(one, down=one.down * 1e18, up=one.up * 1e19) for name, one in originals["a"].modules.items()
        }
        broken = {"a": replace(originals["a"], modules=wild)}
        with pytest.raises(
            NonFiniteError, match=r"predictions of adapter 'a' \(original\) on .*rows.jsonl are NaN or Inf"
        ):
            compare(pack, broken, [("a", tmp_path / "rows.jsonl")])

    def test_originals_of_another_base_model(self, tmp_path, pack, originals, rows):
        wide = {
            name: random_factors(tiny.RANK, tiny.IN, 2 * tiny.IN, seed=1, dtype=torch.float32) for name in tiny.BERT
        }
        specs = {name: one.spec for name, one in wide.items()}
        others = {"a": replace(originals["a"], modules=wide, specs=specs)}
        with pytest.raises(FormatError, match=r"PEFT cannot load adapter 'a' on the base model: .* another base model"):
            compare(pack, others, [("a", tmp_path / "rows.jsonl")])
