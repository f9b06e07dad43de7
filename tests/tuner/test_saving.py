"""Saved and loaded by each loader, in this process and in a new one; and what is refused."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import eigenlorax as ex
from children import python
from eigenlorax.core import registry
from eigenlorax.errors import BaseModelWarning, ModuleNameError, OptionError, PackMissingError, ShapeError
from eigenlorax.tuner import to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from loaders import LOADERS, base, load
from planted import random_factors
from tiny import BERT, IN, RANK, make_pack, shake

pytestmark = pytest.mark.slow


def trained(folder, pack, **fields):
    config = ex.EigenLoraxConfig(subspace=pack, task_type="SEQ_CLS", **{"r": 4, "lora_alpha": 9, **fields})
    model = shake(get_peft_model(base(folder), config)).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    return model


def succeeds(code, *arguments):
    done = python("-c", code, *arguments)
    assert done.returncode == 0, done.stderr


class TestLoaders:
    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("fields", [{}, {"core": True}, {"n_extra": 2, "extra_seed": 8}, {"use_rslora": True}])
    def test_with_the_pack_open(self, saved_base, bert_pack, tmp_path, ids, forgotten, loader, fields):
        model = trained(saved_base, bert_pack, **fields)
        model.save_pretrained(tmp_path / "out")
        registry.clear()
        ex.Pack.open(bert_pack)
        assert torch.equal(load(loader, saved_base, tmp_path / "out").eval()(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("fields", [{}, {"core": True}, {"n_extra": 2, "extra_seed": 8}])
    def test_with_the_subspace_embedded(self, saved_base, bert_pack, tmp_path, ids, forgotten, loader, fields):
        model = trained(saved_base, bert_pack, embed_subspace=True, **fields)
        model.save_pretrained(tmp_path / "out")
        registry.clear()
        loaded = load(loader, saved_base, tmp_path / "out").eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_embedding_can_be_decided_when_it_is_saved(self, saved_base, bert_pack, tmp_path, ids, forgotten):
        model = trained(saved_base, bert_pack)
        model.save_pretrained(tmp_path / "without")
        model.peft_config["default"].embed_subspace = True
        model.save_pretrained(tmp_path / "with")
        registry.clear()
        again = load("peft", saved_base, tmp_path / "with").eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        again.save_pretrained(tmp_path / "again")
        names = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("without", "with", "again")]
        assert names[0] < names[1] == names[2]

    def test_embedding_can_be_taken_back_too(self, saved_base, bert_pack, tmp_path, forgotten):
        trained(saved_base, bert_pack, embed_subspace=True).save_pretrained(tmp_path / "with")
        loaded = load("peft", saved_base, tmp_path / "with")
        loaded.peft_config["default"].embed_subspace = False
        loaded.save_pretrained(tmp_path / "without")
        assert not any("embedded" in name for name in load_file(tmp_path / "without" / "adapter_model.safetensors"))

    def test_models_and_packs_can_be_pickled(self, saved_base, bert_pack, ids):
        model = trained(saved_base, bert_pack)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert pickle.loads(pickle.dumps(ex.Pack.open(bert_pack))).names == ["a0", "a1", "a2", "a3"]

    def test_with_the_pack_given(self, saved_base, bert_pack, tmp_path, ids, forgotten):
        model = trained(saved_base, bert_pack)
        model.save_pretrained(tmp_path / "out")
        registry.clear()
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "out", subspace=bert_pack)
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)

    def test_each_of_them_in_a_new_process(self, saved_base, bert_pack, tmp_path, ids):
        logits = {}
        for name in ("embedded", "pack"):
            model = trained(saved_base, bert_pack, embed_subspace=name == "embedded")
            model.save_pretrained(tmp_path / name)
            logits[name] = model(ids).logits.detach()
        torch.save({"ids": ids, **logits}, tmp_path / "wanted.pt")
        # what has its subspace with it comes first, while no pack is open
        code = (
            "import sys, torch, eigenlorax\n"
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from pathlib import Path\n"
            "from loaders import LOADERS, load\n"
            "base, place, pack = map(Path, sys.argv[1:])\n"
            "wanted = torch.load(place / 'wanted.pt')\n"
            "def check(name):\n"
            "    for loader in LOADERS:\n"
            "        logits = load(loader, base, place / name).eval()(wanted['ids']).logits\n"
            "        assert torch.equal(logits, wanted[name]), (name, loader)\n"
            "check('embedded')\n"
            "opened = eigenlorax.Pack.open(pack)\n"
            "check('pack')\n"
        )
        succeeds(code, saved_base, tmp_path, bert_pack)

    def test_what_is_exported_needs_nothing_of_ours(self, saved_base, bert_pack, tmp_path, ids):
        model = trained(saved_base, bert_pack)
        ex.write_adapter(to_lora(model), tmp_path / "lora")
        torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "wanted.pt")
        code = (
            "import sys, torch\n"
            "sys.modules['eigenlorax'] = None\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForSequenceClassification\n"
            "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)\n"
            "model = PeftModel.from_pretrained(model, sys.argv[2]).eval()\n"
            "wanted = torch.load(sys.argv[3])\n"
            "torch.testing.assert_close(model(wanted['ids']).logits, wanted['logits'], atol=1e-6, rtol=1e-6)\n"
        )
        succeeds(code, saved_base, tmp_path / "lora", tmp_path / "wanted.pt")

    def test_the_files_hold_no_path_and_no_basis(self, saved_base, bert_pack, tmp_path):
        trained(saved_base, bert_pack).save_pretrained(tmp_path / "out")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["subspace"] is None
        assert config["subspace_fingerprint"] == ex.Pack.open(bert_pack).info.fingerprint
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        numbers = sum(t.numel() for name, t in tensors.items() if "eigenlorax" in name)
        assert numbers == len(BERT) * 2 * 4 * 9


class TestAdaptersOfAPack:
    def test_load_from_their_folder(self, saved_base, bert_pack, ids, forgotten):
        loaded = PeftModel.from_pretrained(base(saved_base), bert_pack / "adapters" / "a1").eval()
        ex.write_adapter(ex.Pack.open(bert_pack).adapter("a1"), saved_base.with_name("a1"))
        lora = PeftModel.from_pretrained(base(saved_base), saved_base.with_name("a1")).eval()
        torch.testing.assert_close(loaded(ids).logits, lora(ids).logits, atol=1e-6, rtol=1e-5)

    def test_share_one_basis_after_a_change_of_dtype_too(self, saved_base, bert_pack, ids):
        model = PeftModel.from_pretrained(base(saved_base), bert_pack / "adapters" / "a0", adapter_name="a0")
        for name in ("a1", "a2", "a3"):
            model.load_adapter(bert_pack / "adapters" / name, name)

        def bases():
            return {b.data_ptr() for n, b in model.named_buffers() if "eigenlorax_basis" in n}

        assert len(bases()) == 2 * len(BERT)
        model.to(torch.bfloat16)
        assert len(bases()) == 2 * len(BERT)
        assert all(b.dtype == torch.bfloat16 for n, b in model.named_buffers() if "eigenlorax_basis" in n)
        for name in ("a0", "a1", "a2"):
            model.delete_adapter(name)
        assert len(bases()) == 2 * len(BERT)
        model.delete_adapter("a3")
        assert bases() == set()

    def test_with_carried_tensors_are_refused(self, saved_base, tmp_path):
        modules = {name: random_factors(RANK, IN, IN, seed=i, dtype=torch.float32) for i, name in enumerate(BERT)}
        pack = ex.fit([ex.from_factors("a", modules)], exclude_modules=["layer.1.*"], n_components=4)
        pack.save(tmp_path / "pack")
        model = base(saved_base)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(OptionError, match="cannot express .* `eigenlorax export`"):
            PeftModel.from_pretrained(model, tmp_path / "pack" / "adapters" / "a")
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_under_other_names_find_their_modules(self, saved_base, tmp_path, ids):
        short = {name.removeprefix("bert."): (IN, IN) for name in BERT}
        pack, _ = make_pack(short)
        pack.save(tmp_path / "pack")
        model = get_peft_model(base(saved_base), ex.EigenLoraxConfig(subspace=pack))
        found = {name for name, module in model.named_modules() if isinstance(module, EigenLoraxLayer)}
        assert found == {f"base_model.model.{name}" for name in BERT}


class TestAddToThePack:
    @pytest.mark.parametrize("core", [False, True])
    def test_what_was_trained_is_taken_whole(self, saved_base, bert_pack, tmp_path, ids, core):
        model = trained(saved_base, bert_pack, core=core)
        model.save_pretrained(tmp_path / "mine")
        shutil.copytree(bert_pack, tmp_path / "pack")
        with ex.Pack.edit(tmp_path / "pack") as pack:
            record = pack.add(tmp_path / "mine")
        assert record.delta_error < 1e-6
        pack.export(tmp_path / "loras", ["mine"])
        lora = PeftModel.from_pretrained(base(saved_base), tmp_path / "loras" / "mine").eval()
        torch.testing.assert_close(lora(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        mine = PeftModel.from_pretrained(base(saved_base), tmp_path / "pack" / "adapters" / "mine").eval()
        torch.testing.assert_close(mine(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
    def test_extra_directions_are_lost_or_kept_and_that_is_said(self, saved_base, bert_pack, tmp_path, ids):
        model = trained(saved_base, bert_pack, n_extra=3, extra_seed=5)
        model.save_pretrained(tmp_path / "mine")
        pack = ex.Pack.open(bert_pack)
        assert 0.1 < pack.add(tmp_path / "mine").delta_error < 1
        assert pack.augment(3, 5).add(tmp_path / "mine", name="again").delta_error < 1e-6


class TestWrongUse:
    def assert_untouched(self, model, error, match, call):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(error, match=match):
            call()
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_no_subspace(self, bert):
        call = lambda: get_peft_model(bert, ex.EigenLoraxConfig())  # noqa: E731
        self.assert_untouched(bert, OptionError, "no subspace was passed.*EigenLoraxConfig", call)

    def test_a_pack_that_is_not_there(self, bert, tmp_path):
        call = lambda: get_peft_model(bert, ex.EigenLoraxConfig(subspace=tmp_path / "gone"))  # noqa: E731
        self.assert_untouched(bert, PackMissingError, "is not a pack.*`eigenlorax fit", call)

    def test_a_subspace_that_is_not_at_hand(self, saved_base, bert_pack, tmp_path, forgotten):
        trained(saved_base, bert_pack).save_pretrained(tmp_path / "out")
        registry.clear()
        model = base(saved_base)
        call = lambda: PeftModel.from_pretrained(model, tmp_path / "out")  # noqa: E731
        self.assert_untouched(model, PackMissingError, "Pack.open.*subspace=.*embed_subspace", call)

    def test_another_subspace(self, saved_base, bert_pack, tmp_path):
        trained(saved_base, bert_pack).save_pretrained(tmp_path / "out")
        other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=3)
        other.save(tmp_path / "other")
        model = base(saved_base)
        call = lambda: PeftModel.from_pretrained(model, tmp_path / "out", subspace=tmp_path / "other")  # noqa: E731
        self.assert_untouched(model, OptionError, "belongs to the subspace .* its coefficients would mean", call)

    def test_another_base_model(self, bert, gpt2_pack):
        call = lambda: get_peft_model(bert, ex.EigenLoraxConfig(subspace=gpt2_pack))  # noqa: E731
        self.assert_untouched(bert, ModuleNameError, "none of the modules of the subspace", call)

    @pytest.mark.parametrize(
        ("name", "warned"), [("org/other", True), ("org/tiny", False), ("Tiny", False), ("", False)]
    )
    def test_another_base_model_of_the_same_shape(self, bert, name, warned):
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
        pack.base_model = "someone/tiny"
        bert.name_or_path = name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_peft_model(bert, ex.EigenLoraxConfig(subspace=pack))
        messages = [str(one.message) for one in caught if issubclass(one.category, BaseModelWarning)]
        assert bool(messages) == warned
        assert all("'someone/tiny'" in message and "'org/other'" in message for message in messages)

    def test_another_width(self, bert):
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN + 1)))
        call = lambda: get_peft_model(bert, ex.EigenLoraxConfig(subspace=pack))  # noqa: E731
        self.assert_untouched(bert, ShapeError, r"\(24, 24\) in the model and \(24, 25\)", call)

    def test_a_module_that_the_subspace_lacks(self, bert, bert_pack):
        config = ex.EigenLoraxConfig(subspace=bert_pack, target_modules=["query", "key"])
        call = lambda: get_peft_model(bert, config)  # noqa: E731
        self.assert_untouched(bert, ModuleNameError, "self.key' is not in the subspace.*exclude_modules", call)

    def test_filters_that_leave_nothing(self, bert, bert_pack):
        config = ex.EigenLoraxConfig(subspace=bert_pack, layers_to_transform=[99])
        call = lambda: get_peft_model(bert, config)  # noqa: E731
        self.assert_untouched(
            bert, OptionError, r"none of the 4 modules .* is selected by .*layers_to_transform=\[99\]", call
        )

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"r": 0}, "r must be an integer of at least 1"),
            ({"r": True}, "r must be an integer, got True"),
            ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be an integer of at least 1"),
            ({"lora_alpha": "a"}, "lora_alpha must be a number"),
            ({"lora_dropout": "x"}, "lora_dropout must be a number"),
            ({"start": None}, "start must be 'zero'"),
            ({"n_extra": -1}, "n_extra must be"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
            ({"core": True, "rank_pattern": {"query": 2}}, "rank_pattern has no meaning with core=True"),
            ({"layers_pattern": "layer"}, "layers_to_transform"),
        ],
    )
    def test_options(self, fields, match):
        with pytest.raises(OptionError, match=match):
            ex.EigenLoraxConfig(**fields)
