"""`eigenlorax compare`: what it prints, what it leaves with, and what it refuses before it begins."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[train]'")

import trainable  # noqa: E402
from children import needs_fork, run  # noqa: E402
from eigenlorax.cli import main  # noqa: E402
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = "compare pack --train few.jsonl --eval eval.jsonl -o out.json"
QUICK = f"{ROWS} --methods head --seeds 1 --epochs 1 --learning-rates 0.1"
NUMBERS = {"lora": 4 * 4 * 2 * 24, "core": 4 * 9 * 9}
"""Of rank 4 on four modules of 24 × 24; of a pack of nine components."""


@pytest.fixture
def place(_trainable, tmp_path, monkeypatch):
    """The current folder has what `trainable.make_all` makes, and few rows that no row for evaluation is among."""
    trainable.copy_all(_trainable, tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in Path("eval.jsonl").read_text("utf-8").splitlines()]
    fresh = [row for row in trainable.keyword_rows(90, seed=3) if row not in rows]
    trainable.write_jsonl(tmp_path / "few.jsonl", fresh[:40])
    return tmp_path


class TestAComparison:
    @needs_fork
    def test_in_a_process_of_its_own_prints_one_document(self, place):
        line = f"{ROWS} --methods lora,core --rank 4 --seeds 2 --epochs 1 --learning-rates 0.01 --json"
        done = run(lambda: main(shlex.split(line)))
        found = json_of(done)
        # the plan, and no bar, log or warning
        assert done.err == "note: 4 trainings of 1 epoch: 2 seeds on 40 rows for each of 2 methods.\n"
        assert (found["pack"], found["file"], found["yardstick"]) == ("pack", "out.json", "lora")
        assert {line["method"]: line["numbers"] for line in found["methods"]} == NUMBERS
        assert found["methods"][1]["difference"].keys() == {"value", "low", "high"}
        result = json.loads(Path("out.json").read_text("utf-8"))["result"]
        assert {**result, "pack": "pack", "file": "out.json"} == found

    def test_as_tables(self, cli, place):
        done = succeeded(
            cli(*shlex.split(f"{ROWS} --methods lora,core --rank 4 --epochs 7 --seeds 2 --learning-rates core=0.1,0.2"))
        )
        assert re.search(r"^note: learning rates are chosen on 7 rows held out of 40: with", done.err, re.MULTILINE)
        plan = r"note: 9 trainings of 7 epochs: 2 seeds on 40 rows for each of 2 methods, and 5 on 33 of them, which"
        assert re.search(plan, done.err)
        assert re.search(r"57 rows after 7 epochs on 40; the most frequent class\s+alone has 0\.\d{3}", done.out)
        assert re.search(
            r"method +parameters +file bytes +accuracy +± +least–most +points above lora.* +macro-F1", done.out
        )
        difference = r"[+-]\d+\.\d \([^)]*\)"
        assert re.search(rf"\n lora +768( +\S+){{5}} *\n core +324( +\S+){{4}} +{difference} +0\.\d+ *\n", done.out)
        assert "During training; a training has 21 steps" in done.out
        assert re.search(r"method +rate +epoch 1 +epoch 3 +epoch 4 +epoch 5 +epoch 7 +steps to 98 % of lora", done.out)
        assert "· core: " in done.out
        assert "· basis: core needs the pack's basis too" in done.out
        assert "· learning rates: the chosen rate is the lowest or the highest one tried for" in done.out

    def test_of_one_method_by_one_seed_has_no_columns_without_figures(self, cli, place):
        done = succeeded(cli(*shlex.split(QUICK)))
        assert done.err == "note: 1 training of 1 epoch: 1 seed on 40 rows.\n"
        assert re.search(r"method +parameters +file bytes +accuracy +macro-F1 *\n", done.out)
        assert re.findall(r"^· (no better)?", done.out, re.MULTILINE) in ([], ["no better"])

    def test_of_less_than_an_epoch_shows_what_there_is(self, cli, place):
        asked = f"{ROWS} --quick --methods head --epochs 1.5 --metric f1_macro"
        done = succeeded(cli(*shlex.split(asked)))
        out, note = done.out, re.sub(r"\s+", " ", done.err)
        plan = "note: 1 training of 1.5 epochs: 1 seed on 40 rows."
        # the other methods are left out by --methods
        assert f"{plan} --quick leaves out the choice of learning rates on your rows and the spread between se" in note
        assert json.loads(Path("out.json").read_text("utf-8"))["trainings"][0]["learning_rate"] == 0.2
        assert "57 rows after 1.5 epochs on 40; the most frequent class alone has 0.3" in re.sub(r"\s+", " ", out)
        assert re.search(r"method +parameters +file bytes +f1_macro +accuracy", out)
        assert re.search(r"method +rate +epoch 0\.667 +epoch 1\.333 +epoch 1\.667 +steps", out)

    def test_that_is_resumed(self, cli, place):
        succeeded(cli(*shlex.split(QUICK)))
        done = succeeded(cli(*shlex.split(f"{QUICK} --resume --seeds 2")))
        assert done.err == "note: 1 of 2 trainings of 1 epoch: 2 seeds on 40 rows.\n"
        assert len(json.loads(Path("out.json").read_text("utf-8"))["trainings"]) == 2


BAD = {
    "a pack that is none": (QUICK.replace("pack", "nowhere"), 4, "nowhere is not a pack"),
    "no rows to train on": (f"{QUICK} --train gone.csv", 3, "gone.csv does not exist"),
    "no rows for evaluation": (f"{QUICK} --eval gone.csv", 3, "gone.csv does not exist"),
    "one class": (f"{QUICK} --train one.jsonl", 3, "one.jsonl has one class only, 'good'"),
    "a class that was not trained": (
        f"{QUICK} --eval odd.jsonl",
        3,
        "odd.jsonl, line 1: label 'odd' is not one of the 2",
    ),
    "no such column": (f"{QUICK} --label-column gold", 3, "no column 'gold'. It has: text, label"),
    "no such method": (f"{QUICK} --methods lora,magic", 3, "no method 'magic'. There are: lora, "),
    "a method twice": (f"{QUICK} --methods head,head", 3, "the method 'head' is named twice"),
    "rates that are none": (f"{ROWS} --learning-rates lora=fast", 3, "'lora=fast' are not learning rates"),
    "rates of nobody": (f"{ROWS} --learning-rates full=0.1", 3, "'full', which is not one of the methods"),
    "rates below 0": (f"{ROWS} --learning-rates lora=-1", 3, "must be numbers above 0, got -1.0 for lora"),
    "rates twice": (f"{QUICK} --learning-rates 0.2", 3, "learning rates of all are given twice"),
    "another task": (f"{QUICK} --task causal-lm", 3, "compared by accuracy, which causal-lm does not have"),
    "no such metric": (f"{QUICK} --metric f1_makro", 3, "there is no metric 'f1_makro' of predicted classes. Did you"),
    "no such model": (f"{QUICK} --model no/such", 3, "the model no/such is not a local folder"),
    "a file in the way": (
        f"{QUICK} -o odd.jsonl",
        4,
        "odd.jsonl exists. Choose another file, or continue it with --resume",
    ),
    "a folder in the way": (f"{QUICK} -o empty", 3, "empty is a folder. Name a file for the results"),
    "a file in a file": (f"{QUICK} -o odd.jsonl/out.json", 4, "odd.jsonl exists and is not a folder"),
    "a file in the pack": (f"{QUICK} -o pack/out.json", 4, "is in the pack"),
    "nothing to resume": (f"{QUICK} --resume", 3, "out.json does not exist: there is nothing to resume"),
    "resuming another kind of file": (
        f"{QUICK} --resume -o odd.jsonl",
        3,
        "odd.jsonl is not a file of `eige",
    ),
    "another contest": (
        f"{QUICK} --resume -o begun.json --epochs 2",
        3,
        "started with --epochs 1.0, and now it is 2.0",
    ),
    "other rows": (f"{QUICK} --resume -o begun.json --train train.jsonl", 3, "started with other training rows"),
}


def test_what_is_wrong_is_said_before_anything_is_done(cli, place):
    Path("odd.jsonl").write_text('{"text": "w1", "label": "odd"}\n')
    Path("one.jsonl").write_text('{"text": "w1", "label": "good"}\n' * 9)
    os.mkdir("empty")
    succeeded(cli(*shlex.split(f"{QUICK} -o begun.json")))
    before = contents(place)
    for case, (line, code, part) in BAD.items():
        assert_refused(cli(*shlex.split(line)), code, part)
        assert contents(place) == before, case


@pytest.mark.parametrize("line", ["compare pack", f"{QUICK} --seeds many", "compare pack --train few.jsonl -o x.json"])
def test_what_cannot_be_read(cli, place, line):
    assert_usage_error(cli(*line.split()))
