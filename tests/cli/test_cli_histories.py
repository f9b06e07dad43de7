"""Verbs of histories: track, log, diff, prune, restore; and export, remove and inspect of packs with histories."""

import json
import re
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
from adapters import change_config, change_tensors, make_adapter
from eigenlorax.core import keys, update_changes
from eigenlorax.errors import PackBusyError
from eigenlorax.pack import track as tracking
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded
from runs import WEIGHTS, make_run, write_states
from users import make_users

STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_states(make_run(folder / "run", STEPS), max_steps=50)
    ex.track(folder / "run", folder / "history", lossless=True)
    return folder


@pytest.fixture
def folder(_made, tmp_path):
    """A folder with a run of four checkpoints, and a pack with their lossless history."""
    shutil.copytree(_made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def dense(adapter, module):
    factors = adapter.modules[module]
    return factors.scaling * factors.up.double() @ factors.down.double()


def lines(out, start):
    """The cells of lines of a table that begin with one of these words."""
    return [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in start]


class TestTrack:
    def test_every_checkpoint_becomes_a_version(self, cli, folder):
        out = succeeded(cli("track", folder / "run", "-o", folder / "new", "--lossless")).out
        assert [line[:2] for line in lines(out, ("10", "20", "30", "40"))] == [[str(n), "exact"] for n in STEPS]
        assert "eval_loss" in out
        history = ex.Pack.open(folder / "new").histories["run"]
        assert [record.step for record in history] == list(STEPS)
        assert [record.metrics["eval_loss"] for record in history] == [9 / step for step in STEPS]
        assert contents(folder / "new") == contents(folder / "history")

    def test_every_version_keeps_its_error_bound(self, cli, folder):
        tracked = json_of(cli("track", folder / "run", "-o", folder / "new", "--max-error", 0.1, "--json"))
        pack = ex.Pack.open(folder / "new")
        for record, step in zip(tracked["appended"], STEPS, strict=True):
            source, version = ex.read_adapter(folder / f"run/checkpoint-{step}"), pack[f"run@{step}"]
            pairs = [(dense(source, module), dense(version, module)) for module in source.modules]
            square = sum(float(before.square().sum()) for before, _ in pairs)
            deviation = sum(float((after - before).square().sum()) for before, after in pairs)
            assert (deviation / square) ** 0.5 == pytest.approx(record["delta_error"], rel=1e-6)
            assert 0.03 < record["delta_error"] <= 0.1
            for key, tensor in source.heads.items():
                assert (version.heads[key] - tensor).norm() <= 0.1 * tensor.norm()
        assert sum(path.stat().st_size for path in (folder / "new/versions").iterdir()) == sum(
            record["file_bytes"] for record in tracked["appended"]
        )

    def test_run_again_it_takes_new_checkpoints_only(self, cli, folder):
        assert "no checkpoint is new" in succeeded(cli("track", folder / "run", "-o", folder / "history")).out
        before = contents(folder / "history")
        write_states(make_run(folder / "run", (*STEPS, 50)), max_steps=50)
        tracked = json_of(cli("track", folder / "run", "-o", folder / "history", "--lossless", "--json"))
        assert [record["version"] for record in tracked["appended"]] == ["50"]
        assert tracked["known_steps"] == [*STEPS, 50]
        assert tracked["is_finished"]
        assert tracked["unfinished"] == {}
        after = contents(folder / "history")
        assert {name for name in before if before[name] != after[name]} <= {"subspace_config.json", "README.md"}

    def test_a_checkpoint_that_is_being_written_is_left_out_with_a_note(self, cli, folder):
        newest = folder / "run/checkpoint-40"
        weights = (newest / WEIGHTS).read_bytes()
        (newest / WEIGHTS).write_bytes(weights[:-1])
        done = succeeded(cli("track", folder / "run", "-o", folder / "new", "--lossless"))
        assert "note: checkpoint-40 was left out: its adapter is not complete" in done.err
        (newest / WEIGHTS).write_bytes(weights)
        tracked = json_of(cli("track", folder / "run", "-o", folder / "new", "--lossless", "--json"))
        assert [record["version"] for record in tracked["appended"]] == ["40"]

    def test_a_step_that_was_trained_twice(self, cli, folder):
        change_tensors(folder / "run/checkpoint-30", lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
        before = contents(folder / "history")
        done = cli("track", folder / "run", "-o", folder / "history", "--lossless")
        assert_refused(
            done, 3, "Step 30 was trained twice: the history has run@30 and 1 more of another training", "--overwrite"
        )
        assert "overwrite=" not in done.err
        assert contents(folder / "history") == before
        tracked = json_of(cli("track", folder / "run", "-o", folder / "history", "--lossless", "--overwrite", "--json"))
        assert [record["version"] for record in tracked["appended"]] == ["30", "40"]
        pack = ex.Pack.open(folder / "history")
        stored = pack["run@30"].heads["base_model.model.classifier.weight"]
        expected = load_file(folder / "run/checkpoint-30" / WEIGHTS)["base_model.model.classifier.weight"]
        assert (stored == expected).all()
        assert pack.histories["run"].labels == [str(step) for step in STEPS]

    def test_an_incomplete_checkpoint_before_others_says_how_to_append_it_later(self, cli, folder):
        weights = folder / "run/checkpoint-20" / WEIGHTS
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        done = succeeded(cli("track", folder / "run", "-o", folder / "new", "--lossless"))
        assert "checkpoint-20 was left out" in done.err
        assert "Since later steps were appended, remove those versions first" in done.err
        weights.write_bytes(whole)
        done = succeeded(cli("track", folder / "run", "-o", folder / "new", "--lossless"))
        assert "steps 20. They were pruned, or not there when later ones were appended." in done.err
        succeeded(cli("remove", folder / "new", "run@30", "run@40"))
        succeeded(cli("track", folder / "run", "-o", folder / "new", "--lossless"))
        assert ex.Pack.open(folder / "new").histories["run"].labels == [str(step) for step in STEPS]

    def test_pruned_versions_are_not_appended_again(self, cli, folder):
        succeeded(cli("prune", folder / "history", "run", "--keep-last", 1))
        done = succeeded(cli("track", folder / "run", "-o", folder / "history", "--lossless"))
        assert "left out, because the history continues after them: steps 10, 20, 30." in done.err
        write_states(make_run(folder / "run", (*STEPS, 50)), max_steps=50)
        tracked = json_of(cli("track", folder / "run", "-o", folder / "history", "--lossless", "--json"))
        assert tracked["earlier_steps"] == [10, 20, 30]
        assert ex.Pack.open(folder / "history").histories["run"].labels == ["40", "50"]

    def test_watching_ends_with_the_last_step(self, cli, folder, monkeypatch):
        run, complete = folder / "run", folder / "complete"
        write_states(make_run(complete / "run", (*STEPS, 50)), max_steps=50)
        shutil.rmtree(run)
        run.mkdir()

        def train():
            for step in (*STEPS, 50):
                time.sleep(0.05)
                shutil.copytree(complete / "run" / f"checkpoint-{step}", run / f"checkpoint-{step}")

        training = threading.Thread(target=train)
        training.start()
        done = cli("track", run, "-o", folder / "new", "--lossless", "--watch", "--interval", "0.01")
        training.join()
        printed = succeeded(done).out.splitlines()
        assert [line.partition(":")[0] for line in printed] == [f"run@{step}" for step in (*STEPS, 50)]
        assert re.fullmatch(
            r"run@10: delta error exact, bytes [\d,]+, times smaller [\d.]+, eval_loss 0.9, loss 1", printed[0]
        )
        assert ex.Pack.open(folder / "new").histories["run"].labels == ["10", "20", "30", "40", "50"]

    def test_watching_says_once_that_another_process_is_waited_for(self, cli, folder, monkeypatch):
        rounds = iter([True, True, False])
        opened = tracking.opened_for_appending

        def open_pack(path):
            if next(rounds, False):
                raise PackBusyError(f"{path} is being changed by another process.")
            return opened(path)

        monkeypatch.setattr(tracking, "opened_for_appending", open_pack)
        write_states([folder / f"run/checkpoint-{step}" for step in STEPS], max_steps=40)
        done = succeeded(cli("track", folder / "run", "-o", folder / "new", "--watch", "--interval", "0.01"))
        assert done.err.count(f"note: another process is writing to {folder / 'new'}, and is waited for.") == 1
        assert ex.Pack.open(folder / "new").histories["run"].labels == [str(step) for step in STEPS]

    def test_an_interrupt_says_where_the_versions_are(self, cli, folder, monkeypatch):
        def interrupt(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr(time, "sleep", interrupt)
        done = cli("track", folder / "run", "-o", folder / "new", "--lossless", "--watch")
        assert done.code == 130
        assert f"All versions above are in {folder / 'new'}." in done.err
        assert len(ex.Pack.open(folder / "new").histories["run"]) == 4

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--max-error", 0], 3, "--max-error is a relative error, above 0 and below 1, got 0"),
            (["--max-error", 0.1, "--lossless"], 3, "--max-error has no effect on a lossless version"),
            (["--head-error", 2], 3, "--head-error is a relative error, above 0 and below 1, got 2"),
            (["--name", "a/b"], 3, "history name 'a/b' is not allowed"),
            (["--name", "run@1"], 3, "history name 'run@1' is not allowed"),
            (["--adapter", "policy", "--lossless"], 3, "has no adapter 'policy' in a subfolder"),
            (["--watch", "--json"], 3, "--watch prints each version"),
            (["--interval", 5], 3, "--interval has no effect without --watch. Remove it, or add --watch."),
            (["--watch", "--interval", 0], 3, "a number of seconds above 0 was expected"),
        ],
    )
    def test_wrong_options(self, cli, folder, options, code, message):
        done = cli("track", folder / "run", "-o", folder / "new", *options)
        assert_refused(done, code, message)
        assert not (folder / "new").exists()

    def test_options_are_checked_if_no_checkpoint_is_new(self, cli, folder):
        assert_refused(cli("track", folder / "run", "-o", folder / "history", "--max-error", 2), 3, "--max-error")

    def test_wrong_folders(self, cli, folder):
        assert_refused(cli("track", folder / "rum", "-o", folder / "new"), 3, "rum does not exist. Pass the output_dir")
        done = cli("track", folder / "run/checkpoint-10", "-o", folder / "new")
        assert_refused(done, 3, "It is one checkpoint: pass its parent")
        assert_refused(cli("track", folder, "-o", folder / "new"), 3, "has no folder checkpoint-STEP")
        assert_refused(cli("track", folder / "run", "-o", folder / "run", "--lossless"), 4, "run")
        assert_usage_error(cli("track", folder / "run"), "--output")
        assert_usage_error(cli("track"), "RUN")
        assert_usage_error(cli("track", "s3://bucket/run", "-o", folder / "new"), "is a URL")
        make_adapter(folder / "other/checkpoint-50", seed=3, config={"base_model_name_or_path": "org/other"})
        write_states([folder / "other/checkpoint-50"], max_steps=50)
        done = cli("track", folder / "other", "-o", folder / "history", "--name", "run", "--lossless")
        assert_refused(done, 3, "different base models", "--same-base")

    def test_adalora_cannot_be_lossless(self, cli, folder):
        checkpoint = make_adapter(folder / "ada/checkpoint-10", seed=1)
        config = {"peft_type": "ADALORA", "init_r": 3, "rank_pattern": None}
        change_config(checkpoint, **config)
        change_tensors(checkpoint, as_adalora)
        write_states([checkpoint], max_steps=10)
        done = cli("track", folder / "ada", "-o", folder / "new", "--lossless")
        assert_refused(done, 3, "is converted to one when it is read", "remove --lossless")
        succeeded(cli("track", folder / "ada", "-o", folder / "new"))
        assert ex.Pack.open(folder / "new")["ada@10"].ranks == (3,)


def as_adalora(tensors):
    """Rename the factors of a LoRA to those of an AdaLoRA, with lora_E of 2."""
    for key in list(tensors):
        if key.endswith("lora_A.weight"):
            tensors[key.replace("lora_A.weight", "lora_E")] = torch.full((len(tensors[key]), 1), 2.0)
        if "lora_" in key:
            tensors[key.removesuffix(".weight")] = tensors.pop(key)


class TestLog:
    def test_every_version_has_a_line(self, cli, folder):
        out = succeeded(cli("log", folder / "history")).out
        assert "history run in" in out
        rows = lines(out, ("10", "20", "30", "40"))
        assert [row[0] for row in rows] == ["10", "20", "30", "40"]
        # no previous version, and none to the latest
        assert (len(rows[0]), len(rows[1])) == (6, 7)
        assert rows[-1][2] == "0.0000"
        assert rows[1][-2:] == ["0.45", "0.5"]

    def test_members_of_a_population_are_compared_with_the_common_adapter(self, cli, tmp_path):
        common, members = make_users(tmp_path, ["ann", "bob"])
        ex.fit(members, reference=common).save(tmp_path / "pack")
        out = succeeded(cli("log", tmp_path / "pack")).out
        assert "to common" in out
        assert not re.search("to previous|to latest", out)
        entries = json_of(cli("log", tmp_path / "pack", "--json"))["histories"]["members"]
        assert [entry["to_latest"] for entry in entries] == [None] * 3

    def test_the_json_has_all_figures(self, cli, folder):
        document = json_of(cli("log", folder / "history", "run", "--json"))
        pack = ex.Pack.open(folder / "history")
        entries = document["histories"]["run"]
        assert [entry["version"] for entry in entries] == ["10", "20", "30", "40"]
        metrics = {"epoch": 2.0, "eval_loss": 0.45, "learning_rate": 0.5, "loss": 0.5, "trainer_state.max_steps": 50.0}
        assert entries[1]["metrics"] == metrics
        for entry, log_entry in zip(entries, pack.log("run"), strict=True):
            assert entry["to_latest"] == log_entry.to_latest
            assert entry["file_bytes"] == (folder / "history" / log_entry.record.file).stat().st_size
        latest, first = pack["run@latest"], pack["run@10"]
        assert entries[0]["to_latest"] == pytest.approx(update_changes.compare(latest, first).total.change, rel=1e-9)
        assert entries[1]["change"] == pytest.approx(pack.diff("run@10", "run@20").total.change, rel=1e-9)

    def test_metrics_that_are_chosen(self, cli, folder):
        out = succeeded(cli("log", folder / "history", "--metric", "epoch")).out
        assert "epoch" in out
        assert "eval_loss" not in out

    def test_wrong_names(self, cli, folder):
        assert_refused(cli("log", folder / "history", "rum"), 3, "no history named 'rum'", "Did you mean 'run'?")
        assert_refused(cli("log", folder / "history", "run@10"), 3, "is the name of a version", "its history, 'run'")
        refused = cli("log", folder / "history", "--metric", "los")
        assert_refused(refused, 3, "--metric los: no version has this metric. Did you mean 'loss'?")
        assert_refused(cli("log", folder / "run"), 4, "is not a pack", "It is a run: `eigenlorax track")
        ex.Pack.empty("org/base").save(folder / "empty")
        assert_refused(cli("log", folder / "empty"), 3, "has no histories. Append versions with `eigenlorax track")


class TestDiff:
    def test_all_modules_and_heads_are_compared(self, cli, folder):
        out = succeeded(cli("diff", folder / "history", "run@10", "run@latest")).out
        change = ex.Pack.open(folder / "history").diff("run@10", "run@40")
        assert "run@10 → run@40 in" in out
        (total,) = [line for line in out.splitlines() if line.lstrip().startswith("all modules")]
        assert f"{change.total.change:.4f}" in total
        for module, each in change.modules.items():
            ((_, *cells),) = lines(out, (module,))
            assert cells == [f"{each.change:.4f}", f"{each.norm_ratio:.3f}", f"{each.down:.4f}", f"{each.up:.4f}"]
        assert lines(out, ("base_model.model.classifier.weight",))

    def test_the_json_and_the_picture(self, cli, folder):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")
        picture = folder / "new/change.svg"
        document = json_of(cli("diff", folder / "history", "run@10", "run@20", "--plot", picture, "--json"))
        assert document["plot"] == str(picture)
        change = ex.Pack.open(folder / "history").diff("run@10", "run@20")
        assert document["total"]["change"] == change.total.change
        assert document["modules"].keys() == change.modules.keys()
        assert "<svg" in picture.read_text("utf-8")
        done = cli("diff", folder / "history", "run@10", "run@20", "--plot", picture)
        assert_refused(done, 4, "change.svg exists. Pass another path, or --overwrite")
        succeeded(cli("diff", folder / "history", "run@10", "run@20", "--plot", picture, "--overwrite"))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("run@11", "run@20"), "no version '11' in the history 'run'"),
            (("rum@10", "run@20"), "no history named 'rum'"),
            (("run", "run@20"), "'run' is a history. Choose one of its versions, such as 'run@latest'"),
            (
                ("run", "latest"),
                "no history named 'latest' in the pack. To name a version, pass its history too: 'run@lat",
            ),
            (("run@10", "20"), "pass its history too: 'run@20'."),
            (("run@", "run@20"), "no version ''"),
            (("@10", "run@20"), "no history named ''"),
            (("run@10", "run@20@30"), "no version '20@30'"),
        ],
    )
    def test_wrong_names(self, cli, folder, names, message):
        assert_refused(cli("diff", folder / "history", *names), 3, message)

    def test_wrong_calls(self, cli, folder):
        assert_usage_error(cli("diff", folder / "history", "run@10"), "B")
        assert_refused(cli("diff", folder / "run", "run@10", "run@20"), 4, "is not a pack")
        done = cli("diff", folder / "history", "run@10", "run@20", "--plot", folder / "change.pdf")
        assert_refused(done, 3, "the suffix of a picture must be .svg or .png")


