"""`eigenlorax train` and `evaluate`: what they print, what they leave with, and what they refuse before they begin."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

for package in ("peft", "transformers", "accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[train]'")

import eigenlorax as ex  # noqa: E402
import trainable  # noqa: E402
from children import needs_fork, run  # noqa: E402
from eigenlorax.cli import main  # noqa: E402
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded  # noqa: E402

pytestmark = pytest.mark.slow

TRAIN = "train pack --task text-classification --train train.jsonl --learning-rate 0.1 --rank 4 -o out"
CLASSIFY = shlex.split(TRAIN)


@pytest.fixture
def place(_trainable, tmp_path, monkeypatch):
    """The current folder has what `trainable.make_all` makes; the models are where they were made."""
    trainable.copy_all(_trainable, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestATrainingAndItsEvaluation:
    @needs_fork
    def test_in_processes_of_their_own_print_one_document_each(self, place):
        done = run(lambda: main([*CLASSIFY, "--eval", "eval.jsonl", "--epochs", "4", "--json"]))
        found = json_of(done)
        # no bar, no log, no warning
        assert done.err == ""
        assert found["figures"]["accuracy"] == 1.0
        assert (found["name"], found["folder"], found["pack"]) == ("out", "out", "pack")
        assert found["numbers"] == 4 * 2 * 9 * 4
        assert found["delta_error"] < 1e-6
        assert found["labels"] == ["bad", "good"]
        done = run(lambda: main(["evaluate", "pack", "out", "--data", "eval.jsonl", "--labels", "out", "--json"]))
        again = json_of(done)
        assert done.err == ""
        assert again["figures"]["confusion"] == found["figures"]["confusion"]
        assert again["figures"]["loss"] == pytest.approx(found["figures"]["loss"], abs=1e-5)
        assert (again["data"], again["name"], again["task"]) == ("eval.jsonl", "out", "text-classification")

    def test_as_tables(self, cli, place):
        out = succeeded(cli(*CLASSIFY, "--eval", "eval.jsonl", "--epochs", 4)).out
        assert re.search(r"trained coefficients +288 in 4 modules", out)
        assert re.search(r"accuracy +1\.0000", out)
        assert re.search(r"pack +added to the pack; delta error \d\.\de-\d\d", out)
        assert re.search(r"epoch +loss +evaluation: loss +evaluation: accuracy", out)
        out = succeeded(
            cli("evaluate", "pack", "out", "--data", "eval.jsonl", "--labels", "bad,good", "--metric", "f1_macro")
        ).out
        assert re.search(r"f1_macro +1\.0000 *\n +most frequent class alone +0\.3\d+ *\n accuracy +1\.0000", out)
        table = re.search(r"class \\ prediction +bad +good.*\n.*\n +bad +(\d+) +0 *\n +good +0 +(\d+)", out)
        assert int(table[1]) + int(table[2]) == 57

    def test_of_a_language_model(self, cli, place):
        asked = "train lm-pack --task causal-lm --train lm-train.jsonl --eval lm-eval.jsonl -o lm --core --epochs 1"
        out = succeeded(cli(*asked.split())).out
        assert re.search(r"trained coefficients +324 in 4 modules", out)
        loss = re.search(r"\n +loss +(\S+)", out)[1]
        out = succeeded(cli("evaluate", "lm-pack", "lm", "--data", "lm-eval.jsonl")).out
        assert re.search(r"\n +loss +(\S+)", out)[1] == loss
        assert re.search(r"perplexity +\d+", out)

    def test_on_the_trainer_s_own_options(self, cli, place):
        (place / "options.yaml").write_text("max_steps: 3\nweight_decay: 1e-2\nsave_strategy: 'no'\n")
        found = json_of(cli(*CLASSIFY, "--trainer-options", "options.yaml", "--no-add", "--json"))
        assert (found["steps"], found["delta_error"]) == (3, None)
        assert ex.Pack.open("pack").names == ["a0", "a1", "a2", "a3"]

    def test_that_is_resumed(self, cli, place):
        # the options of a training are its own: one of two epochs is none of one
        first = [*CLASSIFY, "--epochs", "1", "--no-add"]
        succeeded(cli(*first))
        before = (place / "out" / "adapter_model.safetensors").read_bytes()
        found = json_of(cli(*CLASSIFY, "--epochs", "1", "--resume", "--force", "--json"))
        assert found["steps"] == 12
        assert (place / "out" / "adapter_model.safetensors").read_bytes() == before
        assert "out" in ex.Pack.open("pack").names
        assert_refused(
            cli(*CLASSIFY, "--epochs", "2", "--resume", "--name", "new"),
            3,
            "started with --epochs 1.0, and now it is 2.0",
        )

    @needs_fork
    @pytest.mark.parametrize("room", [200, 3000, 9000])
    def test_a_full_disk_is_said_and_what_was_written_serves_to_resume(self, cli, place, room):
        """Full under the record, the weights and the optimizer's state of a checkpoint."""
        before = contents(place / "pack")

        def full():
            resource = pytest.importorskip("resource")
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            main([*CLASSIFY, "--epochs", "1", "--force"])

        assert_refused(run(full), 6, ": out")
        assert contents(place / "pack") == before
        done = cli(*CLASSIFY, "--epochs", 1, "--force", *(["--resume"] if (place / "out").exists() else []))
        assert "added to the pack" in succeeded(done).out

    def test_what_is_cut_is_noted(self, cli, place):
        done = succeeded(cli(*CLASSIFY, "--max-length", 4, "--epochs", 1, "--no-add", "--json"))
        json.loads(done.out)
        assert re.match(r"note: \d+ of 192 rows of \S*train.jsonl were cut after 4 tokens. .*\n", done.err)

    @pytest.mark.parametrize(
        ("options", "code", "added"), [([], 3, False), (["--force"], 0, True), (["--no-add"], 0, False)]
    )
    def test_of_no_use_is_noted_and_added_by_force_alone(self, cli, place, options, code, added):
        idle = [*CLASSIFY, "--learning-rate", "1e-9", "--head-learning-rate", "1e-9", "--epochs", "1"]
        done = cli(*idle, "--eval", "eval.jsonl", "--json", *options)
        found = json.loads(done.out)
        assert (done.code, found["added"], found["baseline"]["better"]) == (code, added, False)
        assert found["baseline"]["baseline"] == found["figures"]["majority"]
        assert ("out" in ex.Pack.open("pack").names) is added
        note = re.search(
            r"note: the accuracy on the 57 evaluation rows is (0\.\d{4}), and the most frequent .* is not better",
            done.err,
        )
        assert float(note[1]) == pytest.approx(found["figures"]["accuracy"], abs=1e-4)
        assert ("error: the adapter was not added to pack" in done.err) is (code == 3)
        assert ("nevertheless: `eigenlorax add pack out=out`" in done.err) is (code == 3)
        if code == 3:
            succeeded(cli("add", "pack", "out=out"))

    @pytest.mark.parametrize(
        ("arguments", "lines"),
        [
            (
                [*CLASSIFY, "--epochs", "4"],
                [r"accuracy on 192 training rows +(0\.9\d+|1\.0000)", r"most frequent class alone +0\.5"],
            ),
            (
                shlex.split(
                    "train lm-pack --task causal-lm --train lm-train.jsonl --eval lm-eval.jsonl -o out --no-add"
                ),
                [r"\n +perplexity +\d+\.?\d*\n", r"\n +base model without the adapter +\d+\.?\d*"],
            ),
        ],
    )
    def test_stands_beside_its_baseline(self, cli, place, arguments, lines):
        out = re.sub(r" +\n", "\n", succeeded(cli(*arguments)).out)
        for line in lines:
            assert re.search(line, out), out


