"""Histories: versions are appended, saved and read one by one, and an adapter of another run is refused."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
import lora_files
import reference
from adapters import change_config, change_tensors, make_adapter
from eigenlorax.codec.versions import lossy
from eigenlorax.errors import (
    AdapterNameError,
    BaseModelError,
    NonFiniteError,
    NothingSharedWarning,
    OptionError,
    PackBusyError,
    PackDamagedError,
    PackExistsError,
    ShapeError,
    UnknownBaseWarning,
)
from eigenlorax.pack import history_store
from eigenlorax.pack.folder import PackFolder
from planted import tree
from runs import WEIGHTS, make_run, tensors_of

STEPS = (10, 20, 30, 40, 50)
MANIFEST = "subspace_config.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", STEPS)


@pytest.fixture
def runs(run):
    """A pack in memory with the versions of one run, lossless."""
    pack = ex.Pack.empty()
    for number, checkpoint in enumerate(run):
        pack.append(checkpoint, metrics={"loss": 1 / (number + 1)}, lossless=True)
    return pack


@pytest.fixture
def saved(runs, tmp_path):
    return ex.Pack.open(runs.save(tmp_path / "pack"))


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


class TestAppendedVersions:
    def test_are_in_order_with_step_and_metrics(self, runs, run):
        (history,) = runs.histories.values()
        assert (history.name, history.labels, history.latest.version) == ("run", ["10", "20", "30", "40", "50"], "50")
        assert [record.step for record in history] == list(STEPS)
        assert [record.metrics for record in history] == [{"loss": 1 / n} for n in range(1, 6)]
        assert [record.reference for record in history] == [None, "10", "20", "30", "40"]
        assert (runs.base_model, len(runs), runs.names, list(runs)) == ("org/base", 0, [], [])
        assert repr(runs) == "<Pack of 0 adapters of org/base, 0 modules, 1 history>"

    def test_have_the_figures_of_their_sources(self, runs, run):
        for record, checkpoint in zip(runs.histories["run"], run, strict=True):
            tensors = load_file(checkpoint / WEIGHTS)
            head = tensors.pop("base_model.model.classifier.weight")
            assert record.source_lora_bytes == sum(tensor.nbytes for tensor in tensors.values())
            assert record.source_tensor_bytes == head.nbytes
            assert record.source_file_bytes == (checkpoint / WEIGHTS).stat().st_size
            assert (record.delta_error, record.tensor_error) == (0.0, 0.0)
            assert record.file_bytes == len(runs.history_store.read(record))

    def test_change_is_the_distance_to_the_previous_version(self, runs, run):
        changes = [record.change for record in runs.histories["run"]]
        updates = [
            np.concatenate([reference.dense(factors).ravel() for factors in ex.read_adapter(path).modules.values()])
            for path in run
        ]
        assert changes[0] is None
        expected = [np.linalg.norm(after - before) / np.linalg.norm(before) for before, after in pairwise(updates)]
        assert changes[1:] == pytest.approx(expected, rel=1e-6)

    def test_are_read_by_name(self, saved, run):
        for step, checkpoint in zip(STEPS, run, strict=True):
            adapter = saved[f"run@{step}"]
            assert adapter.name == f"run@{step}"
            assert_equal_tensors(tensors_of(adapter), load_file(checkpoint / WEIGHTS))
            assert adapter.source_config == (checkpoint / "adapter_config.json").read_text()
        assert saved["run@latest"].name == "run@50"
        assert saved.adapter("run@10", torch.float16).specs["encoder.layer.0.query"].dtype == torch.float16

    def test_are_no_names_of_the_mapping(self, saved):
        assert "run@20" in saved
        assert "run@latest" in saved
        assert not any(name in saved for name in ("run", "run@", "run@21", "other@20", "@20"))
        assert saved.get("run@21") is None
        assert dict(saved) == {}

    def test_are_read_in_any_order_from_few_files(self, saved, run, monkeypatch):
        read, read_version = [], PackFolder.read_version
        monkeypatch.setattr(
            PackFolder,
            "read_version",
            lambda folder, record: read.append(record.version) or read_version(folder, record),
        )
        saved = ex.Pack.open(saved.path)
        saved["run@30"], saved["run@30"]
        assert read == ["10", "20", "30"]
        saved["run@40"]
        assert read == ["10", "20", "30", "40"]

    def test_few_at_once_where_they_are_large(self, run, tmp_path, monkeypatch):
        pack = ex.Pack.empty()
        for checkpoint in run:
            pack.append(checkpoint)
        path, expected = pack.save(tmp_path / "pack"), tensors_of(pack["run@50"])
        counts, decode_chain = [], lossy.decode_chain
        monkeypatch.setattr(
            lossy, "decode_chain", lambda chain, start: counts.append(len(chain)) or decode_chain(chain, start)
        )
        for held, at_once in ((2**26, [1, 4]), (0, [1] * 5)):
            monkeypatch.setattr(history_store, "HELD_BYTES", held)
            counts.clear()
            assert_equal_tensors(tensors_of(ex.Pack.open(path)["run@50"]), expected)
            assert counts == at_once

    def test_a_change_of_what_was_read_changes_nothing_in_the_pack(self, saved):
        before = {key: tensor.clone() for key, tensor in tensors_of(saved["run@50"]).items()}
        adapter = saved["run@50"]
        for factors in adapter.modules.values():
            factors.down.zero_()
        adapter.modules["encoder.layer.0.query"].down.zero_()
        adapter.heads["base_model.model.classifier.weight"].zero_()
        assert_equal_tensors(tensors_of(saved["run@50"]), before)

    def test_key_versions_bound_the_chain(self, tmp_path, monkeypatch):
        monkeypatch.setattr(history_store, "KEY_DISTANCE", 3)
        pack = ex.Pack.empty()
        for checkpoint in make_run(tmp_path / "run", range(7)):
            pack.append(checkpoint, lossless=True)
        history = pack.histories["run"]
        assert [record.version for record in history if record.reference is None] == ["0", "3", "6"]
        assert max(len(history.chain(record)) for record in history) == 3

    def test_in_place_only_the_new_file_is_written(self, saved, run, tmp_path):
        before = tree(saved.path)
        record = saved.append(run[0], "again", lossless=True)
        saved.save()
        after = tree(saved.path)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert changed - {"README.md"} == {MANIFEST, record.file}

    def test_the_same_input_gives_the_same_bytes(self, runs, run, tmp_path):
        again = ex.Pack.empty()
        for number, checkpoint in enumerate(run):
            again.append(checkpoint, metrics={"loss": 1 / (number + 1)}, lossless=True)
            again.save(tmp_path / "again")
        assert tree(again.path) == tree(runs.save(tmp_path / "at-once"))


class TestWithinAnErrorBound:
    @pytest.mark.parametrize(
        ("options", "max_error", "head_error"),
        [
            ({}, 0.05, 0.1),
            ({"max_error": 0.2}, 0.2, 0.2),
            ({"max_error": 0.5}, 0.5, 0.3),
            ({"max_error": 0.01, "head_error": 0.02}, 0.01, 0.02),
        ],
    )
    def test_is_kept_by_every_version(self, run, tmp_path, options, max_error, head_error):
        pack = ex.Pack.empty()
        for checkpoint in run:
            record = pack.append(checkpoint, **options)
            assert (record.max_error, record.head_error) == (max_error, head_error)
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        for record, checkpoint in zip(pack.histories["run"], run, strict=True):
            exact, found = ex.read_adapter(checkpoint), pack[f"run@{record.version}"]
            updates = [
                np.concatenate([reference.dense(adapter.modules[module]).ravel() for module in exact.modules])
                for adapter in (exact, found)
            ]
            error = np.linalg.norm(updates[1] - updates[0]) / np.linalg.norm(updates[0])
            assert max_error / 2 < error <= max_error
            assert record.delta_error == pytest.approx(error, rel=1e-5)
            heads = [adapter.heads["base_model.model.classifier.weight"].double() for adapter in (exact, found)]
            error = float((heads[1] - heads[0]).norm() / heads[0].norm())
            assert error <= head_error
            assert record.tensor_error == pytest.approx(error, rel=1e-5)

    def test_tensors_that_are_no_heads_are_closer(self, tmp_path):
        (checkpoint,) = make_run(tmp_path / "run", [1])
        others = {
            "base_model.model.encoder.layer.0.output.dense.weight": torch.randn(5, 37),
            "base_model.model.classifier.bias": torch.randn(41),
            "base_model.model.steps": torch.arange(7),
        }
        change_tensors(checkpoint, lambda tensors: tensors.update(others))
        pack = ex.Pack.empty()
        pack.append(checkpoint, max_error=0.2)
        found = pack["run@latest"].heads
        for key, tensor in others.items():
            if tensor.is_floating_point():
                assert float((found[key] - tensor).norm() / tensor.norm()) <= 0.002
            else:
                assert torch.equal(found[key], tensor)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_comes_back_in_the_dtype_of_the_source(self, tmp_path, dtype):
        pack = ex.Pack.empty()
        for checkpoint in make_run(tmp_path / "run", (1, 2), dtype=dtype):
            pack.append(checkpoint)
        assert {tensor.dtype for tensor in tensors_of(pack["run@2"]).values()} == {dtype}

    def test_is_smaller_than_without_loss(self, runs, run):
        pack = ex.Pack.empty()
        for checkpoint in run:
            pack.append(checkpoint)
        sizes = [sum(record.file_bytes for record in each.histories["run"]) for each in (pack, runs)]
        assert sizes[0] < sizes[1] / 2

    def test_goes_beside_lossless_versions(self, run, tmp_path):
        pack = ex.Pack.empty()
        for number, checkpoint in enumerate(run):
            pack.append(checkpoint, lossless=number in (1, 3))
        assert [record.reference for record in pack.histories["run"]] == [None, None, "10", "20", "30"]
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        for number in (1, 3):
            assert_equal_tensors(tensors_of(pack[f"run@{STEPS[number]}"]), load_file(run[number] / WEIGHTS))

    def test_of_convolutions_and_single_files(self, tmp_path):
        truth = lora_files.planted({"unet.conv_in": (7, 5, 3, 3), "unet.mid_block.proj": (13, 11)}, seed=1, mixed=False)
        file = lora_files.write(tmp_path / "style.safetensors", truth, "kohya", metadata={"note": "n"})
        pack = ex.Pack.empty()
        for lossless in (False, True):
            pack.append(file, name="style", lossless=lossless)
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        assert pack["style@1"].specs == pack["style@2"].specs == ex.read_adapter(file).specs
        (path,) = pack.export(tmp_path / "out", "style@2").values()
        assert path.name == "style-2.safetensors"
        assert_equal_tensors(load_file(path), load_file(file))
        with pytest.raises(OptionError, match="was a single file, and no folder"):
            pack.restore("style@2", tmp_path / "restored")


def test_a_chosen_reference_that_cannot_predict_is_none(tmp_path, run, monkeypatch):
    pack = ex.Pack.empty()
    pack.append(run[0])
    monkeypatch.setattr("eigenlorax.codec.versions.lossy._can_be_read", lambda encoded, reference: reference is None)
    record = pack.append(run[1], reference="10")
    assert (record.reference, record.change_error) == (None, None)
    opened = ex.Pack.open(pack.save(tmp_path / "pack"))
    assert opened["run@20"].ranks == pack["run@20"].ranks


class TestTensorsOfTheCaller:
    """They may change after the call, as those of a training do."""

    @pytest.mark.parametrize("lossless", [True, False])
    def test_may_change_after_they_were_appended(self, tmp_path, run, lossless):
        adapter = ex.read_adapter(run[0])
        modules = dict(adapter.modules)
        tensors = [tensor for factors in modules.values() for tensor in (factors.down, factors.up)]
        tensors += [head := torch.arange(500), embedding := torch.zeros(3, 5, requires_grad=True)]
        heads = {"base_model.model.position_ids": head, "base_model.model.score.weight": embedding}
        adapter = ex.from_factors("a", modules, heads=heads)
        pack = ex.Pack.empty()
        for _ in range(3):
            pack.append(adapter, lossless=lossless)
            with torch.no_grad():
                for tensor in tensors:
                    tensor += 1
        opened = ex.Pack.open(pack.save(tmp_path / "pack"))
        for number in range(3):
            found = opened[f"adapter@{number + 1}"].heads["base_model.model.position_ids"]
            assert torch.equal(found, torch.arange(500) + number)


class TestLabelsAndNames:
    def test_without_a_step_the_next_integer_is_the_label(self, tmp_path, run):
        pack = ex.Pack.empty()
        adapter = ex.read_adapter(run[0])
        labels = [pack.append(adapter, *label, lossless=True).version for label in ((), ("7",), (), ("x",), ())]
        assert labels == ["1", "7", "8", "x", "9"]
        assert list(pack.histories) == ["adapter"]

    def test_a_step_is_the_label(self, run):
        pack = ex.Pack.empty()
        record = pack.append(ex.read_adapter(run[0]), step=12, name="r", lossless=True)
        assert (record.version, record.step) == ("12", 12)
        record = pack.append(run[0], "best", step=12, lossless=True)
        assert (record.version, record.step, list(pack.histories)) == ("best", 12, ["r", "run"])

    def test_the_only_history_is_the_default(self, run):
        pack = ex.Pack.empty()
        pack.append(ex.read_adapter(run[0]), name="r", lossless=True)
        assert pack.append(ex.read_adapter(run[1]), lossless=True).reference == "1"

    @pytest.mark.parametrize("label", ["", "latest", "Latest", "a@b", "a/b", "..", ".a", "a.", "a b", "x" * 65, "é"])
    def test_labels_that_are_refused(self, run, label):
        with pytest.raises(AdapterNameError, match="version label .* is not allowed.*Pass another label"):
            ex.Pack.empty().append(run[0], label, lossless=True)

    def test_a_label_twice(self, runs, run):
        for label in ("30", None):
            with pytest.raises(AdapterNameError, match="already has a version '30'"):
                runs.append(run[2], label, lossless=True)

    def test_a_name_of_an_adapter(self, run, tmp_path):
        pack = ex.fit(make_adapter(tmp_path / "one", seed=3), n_components=2)
        with pytest.raises(AdapterNameError, match="already has an adapter named 'one'.*Pass another name"):
            pack.append(run[0], name="ONE", lossless=True)
        pack.append(run[0], lossless=True)
        with pytest.raises(AdapterNameError, match="already has a history named 'run'"):
            pack.add(tmp_path / "one", name="run")
        with pytest.raises(AdapterNameError, match="already has a history named 'run'"):
            pack.append(run[0], name="Run", lossless=True)

    @pytest.mark.parametrize("name", ["a@b", "a/b", "..", ""])
    def test_names_that_are_refused(self, run, name):
        if name:
            with pytest.raises(AdapterNameError, match="history name .* is not allowed"):
                ex.Pack.empty().append(run[0], name=name, lossless=True)

    def test_unknown_versions_are_named(self, saved):
        with pytest.raises(AdapterNameError, match="no version '5' in the history 'run'.*It has 5: 10, 20, 30, 40, 50"):
            saved["run@5"]
        with pytest.raises(AdapterNameError, match="no history named 'rum' in the pack.*Did you mean 'run'"):
            saved["rum@5"]
        with pytest.raises(
            AdapterNameError, match="'run' is a history. Choose one of its versions, such as 'run@latest"
        ):
            saved["run"]
        with pytest.raises(AdapterNameError, match="'run@10' is a version of a history"):
            saved.packed("run@10")


class TestWhatIsRefused:
    def test_another_base_model(self, runs, tmp_path):
        other = make_run(tmp_path / "run", [60], base="org/other")[0]
        with pytest.raises(BaseModelError, match="different base models: adapter 'run@60' has 'org/other'"):
            runs.append(other, lossless=True)
        assert runs.append(other, same_base=True, lossless=True).version == "60"

    def test_another_model_under_the_same_name_is_noticed(self, runs, tmp_path):
        modules = {"decoder.0.q": (17, 11), "decoder.1.q": (13, 23)}
        other = make_run(tmp_path / "other", [60], base="org/other", modules=modules)[0]
        with pytest.warns(NothingSharedWarning, match="'decoder.0.q', has no module in common with the pack, with"):
            runs.append(other, name="other", same_base=True)

    def test_no_base_model_is_that_of_the_pack(self, runs, tmp_path):
        with pytest.warns(UnknownBaseWarning, match="no base model is stated by adapter 'run@60'"):
            runs.append(make_run(tmp_path / "run", [60], base=None)[0], lossless=True)

    def test_other_modules(self, runs, run, tmp_path):
        modules = {"encoder.layer.0.query": (17, 11), "encoder.layer.0.other": (13, 23)}
        other = make_adapter(tmp_path / "run" / "checkpoint-60", seed=1, head=(2, 31), modules=modules)
        message = "lacks module encoder.layer.0.value|has module encoder.layer.0.other"
        with pytest.raises(ShapeError, match=f"({message}), unlike version run@50.*under another name"):
            runs.append(other, lossless=True)

    def test_other_shapes(self, runs, tmp_path):
        modules = {
            "encoder.layer.0.query": (17, 11),
            "encoder.layer.0.value": (13, 24),
            "encoder.layer.1.query": (19, 29),
        }
        other = make_adapter(tmp_path / "run" / "checkpoint-60", seed=1, head=(2, 31), modules=modules)
        with pytest.raises(
            ShapeError, match=r"\(13, 24, \(\)\) in adapter 'run@60' and \(13, 23, \(\)\) in version run@50"
        ):
            runs.append(other, lossless=True)
        head = make_adapter(tmp_path / "heads" / "checkpoint-60", seed=1, head=(3, 31))
        with pytest.raises(ShapeError, match=r"classifier.weight has shape \(3, 31\).*\(2, 31\) in version run@50"):
            runs.append(head, name="run", lossless=True)
        bare = make_adapter(tmp_path / "bare" / "checkpoint-60", seed=1)
        with pytest.raises(ShapeError, match=r"lacks tensor base_model.model.classifier.weight, unlike version run@50"):
            runs.append(bare, name="run", lossless=True)

    def test_another_rank_is_none_of_it(self, runs, tmp_path):
        other = make_adapter(tmp_path / "run" / "checkpoint-60", seed=1, head=(2, 31), rank=2)
        assert runs.append(other, lossless=True).change > 0
        assert runs["run@60"].ranks == (2,)

    def test_numbers_that_are_not_finite(self, runs, tmp_path):
        other = make_run(tmp_path / "run", [60])[0]
        change_tensors(other, lambda tensors: next(iter(tensors.values())).fill_(math.nan))
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            runs.append(other, lossless=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_error": 0}, "max_error is a relative error, above 0 and below 1, got 0"),
            ({"max_error": 1.0}, "max_error is a relative error"),
            ({"max_error": math.nan}, "max_error is a relative error"),
            ({"max_error": "0.1"}, "max_error must be a number"),
            ({"head_error": -0.1}, "head_error is a relative error"),
            ({"lossless": True, "max_error": 0.1}, "max_error has no effect on a lossless version"),
            ({"lossless": True, "head_error": 0.1}, "head_error has no effect on a lossless version"),
            ({"step": -1}, "step=-1: a step is at least 0"),
            ({"step": 2**63}, "a step is at least 0 and below 2"),
            ({"step": 1.5}, "step must be an integer"),
            ({"metrics": {"loss": math.inf}}, "metric 'loss' is inf; a metric is a finite number"),
            ({"metrics": {"loss": "low"}}, "metric 'loss' must be a number"),
            ({"metrics": [0.5]}, "metrics is a list; a mapping of numbers by name was expected: {'loss': 0.5}."),
            ({"metrics": {3: 0.5}}, "the name of a metric is text, got 3"),
        ],
    )
    def test_options(self, run, options, message):
        pack = ex.Pack.empty()
        with pytest.raises(OptionError, match=message):
            pack.append(run[0], **options)
        assert not pack.histories

    def test_a_failure_changes_nothing(self, runs, tmp_path):
        before = dict(runs.histories)
        with pytest.raises(ShapeError):
            runs.append(make_adapter(tmp_path / "x", seed=1), name="run", lossless=True)
        assert dict(runs.histories) == before


class TestHistoriesOnly:
    def test_have_no_bases_to_change(self, saved, run):
        with pytest.raises(OptionError, match="no bases to augment, but histories only. Fit a pack of adapters"):
            saved.augment(2, seed=1)
        with pytest.raises(OptionError, match="no bases, but histories only. Append the adapter as a version"):
            saved.add(run[0], name="one")
        with pytest.raises(OptionError, match="no adapter to fit a subspace to. Fit a pack of adapters"):
            ex.refit(saved, n_components=2)


class TestOnDisk:
    def test_a_version_costs_little_in_the_manifest(self, saved, run):
        before = (saved.path / MANIFEST).stat().st_size
        with ex.Pack.edit(saved.path) as pack:
            pack.append(run[0], "60", lossless=True)
        assert (saved.path / MANIFEST).stat().st_size - before < 350

    def test_a_config_that_differs_comes_back(self, saved, tmp_path):
        other = change_config(make_run(tmp_path / "run", [60])[0], lora_dropout=0.5, note="x")
        saved.append(other, lossless=True)
        saved.save()
        opened = ex.Pack.open(saved.path)
        assert opened["run@60"].source_config == (other / "adapter_config.json").read_text()
        assert opened["run@50"].config["lora_dropout"] == 0.1

    def test_a_copy_has_the_same_bytes(self, saved, tmp_path):
        copy = ex.Pack.open(saved.path).save(tmp_path / "copy")
        assert tree(copy) == tree(saved.path)
        ex.Pack.open(copy).verify()

    def test_histories_beside_adapters(self, run, tmp_path):
        pack = ex.fit([make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")], n_components=3)
        pack.append(run[0], lossless=True)
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        pack.verify()
        pack.append(run[1], lossless=True)
        pack.save()
        assert pack.names == ["a", "b"]
        augmented = pack.augment(2, seed=3)
        assert_equal_tensors(tensors_of(augmented["run@20"]), load_file(run[1] / WEIGHTS))
        opened = ex.Pack.open(augmented.save(tmp_path / "augmented"))
        assert_equal_tensors(tensors_of(opened["run@10"]), load_file(run[0] / WEIGHTS))

    def test_without_histories_their_folder_is_removed(self, saved):
        saved.remove("run")
        saved.save()
        assert not (saved.path / "versions").exists()
        assert not ex.Pack.open(saved.path).histories

    def test_other_files_in_their_folder_stay(self, saved):
        (saved.path / "versions" / "note.txt").write_text("mine")
        saved.remove("run")
        saved.save()
        assert [path.name for path in (saved.path / "versions").iterdir()] == ["note.txt"]

    def test_damage_is_noticed(self, saved):
        record = saved.histories["run"]["20"]
        path = saved.path / record.file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        opened = ex.Pack.open(saved.path)
        with pytest.raises(PackDamagedError, match=f"{record.file} was changed after it was written"):
            opened.verify()
        with pytest.raises(PackDamagedError, match="was changed after"):
            opened["run@40"]
        opened["run@10"]
        path.unlink()
        with pytest.raises(PackDamagedError, match=f"{record.file} is missing"):
            opened.verify()

    def test_two_writers(self, saved, run):
        other = ex.Pack.open(saved.path)
        other.append(run[0], "a", lossless=True)
        other.save()
        saved.append(run[0], "b", lossless=True)
        with pytest.raises(PackBusyError, match="was changed by another process"):
            saved.save()

    def test_a_reader_of_a_version_that_was_removed(self, saved):
        reader = ex.Pack.open(saved.path)
        saved.remove("run")
        saved.save()
        with pytest.raises(PackBusyError, match="was changed by another process since it was opened"):
            reader["run@10"]

    def test_a_link_in_place_of_their_folder_is_not_written_through(self, saved, run, tmp_path):
        (saved.path / "versions").rename(tmp_path / "elsewhere")
        (saved.path / "versions").symlink_to(tmp_path / "elsewhere")
        saved.append(run[0], "60", lossless=True)
        with pytest.raises(PackExistsError, match="versions is a link"):
            saved.save()

    def test_sizes_of_files(self, saved):
        sizes = sum(path.stat().st_size for path in saved.path.rglob("*") if path.name != ".lock" and path.is_file())
        files = saved.summary.files
        assert files.pack == sizes
        records = saved.histories["run"].versions
        assert files.sources == sum(record.source_file_bytes for record in records)
        assert files.ratio == files.sources / sizes
        source_heads = 5 * records[0].source_tensor_bytes
        heads = sum(record.tensor_bytes for record in records)
        assert files.ratio_without_heads == (files.sources - source_heads) / (sizes - heads)

    def test_no_ratio_of_files_with_a_version_from_memory(self, saved, run):
        source = ex.read_adapter(run[0])
        saved.append(ex.from_factors("a", source.modules, heads=source.heads, base_model="org/base"), "60")
        saved.save()
        assert (saved.summary.files.sources, saved.summary.files.ratio) == (None, None)


class TestDigest:
    def test_is_that_of_the_chain(self, saved, run):
        before = {step: saved.digest(f"run@{step}") for step in STEPS}
        assert len(set(before.values())) == len(STEPS)
        assert saved.digest("run@latest") == before[50]
        saved.append(run[0], "60", lossless=True)
        saved.save()
        opened = ex.Pack.open(saved.path)
        assert {step: opened.digest(f"run@{step}") for step in STEPS} == before
        assert opened.digest("run@latest") == opened.digest("run@60") != before[50]

    def test_of_equal_files_with_other_references(self, run):
        pack = ex.Pack.empty()
        for name in ("a", "b"):
            pack.append(run[0] if name == "a" else run[1], "1", name=name, lossless=True)
            # equal to the version before, so that both files have the same bytes
            pack.append(run[0] if name == "a" else run[1], "2", name=name, lossless=True)
        assert pack.digest("a@2") != pack.digest("b@2")


class TestExport:
    def test_of_versions(self, saved, run, tmp_path):
        paths = saved.export(tmp_path / "out", ["run@20", "run@latest"])
        assert {name: path.name for name, path in paths.items()} == {"run@20": "run-20", "run@latest": "run-latest"}
        for path, checkpoint in ((paths["run@20"], run[1]), (paths["run@latest"], run[4])):
            assert (path / "adapter_config.json").read_bytes() == (checkpoint / "adapter_config.json").read_bytes()
            assert_equal_tensors(load_file(path / WEIGHTS), load_file(checkpoint / WEIGHTS))
        half = saved.export(tmp_path / "half", "run@20", dtype="float16")["run@20"]
        assert load_file(half / WEIGHTS)["base_model.model.encoder.layer.0.query.lora_A.weight"].dtype == torch.float16

    def test_two_names_of_one_path(self, saved, run, tmp_path):
        saved.append(run[0], "10", name="run-1", lossless=True)
        saved.append(run[0], "1-10", name="run", lossless=True)
        with pytest.raises(AdapterNameError, match="'run@1-10' and 'run-1@10' would both be exported to"):
            saved.export(tmp_path / "out", ["run@1-10", "run-1@10"])
        assert not (tmp_path / "out").exists()

    def test_all_adapters_are_no_versions(self, saved, tmp_path):
        assert saved.export(tmp_path / "out") == {}


def test_the_manifest_of_a_pack_with_a_history_says_no_more_than_needed(saved):
    history = json.loads((saved.path / MANIFEST).read_text())["histories"]["run"]
    assert history["versions"][0].keys() == {
        "lora_bytes",
        "metrics",
        "sha256",
        "source_sha256",
        "step",
        "tensor_bytes",
        "version",
    }
    assert history["source_fields"]["r"] == 3