class TestPrune:
    def stored(self, history):
        """Bytes of the versions and of the manifest."""
        return sum(path.stat().st_size for path in [*(history / "versions").iterdir(), history / keys.MANIFEST])

    def test_it_says_what_it_freed(self, cli, folder):
        pack = ex.Pack.open(folder / "history")
        expected = {label: contents_of(pack[f"run@{label}"]) for label in ("20", "40")}
        before = self.stored(folder / "history")
        document = json_of(cli("prune", folder / "history", "run", "--keep-last", 1, "--keep-every", 20, "--json"))
        assert document == {
            "pack": str(folder / "history"),
            "name": "run",
            "removed": ["10", "30"],
            "encoded_again": ["20", "40"],
            "left": 2,
            "freed_bytes": before - self.stored(folder / "history"),
        }
        pruned = ex.Pack.open(folder / "history")
        assert {label: contents_of(pruned[f"run@{label}"]) for label in ("20", "40")} == expected

    def test_the_table(self, cli, folder):
        out = succeeded(cli("prune", folder / "history", "run", "--keep-last", 2)).out
        assert lines(out, ("removed", "left")) == [["removed", "2:", "10,", "20"], ["left", "2"]]
        out = succeeded(cli("prune", folder / "history", "run", "--keep-last", 2)).out
        assert lines(out, ("removed", "freed")) == [["removed", "0"], ["freed", "bytes", "0"]]

    def test_wrong_calls(self, cli, folder):
        before = contents(folder / "history")
        assert_refused(cli("prune", folder / "history", "run"), 3, "--keep-last, --keep-every or both")
        assert_refused(cli("prune", folder / "history", "run", "--keep-last", 0), 3, "--keep-last 0")
        assert_refused(cli("prune", folder / "history", "run", "--keep-every", -5), 3, "--keep-every -5")
        assert_refused(cli("prune", folder / "history", "run@10", "--keep-last", 1), 3, "no history named 'run@10'")
        assert_refused(cli("prune", folder / "history", "rum", "--keep-last", 1), 3, "Did you mean 'run'?")
        assert_refused(cli("prune", folder / "run", "run", "--keep-last", 1), 4, "is not a pack")
        assert_usage_error(cli("prune", folder / "history"), "NAME")
        assert_usage_error(cli("prune", folder / "history", "run", "--keep-last", "x"), "'x' is not a valid integer")
        assert contents(folder / "history") == before