class TestFromAReference:
    """In place of coefficients, a LoRA that goes on from a trained one."""

    ASKED = TRAIN.replace("train pack", "train").replace("--learning-rate 0.1 --rank 4", "--labels bad,good")

    def test_in_a_folder(self, cli, place):
        trainable.save_common(place)
        line = [*shlex.split(self.ASKED), "--reference", "common", "--epochs", 1, "--eval", "eval.jsonl"]
        found = json_of(cli(*line, "--learning-rate", 0.03, "--json"))
        assert (found["pack"], found["name"], found["added"], found["numbers"]) == (None, "out", False, 4 * 2 * 24 * 3)
        shown = succeeded(cli(*line, "--learning-rate", 0.03, "--resume")).out
        assert re.search(r"trained from +common", shown)
        assert "added to the pack" not in shown
        out = succeeded(cli("fit", "out", "--reference", "common", "-o", "users")).out
        assert "members" in out
        assert ex.Pack.open("users").histories["members"].labels == ["common", "out"]

    def test_that_is_a_version_of_the_pack(self, cli, place):
        common = trainable.save_common(place)
        pack = ex.Pack.empty()
        pack.append(common, "common", name="members", max_error=0.002)
        pack.save("users")
        line = [*shlex.split(self.ASKED), "users", "--reference", "members@common", "--eval", "eval.jsonl"]
        idle = ["--learning-rate", 1e-12, "--head-learning-rate", 1e-12, "--epochs", 1]
        done = cli(*line, *idle)
        assert done.code == 3
        assert "and that of the reference members@common" in done.err
        assert "to add it nevertheless: repeat the command with --resume --force" in done.err
        out = succeeded(cli(*line, *idle, "--resume", "--force")).out
        assert re.search(r"adapter members@out", out)
        assert re.search(r"trained from +members@common", out)
        assert re.search(r"trained parameters of the LoRA +576 in 4 modules", out)
        assert re.search(r"accuracy of the reference +0\.\d+", out)
        assert ex.Pack.open("users").histories["members"].labels == ["common", "out"]


def written(name, content):
    Path(name).write_text(content)
    return name


