"""Export and import, swapping, scaling and combining: against PEFT's LoRA and against sums of updates."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter

import eigenlorax as ex
from eigenlorax.errors import AdapterNameError, ModuleNameError, OptionError, ProjectionWarning, ShapeError
from eigenlorax.tuner import combine, from_lora, scaled, swap, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from planted import random_factors
from tiny import BERT, IN, RANK, make_bert, make_gpt2, make_pack, shake


def model_of(pack, **fields):
    return shake(
        get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, **{"r": 4, "lora_alpha": 6, **fields}))
    ).eval()


def deltas(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer) and module.has_adapter(adapter)
    }


class TestToLora:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"core": True},
            {"use_rslora": True},
            {"n_extra": 2, "extra_seed": 1},
            {"rank_pattern": {"value": 2}, "alpha_pattern": {"layer.0.attention.self.query": 3}},
            {"task_type": "SEQ_CLS"},
            {"bias": "all"},
            {"bias": "eigenlorax_only"},
        ],
    )
    def test_plain_peft_gives_the_same_outputs(self, bert_pack, ids, tmp_path, fields):
        model = model_of(bert_pack, **fields)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "eigenlorax_" not in name:
                parameter.data += 0.05
        ex.write_adapter(to_lora(model), tmp_path / "lora")
        lora = PeftModel.from_pretrained(make_bert(), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)

    def test_of_conv1d(self, gpt2_pack, ids, tmp_path):
        config = ex.EigenLoraxConfig(subspace=gpt2_pack, r=4, fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = shake(get_peft_model(make_gpt2(), config)).eval()
        ex.write_adapter(to_lora(model), tmp_path / "lora")
        lora = PeftModel.from_pretrained(make_gpt2(), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)

    def test_of_a_name_that_is_not_there(self, bert_pack):
        with pytest.raises(AdapterNameError, match="no EigenLoRAx adapter 'gone'. It has: default"):
            to_lora(model_of(bert_pack), "gone")


class TestFromLora:
    @pytest.mark.parametrize("core", [False, True])
    def test_an_adapter_of_the_subspace_is_whole(self, bert_pack, ids, tmp_path, core):
        adapter = ex.Pack.open(bert_pack).adapter("a1")
        ex.write_adapter(adapter, tmp_path / "a1")
        lora = PeftModel.from_pretrained(make_bert(), tmp_path / "a1").eval()
        model = from_lora(make_bert(), tmp_path / "a1", subspace=bert_pack, core=core).eval()
        torch.testing.assert_close(model(ids).logits, lora(ids).logits, atol=1e-6, rtol=1e-6)

    def test_round_trip_with_a_head(self, bert_pack, ids):
        model = model_of(bert_pack, task_type="SEQ_CLS", rank_pattern={"value": 2}, alpha_pattern={"value": 5})
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.3
        again = from_lora(make_bert(), to_lora(model), subspace=bert_pack).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)

    def test_what_lies_outside_is_lost_and_said(self, bert_pack):
        factors = {name: random_factors(RANK, IN, IN, seed=900 + i) for i, name in enumerate(BERT)}
        outside = ex.from_factors("outside", factors)
        lost = ex.Pack.open(bert_pack).add(outside).delta_error
        with pytest.warns(ProjectionWarning, match=f"{lost:.4f}"):
            from_lora(make_bert(), outside, subspace=bert_pack)

    def test_as_one_more_adapter(self, bert_pack, ids):
        model = model_of(bert_pack)
        before = deltas(model)
        from_lora(model, ex.Pack.open(bert_pack).adapter("a2"), "second", subspace=bert_pack)
        assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())
        wanted = ex.Pack.open(bert_pack).adapter("a2").modules
        for name, delta in deltas(model, "second").items():
            one = wanted[name]
            torch.testing.assert_close(delta, one.scaling * one.up @ one.down, atol=1e-5, rtol=1e-5)


class TestSwap:
    def test_in_place_without_a_new_compilation(self, bert_pack, ids):
        pack = ex.Pack.open(bert_pack)
        model = from_lora(make_bert(), pack.adapter("a0"), subspace=bert_pack).eval()
        parameters = {name: p.data_ptr() for name, p in model.named_parameters() if "eigenlorax_" in name}
        counter = CompileCounter()
        # without the wrapper, through which old releases of torch cannot trace
        compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
        with torch.inference_mode():
            compiled(ids)
            compilations = counter.frame_count
            for name in ("a1", "a2"):
                assert swap(model, pack.adapter(name)) < 1e-6
                fresh = from_lora(make_bert(), pack.adapter(name), subspace=bert_pack).eval()
                torch.testing.assert_close(compiled(ids).logits, fresh(ids).logits, atol=1e-6, rtol=1e-6)
        assert counter.frame_count == compilations
        assert {name: p.data_ptr() for name, p in model.named_parameters() if "eigenlorax_" in name} == parameters

    def test_modules_that_the_other_lacks_get_zeros(self, bert_pack):
        model = model_of(bert_pack, r=RANK)
        factors = {BERT[1]: ex.Pack.open(bert_pack).adapter("a0").modules[BERT[1]]}
        swap(model, ex.from_factors("part", factors))
        assert {name for name, delta in deltas(model).items() if delta.any()} == {BERT[1]}

    def test_another_rank_or_module_changes_nothing(self, bert_pack):
        model = model_of(bert_pack)
        before = deltas(model)
        with pytest.raises(ShapeError, match=r"\(4, 9\) in the model and \(3, 9\) in 'a0'"):
            swap(model, ex.Pack.open(bert_pack).adapter("a0"))
        with pytest.raises(ModuleNameError, match="'elsewhere' of 'b' has no coefficients"):
            swap(model, ex.from_factors("b", {"elsewhere": random_factors(4, IN, IN, seed=1)}))
        assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())


class TestMergedAdapters:
    """Merged, an adapter is in the base model's weights, where no change of ours reaches it."""

    def test_are_not_swapped_nor_scaled(self, bert_pack):
        model = model_of(bert_pack)
        model.merge_adapter()
        with pytest.raises(OptionError, match=r"adapters are merged: default. Call unmerge_adapter\(\) first"):
            swap(model, to_lora(model))
        with pytest.raises(OptionError, match="merged"), scaled(model, 0.5):
            pass

    def test_are_taken_out_as_they_were_put_in(self, bert_pack):
        model = model_of(bert_pack)
        before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
        with scaled(model, 0.25):
            model.merge_adapter()
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            if name in before:
                torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-6)


