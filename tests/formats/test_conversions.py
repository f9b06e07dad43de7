"""One adapter through every pair of formats: the same update, or an error that names what has no place."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

import eigenlorax as ex
import gguf_models as models
import reference
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import OptionError
from eigenlorax.formats import FORMATS

TEXT = ("peft", "mlx", "gguf")
DIALECTS = tuple(name for name, each in FORMATS.items() if each.dialect is not None)
IMAGE = ("peft", *DIALECTS)
RANK = 4
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_every_format_is_converted_here():
    assert {*TEXT, *IMAGE} == {name for name, each in FORMATS.items() if each.write is not None}


def text_adapter(kind):
    """An adapter of a tiny Llama. kind: plain, several ranks and scalings, or with a LoRA of the embedding."""
    plain = models.adapter(rank=RANK)
    if kind == "mixed":
        modules = {
            name: ex.LoRAFactors(factors.down[: 2 + n % 3], factors.up[:, : 2 + n % 3], (2.0, 1.3, 0.7)[n % 3])
            for n, (name, factors) in enumerate(plain.modules.items())
        }
        return from_factors("french", modules, base_model="org/tiny-1B")
    if kind == "embedding":
        carried = {
            f"{EMBEDDING}A": models.numbers(RANK, models.VOCABULARY),
            f"{EMBEDDING}B": models.numbers(models.HIDDEN, RANK, start=7),
        }
        return replace(plain, carried=carried)
    return plain


def image_adapter(kind):
    """An adapter of Stable Diffusion 1: linear modules and convolutions of the UNet, and the text encoder."""
    shapes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": (1280, 5120),
        "text_encoder.text_model.encoder.layers.3.self_attn.v_proj": (768, 768),
    }
    draw = torch.Generator().manual_seed(3)
    modules = {}
    for n, (name, (n_out, n_in)) in enumerate(shapes.items()):
        rank = RANK if kind == "plain" else 2 + n % 3
        scaling = 0.5 if kind == "plain" else (0.5, 1.3, 0.7)[n % 3]
        down, up = torch.randn(rank, n_in, generator=draw), torch.randn(n_out, rank, generator=draw)
        modules[name] = ex.LoRAFactors(down, up, scaling)
    return from_factors("style", modules)


def converted(adapter, folder, *formats):
    """The adapter after it was written and read in each format, one after another."""
    for number, name in enumerate(formats):
        base = models.config() if name == "gguf" else None
        path = ex.write_adapter(adapter, folder / str(number) / adapter.name, format=name, base_config=base)
        adapter = ex.read_adapter(path, base_config=base)
    return adapter


@pytest.mark.parametrize(("source", "target"), list(permutations(TEXT, 2)))
@pytest.mark.parametrize("kind", ["plain", "mixed", "embedding"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_text_adapter_there_and_back(tmp_path, kind, source, target):
    adapter = text_adapter(kind)
    if kind == "embedding":
        # rank and scaling of an embedding are stated in PEFT's config alone
        config = ex.read_adapter(ex.write_adapter(models.adapter(rank=RANK), tmp_path / "config")).source_config
        adapter = replace(adapter, source_config=config)
    back = converted(adapter, tmp_path, source, target, source)
    assert reference.delta_error(adapter, back) < 1e-6
    assert back.base_model == adapter.base_model
    assert back.carried.keys() == adapter.carried.keys()
    if kind != "mixed":
        for name, factors in adapter.modules.items():
            found = back.modules[name]
            assert torch.equal(found.down, factors.down)
            assert torch.equal(found.up, factors.up)
            assert found.scaling == factors.scaling
        assert all(torch.equal(back.carried[key], tensor) for key, tensor in adapter.carried.items())


@pytest.mark.parametrize(("source", "target"), list(permutations(IMAGE, 2)))
@pytest.mark.parametrize("kind", ["plain", "mixed"])
@pytest.mark.filterwarnings("ignore::eigenlorax.errors.SourceWarning")
def test_an_image_adapter_there_and_back(tmp_path, kind, source, target):
    adapter = image_adapter(kind)
    back = converted(adapter, tmp_path, source, target, source)
    assert back.specs.keys() == adapter.specs.keys()
    assert reference.delta_error(adapter, back) < 1e-6
    if kind == "plain":
        # a scaling of 0.5 is a power of two, which multiplies without rounding
        for name, factors in adapter.modules.items():
            found = back.modules[name]
            assert torch.equal(found.down, factors.down)
            assert torch.equal(found.up * found.scaling, factors.up * factors.scaling)


@pytest.mark.parametrize("target", ["mlx", "gguf"])
@pytest.mark.parametrize("source", DIALECTS)
def test_an_image_adapter_has_no_place_in_formats_of_language_models(tmp_path, source, target):
    adapter = converted(image_adapter("plain"), tmp_path, source)
    with pytest.raises(OptionError, match=f"image model.*'{source}'.*'{target}'.*kohya, diffusers"):
        ex.write_adapter(adapter, tmp_path / "out", format=target)


@pytest.mark.parametrize("target", DIALECTS)
@pytest.mark.parametrize("source", TEXT)
def test_a_text_adapter_has_no_place_in_formats_of_image_models(tmp_path, source, target):
    adapter = converted(text_adapter("plain"), tmp_path, source)
    with pytest.raises(OptionError, match=r"image model.*'model\.layers\.0\.mlp\.down_proj'|image model.*q_proj"):
        ex.write_adapter(adapter, tmp_path / "out", format=target)


@pytest.mark.parametrize("source", ["peft", "mlx"])
def test_magnitudes_of_dora_go_where_the_format_has_them(tmp_path, source):
    plain = text_adapter("plain")
    carried = {
        f"base_model.model.{name}.lora_magnitude_vector": models.numbers(spec.out_features)
        for name, spec in plain.specs.items()
    }
    config = ex.read_adapter(ex.write_adapter(plain, tmp_path / "config")).source_config
    config = config.replace("{", '{"use_dora": true, ', 1).replace('"use_dora": false,', "")
    adapter = converted(replace(plain, carried=carried, source_config=config), tmp_path, source)
    back = converted(adapter, tmp_path / "again", "mlx", "peft", "mlx")
    assert all(torch.equal(back.carried[key], tensor) for key, tensor in carried.items())
    assert len(back.carried) == len(carried)
    with pytest.raises(OptionError, match=r"down_proj\.lora_magnitude_vector|q_proj\.lora_magnitude_vector"):
        ex.write_adapter(adapter, tmp_path / "out", format="gguf", base_config=models.config())


@pytest.mark.parametrize("target", ["mlx", "gguf"])
def test_a_weight_that_peft_saves_with_an_embedding_is_an_error_that_says_what_to_do(tmp_path, target):
    key = "base_model.model.lm_head.base_layer.weight"
    adapter = replace(text_adapter("plain"), heads={key: torch.ones(3, 2)})
    with pytest.raises(OptionError, match=rf"{key}.*save_embedding_layers=False"):
        ex.write_adapter(adapter, tmp_path / "out", format=target, base_config=models.config())


STRANGERS = {
    "gpt2": models.config("GPT2LMHeadModel", num_hidden_layers=12),
    "bert-base-uncased": None,
    "distilbert-base-uncased": None,
    "stable-diffusion-v1": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted({*TEXT, *IMAGE}))
@pytest.mark.parametrize("family", STRANGERS)
@pytest.mark.filterwarnings("ignore::eigenlorax.errors.SourceWarning")
def test_adapters_by_strangers_come_back_or_the_error_names_a_tensor(shared, tmp_path, family, target):
    base = STRANGERS[family] or models.config()
    for folder in sorted((shared / "zoo" / family).iterdir()):
        adapter = ex.read_adapter(folder, allow_pickle=True)
        path = written_or_refused(adapter, tmp_path / folder.name, target, base)
        if path is None:
            assert target != "peft"
            continue
        back = ex.read_adapter(path, base_config=base)
        # a folder of PEFT for the UNet alone has its own names
        wanted, found = (
            from_factors("a", {name.removeprefix("unet."): factors for name, factors in each.modules.items()})
            for each in (adapter, back)
        )
        # the files are in float16, and a scaling that the format lacks is multiplied into it
        assert reference.delta_error(wanted, found) < 1e-3
        assert len(back.heads) == len(adapter.heads)


def written_or_refused(adapter, path, target, base):
    """Write an adapter; None if the error names one of its tensors, or says that it is of an image model."""
    try:
        return ex.write_adapter(adapter, path, format=target, base_config=base)
    except OptionError as error:
        message = str(error)
    names = [*adapter.specs, *adapter.heads, *adapter.carried]
    assert "a LoRA of an image model" in message or any(name in message for name in names)
    return None
