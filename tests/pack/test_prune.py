"""Removal of versions: what stays decodes to the same numbers, from files that need no removed one; and `restore`."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.codec.versions import lossy
from eigenlorax.core import keys
from eigenlorax.errors import AdapterNameError, OptionError, PackError, PackExistsError
from eigenlorax.pack import history_store
from planted import tree
from runs import WEIGHTS, make_run, tensors_of

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

STEPS = (100, 200, 300, 400, 500, 600, 700, 800)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", STEPS)


@pytest.fixture(scope="module", params=["lossless", "lossy", "mixed"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def _saved(run, kind, tmp_path_factory):
    pack = ex.Pack.empty()
    for number, checkpoint in enumerate(run):
        lossless = kind == "lossless" or (kind == "mixed" and number % 3 == 0)
        pack.append(checkpoint, lossless=lossless)
    return pack.save(tmp_path_factory.mktemp("saved") / "pack")


@pytest.fixture
def pack(_saved, tmp_path):
    """A pack on disk with the versions of one run."""
    return ex.Pack.open(shutil.copytree(_saved, tmp_path / "pack"))


def numbers(pack):
    """All tensors of every version, by label."""
    return {label: tensors_of(pack[f"run@{label}"]) for label in pack.histories["run"].labels}


def assert_same_numbers(after, before):
    for label, tensors in after.items():
        assert tensors.keys() == before[label].keys()
        assert all(torch.equal(tensor, before[label][key]) for key, tensor in tensors.items()), label


class TestPrune:
    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"keep_last": 3}, "600 700 800"),
            ({"keep_last": 100}, "100 200 300 400 500 600 700 800"),
            ({"keep_every": 300}, "300 600 800"),
            ({"keep_last": 2, "keep_every": 400}, "400 700 800"),
            ({"keep_every": 7}, "700 800"),
            ({"keep_last": 1}, "800"),
        ],
    )
    def test_what_stays_has_the_same_numbers(self, pack, options, kept):
        before, sizes = numbers(pack), tree(pack.path)
        pruned = pack.prune("run", **options)
        assert pack.histories["run"].labels == kept.split()
        assert pruned.removed == tuple(label for label in before if label not in kept.split())
        assert_same_numbers(numbers(pack), before)
        pack.save()
        opened = ex.Pack.open(pack.path)
        opened.verify()
        assert_same_numbers(numbers(opened), before)
        after = tree(pack.path)
        files = {record.file for record in opened.histories["run"]}
        assert {path for path in after if path.startswith("versions/")} == files
        freed = [len(data) for path, data in sizes.items() if path.startswith("versions/") or path == keys.MANIFEST]
        assert pruned.freed_bytes == sum(freed) - sum(len(after[path]) for path in [*files, keys.MANIFEST])

    @pytest.mark.parametrize("removed", [("200",), ("100",), ("100", "200", "500"), ("800",), STEPS[1:]])
    def test_of_any_versions(self, pack, removed):
        before = numbers(pack)
        pack.remove(*(f"run@{label}" for label in removed))
        pack.save()
        opened = ex.Pack.open(pack.path)
        assert opened.histories["run"].labels == [label for label in before if label not in map(str, removed)]
        assert_same_numbers(numbers(opened), before)

    def test_versions_that_need_no_removed_one_keep_their_files(self, pack):
        before = {record.version: record.file for record in pack.histories["run"]}
        pruned = pack.prune("run", keep_last=3)
        after = {record.version: record.file for record in pack.histories["run"]}
        assert {label for label, file in after.items() if before[label] != file} <= set(pruned.encoded_again)
        # 600 referred to 500, or to the last version of its kind; later ones refer to versions that stay
        assert "600" in pruned.encoded_again

    def test_errors_and_sources_stay(self, pack):
        before = {record.version: record for record in pack.histories["run"]}
        pack.prune("run", keep_every=300)
        for record in pack.histories["run"]:
            for field in ("delta_error", "tensor_error", "max_error", "source_sha256", "step", "source_config"):
                assert getattr(record, field) == getattr(before[record.version], field)

    def test_change_is_that_to_the_version_before(self, pack, run):
        pack.prune("run", keep_every=300)
        first, second, third = pack.histories["run"]
        again = ex.Pack.empty()
        for label in ("300", "600", "800"):
            again.append(pack[f"run@{label}"], label, name="run", lossless=True)
        assert first.change is None
        assert [second.change, third.change] == pytest.approx([r.change for r in again.histories["run"]][1:], rel=1e-5)

    def test_appending_goes_on(self, pack, run):
        pack.prune("run", keep_last=2)
        pack.save()
        for opened in (pack, ex.Pack.open(pack.path)):
            opened.append(run[0], "900", lossless=opened.histories["run"].latest.lossless)
        assert [record.file for record in opened.histories["run"]] == [record.file for record in pack.histories["run"]]
        numbers_before = numbers(pack)
        opened = ex.Pack.open(opened.save())
        assert_same_numbers(numbers(opened), numbers_before)

    def test_a_second_time_changes_nothing(self, pack):
        pack.prune("run", keep_last=2, keep_every=300)
        records = pack.histories["run"].versions
        pruned = pack.prune("run", keep_last=2, keep_every=300)
        assert (pruned.removed, pruned.encoded_again, pruned.freed_bytes) == ((), (), 0)
        assert pack.histories["run"].versions == records

    def test_other_numbers_are_an_error_and_change_nothing(self, run, monkeypatch):
        pack = ex.Pack.empty()
        for checkpoint in run[:4]:
            pack.append(checkpoint)
        before = pack.histories["run"]
        other = pack.history_store.decode(before, before["200"])
        encode_again = lossy.encode_again
        monkeypatch.setattr(lossy, "encode_again", lambda decoded, reference: encode_again(other, reference))
        with pytest.raises(PackError, match="'run@400' would not decode to the same numbers.*Nothing was changed"):
            pack.remove("run@200", "run@100")
        assert pack.histories["run"] == before

    @pytest.mark.parametrize("distance", [2, 3, 5])
    @pytest.mark.parametrize("every", [2, 3])
    def test_chains_stay_short(self, tmp_path, monkeypatch, distance, every):
        monkeypatch.setattr(history_store, "KEY_DISTANCE", distance)
        pack = ex.Pack.empty()
        for checkpoint in make_run(tmp_path / "run", range(1, 19)):
            pack.append(checkpoint, lossless=True)
        for keep_every in (every, 2 * every):
            before = numbers(pack)
            pack.prune("run", keep_every=keep_every)
            history = pack.histories["run"]
            assert max(len(history.chain(record)) for record in history) <= distance
            assert_same_numbers(numbers(pack), before)
            # not all of them have become key versions
            assert sum(record.reference is None for record in history) <= -(-len(history) // 2) + 1

    def test_without_steps_labels_count(self, run):
        pack = ex.Pack.empty()
        for checkpoint in run[:6]:
            pack.append(ex.read_adapter(checkpoint), name="run", lossless=True)
        assert pack.prune("run", keep_every=2).removed == ("1", "3", "5")
        assert pack.prune("run", keep_every=2).removed == ()

    def test_without_numbers_positions_count(self, run):
        pack = ex.Pack.empty()
        for label, checkpoint in zip("abcdef", run[:6], strict=True):
            pack.append(ex.read_adapter(checkpoint), label, name="run", lossless=True)
        assert pack.prune("run", keep_every=3).removed == ("a", "b", "d", "e")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "nothing says which versions stay: pass keep_last, keep_every or both"),
            ({"keep_last": 0}, "keep_last=0: it is a number of at least 1"),
            ({"keep_every": -2}, "keep_every=-2: it is a number of at least 1"),
            ({"keep_every": 1.5}, "keep_every must be an integer"),
        ],
    )
    def test_options(self, run, options, message):
        pack = ex.Pack.empty()
        pack.append(run[0], lossless=True)
        with pytest.raises(OptionError, match=message):
            pack.prune("run", **options)
        with pytest.raises(AdapterNameError, match="no history named 'rum' in the pack"):
            pack.prune("rum", keep_last=1)


class TestRemove:
    def test_the_last_version_goes_with_its_history(self, pack):
        pack.remove(*(f"run@{step}" for step in STEPS))
        assert not pack.histories
        pack.save()
        assert not (pack.path / "versions").exists()

    def test_adapters_versions_and_histories_together(self, run, tmp_path):
        pack = ex.fit([make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")], n_components=3)
        for name, checkpoint in itertools.product(("one", "two"), run[:3]):
            pack.append(checkpoint, name=name, lossless=True)
        for wrong in ("c", "one@7", "three@100"):
            with pytest.raises(AdapterNameError):
                pack.remove("a", "one@latest", wrong)
        assert (pack.names, pack.histories["one"].labels) == (["a", "b"], ["100", "200", "300"])
        pack.remove("a", "two", "one@latest", "one@100")
        assert (pack.names, list(pack.histories), pack.histories["one"].labels) == (["b"], ["one"], ["200"])


class TestRestore:
    def test_is_the_folder_that_it_was(self, run, tmp_path):
        pack = ex.Pack.empty()
        for checkpoint in run[:3]:
            pack.append(checkpoint, lossless=True)
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        pack.prune("run", keep_last=2)
        for name, checkpoint in (("run@200", run[1]), ("run@latest", run[2])):
            restored = pack.restore(name, tmp_path / name.partition("@")[2])
            assert tree(restored) == {
                file: (checkpoint / file).read_bytes() for file in ("adapter_config.json", WEIGHTS)
            }

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_of_other_dtypes_and_metadata(self, tmp_path, dtype):
        (source,) = make_run(tmp_path / "run", [10], dtype=dtype)
        tensors = {
            **load_file(source / WEIGHTS),
            "base_model.model.score.weight": torch.tensor([[0.0, -0.0, float(2**-149)]]),
            "base_model.model.score.steps": torch.arange(7),
        }
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt", "epoch": "3"})
        # not as PEFT writes it
        config = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score", "classifier"]}))
        pack = ex.Pack.empty()
        pack.append(source, lossless=True)
        restored = pack.restore("run@10", tmp_path / "restored")
        assert (restored / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
        found = load_file(restored / WEIGHTS)
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype
            assert bytes(found[key].view(torch.uint8).flatten()) == bytes(tensor.view(torch.uint8).flatten()), key
        with safe_open(restored / WEIGHTS, "pt") as file:
            assert file.metadata() == {"format": "pt", "epoch": "3"}

    def test_within_an_error_bound_is_none(self, run, tmp_path):
        pack = ex.Pack.empty()
        pack.append(run[0])
        with pytest.raises(OptionError, match=r"'run@100' is stored within an error bound of 0.05.*`export` writes"):
            pack.restore("run@latest", tmp_path / "restored")

    def test_an_existing_folder(self, run, tmp_path):
        pack = ex.Pack.empty()
        pack.append(run[0], lossless=True)
        pack.restore("run@100", tmp_path / "restored")
        with pytest.raises(PackExistsError, match="is not empty"):
            pack.restore("run@100", tmp_path / "restored")
        pack.restore("run@100", tmp_path / "restored", overwrite=True)
        saved = pack.save(tmp_path / "pack")
        with pytest.raises(PackExistsError, match="is in the pack"):
            pack.restore("run@100", saved / "restored")

    def test_what_is_converted_when_it_is_read_has_no_folder_to_restore(self, tmp_path):
        source = make_adapter(tmp_path / "ada", seed=1, config={"peft_type": "ADALORA", "init_r": 3})
        tensors = {}
        for key, tensor in load_file(source / WEIGHTS).items():
            tensors[key.removesuffix(".weight")] = tensor
            if "lora_A" in key:
                tensors[key.replace("lora_A.weight", "lora_E")] = torch.ones(3, 1)
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
        assert ex.read_adapter(source).ranks == (3,)
        with pytest.raises(OptionError, match="is converted to one when it is read.*remove lossless=True"):
            ex.Pack.empty().append(source, lossless=True)