def test_unknown_adapters_are_named(bert_pack):
    with pytest.raises(AdapterNameError, match="no EigenLoRAx adapter 'zz'"):
        swap(model_of(bert_pack), ex.Pack.open(bert_pack).adapter("a0"), "zz")


def test_scaled_is_for_the_length_of_the_block(bert_pack, ids):
    model = model_of(bert_pack)
    before = deltas(model)
    with scaled(model, 0.25):
        for name, delta in deltas(model).items():
            torch.testing.assert_close(delta, 0.25 * before[name])
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model).items())


class TestCombine:
    @pytest.fixture(params=[False, True], ids=["pairs", "cores"])
    def model(self, bert_pack, request):
        model = model_of(bert_pack, core=request.param)
        for seed, name in enumerate(("b", "c")):
            ranks = {} if request.param else {"rank_pattern": {"query": 3}}
            config = ex.EigenLoraxConfig(subspace=bert_pack, r=2, lora_alpha=7, core=request.param, **ranks)
            model.add_adapter(name, config)
            shake(model, name, seed=seed)
        return model

    def test_is_the_weighted_sum_of_the_updates(self, model, ids):
        combine(model, {"default": 0.5, "b": -2.0, "c": 1.5}, "mix")
        parts = {name: deltas(model, name) for name in ("default", "b", "c")}
        for name, delta in deltas(model, "mix").items():
            wanted = 0.5 * parts["default"][name] - 2 * parts["b"][name] + 1.5 * parts["c"][name]
            torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-5)
        model.set_adapter("mix")
        model.eval()(ids)

    def test_names_alone_give_the_mean(self, model):
        combine(model, ["b", "c"], "mean")
        for name, delta in deltas(model, "mean").items():
            wanted = (deltas(model, "b")[name] + deltas(model, "c")[name]) / 2
            torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-5)

    def test_of_two_subspaces_is_refused(self, model):
        other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=2)
        model.add_adapter("other", ex.EigenLoraxConfig(subspace=other, r=2))
        with pytest.raises(OptionError, match="b, other have different subspaces"):
            combine(model, ["b", "other"], "mix")
