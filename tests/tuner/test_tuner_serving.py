"""Serving: one core a subspace, filled in place. Beside the same layers that do not serve, and without recompiling."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter

import eigenlorax as ex
from convnets import conv_pack, images, make_convnet
from eigenlorax.core.layer_update import project
from eigenlorax.errors import OptionError
from eigenlorax.tuner import combine, forward, scaled, serve, swap, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from planted import random_factors
from tiny import BERT, IN, RANK, make_bert, make_gpt2, make_pack, shake

CLOSE = {"atol": 2e-6, "rtol": 2e-5}
RECIPES = {
    "b": {"r": 2, "lora_alpha": 3},
    "c": {"r": 3, "core": True},
    "d": {"r": 4, "use_rslora": True, "target_modules": BERT[:1]},
    "e": {"r": 4, "embed_subspace": True},
}


@pytest.fixture(autouse=True)
def _compiled_anew():
    yield
    torch.compiler.reset()


def crowd(pack, base, recipes=RECIPES, **fields):
    """A model with adapters of several recipes."""
    config = ex.EigenLoraxConfig(subspace=pack, **{"r": 4, "lora_alpha": 6, **fields})
    model = shake(get_peft_model(base, config))
    for seed, (name, own) in enumerate(recipes.items()):
        model.add_adapter(name, ex.EigenLoraxConfig(**{"subspace": pack, **fields, **own}))
        shake(model, name, seed=20 + seed)
    return model.eval()


def both(pack, **fields):
    plain = crowd(pack, make_bert(), **fields)
    served = copy.deepcopy(plain)
    serve(served)
    return plain, served


def layers(model):
    return [module for module in model.modules() if isinstance(module, EigenLoraxLayer)]


def compiled(model):
    """The base model inside, as PEFT's wrapper looks at names of adapters; and what counts the compilations."""
    counter = CompileCounter()
    return torch.compile(model.get_base_model(), backend=counter, fullgraph=True), counter


def choose(model, weights):
    """As diffusers does it: all layers by themselves."""
    for layer in layers(model):
        layer.set_adapter(list(weights))
        for name, weight in weights.items():
            layer.set_scale(name, weight)


def test_every_choice_equals_that_of_layers_that_do_not_serve(bert_pack, ids):
    plain, served = both(bert_pack)
    with torch.no_grad():
        for weights in (
            {"default": 1.0},
            {"default": 0.7, "b": -0.5},
            {"b": 1.0, "c": 2.0, "d": 0.3, "e": -1.5},
            {"d": 0.0},
            {},
        ):
            for model in (plain, served):
                choose(model, weights)
            torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)
        assert torch.equal(served(ids).logits, make_bert()(ids).logits)