BAD = {
    "nothing to train from": (
        TRAIN.replace("train pack", "train"),
        3,
        "neither a PACK nor a --reference to train from",
    ),
    "a rank beside a reference": (f"{TRAIN} --reference run@1", 3, "--rank has no effect with --reference run@1"),
    "classes without a reference": (f"{TRAIN} --labels a,b", 3, "Remove --labels, or pass --reference"),
    "a name without a pack": (
        f"{TRAIN.replace('train pack', 'train')} --reference x --name new",
        3,
        "--name has no effect without PACK",
    ),
    "a pack that is none": (TRAIN.replace("pack", "nowhere"), 4, "nowhere is not a pack"),
    "a name that is taken": (f"{TRAIN} --name a1", 3, "already has an adapter named 'a1'"),
    "a name that is none": (f"{TRAIN} --name .x", 3, ".x"),
    "a folder in the way": (f"{TRAIN} -o in-the-way", 4, "in-the-way exists and is not empty"),
    "a folder in the pack": (f"{TRAIN} -o pack/adapters/new", 4, "is in the pack"),
    "nothing to resume": (f"{TRAIN} --resume", 3, "there is no training to resume"),
    "no such task": (f"{TRAIN} --task chess", 3, "no task 'chess'"),
    "no such rows": (f"{TRAIN} --train gone.jsonl", 3, "gone.jsonl does not exist"),
    "rows of another kind": (f"{TRAIN} --train odd.txt", 3, "rows are read from JSON lines"),
    "no such column": (f"{TRAIN} --label-column gold", 3, "no column 'gold'. It has: text, label"),
    "classes that were not trained": (f"{TRAIN} --eval odd.jsonl", 3, "'odd' is not one of the 2 classes"),
    "no such metric": (
        f"{TRAIN} --metric f1_makro",
        3,
        "no metric 'f1_makro' of predicted classes. Did you mean 'f1_macro'",
    ),
    "a metric of classes": (
        "evaluate pack a1 --data eval.jsonl --task causal-lm --metric f1",
        3,
        "--metric f1 scores predicted classes, and causal-lm has none",
    ),
    "no such model": (f"{TRAIN} --model no/such", 3, "the model no/such is not a local folder"),
    "a folder without a model": (f"{TRAIN} --model empty", 3, "empty is not a model"),
    "no such start": (f"{TRAIN} --start nope", 3, "--start nope is neither"),
    "no room for extra directions": (f"{TRAIN} --n-extra 2", 3, "eigenlorax augment pack --n-extra 2 --seed 0"),
    "more extra directions than there are": (f"{TRAIN} --n-extra 99 --no-add", 3, "99"),
    "fewer extra directions than none": (f"{TRAIN} --n-extra -1", 3, "--n-extra must be at least 0, got -1"),
    "a rank of nothing": (f"{TRAIN} --rank 0", 3, "--rank must be an integer of at least 1"),
    "epochs of nothing": (f"{TRAIN} --epochs 0", 3, "--epochs must be a number above 0"),
    "no such options": (f"{TRAIN} --trainer-options gone.yaml", 3, "gone.yaml does not exist"),
    "options that are no YAML": (f"{TRAIN} --trainer-options broken.yaml", 3, "broken.yaml, line 2, is not YAML"),
    "options that are a list": (f"{TRAIN} --trainer-options list.yaml", 3, "list.yaml is not a mapping"),
    "options that there are not": (f"{TRAIN} --trainer-options typo.yaml", 3, "'weigth_decay' is not a field"),
    "an option that is given twice": (
        f"{TRAIN} --trainer-options twice.yaml",
        3,
        "'learning_rate' is among the Trainer's options, and --learning-rate was passed too",
    ),
    "evaluating what is not there": ("evaluate pack gone --data eval.jsonl", 3, "no adapter named 'gone'"),
    "evaluating in no pack": ("evaluate nowhere a1 --data eval.jsonl", 4, "nowhere is not a pack"),
    "evaluating what has no task": ("evaluate pack a1 --data eval.jsonl", 3, "the task type None"),
    "evaluating on nothing": ("evaluate pack a1 --data gone.csv --task causal-lm", 3, "gone.csv does not exist"),
    "names out of no record": ("evaluate pack a1 --data eval.jsonl --labels empty", 3, "empty has no training.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_anything_is_done(cli, place, case):
    written("odd.txt", "x")
    written("odd.jsonl", '{"text": "w1", "label": "odd"}\n')
    written("broken.yaml", "a: 1\nb: ]\n")
    written("list.yaml", "- 1\n")
    written("typo.yaml", "weigth_decay: 0.1\n")
    written("twice.yaml", "learning_rate: 0.1\n")
    os.mkdir("empty")
    os.mkdir("in-the-way")
    written("in-the-way/theirs", "")
    before = contents(place)
    line, code, part = BAD[case]
    assert_refused(cli(*shlex.split(line)), code, part)
    assert contents(place) == before


@pytest.mark.parametrize("arguments", [["train", "pack"], [*CLASSIFY, "--epochs", "many"], ["evaluate", "pack", "a1"]])
def test_what_cannot_be_read(cli, place, arguments):
    assert_usage_error(cli(*arguments))
