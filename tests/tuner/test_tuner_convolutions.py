"""Convolutions in the tuner: against PEFT's LoRA where that computes the same, else against dense weights."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import eigenlorax as ex
from convnets import CONVOLUTIONS, OWN_WAYS, RANK, conv_pack, images, make_convnet, random_loras, with_updates
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import ShapeError
from eigenlorax.tuner import combine, from_lora, lora_from_components, swap, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from tiny import shake

PLAIN = [name for name in (*CONVOLUTIONS, "head") if name not in OWN_WAYS]


@pytest.fixture(scope="module")
def pack_path(tmp_path_factory):
    pack, _ = conv_pack(n_components=5, energy=None)
    return pack.save(tmp_path_factory.mktemp("packs") / "conv")


def model_of(pack, base=None, **fields):
    config = ex.EigenLoraxConfig(subspace=pack, **{"r": 4, "lora_alpha": 6, **fields})
    return shake(get_peft_model(base or make_convnet(), config)).eval()


def layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, EigenLoraxLayer)
    }


def dense(model, adapter="default"):
    """The base model with each update added to its weight, in float64."""
    base = make_convnet(torch.float64)
    for name, layer in layers(model).items():
        down, up = (basis.double() for basis in layer.bases_of(adapter))
        delta = layer.scaling[adapter] * up.mT @ layer.core_of(adapter).detach().double() @ down
        weight = base.get_submodule(name).weight
        weight.data += delta.view(weight.shape)
    return base


@pytest.mark.parametrize("fields", [{}, {"core": True}, {"n_extra": 1, "extra_seed": 3}, {"embed_subspace": True}])
def test_outputs_are_those_of_the_dense_weights(pack_path, fields):
    model = model_of(pack_path, **fields)
    assert set(layers(model)) == {*CONVOLUTIONS, "head"}
    wanted = dense(model)(images(4).double())
    assert not torch.allclose(make_convnet()(images(4)).double(), wanted, atol=1e-2)
    torch.testing.assert_close(model(images(4)).double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_dense_weights(pack_path):
    model = model_of(pack_path)
    x = images(4).requires_grad_()
    model(x).square().sum().backward()
    wanted = dense(model)
    y = images(4).double().requires_grad_()
    wanted(y).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)
    for name, layer in layers(model).items():
        down, up = (basis.double() for basis in layer.bases_of("default"))
        c_down, c_up = (factor.detach().double() for factor in layer.factors_of("default"))
        of_weight = wanted.get_submodule(name).weight.grad.flatten(1)
        core = layer.scaling["default"] * up @ of_weight @ down.mT
        for found, dense_one in ((layer.eigenlorax_up, core @ c_down.mT), (layer.eigenlorax_down, c_up.mT @ core)):
            torch.testing.assert_close(found["default"].grad.double(), dense_one, atol=1e-3, rtol=1e-3)


def test_of_peft_s_lora_too(pack_path, tmp_path):
    model = model_of(pack_path, target_modules=PLAIN)
    ex.write_adapter(to_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(make_convnet(), tmp_path / "lora", is_trainable=True).eval()
    x, y = images(4).requires_grad_(), images(4).requires_grad_()
    got, wanted = model(x), lora(y)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    inner = lora.base_model.model
    for name, layer in layers(model).items():
        down, up = layer.bases_of("default")
        theirs = inner.get_submodule(name)
        grads = (theirs.lora_A["default"].weight.grad, theirs.lora_B["default"].weight.grad)
        by_a, by_b = (grad.flatten(1) for grad in grads)
        torch.testing.assert_close(layer.eigenlorax_down["default"].grad, by_a @ down.mT, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.eigenlorax_up["default"].grad, up @ by_b, atol=1e-4, rtol=1e-4)


def test_step_zero_is_the_base_model(pack_path):
    config = ex.EigenLoraxConfig(subspace=pack_path, r=4)
    assert torch.equal(get_peft_model(make_convnet(), config)(images(2)), make_convnet()(images(2)))


@pytest.mark.parametrize("safe", [False, True])
def test_merging(pack_path, safe):
    model = model_of(pack_path)
    wanted, before = model(images(3)), {name: p.clone() for name, p in model.named_parameters()}
    for name, layer in layers(model).items():
        assert layer.get_delta_weight("default").shape == make_convnet().get_submodule(name).weight.shape
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(images(3)), wanted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-6)
    whole = model.merge_and_unload()
    assert not layers(whole)
    torch.testing.assert_close(whole(images(3)), wanted, atol=1e-5, rtol=1e-5)


def test_each_row_of_a_batch_with_its_own(pack_path):
    model = model_of(pack_path)
    other, _ = conv_pack(n_components=2, energy=None)
    recipes = {
        "b": {"r": 4, "lora_alpha": 3},
        "c": {"r": 2, "core": True},
        "d": {"r": 4, "embed_subspace": True},
        "e": {"r": 2, "subspace": other},
        "f": {"r": 3, "target_modules": ["circular", "line", "head"]},
    }
    for seed, (name, fields) in enumerate(recipes.items()):
        model.add_adapter(name, ex.EigenLoraxConfig(**{"subspace": pack_path, **fields}))
        shake(model, name, seed=seed)
    model.eval()
    names = ["default", *recipes, "__base__", "b", "default", "c"]
    got = model(images(len(names)), adapter_names=names)
    for row, name in enumerate(names):
        one = images(len(names))[row : row + 1]
        if name == "__base__":
            wanted = make_convnet()(one)
        else:
            model.set_adapter(name)
            wanted = model(one)
        torch.testing.assert_close(got[row : row + 1], wanted, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_the_input(pack_path):
    model = model_of(pack_path, lora_dropout=0.5, target_modules=["circular"]).train()
    layer = layers(model)["circular"]
    x = torch.randn(3, 9, 6, 7)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got = layer(x)
        torch.manual_seed(1)
        dropped = nn.functional.dropout(x, 0.5)
    update = layer.base_layer._conv_forward(dropped, layer.get_delta_weight("default"), None)
    torch.testing.assert_close(got, layer.base_layer(x) + update, atol=1e-5, rtol=1e-5)


def test_a_half_precision_model(pack_path):
    model = model_of(pack_path, base=make_convnet(torch.bfloat16))
    assert layers(model)["strided"].eigenlorax_down["default"].dtype == torch.float32
    got = model(images(3).bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), dense(model)(images(3).double()), atol=0.05, rtol=0.05)


def test_autocast(pack_path):
    model = model_of(pack_path)
    wanted = model(images(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images(3))
        got.float().sum().backward()
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.1)


def test_the_memory_format_stays(pack_path):
    model = model_of(pack_path, target_modules=["strided"])
    layer, x = layers(model)["strided"], images(3)
    wanted = layer(x)
    layer.base_layer.to(memory_format=torch.channels_last)
    got = layer(x.to(memory_format=torch.channels_last))
    assert wanted.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_an_image_without_a_batch(pack_path):
    layer = layers(model_of(pack_path))["circular"]
    x = torch.randn(3, 9, 6, 7)
    torch.testing.assert_close(layer(x[1]), layer(x)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"core": True}, {"embed_subspace": True}])
def test_saving_and_reading(pack_path, tmp_path, fields):
    model = model_of(pack_path, **fields)
    wanted = model(images(3))
    model.save_pretrained(tmp_path / "mine")
    assert '"strided": [\n      3,\n      5\n    ]' in (tmp_path / "mine" / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(make_convnet(), tmp_path / "mine").eval()
    torch.testing.assert_close(again(images(3)), wanted, atol=0, rtol=0)
    read, lora = ex.read_adapter(tmp_path / "mine"), to_lora(model)
    assert {name: spec.kernel for name, spec in read.specs.items()} == {
        name: layer.kernel for name, layer in layers(model).items()
    }
    for name, factors in read.modules.items():
        torch.testing.assert_close(factors.up @ factors.down, lora.modules[name].up @ lora.modules[name].down)
        assert factors.kernel == lora.modules[name].kernel


def test_adapters_of_a_pack_and_back_into_it(pack_path, tmp_path):
    pack = ex.Pack.open(pack_path)
    model = PeftModel.from_pretrained(make_convnet(), pack_path / "adapters" / "a1").eval()
    wanted = with_updates(pack.adapter("a1"))
    torch.testing.assert_close(model(images(3)), wanted(images(3)), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "mine")
    assert pack.add(tmp_path / "mine", name="mine").delta_error < 1e-5
    assert pack.adapter("mine").specs["line"].kernel == (3,)


def test_a_lora_in_and_another_one_in_its_place(pack_path):
    pack = ex.Pack.open(pack_path)
    model = from_lora(make_convnet(), pack.adapter("a0"), subspace=pack_path).eval()
    for name in ("a0", "a2"):
        swap(model, pack.adapter(name))
        for module, layer in layers(model).items():
            one = pack.adapter(name).modules[module]
            wanted = (one.scaling * one.up @ one.down).view(layer.base_layer.weight.shape)
            torch.testing.assert_close(layer.get_delta_weight("default"), wanted, atol=1e-5, rtol=1e-5)


def test_combining(pack_path):
    model = model_of(pack_path)
    model.add_adapter("b", ex.EigenLoraxConfig(subspace=pack_path, r=2))
    shake(model, "b", seed=3)
    combine(model, {"default": 0.5, "b": -2.0}, "mix")
    for layer in layers(model).values():
        wanted = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("mix"), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["mean", "a1", "path", "uniform"])
def test_starts(pack_path, tmp_path, start):
    pack = ex.Pack.open(pack_path)
    if start == "path":
        start = str(ex.write_adapter(pack.adapter("a1"), tmp_path / "start"))
    model = get_peft_model(make_convnet(), ex.EigenLoraxConfig(subspace=pack_path, start=start, core=True)).eval()
    updates = [pack.adapter(name).modules["circular"] for name in pack.names]
    one = updates[1].scaling * updates[1].up @ updates[1].down
    mean = sum(u.scaling * u.up @ u.down for u in updates) / len(updates)
    found = layers(model)["circular"].get_delta_weight("default").flatten(1)
    if start == "uniform":
        assert found.abs().sum() > 0
    else:
        torch.testing.assert_close(found, mean if start == "mean" else one, atol=1e-5, rtol=1e-5)


def test_the_paper_s_init_variant(pack_path):
    model = lora_from_components(make_convnet(), pack_path, r=4, start="components", target_modules=PLAIN)
    subspace = ex.Pack.open(pack_path).subspace
    for name in PLAIN:
        layer, bases = model.base_model.model.get_submodule(name), subspace.modules[name]
        down, up = layer.lora_A["default"].weight.flatten(1), layer.lora_B["default"].weight.flatten(1).mT
        kept = min(4, bases.up.k)
        assert torch.equal(down, bases.down.components[:4])
        assert torch.equal(up[:kept], bases.up.components[:kept])


@pytest.mark.parametrize(
    ("module", "base", "why"),
    [
        ("strided", nn.ConvTranspose2d(5, 7, 3), "module strided is a ConvTranspose2d; transposed"),
        ("same", nn.Conv2d(6, 8, (2, 3), groups=2), "module same is a convolution with groups=2"),
    ],
)
def test_convolutions_that_are_not_supported_are_refused_by_name(pack_path, module, base, why):
    model = make_convnet()
    setattr(model, module, base)
    with pytest.raises(TypeError, match=f"{why}.*exclude_modules"):
        get_peft_model(model, ex.EigenLoraxConfig(subspace=pack_path, target_modules=[module, "point"], r=4))
    assert not layers(model)
    model = get_peft_model(model, ex.EigenLoraxConfig(subspace=pack_path, r=4))
    assert module not in layers(model)


def test_another_kernel_is_another_base_model(pack_path, tmp_path):
    model = model_of(pack_path, target_modules=["strided"])
    model.save_pretrained(tmp_path / "mine")
    base = make_convnet()
    base.strided = nn.Conv2d(5, 7, (5, 3))
    with pytest.raises(ShapeError, match=r"strided: the adapter has the kernel \(3, 5\), .* has \(5, 3\)"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine")
    (lora,) = random_loras(base, ["strided"], n=1)
    with pytest.raises(ShapeError, match=r"kernel of 'a0' is \(5, 3\), in the model it is \(3, 5\)"):
        swap(model, lora)
    start = ex.write_adapter(lora, tmp_path / "lora")
    with pytest.raises(ShapeError, match=r"module strided: its kernel is \(5, 3\), and \(3, 5\) in the model"):
        get_peft_model(make_convnet(), ex.EigenLoraxConfig(subspace=pack_path, start=str(start), r=4))
    wide = nn.Conv2d(5, 7, (3, 3))
    base.strided = wide
    with pytest.raises(ShapeError, match=r"module strided: \(out, in\) is \(7, 45\).*\(7, 75\)"):
        get_peft_model(base, ex.EigenLoraxConfig(subspace=pack_path, r=4))


def test_a_linear_layer_and_a_kernel_of_ones_are_one_module(pack_path):
    factors = ex.Pack.open(pack_path).adapter("a0").modules["point"]
    model = model_of(pack_path, r=RANK, target_modules=["point"])
    linear = from_factors("linear", {"point": type(factors)(factors.down, factors.up, factors.scaling)})
    assert swap(model, linear) < 1e-6
    wanted = (factors.scaling * factors.up @ factors.down)[:, :, None, None]
    torch.testing.assert_close(layers(model)["point"].get_delta_weight("default"), wanted, atol=1e-5, rtol=1e-5)


def test_patterns(pack_path):
    model = model_of(pack_path, rank_pattern={"strided": 2}, alpha_pattern={"line": 3}, fan_in_fan_out=False)
    assert layers(model)["strided"].eigenlorax_down["default"].shape == (2, 5)
    assert layers(model)["line"].scaling["default"] == pytest.approx(3 / 4)


@pytest.mark.slow
def test_compiles_as_one_graph(pack_path):
    model = model_of(pack_path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(2)), model(images(2)), atol=1e-5, rtol=1e-5)