def test_of_whatever_changes_what_is_active(bert_pack, ids, tmp_path):
    plain, served = both(bert_pack)
    other = crowd(bert_pack, make_bert(), recipes={})
    shake(other, seed=77)
    other.save_pretrained(tmp_path / "other")
    pack = ex.Pack.open(bert_pack)

    def on_layers(do):
        return lambda model: [do(layer) for layer in layers(model)]

    @torch.no_grad()
    def by_hand(model):
        for layer in layers(model):
            layer.eigenlorax_up["default"].mul_(0.5)
        if model is served:
            serve(model)

    changes = {
        "set_adapter": lambda model: model.set_adapter("b"),
        "several": lambda model: model.base_model.set_adapter(["default", "b"]),
        "set_scale": on_layers(lambda layer: layer.set_scale("b", 0.25)),
        "scale_layer": on_layers(lambda layer: layer.scale_layer(3)),
        "unscale_layer": on_layers(lambda layer: layer.unscale_layer(2)),
        "unscale_layer, back": on_layers(lambda layer: layer.unscale_layer()),
        "disable": on_layers(lambda layer: layer.enable_adapters(False)),
        "enable": on_layers(lambda layer: layer.enable_adapters(True)),
        "load": lambda model: model.load_adapter(tmp_path / "other", "loaded"),
        "choose what was loaded": lambda model: model.set_adapter("loaded"),
        "delete": lambda model: model.delete_adapter("loaded"),
        "choose again": lambda model: model.set_adapter("default"),
        "by hand": by_hand,
        "add": lambda model: shake(
            model.add_adapter("a0", ex.EigenLoraxConfig(subspace=bert_pack, r=RANK)) or model, "a0", seed=3
        ),
        "swap": lambda model: (swap(model, pack.adapter("a0"), "a0"), model.set_adapter("a0")),
        "swap, while active": lambda model: swap(model, pack.adapter("a1"), "a0"),
        "combine": lambda model: combine(model, {"a0": 0.4, "b": 1.1}, "mix"),
        "choose the mix": lambda model: model.set_adapter("mix"),
        "merge": lambda model: model.merge_adapter(),
        "unmerge": lambda model: model.unmerge_adapter(),
        "load again": lambda model: model.load_state_dict(
            {key: value * 0.9 if "eigenlorax_" in key else value for key, value in model.state_dict().items()}
        ),
        "train": lambda model: model.train(),
        "eval": lambda model: model.eval(),
    }
    seen = []
    for what, change in changes.items():
        for model in (plain, served):
            change(model)
        with torch.no_grad():
            got, wanted = served(ids).logits, plain(ids).logits
        torch.testing.assert_close(got, wanted, **CLOSE, msg=lambda text, what=what: f"{what}: {text}")
        seen.append(wanted)
    assert len({tuple(one.flatten().tolist()) for one in seen}) > len(seen) / 2
    with torch.no_grad():
        with served.disable_adapter():
            torch.testing.assert_close(served(ids).logits, make_bert()(ids).logits, **CLOSE)
        with scaled(served, 0.5), scaled(plain, 0.5):
            torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_nothing_is_compiled_again(bert_pack, ids):
    plain, served = both(bert_pack)
    # what is guarded against does not depend on the backend, and this one takes no time
    run = torch.compile(served.get_base_model(), backend="eager", fullgraph=True)
    with torch.inference_mode():
        run(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for weights in ({"b": 1.0}, {"default": 0.7, "c": 0.5, "d": 1.0}, {"default": 0.2, "e": 3.0}, {}):
                for model in (plain, served):
                    choose(model, weights)
                torch.testing.assert_close(run(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
            for model in (plain, served):
                choose(model, {"b": 2.0})
                for layer in layers(model):
                    layer.enable_adapters(False)
            torch.testing.assert_close(run(ids).logits, make_bert()(ids).logits, atol=1e-5, rtol=1e-5)
            for model in (plain, served):
                for layer in layers(model):
                    layer.enable_adapters(True)
                    layer.scale_layer(0.5)
                model.delete_adapter("d")
                model.set_adapter("b")
            torch.testing.assert_close(run(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_nor_for_an_adapter_that_comes_later(bert_pack, ids):
    served = crowd(bert_pack, make_bert(), recipes={})
    serve(served)
    run, counter = compiled(served)
    with torch.no_grad():
        run(ids)
        before = counter.frame_count
        served.add_adapter("later", ex.EigenLoraxConfig(subspace=bert_pack, r=2, core=True))
        shake(served, "later", seed=9)
        serve(served)
        served.set_adapter("later")
        got = run(ids).logits
        assert counter.frame_count == before
        alone = crowd(bert_pack, make_bert(), recipes={}, r=2, core=True, lora_alpha=16)
        shake(alone, seed=9)
        torch.testing.assert_close(got, alone(ids).logits, **CLOSE)


def test_layers_that_come_later_serve_too(bert_pack, ids):
    plain = crowd(bert_pack, make_bert(), recipes={}, target_modules=BERT[:1])
    served = copy.deepcopy(plain)
    serve(served, torch.float64)
    for model in (plain, served):
        model.add_adapter("more", ex.EigenLoraxConfig(subspace=bert_pack, r=2))
        shake(model, "more", seed=4)
    serve(served, torch.float64)
    assert len(layers(served)) == len(BERT)
    for layer in layers(served):
        assert layer.serving is not None
        assert {basis.dtype for basis in layer.bases_of("more")} == {torch.float64}
    for model in (plain, served):
        model.set_adapter("more")
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_an_adapter_put_into_a_model_that_serves_is_loaded_in_whatever_way(bert_pack, saved_base, ids, tmp_path):
    other = crowd(bert_pack, make_bert(), recipes={})
    other.save_pretrained(tmp_path / "other")
    wanted = other(ids).logits
    served = crowd(bert_pack, make_bert(), recipes={"b": RECIPES["b"]})
    served.delete_adapter("default")
    serve(served)
    served.load_adapter(tmp_path / "other", "low", low_cpu_mem_usage=True)
    served.set_adapter("low")
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, wanted, **CLOSE)


def test_without_peft_s_wrapper(bert_pack, ids):
    config = ex.EigenLoraxConfig(subspace=bert_pack, r=4)
    model = shake(inject_adapter_in_model(config, make_bert())).eval()
    with torch.no_grad():
        wanted = model(ids).logits
        serve(model)
        torch.testing.assert_close(model(ids).logits, wanted, **CLOSE)


def test_convolutions(ids):
    pack, _ = conv_pack(n_components=5, energy=None)
    plain = crowd(pack, make_convnet(), recipes={"b": {"r": 2}, "c": {"r": 2, "core": True}})
    served = copy.deepcopy(plain)
    serve(served)
    run, counter = compiled(served)
    with torch.no_grad():
        for weights in ({"default": 1.0}, {"default": 0.5, "b": 0.3, "c": -0.1}, {}):
            for model in (plain, served):
                choose(model, weights)
            torch.testing.assert_close(run(images(2)), plain(images(2)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_conv1d(gpt2_pack, ids):
    plain = crowd(gpt2_pack, make_gpt2(), recipes={"b": {"r": 2}}, fan_in_fan_out=True)
    served = copy.deepcopy(plain)
    serve(served)
    for model in (plain, served):
        choose(model, {"default": 0.5, "b": 2.0})
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_of_two_subspaces(bert_pack, ids):
    other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=2)
    plain = crowd(bert_pack, make_bert(), recipes={"b": {"r": 2, "subspace": other}})
    served = copy.deepcopy(plain)
    serve(served)
    assert all(len(layer.eigenlorax_blend) == 2 for layer in layers(served))
    for model in (plain, served):
        choose(model, {"default": 0.5, "b": 2.0})
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)
    served.delete_adapter("b")
    assert all(len(layer.eigenlorax_blend) == 1 for layer in layers(served))


def test_adapters_of_before_the_subspace_grew(tmp_path, ids):
    pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=2)
    early = pack.save(tmp_path / "pack")
    crowd(early, make_bert(), recipes={}).save_pretrained(tmp_path / "early")
    grown = ex.Pack.open(early)
    new = ex.from_factors("new", {m: random_factors(RANK, IN, IN, seed=70 + i) for i, m in enumerate(BERT)})
    grown.add(new, extend=3, warn_above=1.0)
    grown.save()
    plain = PeftModel.from_pretrained(make_bert(), tmp_path / "early", subspace=early).eval()
    plain.load_adapter(early / "adapters" / "new", "new")
    served = copy.deepcopy(plain)
    serve(served)
    layer = layers(served)[0]
    assert layer.n_components["default"] < layer.n_components["new"]
    for model in (plain, served):
        choose(model, {"default": 0.5, "new": 2.0})
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_in_half_precision(bert_pack, ids, dtype):
    plain = crowd(bert_pack, make_bert().to(dtype), recipes={"b": RECIPES["b"]})
    served = copy.deepcopy(plain)
    serve(served, dtype)
    layer, before = layers(served)[0], layers(plain)[0]
    assert {basis.dtype for basis in layer.bases_of("b")} == {dtype}
    assert layer.eigenlorax_down["b"].dtype == torch.float32
    assert [blend.dtype for blend in layer.eigenlorax_blend.values()] == [torch.float32]
    for old, new in zip(before.bases_of("b"), layer.bases_of("b"), strict=True):
        assert 2 * new.nbytes == old.nbytes
    for model in (plain, served):
        choose(model, {"default": 0.5, "b": 1.0})
    with torch.no_grad():
        got, wanted = served(ids).logits, plain(ids).logits
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_bytes_are_bases_coefficients_and_one_core(bert_pack):
    model = crowd(bert_pack, make_bert(), recipes={})
    serve(model)
    pack = ex.Pack.open(bert_pack)

    def held():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return sum(tensor.nbytes for name, tensor in tensors if "eigenlorax_" in name)

    sizes = [(b.down.k, b.up.k, b.down.dimension, b.up.dimension) for b in pack.subspace.modules.values()]
    bases = sum(4 * (k_down * n_in + k_up * n_out) for k_down, k_up, n_in, n_out in sizes)
    core = sum(4 * k_down * k_up for k_down, k_up, *_ in sizes)
    one = sum(4 * 4 * (k_down + k_up) for k_down, k_up, *_ in sizes)
    assert held() == bases + core + one
    for name in ("b", "c"):
        model.add_adapter(name, ex.EigenLoraxConfig(subspace=bert_pack, r=4))
    assert held() == bases + core + 3 * one


def test_rows_of_their_own_and_training_go_as_without(bert_pack, ids):
    plain, served = both(bert_pack, task_type="SEQ_CLS")
    names = ["default", "b", "__base__", "c", "e"]
    with torch.no_grad():
        wanted = plain(ids, adapter_names=names).logits
        torch.testing.assert_close(served(ids, adapter_names=names).logits, wanted, **CLOSE)
    labels = torch.tensor([0, 1, 2, 1, 0])
    for model in (plain, served):
        model.set_adapter("default")
        model.train()(ids, labels=labels).loss.backward()
        layer = layers(model)[0]
        assert layer.eigenlorax_up["default"].grad.abs().sum() > 0
        with torch.no_grad():
            for one in layers(model):
                one.eigenlorax_up["default"] -= one.eigenlorax_up["default"].grad
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_within_inference_mode(bert_pack, ids):
    plain, served = both(bert_pack)
    with torch.inference_mode():
        serve(served)
        served.set_adapter("b")
    served.set_adapter("c")
    plain.set_adapter("c")
    with torch.inference_mode():
        torch.testing.assert_close(served(ids).logits, plain(ids).logits, **CLOSE)


def test_moving_and_copying(bert_pack, ids):
    _, served = both(bert_pack)
    copied = copy.deepcopy(served).to(torch.float64)
    assert {blend.dtype for layer in layers(copied) for blend in layer.eigenlorax_blend.values()} == {torch.float64}
    copied.set_adapter("b")
    served.set_adapter("b")
    with torch.no_grad():
        torch.testing.assert_close(copied(ids).logits.float(), served(ids).logits, atol=1e-5, rtol=1e-5)


def test_nothing_of_it_is_saved(bert_pack, tmp_path):
    plain, served = both(bert_pack)
    assert set(served.state_dict()) == set(plain.state_dict())
    served.save_pretrained(tmp_path / "served", selected_adapters=["b"])
    again = to_lora(PeftModel.from_pretrained(make_bert(), tmp_path / "served" / "b"))
    for name, factors in to_lora(plain, "b").modules.items():
        torch.testing.assert_close(again.modules[name].down, factors.down)


def test_wrong_use(bert_pack):
    with pytest.raises(OptionError, match="no EigenLoRAx adapter: load one first"):
        serve(make_bert())
    with pytest.raises(OptionError, match="dtype must be a floating-point dtype"):
        serve(crowd(bert_pack, make_bert(), recipes={}), torch.int16)


class TestSharedProducts:
    """Active together, adapters of one subspace have both products with its bases in common."""

    def test_one_more_adapter_costs_no_product_with_a_basis(self, bert_pack, projected):
        model = crowd(bert_pack, make_bert())
        layer = model.get_submodule(f"base_model.model.{BERT[1]}")
        x = torch.randn(7, IN)
        layer.set_adapter(["default", "b", "c"])
        got = layer(x)
        wanted = layer.base_layer(x) + sum(x @ layer.get_delta_weight(name).mT for name in ("default", "b", "c"))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert len(projected) == 1

    @pytest.fixture
    def projected(self, monkeypatch):
        """The inputs that layers have projected on a down basis so far."""
        inputs = []

        def spy(x, rows, convolution):
            inputs.append(x)
            return project(x, rows, convolution)

        monkeypatch.setattr(forward, "project", spy)
        return inputs

    def test_each_has_its_own_dropout(self, bert_pack, projected):
        model = crowd(bert_pack, make_bert(), recipes={"b": {}}, lora_dropout=0.5).train()
        layer = model.get_submodule(f"base_model.model.{BERT[1]}")
        layer.set_adapter(["default", "b"])
        layer(torch.ones(7, IN))
        x, y = projected
        assert not torch.equal(x, y)

    def test_gradients_are_those_of_each(self, bert_pack):
        model = crowd(bert_pack, make_bert(), recipes={"b": RECIPES["b"]})
        layer = model.get_submodule(f"base_model.model.{BERT[1]}")
        x, weights = torch.randn(7, IN), torch.randn(7, IN)
        layer.set_adapter(["default", "b"])
        (layer(x) * weights).sum().backward()
        together = {name: layer.eigenlorax_up[name].grad.clone() for name in ("default", "b")}
        for name, wanted in together.items():
            layer.zero_grad()
            layer.set_adapter(name)
            (layer(x) * weights).sum().backward()
            torch.testing.assert_close(layer.eigenlorax_up[name].grad, wanted)
