"""Adapters that were trained, or packed, before their subspace grew: loaded on the grown one, by each loader."""

import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

import eigenlorax as ex
from eigenlorax.core import registry
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import LossWarning, OptionError, PackMissingError, ProjectionWarning
from eigenlorax.tuner import combine, from_lora, swap, to_lora
from loaders import LOADERS, base, load
from planted import random_factors
from tiny import BERT, IN, shake

pytestmark = pytest.mark.slow

# float32 sums over more numbers, of which the further ones are zero: what they may differ by
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def pack(bert_pack, tmp_path):
    return shutil.copytree(bert_pack, tmp_path / "pack")


def newcomer(name="new", seed=900, rank=2):
    return from_factors(
        name,
        {
            module: random_factors(rank, IN, IN, seed=seed + place, dtype=torch.float32)
            for place, module in enumerate(BERT)
        },
    )


def grow(folder, seed=900):
    """The pack on disk, extended by two directions on every side."""
    with ex.Pack.edit(folder) as opened:
        assert opened.add(newcomer(f"new-{seed}", seed), extend=2).delta_error < 1e-5


def trained(folder, subspace, **fields):
    config = ex.EigenLoraxConfig(subspace=subspace, task_type="SEQ_CLS", **{"r": 4, "lora_alpha": 9, **fields})
    return shake(get_peft_model(base(folder), config)).eval()


def dense(factors):
    return factors.scaling * factors.up @ factors.down


def columns(model):
    return {
        parameter.shape[1]
        for name, parameter in model.named_parameters()
        if "eigenlorax_down" in name or "eigenlorax_core" in name
    }


class TestSavedElsewhere:
    @pytest.mark.usefixtures("forgotten")
    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("fields", [{}, {"core": True}, {"rank_pattern": {"query": 2}}, {"n_extra": 2}])
    def test_it_loads_with_the_outputs_it_had(self, saved_base, pack, tmp_path, ids, loader, fields):
        model = trained(saved_base, pack, **fields)
        model.save_pretrained(tmp_path / "mine")
        wanted = model(ids).logits
        registry.clear()
        grow(pack)
        grow(pack, seed=950)
        ex.Pack.open(pack)
        loaded = load(loader, saved_base, tmp_path / "mine").eval()
        assert torch.equal(loaded(ids).logits, wanted)
        assert columns(loaded) == {9 + fields.get("n_extra", 0)}

    def test_the_subspace_may_be_named(self, saved_base, pack, tmp_path, ids):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_or_given_as_a_pack(self, saved_base, pack, tmp_path, ids):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        opened = ex.Pack.open(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=opened).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        # one of another basis, though of as many components
        other = ex.fit([opened.adapter(name) for name in ("a1", "a2", "a3")], n_components=9)
        with pytest.raises(OptionError, match="but <Pack of 3 adapters .*> has .* would mean something else there"):
            PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=other)

    @pytest.mark.parametrize("start", ["mean", "a1", "uniform"])
    def test_wherever_it_was_started(self, saved_base, pack, tmp_path, ids, start):
        model = trained(saved_base, pack, start=start)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_training_goes_on_where_it_was_and_is_saved_as_it_was(self, saved_base, pack, tmp_path, ids):
        trained(saved_base, pack).save_pretrained(tmp_path / "mine")
        before = shutil.copytree(pack, tmp_path / "before")
        grow(pack)
        model = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack, is_trainable=True)
        assert columns(model) == {9}
        shake(model, seed=6).save_pretrained(tmp_path / "again")
        for subspace in (pack, before):
            again = PeftModel.from_pretrained(base(saved_base), tmp_path / "again", subspace=subspace).eval()
            assert torch.equal(again(ids).logits, model.eval()(ids).logits)

    def test_it_is_read_as_the_lora_that_it_was(self, saved_base, pack, tmp_path):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        wanted = to_lora(model)
        grow(pack)
        opened = ex.Pack.open(pack)
        found = ex.read_adapter(tmp_path / "mine")
        for module, factors in found.modules.items():
            assert torch.equal(factors.down, wanted.modules[module].down)
            assert torch.equal(factors.up, wanted.modules[module].up)
        assert opened.add(tmp_path / "mine").delta_error < 1e-6

    def test_an_embedded_one_is_as_it_was(self, saved_base, pack, tmp_path, ids):
        model = trained(saved_base, pack, embed_subspace=True)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        ex.Pack.open(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine").eval()
        assert columns(loaded) == {9}
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)

    def test_it_may_be_embedded_then(self, saved_base, pack, tmp_path, ids):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack)
        loaded.peft_config["default"].embed_subspace = True
        loaded.save_pretrained(tmp_path / "embedded")
        alone = PeftModel.from_pretrained(base(saved_base), tmp_path / "embedded").eval()
        torch.testing.assert_close(alone(ids).logits, model(ids).logits, atol=0, rtol=0)

    @pytest.mark.usefixtures("forgotten")
    def test_merging_and_unmerging_is_as_it_was(self, saved_base, pack, tmp_path, ids):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack).eval()
        merged, wanted = (one.merge_and_unload() for one in (loaded, model))
        assert torch.equal(merged(ids).logits, wanted(ids).logits)

    @pytest.mark.usefixtures("forgotten")
    def test_a_subspace_that_grew_elsewhere_is_another_one(self, saved_base, pack, tmp_path):
        """One pack, extended in two ways: what was trained after one extension does not belong to the other."""
        other = shutil.copytree(pack, tmp_path / "other")
        grow(pack)
        grow(other, seed=950)
        trained(saved_base, pack).save_pretrained(tmp_path / "mine")
        with pytest.raises(OptionError, match="belongs to the subspace .* would mean something else there"):
            PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=other)
        registry.clear()
        ex.Pack.open(other)
        with pytest.raises(PackMissingError, match="not loaded"):
            PeftModel.from_pretrained(base(saved_base), tmp_path / "mine")

    def test_tensors_of_another_width_are_refused_as_ever(self, saved_base, pack, tmp_path):
        model = trained(saved_base, pack)
        model.save_pretrained(tmp_path / "mine")
        grow(pack)
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine", subspace=pack)
        state = get_peft_model_state_dict(model)
        cut = {
            key.replace(".eigenlorax_down", ".eigenlorax_down.default"): value[:, :5]
            for key, value in state.items()
            if key.endswith("eigenlorax_down")
        }
        with pytest.raises(RuntimeError, match="size mismatch"):
            loaded.load_state_dict(cut, strict=False)


