"""Names of every module of Stable Diffusion 1.5, XL and FLUX: to each dialect, back, and as diffusers' converters read
them."""

import re
from types import SimpleNamespace

import pytest
import torch

from eigenlorax.core import adapter as adapters
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.formats.image import families, flux, layers, tensor_keys, underscored_names, unets

pytest.importorskip("diffusers")
import image_models

MODELS = {
    "sd": (image_models.stable_diffusion, "StableDiffusionLoraLoaderMixin", families.SD1),
    "xl": (image_models.stable_diffusion_xl, "StableDiffusionXLLoraLoaderMixin", families.XL),
    "flux": (image_models.flux, "FluxLoraLoaderMixin", families.FLUX),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def modules(model):
    """The shapes of the weights of a model, by its modules' names."""
    return MODELS[model][0]()


def layers_of(modules, dialect, spelling=None):
    """The layers of a file with a LoRA of rank 2 for each module: name → (modules, keys of down and up, rows)."""
    tensors = {
        name: LoRAFactors.from_weights(torch.empty(2, *rest), torch.empty(out, 2, *[1] * (len(rest) - 1)), 1.0)
        for name, (out, *rest) in modules.items()
    }
    origin = None if spelling is None else adapters.Origin(dialect, spelling)
    adapter = adapters.from_factors("all", tensors, origin=origin)
    kind = layers.naming(adapter, dialect)
    found = {}
    for stem, members in layers.layers(adapter, kind).items():
        single = len(members) == 1 and members[0][1].rows in (flux.Rows.ALL, flux.Rows.SWAPPED)
        rows = modules[members[0][0]][0] if single else sum(layers.heights(adapter, members))
        found[stem] = ([name for name, _ in members], layers.factor_keys(stem, kind), rows)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "spelling"),
    [
        *((dialect, None) for dialect in tensor_keys.DIALECTS),
        ("kohya", ()),
        ("kohya", ("first-names", "te1")),
        ("kohya", ("transformer",)),
        ("diffusers-old", ("processors",)),
        ("diffusion-model", ("transformer",)),
    ],
)
def test_there_and_back(model, modules, dialect, spelling):
    found = layers_of(modules, dialect, spelling)
    back = []
    for wanted, (down, up), _ in found.values():
        keys = tensor_keys.key(down), tensor_keys.key(up)
        assert [key.part for key in keys] == ["down", "up"]
        assert keys[0].stem == keys[1].stem
        layer = tensor_keys.layer(keys[0].stem, keys[0].style, has_flux=model == "flux")
        assert (sorted(part.module for part in layer.parts), layer.dialect) == (sorted(wanted), dialect)
        back += wanted
    assert sorted(back) == sorted(modules)


@pytest.mark.parametrize(
    ("dialect", "spelling"),
    [("kohya", None), ("diffusers", None), ("diffusers-old", None), ("diffusers-old", ("processors",))],
)
def test_diffusers_converters_agree(model, modules, dialect, spelling):
    """Each layer has a number of its own in its tensors, by which it is known when the converter is done with it."""
    import diffusers.loaders

    file, numbers = {}, {}
    for number, (wanted, (down, up), rows) in enumerate(layers_of(modules, dialect, spelling).values(), 1):
        file |= {down: torch.full((2, 3), float(number)), up: torch.ones(rows, 2)}
        if dialect == "kohya":
            file[down.replace("lora_down.weight", "alpha")] = torch.tensor(2.0)
        numbers |= dict.fromkeys(wanted, number)
    options = {} if model == "flux" else {"unet_config": SimpleNamespace(layers_per_block=2)}
    converted = getattr(diffusers.loaders, MODELS[model][1]).lora_state_dict(file, **options)
    converted = converted[0] if isinstance(converted, tuple) else converted
    found = {}
    for raw, tensor in converted.items():
        key = tensor_keys.key(raw)
        (part,) = tensor_keys.layer(key.stem, key.style, has_flux=False).parts
        if key.part == "down":
            found[part.module] = int(tensor[0, 0])
    assert found == numbers


def test_the_family_is_found(model, modules):
    assert families.families((name, shape[1]) for name, shape in modules.items()) == {MODELS[model][2]}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SD3Transformer2DModel", {"num_layers": 1}),
        ("PixArtTransformer2DModel", {"num_layers": 1}),
        ("WanTransformer3DModel", {"num_layers": 1}),
        ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1}),
        ("QwenImageTransformer2DModel", {"num_layers": 1}),
    ],
)
@pytest.mark.parametrize("part", ["", "attn", r"\.ff|_mlp"])
def test_other_transformers(name, options, part):
    """A part of their modules may have names that FLUX's have too."""
    import diffusers

    with torch.device("meta"):
        shapes = image_models.shapes(getattr(diffusers, name)(**options), "transformer")
    modules = {module: shape for module, shape in shapes.items() if re.search(part, module)}
    found = families.families((module, shape[1]) for module, shape in modules.items())
    assert families.TRANSFORMER in found
    assert part or found == {families.TRANSFORMER}
    assert layers_of(modules, "diffusers").keys() == modules.keys()


def test_stable_diffusion_1_by_its_first_names():
    """Its levels without attention have the upsampler and the resnets elsewhere than XL's."""
    pairs = {
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
        "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
    }
    for name, first in pairs.items():
        assert unets.to_first(name, xl=False) == first
        assert unets.to_diffusers(first) == name


@pytest.mark.parametrize("name", ["down_blocks_0_thing", "", "down", "_", "down_blocks_0_"])
def test_words_that_are_not_known(name):
    assert underscored_names.dotted(name) is None


def test_files_from_xlabs_trainer():
    from diffusers.loaders import FluxLoraLoaderMixin

    double, single = "double_blocks.3.processor.", "diffusion_model.single_blocks.5.processor."
    stems = {double + "qkv_lora1": 27, double + "qkv_lora2": 27, double + "proj_lora1": 9, double + "proj_lora2": 9}
    stems |= {single + "qkv_lora": 27, single + "proj_lora": 9}
    generator = torch.Generator().manual_seed(0)
    file = {f"{stem}.down.weight": torch.randn(2, 9, generator=generator) for stem in stems}
    file |= {f"{stem}.up.weight": torch.randn(rows, 2, generator=generator) for stem, rows in stems.items()}
    wanted = FluxLoraLoaderMixin.lora_state_dict(dict(file))
    found = {}
    for raw, tensor in file.items():
        key = tensor_keys.key(raw)
        for part in tensor_keys.layer(key.stem, key.style, has_flux=True).parts:
            begin, end = flux.span(part, stems[raw.rsplit(".", 2)[0]], 9)
            letter = "A" if key.part == "down" else "B"
            found[f"{part.module}.lora_{letter}.weight"] = tensor if letter == "A" else tensor[begin:end]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        # before diffusers had components in its keys
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight", "to_out.0"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "to_q"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight", "out_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight", "q_proj"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight", "to_q"),
        ("base_model.model.transformer_blocks.0.attn.to_k.lora_B.weight", "to_k"),
        ("unet.base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", "proj_in"),
        ("lora_transformer_single_transformer_blocks_3_proj_mlp.lora_down.weight", "proj_mlp"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight", "fc1"),
    ],
)
def test_keys_of_other_programs(key, module):
    found = tensor_keys.key(key)
    (part,) = tensor_keys.layer(found.stem, found.style, has_flux=False).parts
    assert part.module.endswith(f".{module}")
    assert part.module.partition(".")[0] in tensor_keys.COMPONENTS
