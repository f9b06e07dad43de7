"""Adapters with a residual, in the tuner: against PEFT's LoRA of the whole update."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import eigenlorax as ex
from convnets import conv_pack, images, make_convnet, with_updates
from eigenlorax.core import keys
from eigenlorax.errors import FormatError, ModuleNameError, ProjectionWarning
from eigenlorax.tuner import combine, from_lora, serve, swap, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from loaders import several
from rests import SIDES, with_rests
from tiny import BERT, IN, make_bert, make_pack

CLOSE = {"atol": 3e-6, "rtol": 2e-5}
NAMES = ["a0", "a1", "a2", "a3"]


@pytest.fixture(autouse=True)
def _compiled_anew():
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def pack():
    made, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
    return with_rests(made, SIDES)


@pytest.fixture(scope="module")
def path(pack, tmp_path_factory):
    return pack.save(tmp_path_factory.mktemp("rests") / "pack")


@pytest.fixture(scope="module")
def loras(pack, tmp_path_factory):
    return pack.export(tmp_path_factory.mktemp("rests") / "loras")


@pytest.fixture
def ours(path):
    return several(lambda name: path / "adapters" / name, make_bert(), NAMES)


@pytest.fixture
def theirs(loras):
    return several(lambda name: loras[name], make_bert(), NAMES)


def layers(model):
    return [module for module in model.modules() if isinstance(module, EigenLoraxLayer)]


@torch.no_grad()
def assert_same(got, wanted, ids):
    torch.testing.assert_close(got(ids).logits, wanted(ids).logits, **CLOSE)


class TestRun:
    def test_each_alone_and_several(self, ours, theirs, ids):
        for names in ([name] for name in NAMES):
            for model in (ours, theirs):
                model.base_model.set_adapter(names)
            assert_same(ours, theirs, ids)
        for names in (["a0", "a3"], ["a2", "a0", "a1", "a3"]):
            for model in (ours, theirs):
                model.base_model.set_adapter(names)
            assert_same(ours, theirs, ids)

    def test_a_rest_counts(self, path, pack, ours, ids):
        """Nothing above is right because residuals are small."""
        plain, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
        other = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=plain, start="a0", r=3))
        ours.set_adapter("a0")
        with torch.no_grad():
            assert not torch.allclose(ours(ids).logits, other(ids).logits, atol=1e-4)

    @pytest.mark.parametrize("served", [False, True])
    def test_each_row_has_its_own(self, ours, loras, ids, served):
        if served:
            serve(ours)
        names = ["a0", "__base__", "a3", "a1", "a0"]
        with torch.no_grad():
            got = ours(ids, adapter_names=names).logits
            for row, name in enumerate(names):
                alone = make_bert()
                if name != "__base__":
                    alone = PeftModel.from_pretrained(alone, loras[name]).eval()
                torch.testing.assert_close(got[row : row + 1], alone(ids[row : row + 1]).logits, **CLOSE)

    @pytest.mark.parametrize("safe", [False, True])
    def test_merged_and_back(self, ours, theirs, ids, safe):
        names = ["a0", "a1"]
        for model in (ours, theirs):
            model.base_model.set_adapter(names)
        ours.merge_adapter(safe_merge=safe)
        assert_same(ours, theirs, ids)
        ours.unmerge_adapter()
        assert_same(ours, theirs, ids)
        assert_same(ours.merge_and_unload(), theirs, ids)

    def test_disabled_and_deleted(self, ours, theirs, ids):
        with ours.disable_adapter(), torch.no_grad():
            assert torch.equal(ours(ids).logits, make_bert()(ids).logits)
        ours.delete_adapter("a0")
        assert all(not layer.has_residual("a0") for layer in layers(ours))
        for model in (ours, theirs):
            model.set_adapter("a2")
        assert_same(ours, theirs, ids)

    def test_in_another_dtype(self, ours, theirs, ids):
        for model in (ours, theirs):
            model.set_adapter("a2")
        wanted = copy.deepcopy(theirs).double()
        assert_same(ours.double(), wanted, ids)
        with torch.no_grad():
            got = ours.to(torch.bfloat16)(ids).logits
        torch.testing.assert_close(got.float(), wanted(ids).logits.float(), atol=0.1, rtol=0.1)

    def test_of_a_model_in_half_precision_rests_are_not_rounded(self, path, theirs, ids):
        model = several(lambda name: path / "adapters" / name, make_bert().to(torch.bfloat16), ["a0"])
        residuals = [residual for layer in layers(model) for residual in layer.residuals_of("a0")]
        assert {residual.dtype for residual in residuals} == {torch.float32}
        plain = ex.Pack.open(path).packed("a0").coefficients[BERT[0]]
        assert any(torch.equal(residual, plain.down_residual) for residual in residuals)

    def test_with_low_cpu_mem_usage(self, path, theirs, ids):
        model = PeftModel.from_pretrained(make_bert(), path / "adapters" / "a2", low_cpu_mem_usage=True).eval()
        theirs.set_adapter("a2")
        assert_same(model, theirs, ids)

    def test_convolutions(self, tmp_path):
        plain, _ = conv_pack(n_components=7, energy=None)
        made = with_rests(plain, {"a0": ["both"], "a1": ["down", "up", "none"]})
        path = made.save(tmp_path / "pack")
        names = ["a0", "a1", "a2"]
        model = several(lambda name: path / "adapters" / name, make_convnet(), names)
        served = copy.deepcopy(model)
        serve(served)
        x = images(3)
        with torch.no_grad():
            mixed = model(x, adapter_names=names)
            for row, name in enumerate(names):
                dense = with_updates(made.adapter(name))
                model.set_adapter(name)
                served.set_adapter(name)
                for got in (model(x), served(x)):
                    torch.testing.assert_close(got, dense(x), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(mixed[row : row + 1], dense(x[row : row + 1]), atol=1e-5, rtol=1e-5)
                merged = copy.deepcopy(model).merge_and_unload()
                torch.testing.assert_close(merged(x), dense(x), atol=1e-5, rtol=1e-5)


class TestServed:
    def test_every_choice(self, ours, theirs, ids):
        serve(ours)
        for weights in ({"a0": 1.0}, {"a0": 0.5, "a3": -1.0}, {"a1": 0.3, "a2": 0.2, "a0": 1.5}, {"a3": 1.0}):
            for model in (ours, theirs):
                for layer in model.base_model.model.modules():
                    if hasattr(layer, "set_scale"):
                        layer.set_adapter(list(weights))
                        for name, weight in weights.items():
                            layer.set_scale(name, weight)
            assert_same(ours, theirs, ids)
        for layer in layers(ours):
            layer.enable_adapters(False)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, make_bert()(ids).logits)

    @pytest.mark.slow
    def test_nothing_is_compiled_again(self, ours, theirs, ids):
        serve(ours)
        counter = CompileCounter()
        compiled = torch.compile(ours.get_base_model(), backend=counter, fullgraph=True)

        def run(*names):
            for model in (ours, theirs):
                model.base_model.set_adapter(list(names))
            with torch.no_grad():
                torch.testing.assert_close(compiled(ids).logits, theirs(ids).logits, **CLOSE)
            return counter.frame_count

        first = run("a0")
        assert run("a3") == run("a1") == run("a2") == first
        with ours.disable_adapter(), torch.no_grad():
            compiled(ids)
        assert counter.frame_count == first
        # two with a residual at one time have more rows than any had: once, and from then on there is room
        more = run("a0", "a1", "a2")
        assert more == first + 1
        assert run("a1", "a2", "a3") == run("a0", "a1") == run("a3") == more

    def test_a_rest_is_held_once_and_what_is_active_once(self, ours):
        serve(ours)
        for layer in layers(ours):
            rows = max(layer.r.values())
            assert layer.eigenlorax_factors["down"].shape == (rows, IN)
            assert layer.eigenlorax_factors["up"].shape == (IN, rows)
        for name in ("a0", "a1", "a2"):
            ours.delete_adapter(name)
        for layer in layers(ours):
            assert not list(layer.eigenlorax_factors.keys())
            assert len(layer.eigenlorax_blend) == 1

    def test_without_an_adapter_of_coefficients_alone_there_is_no_core(self, path):
        model = several(lambda name: path / "adapters" / name, make_bert(), ["a0"])
        serve(model)
        assert all(not list(layer.eigenlorax_blend.keys()) for layer in layers(model))


class TestTraining:
    def test_a_rest_is_frozen_and_saved_with_what_was_trained(self, path, tmp_path, ids):
        model = PeftModel.from_pretrained(make_bert(), path / "adapters" / "a1", is_trainable=True)
        before = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("_rest.default")}
        assert before
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert not any("_rest" in name for name in trained)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).logits.square().sum().backward()
            optimizer.step()
        after = dict(model.named_buffers())
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        model.eval().save_pretrained(tmp_path / "mine")
        again = PeftModel.from_pretrained(make_bert(), tmp_path / "mine", subspace=path).eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        # and by ourselves, as an ordinary LoRA
        found = ex.read_adapter(tmp_path / "mine")
        wanted = to_lora(model)
        for module, factors in found.modules.items():
            torch.testing.assert_close(factors.down, wanted.modules[module].down)
            torch.testing.assert_close(factors.up, wanted.modules[module].up)

    def test_gradients_are_those_of_the_same_lora(self, path, pack, ids):
        model = PeftModel.from_pretrained(make_bert(), path / "adapters" / "a0", is_trainable=True).train()
        model(ids).logits.square().sum().backward()
        base = make_bert().train()
        packed = pack.packed("a0")
        own = {}
        for name, one in packed.coefficients.items():
            bases = pack.subspace.modules[packed.subspace_names[name]]
            down, up = own[name] = [part.clone().requires_grad_() for part in (one.down, one.up)]
            whole = (
                one.scaling
                * (bases.up.components.mT @ up + one.up_residual)
                @ (down @ bases.down.components + one.down_residual)
            )
            layer = base.get_submodule(name)
            weight = layer.weight.detach() + whole
            del layer._parameters["weight"]
            layer.weight = weight
        base(ids).logits.square().sum().backward()
        found = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
        for name, (down, up) in own.items():
            torch.testing.assert_close(found[name].eigenlorax_down["default"].grad, down.grad, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found[name].eigenlorax_up["default"].grad, up.grad, atol=1e-3, rtol=1e-3)

    def test_a_new_one_starts_from_what_is_inside(self, pack, ids):
        with pytest.warns(ProjectionWarning, match=r"start='a0': it has a residual outside the subspace, 0\.\d+ of"):
            model = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, start="a0", r=3, lora_alpha=6))
        with pytest.warns(ProjectionWarning, match="the update of 'a0' is not in the subspace"):
            wanted = from_lora(make_bert(), pack.adapter("a0"), subspace=pack)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, wanted.eval()(ids).logits, **CLOSE)
        assert all(not layer.has_residual("default") for layer in layers(model))

    def test_the_mean_says_how_many_have_one(self, pack):
        with pytest.warns(ProjectionWarning, match="3 of 4 adapters have a residual outside the subspace"):
            get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, start="mean"))

    def test_one_without_is_not_warned_of(self, pack, recwarn):
        get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, start="a3"))
        assert not [one for one in recwarn if isinstance(one.message, ProjectionWarning)]


class TestConverted:
    @pytest.mark.parametrize("name", NAMES)
    def test_to_lora(self, ours, pack, name):
        found, wanted = to_lora(ours, name), pack.adapter(name)
        for module, factors in found.modules.items():
            torch.testing.assert_close(factors.down, wanted.modules[module].down)
            torch.testing.assert_close(factors.up, wanted.modules[module].up)
        assert not found.heads

    def test_swapped_into_room_for_it(self, ours, theirs, pack, ids):
        assert swap(ours, pack.adapter("a2"), "a0") < 1e-6
        ours.set_adapter("a0")
        theirs.set_adapter("a2")
        assert_same(ours, theirs, ids)
        # one that lies inside leaves nothing of what was there
        swap(ours, pack.adapter("a3"), "a0")
        theirs.set_adapter("a3")
        assert_same(ours, theirs, ids)

    def test_swapped_where_there_is_none(self, ours, pack):
        with pytest.warns(ProjectionWarning, match="is not in the subspace"):
            assert swap(ours, pack.adapter("a0"), "a3") > 0.1

    def test_combined(self, ours, theirs, ids):
        weights = {"a0": 0.7, "a3": -0.4, "a2": 0.2}
        combine(ours, weights, "mix")
        ours.set_adapter("mix")
        theirs.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
        theirs.set_adapter("mix")
        assert_same(ours, theirs, ids)

    def test_a_combination_is_saved_with_its_rests(self, ours, tmp_path, path, ids):
        combine(ours, {"a0": 0.7, "a1": 0.3}, "mix")
        ours.set_adapter("mix")
        ours.save_pretrained(tmp_path / "mine", selected_adapters=["mix"])
        again = PeftModel.from_pretrained(make_bert(), tmp_path / "mine" / "mix", subspace=path).eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, ours(ids).logits)

    def test_embedded(self, path, tmp_path, theirs, ids, forgotten):
        model = several(lambda name: path / "adapters" / name, make_bert(), ["a0"])
        model.peft_config["a0"].embed_subspace = True
        model.save_pretrained(tmp_path / "mine")
        again = PeftModel.from_pretrained(make_bert(), tmp_path / "mine" / "a0").eval()
        theirs.set_adapter("a0")
        assert_same(again, theirs, ids)
        native = make_bert()
        native.load_adapter(str(tmp_path / "mine" / "a0"))
        assert_same(native.eval(), theirs, ids)


class TestFiles:
    def copied(self, path, tmp_path, change):
        folder = path / "adapters" / "a0"
        (tmp_path / "a0").mkdir()
        (tmp_path / "a0" / keys.ADAPTER_CONFIG).write_text((folder / keys.ADAPTER_CONFIG).read_text())
        tensors = load_file(folder / keys.ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / "a0" / keys.ADAPTER_WEIGHTS, metadata={"format": "pt"})
        return tmp_path / "a0"

    def test_one_that_the_config_does_not_know_is_not_passed_by(self, path, tmp_path):
        key = keys.residual_key(BERT[0], "down")
        folder = self.copied(path, tmp_path, lambda tensors: None)
        config = ex.EigenLoraxConfig.from_pretrained(str(folder), subspace=path)
        config.rests = {}
        with pytest.raises(FormatError, match=f"file has a residual of the down side of {BERT[0]}"):
            PeftModel.from_pretrained(make_bert(), folder, config=config)
        assert key in load_file(folder / keys.ADAPTER_WEIGHTS)

    def test_one_that_is_missing_is_not_taken_for_zero(self, path, tmp_path):
        folder = self.copied(path, tmp_path, lambda tensors: tensors.pop(keys.residual_key(BERT[0], "up")))
        with pytest.raises(FormatError, match=f"config has a residual of the up side of {BERT[0]}"):
            PeftModel.from_pretrained(make_bert(), folder, subspace=path)

    def test_one_of_a_module_that_the_model_lacks(self, pack):
        config = ex.EigenLoraxConfig(subspace=pack, rests={"decoder.query": ["down"]})
        with pytest.raises(ModuleNameError, match=r"a residual in 'decoder\.query'"):
            get_peft_model(make_bert(), config)