class TestRestore:
    def test_the_folder_is_that_of_the_run(self, cli, folder):
        succeeded(cli("restore", folder / "history", "run@20", "-o", folder / "restored"))
        source = folder / "run/checkpoint-20"
        for name in ("adapter_config.json", WEIGHTS):
            assert (folder / "restored" / name).read_bytes() == (source / name).read_bytes()
        document = json_of(cli("restore", folder / "history", "run@latest", "-o", folder / "last", "--json"))
        assert document == {
            "pack": str(folder / "history"),
            "version": "run@latest",
            "written": str(folder / "last"),
        }

    def test_wrong_calls(self, cli, folder):
        make_adapter(folder / "restored", seed=1)
        before = contents(folder)
        done = cli("restore", folder / "history", "run@20", "-o", folder / "restored")
        assert_refused(done, 4, "exists", "--overwrite")
        assert_refused(cli("restore", folder / "history", "run", "-o", folder / "new"), 3, "'run@latest'")
        assert_refused(cli("restore", folder / "history", "run@21", "-o", folder / "new"), 3, "no version '21'")
        assert_refused(cli("restore", folder / "run", "run@20", "-o", folder / "new"), 4, "is not a pack")
        assert_usage_error(cli("restore", folder / "history", "run@20"), "--output")
        assert contents(folder) == before
        succeeded(cli("restore", folder / "history", "run@20", "-o", folder / "restored", "--overwrite"))


