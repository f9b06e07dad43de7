"""What `load_into` refuses, in sentences, before a layer is touched."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import AdapterNameError, MissingPartWarning, ModuleNameError, OptionError, ShapeError
from planted import normal
from tinypipes import picture, style

pytestmark = pytest.mark.slow


def untouched(pipe):
    """Whether no model of a pipeline has anything of an adapter."""
    models = [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return not layers and not any(hasattr(model, "peft_config") for model in models)


@pytest.fixture
def pipe(make):
    return make("sd")


@pytest.fixture
def small(pipe):
    """A pack in memory, of one style."""
    return ex.fit([style(pipe, "toy", 1)], energy=1.0)


@pytest.mark.parametrize("reversed_", [False, True])
def test_another_base_model(make, packs, pipe, reversed_):
    path, _ = packs["sd" if reversed_ else "sdxl"]
    other = make("sdxl") if reversed_ else pipe
    with pytest.raises(ShapeError, match=r"^\S+: \(out, in\) is \(\d+, \d+\) in this \w+ and \(\d+, \d+\) in the pack"):
        ex.load_into(other, path)
    assert untouched(other)


def test_a_wider_context(make, packs):
    wide = make("sd", cross=22)
    with pytest.raises(ShapeError, match=r"text_encoder\.\S+: \(out, in\) is \(\d+, 2\d\).*another base model"):
        ex.load_into(wide, packs["sd"][0])
    assert untouched(wide)


def test_another_kernel_of_as_many_numbers(pipe):
    conv = pipe.unet.conv_in
    down, up = normal(3, conv.in_channels * 9, seed=1).float(), normal(conv.out_channels, 3, seed=2).float()
    factors = LoRAFactors(down, up, 1.0, kernel=(9, 1))
    pack = ex.fit([ex.from_factors("a", {"unet.conv_in": factors})], energy=1.0)
    with pytest.raises(ShapeError, match=r"unet.conv_in: the kernel is \(3, 3\) in this .* and \(9, 1\) in the pack"):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_a_pack_with_nothing_for_the_pipeline(pipe, packs):
    with pytest.raises(ModuleNameError, match=r"transformer\..* more are not in this StableDiffusionPipeline, which"):
        ex.load_into(pipe, packs["flux"][0])
    assert untouched(pipe)


def test_a_module_that_is_no_layer(pipe):
    factors = LoRAFactors(normal(3, 8, seed=1).float(), normal(8, 3, seed=2).float(), 1.0)
    pack = ex.fit([ex.from_factors("a", {"unet.conv_norm_out": factors})], energy=1.0)
    with pytest.raises(
        ModuleNameError, match="unet.conv_norm_out is a GroupNorm in this .*, which cannot have an adapter"
    ):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_tensors_that_coefficients_cannot_express(pipe):
    toy = style(pipe, "toy", 1)
    carried = {"base_model.model.unet.conv_in.lora_magnitude_vector": torch.ones(8)}
    dora = ex.from_factors("dora", style(pipe, "dora", 2).modules, carried=carried)
    pack = ex.fit([toy, dora], energy=1.0)
    with pytest.raises(
        OptionError,
        match=r"'dora' has .* 'base_model.*magnitude_vector.*export .* dora -o .*--format diffusers",
    ):
        ex.load_into(pipe, pack)
    assert untouched(pipe)
    assert ex.load_into(pipe, pack, "toy").keys() == {"toy"}


def test_heads(pipe):
    toy = style(pipe, "toy", 1)
    headed = ex.from_factors("headed", toy.modules, heads={"base_model.model.classifier.bias": torch.ones(3)})
    with pytest.raises(OptionError, match=r"'headed' has its own heads.*classifier.bias.*AdapterBank\(model, pack\)"):
        ex.load_into(pipe, ex.fit([headed], energy=1.0))
    assert untouched(pipe)


def test_names(pipe, small, packs):
    path, _ = packs["sd"]
    with pytest.raises(
        AdapterNameError, match="no adapter named 'tyo' in the pack. Did you mean 'toy'. It has: clay, ink.v2, toy"
    ):
        ex.load_into(pipe, path, ["toy", "tyo"])
    with pytest.raises(AdapterNameError, match="no adapter named 'tyo' in the pack. Did you mean 'toy'. It has: toy"):
        ex.load_into(pipe, small, ["tyo"])
    with pytest.raises(OptionError, match="names is empty"):
        ex.load_into(pipe, path, [])
    assert untouched(pipe)


def test_names_that_would_be_one(pipe):
    pack = ex.fit([style(pipe, "ink.v2", 1), style(pipe, "ink_v2", 2)], energy=1.0)
    with pytest.raises(AdapterNameError, match="'ink.v2' and 'ink_v2' would both be 'ink_v2'"):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_names_that_are_taken(pipe, small):
    ex.load_into(pipe, small)
    with pytest.raises(
        AdapterNameError, match=r"already has an adapter 'toy'. Remove it with pipe.delete_adapters\('toy'\)"
    ):
        ex.load_into(pipe, small)
    pipe.delete_adapters("toy")
    assert ex.load_into(pipe, small).keys() == {"toy"}


def test_names_that_torch_has(pipe):
    pack = ex.fit([style(pipe, "values", 1)], energy=1.0)
    with pytest.raises(AdapterNameError, match="'values' cannot be the name of an adapter in a pipeline"):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_fused_adapters(pipe, packs):
    path, _ = packs["sd"]
    ex.load_into(pipe, path, "toy")
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(OptionError, match=r"fused into the pipeline: toy. Call pipe.unfuse_lora\(\) first"):
        ex.load_into(pipe, path, "clay")
    pipe.unfuse_lora(components=["unet"])
    ex.load_into(pipe, path, "clay")


def test_weights_that_are_elsewhere(pipe, small):
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(OptionError, match="has no weight in memory, .* Use enable_model_cpu_offload"):
        ex.load_into(pipe, small)
    assert untouched(pipe)


def test_what_is_no_pipeline(small):
    with pytest.raises(OptionError, match="dict is neither a pipeline of diffusers .* nor a model"):
        ex.load_into({}, small)


def test_a_pipeline_without_its_text_encoder(pipe, packs):
    path, _ = packs["sd"]
    pipe.text_encoder = None
    with pytest.warns(
        MissingPartWarning, match="was created without text_encoder: 12 modules of the adapters are ignored"
    ):
        counts = ex.load_into(pipe, path, ["toy", "ink.v2"])
    assert [*counts["toy"]] == ["unet"]


def test_an_adapter_of_the_missing_text_encoder_alone(pipe):
    pack = ex.fit([style(pipe, "words", 1, parts=["text_encoder"])], energy=1.0)
    pipe.text_encoder = None
    with pytest.raises(ModuleNameError, match="adapter 'words' has no module of this StableDiffusionPipeline: its 12"):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_saving_from_the_pipeline(pipe, small, tmp_path):
    ex.load_into(pipe, small)
    with pytest.raises(
        OptionError, match="'toy' was loaded from a pack for inference, .*`eigenlorax export` writes a LoRA"
    ):
        pipe.unet.save_lora_adapter(tmp_path / "lora", adapter_name="toy")
    assert not (tmp_path / "lora").exists()


def test_nothing_is_drawn_at_random(pipe, small):
    before = torch.get_rng_state()
    ex.load_into(pipe, small)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.isfinite(picture(pipe)).all()


def test_two_modules_that_are_one_layer(pipe):
    first = style(pipe, "toy", 1, parts=["text_encoder"])
    both = {**first.modules, **{name.replace("text_model.", ""): one for name, one in first.modules.items()}}
    pack = ex.fit([ex.from_factors("toy", both)], energy=1.0)
    with pytest.raises(ModuleNameError, match="of adapter 'toy' are both the layer text_encoder.encoder.layers.0"):
        ex.load_into(pipe, pack)
    assert untouched(pipe)


def test_a_dtype_that_bases_cannot_have(pipe, small):
    with pytest.raises(OptionError, match="int16"):
        ex.load_into(pipe, small, dtype=torch.int16)
    assert untouched(pipe)
    ex.load_into(pipe, small, dtype="bfloat16")
    assert pipe.unet.conv_in.weight.dtype == torch.float32
    assert {one.dtype for name, one in pipe.unet.named_buffers() if "_basis_" in name} == {torch.bfloat16}