class TestAdaptersOfThePack:
    def test_old_and_new_ones_share_one_basis(self, saved_base, pack, ids):
        before = {name: self.alone(saved_base, pack, name)(ids).logits for name in ("a1", "a2")}
        grow(pack)
        opened = ex.Pack.open(pack)
        names = ["a1", "a2", "new-900"]
        model = PeftModel.from_pretrained(base(saved_base), opened.adapter_folder("a1"), "a1")
        for name in names[1:]:
            model.load_adapter(opened.adapter_folder(name), name.replace("-", "_"))
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        assert set(layer.eigenlorax_basis_down) == {opened.info.fingerprint}
        for name, wanted in before.items():
            model.set_adapter(name)
            assert torch.equal(model.eval()(ids).logits, wanted)
        # in one batch too
        mixed = model(ids[:3], adapter_names=["a1", "a2", "new_900"]).logits
        torch.testing.assert_close(mixed[:1], before["a1"][:1], **CLOSE)
        torch.testing.assert_close(mixed[1:2], before["a2"][1:2], **CLOSE)
        combine(model, {"a1": 0.5, "new_900": 2.0}, "both")
        assert model.peft_config["both"].subspace_fingerprint == opened.info.fingerprint
        both, one, new = (to_lora(model, name) for name in ("both", "a1", "new_900"))
        for module in BERT:
            wanted = 0.5 * dense(one.modules[module]) + 2.0 * dense(new.modules[module])
            torch.testing.assert_close(dense(both.modules[module]), wanted, atol=1e-5, rtol=1e-5)

    def alone(self, saved_base, pack, name):
        return PeftModel.from_pretrained(base(saved_base), ex.Pack.open(pack).adapter_folder(name), name).eval()

    def test_a_new_one_takes_the_place_of_an_old_one(self, saved_base, pack, ids):
        grow(pack)
        opened = ex.Pack.open(pack)
        model = PeftModel.from_pretrained(base(saved_base), opened.adapter_folder("a1")).eval()
        new = newcomer("other", 900, rank=3)
        opened.add(new, extend=3)
        opened.save()
        model = PeftModel.from_pretrained(base(saved_base), opened.adapter_folder("a1"), subspace=pack).eval()
        assert swap(model, new) < 1e-5
        assert model.peft_config["default"].subspace_fingerprint == opened.info.fingerprint
        lora = from_lora(base(saved_base), new, subspace=pack).eval()
        torch.testing.assert_close(model(ids).logits, lora(ids).logits, **CLOSE)

    @pytest.mark.parametrize("start", ["a1", "mean", "new-900"])
    def test_one_may_start_from_them(self, saved_base, pack, start):
        grow(pack)
        opened = ex.Pack.open(pack)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ProjectionWarning)
            model = get_peft_model(
                base(saved_base), ex.EigenLoraxConfig(subspace=pack, start=start, core=True, lora_alpha=8)
            )
        names = opened.names if start == "mean" else [start]
        for module, factors in to_lora(model).modules.items():
            wanted = sum(dense(one) for one in (opened.adapter(name).modules[module] for name in names)) / len(names)
            torch.testing.assert_close(dense(factors), wanted, atol=1e-4, rtol=1e-4)

    def test_losses_are_said_where_it_is_not_extended(self, pack):
        with pytest.warns(LossWarning, match="new"):
            ex.Pack.open(pack).add(newcomer())