class TestOtherVerbs:
    def test_export_of_versions(self, cli, folder):
        document = json_of(
            cli(
                "export",
                folder / "history",
                "run@10",
                "run@latest",
                "-o",
                folder / "loras",
                "--dtype",
                "float16",
                "--json",
            )
        )
        assert list(document["written"]) == ["run@10", "run@latest"]
        assert 0 < document["adapters"]["run@10"]["rounding"] < 1e-3
        adapter, source = ex.read_adapter(folder / "loras/run-10"), ex.read_adapter(folder / "run/checkpoint-10")
        assert update_changes.compare(source, adapter).total.change == pytest.approx(
            document["adapters"]["run@10"]["rounding"], rel=1e-3
        )

    def test_export_without_a_name(self, cli, folder):
        done = cli("export", folder / "history", "-o", folder / "loras")
        assert_refused(done, 3, "has no adapters to export. Name a version, such as run@40.")

    def test_remove_of_versions_and_histories(self, cli, folder):
        out = succeeded(cli("remove", folder / "history", "run@20", "run@latest")).out
        assert ["versions", "of", "run", "left", "2"] in lines(out, ("versions",))
        assert lines(out, ("removed",)) == [["removed", "run@20,", "run@40"]]
        # there are no adapters beside the history
        assert "adapters left" not in out
        assert ex.Pack.open(folder / "history").histories["run"].labels == ["10", "30"]
        before = contents(folder / "history")
        assert_refused(cli("remove", folder / "history", "run@20"), 3, "no version '20' in the history 'run'")
        assert contents(folder / "history") == before
        done = cli("remove", folder / "history", "latest")
        assert_refused(done, 3, "no history named 'latest' in the pack. To name a version, pass its history too: 'run@")
        document = json_of(cli("remove", folder / "history", "run@latest", "run@30", "--json"))
        assert (document["removed"], document["histories"]) == (["run@30"], {"run": 1})
        document = json_of(cli("remove", folder / "history", "run", "--json"))
        assert document == {"pack": str(folder / "history"), "removed": ["run"], "left": []}

    def test_inspect_shows_bytes_of_lora_and_of_everything_else(self, cli, folder):
        document = json_of(cli("inspect", folder / "history", "--json"))
        figures = document["histories"]["run"]
        versions = folder / "history/versions"
        assert figures["lora_bytes"] + figures["tensor_bytes"] == sum(
            path.stat().st_size for path in versions.iterdir()
        )
        assert figures["source_file_bytes"] == sum(
            (folder / f"run/checkpoint-{step}" / WEIGHTS).stat().st_size for step in STEPS
        )
        assert (figures["versions"], figures["lossless"], figures["latest"]) == (4, 4, "40")
        out = succeeded(cli("inspect", folder / "history")).out
        assert f"{figures['tensor_bytes']:,}" in out
        assert "components" not in out


def contents_of(adapter):
    factors = {module: (each.down.tolist(), each.up.tolist()) for module, each in adapter.modules.items()}
    return json.dumps([factors, {key: tensor.tolist() for key, tensor in adapter.heads.items()}])
