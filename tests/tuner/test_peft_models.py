"""PEFT models as sources of a fit, and adapters of a pack loaded into PEFT models: compared with PEFT itself."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

import eigenlorax as ex
from eigenlorax import EigenLoraxConfig
from eigenlorax.errors import (
    AdapterNameError,
    DuplicateAdapterWarning,
    FormatError,
    ModuleNameError,
    OptionError,
    ShapeError,
)
from tiny import make_bert, make_gpt2, shake

TARGETS = ["query", "value"]


def lora_model(name="default", seed=1, rank=4, head=False):
    """The tiny BERT with a LoRA whose B is random, too."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights=False,
        modules_to_save=["classifier"] if head else None,
    )
    return get_peft_model(make_bert(), config, adapter_name=name)


def ia3_model():
    return get_peft_model(make_bert(), IA3Config(target_modules=TARGETS, feedforward_modules=[]))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def exact_pack():
    """A pack of the adapters `first` and `second` with as many components as they need."""
    return ex.fit([lora_model("first", 1), lora_model("second", 2)], n_components=8)


class TestModelsAsSources:
    def test_all_adapters_of_a_model_are_fitted(self):
        model = lora_model("first", 1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        pack = ex.fit(model, n_components=8)
        assert (pack.names, pack.adapter("first").ranks, pack.adapter("second").ranks) == (
            ["first", "second"],
            (4,),
            (2,),
        )

    def test_updates_are_those_of_the_model(self, exact_pack):
        layer = lora_model("second", 2).get_base_model().bert.encoder.layer[0].attention.self.query
        factors = exact_pack["second"].modules["bert.encoder.layer.0.attention.self.query"]
        update = factors.scaling * factors.up @ factors.down
        torch.testing.assert_close(update, layer.get_delta_weight("second").detach(), rtol=1e-5, atol=1e-6)

    def test_a_head_is_kept_to_the_bit(self):
        model = lora_model("first", head=True)
        pack = ex.fit({"x": model}, n_components=4)
        head = model.get_base_model().classifier.modules_to_save["first"].weight
        (key,) = (key for key in pack["x"].heads if key.endswith("weight"))
        assert torch.equal(pack["x"].heads[key], head)

    def test_a_state_dict_with_its_config(self, exact_pack):
        model = lora_model("first", 1)
        state_dict = get_peft_model_state_dict(model, adapter_name="first")
        for config in (model.peft_config["first"], {**model.peft_config["first"].to_dict(), "target_modules": TARGETS}):
            pack = ex.fit({"first": (state_dict, config), "second": lora_model("second", 2)}, n_components=8)
            assert pack.info.fingerprint == exact_pack.info.fingerprint

    def test_a_model_is_added(self, exact_pack):
        assert exact_pack.add(lora_model(seed=3), name="third").delta_error > 0
        with pytest.warns(DuplicateAdapterWarning, match="fourth has the same update as first"):
            exact_pack.add_all([lora_model("fourth", 1)])
        assert exact_pack.names == ["first", "fourth", "second", "third"]
        assert exact_pack.records["fourth"].delta_error < 1e-6

    def test_a_model_on_coefficients(self, exact_pack, tmp_path):
        exact_pack.save(tmp_path / "pack")
        model = shake(get_peft_model(make_bert(), EigenLoraxConfig(subspace=exact_pack, r=4)))
        pack = ex.fit({"own": model, "first": lora_model("first", 1)}, n_components=8)
        layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
        factors = pack["own"].modules["bert.encoder.layer.0.attention.self.value"]
        update = factors.scaling * factors.up @ factors.down
        torch.testing.assert_close(update, layer.get_delta_weight("default").detach(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("source", "error", "text"),
        [
            (3.0, OptionError, "float is not an adapter"),
            (lambda: {"first": lora_model().state_dict()}, OptionError, "with its config"),
            (lambda: [(lora_model().state_dict(), {})], OptionError, "has no name"),
            (lambda: {"first": (get_peft_model_state_dict(lora_model()), None)}, FormatError, "NoneType"),
            (lambda: {"first": ({}, LoraConfig())}, FormatError, "no LoRA tensor"),
            (lambda: lora_model().get_base_model(), OptionError, "BertForSequenceClassification is not an adapter"),
            (
                lambda: get_peft_model(make_bert(), IA3Config(target_modules=TARGETS, feedforward_modules=[])),
                FormatError,
                "IA3",
            ),
        ],
    )
    def test_what_is_no_adapter(self, source, error, text):
        with pytest.raises(error, match=text):
            ex.fit(source() if callable(source) else source)

    def test_one_name_for_several_adapters(self):
        model = lora_model("first")
        model.add_adapter("second", LoraConfig(target_modules=TARGETS))
        with pytest.raises(OptionError, match="the model has 2: 'first', 'second'"):
            ex.fit({"x": model})

    def test_models_with_adapters_of_the_same_name_need_a_mapping(self):
        models = lora_model(), lora_model(seed=2)
        message = r"same name, 'default'. Set another name for one of them: pass a mapping, \{'name': source\}.$"
        with pytest.raises(AdapterNameError, match=message):
            ex.fit(models)
        pack = ex.fit({"one": models[0]}, max_error=0.2)
        with pytest.raises(AdapterNameError, match=message):
            pack.add_all(models)
        assert ex.fit(dict(zip(("one", "two"), models, strict=True))).names == ["one", "two"]

    def test_a_pack_is_no_collection_of_originals(self, exact_pack):
        with pytest.raises(OptionError, match="refit"):
            ex.fit(exact_pack)


class TestLoadInto:
    def test_as_lora(self, exact_pack, ids):
        model = lora_model("own", 5)
        exact_pack.load_into(model, ["first", "second"])
        for name, seed in (("first", 1), ("second", 2)):
            model.set_adapter(name)
            torch.testing.assert_close(logits(model, ids), logits(lora_model(name, seed), ids), rtol=1e-4, atol=1e-5)
        model.set_adapter("own")
        torch.testing.assert_close(logits(model, ids), logits(lora_model("own", 5), ids))

    def test_as_coefficients(self, exact_pack, ids, tmp_path):
        exact_pack.save(tmp_path / "pack")
        model = get_peft_model(make_bert(), EigenLoraxConfig(subspace=exact_pack, r=4), adapter_name="own")
        exact_pack.load_into(model, "first")
        model.set_adapter("first")
        assert model.peft_config["first"].peft_type == "EIGENLORAX"
        torch.testing.assert_close(logits(model, ids), logits(lora_model("first", 1), ids), rtol=1e-4, atol=1e-5)

    def test_a_version_of_a_model_with_several_adapters(self):
        model = lora_model("first", 1)
        model.add_adapter("second", LoraConfig(target_modules=TARGETS, r=2))
        pack = ex.Pack.empty()
        with pytest.raises(OptionError, match="has 2 adapters, 'first', 'second', and none is named 'adapter'"):
            pack.append(model)
        pack.append(model, name="second", lossless=True)
        assert pack["second@1"].ranks == (2,)

    def test_versions(self, ids):
        pack = ex.Pack.empty()
        for seed in (1, 2):
            pack.append(lora_model("first", seed), step=seed, lossless=True)
        model = lora_model("own", 5)
        pack.load_into(model, ["adapter@1", "adapter@latest"])
        for name, seed in (("adapter@1", 1), ("adapter@latest", 2)):
            model.set_adapter(name)
            torch.testing.assert_close(logits(model, ids), logits(lora_model("first", seed), ids))
        pack.append(lora_model("first", 3), step=3, lossless=True)
        coefficients = get_peft_model(make_bert(), EigenLoraxConfig(subspace=ex.fit(lora_model(), n_components=4), r=4))
        with pytest.raises(AdapterNameError, match="'adapter@3' is a version of a history"):
            pack.load_into(coefficients, "adapter@3")

    def test_all_by_default(self, exact_pack):
        model = lora_model("own", 5)
        exact_pack.load_into(model)
        assert set(model.peft_config) == {"own", "first", "second"}

    def test_a_coded_pack(self, ids):
        pack = ex.fit([lora_model("first", 1), lora_model("second", 2)], max_error=0.01)
        model = lora_model("own", 5)
        pack.load_into(model, "second")
        exported = pack["second"].modules["bert.encoder.layer.1.attention.self.value"]
        layer = model.get_base_model().bert.encoder.layer[1].attention.self.value
        torch.testing.assert_close(
            layer.get_delta_weight("second").detach(), exported.scaling * exported.up @ exported.down
        )

    def test_what_cannot_be_loaded(self, exact_pack, tmp_path):
        model = lora_model("first", 5)
        with pytest.raises(AdapterNameError, match="already has an adapter named 'first'"):
            exact_pack.load_into(model)
        assert set(model.peft_config) == {"first"}
        with pytest.raises(AdapterNameError, match="Did you mean 'first'"):
            exact_pack.load_into(model, "firs")
        with pytest.raises(OptionError, match="BertForSequenceClassification is not a PeftModel"):
            exact_pack.load_into(make_bert(), "first")
        with pytest.raises(OptionError, match="are of type IA3"):
            exact_pack.load_into(ia3_model(), "first")

    def test_a_model_of_another_width_is_unchanged(self, exact_pack):
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        )
        model = get_peft_model(
            BertForSequenceClassification(config), LoraConfig(r=4, target_modules=TARGETS), adapter_name="own"
        )
        with pytest.raises(ShapeError, match="'first' does not fit the model: size mismatch for .*another base model"):
            exact_pack.load_into(model)
        assert set(model.peft_config) == {"own"}

    def test_another_base_model(self, exact_pack):
        model = get_peft_model(make_gpt2(), LoraConfig(target_modules=["c_attn"]), adapter_name="own")
        with pytest.raises((ModuleNameError, ValueError)):
            exact_pack.load_into(model, "first")
        assert set(model.peft_config) == {"own"}
