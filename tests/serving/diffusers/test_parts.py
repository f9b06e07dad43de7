"""Where modules of a pack go: which model of a pipeline, by whole names."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.errors import ModuleNameError
from tinypipes import picture, style, with_loras


def renamed(adapter, change):
    """The same LoRA with other names for its modules."""
    return ex.from_factors(adapter.name, {change(name): factors for name, factors in adapter.modules.items()})


def test_two_text_encoders_have_layers_of_the_same_names(make):
    ours = make("sdxl")
    second = style(ours, "toy", 1, parts=["text_encoder_2"])
    # the first has a layer of the same name and of another shape
    assert ex.load_into(ours, ex.fit([second], energy=1.0)) == {"toy": {"text_encoder_2": 12}}
    assert not hasattr(ours.text_encoder, "peft_config")


def test_each_text_encoder_gets_its_own(make):
    ours, plain = make("sdxl"), make("sdxl")
    adapters = [style(ours, "toy", 1, parts=["text_encoder", "text_encoder_2"])]
    ex.load_into(ours, ex.fit(adapters, energy=1.0))
    with_loras(plain, adapters)
    torch.testing.assert_close(picture(ours), picture(plain), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_names_without_a_model_are_the_denoisers(make, kind):
    ours = make(kind)
    denoiser = ours._lora_loadable_modules[0]
    adapter = renamed(style(ours, "toy", 1, parts=[denoiser]), lambda name: name.removeprefix(f"{denoiser}."))
    (counts,) = ex.load_into(ours, ex.fit([adapter], energy=1.0)).values()
    assert counts.keys() == {denoiser}


@pytest.mark.parametrize("named", [True, False])
def test_one_model_in_place_of_its_pipeline(make, named):
    ours, plain = make("sd"), make("sd")
    adapter = style(ours, "toy", 1, parts=["unet"])
    given = adapter if named else renamed(adapter, lambda name: name.removeprefix("unet."))
    loaded = ex.load_into(ours.unet, ex.fit([given], energy=1.0))
    assert loaded == {"toy": {"unet" if named else "UNet2DConditionModel": 32}}
    with_loras(plain, [adapter])
    torch.testing.assert_close(picture(ours), picture(plain), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_one_model_takes_its_own_part_of_a_style(make, packs):
    path, _ = packs["sd"]
    ours = make("sd")
    assert ex.load_into(ours.unet, path, "toy") == {"toy": {"unet": 65}}
    assert ex.load_into(ours.text_encoder, path, "toy") == {"toy": {"text_encoder": 12}}
    assert ours.get_list_adapters() == {"unet": ["toy"], "text_encoder": ["toy"]}
    with pytest.raises(ModuleNameError, match="adapter 'ink.v2' has no module of this CLIPTextModel"):
        ex.load_into(ours.text_encoder, path, ["clay", "ink.v2"])


def test_one_of_two_text_encoders_is_not_told_from_the_other(make, packs):
    path, _ = packs["sdxl"]
    ours = make("sdxl")
    with pytest.raises(ModuleNameError, match="could be the text_encoder or the text_encoder_2 of the pack.*load_into"):
        ex.load_into(ours.text_encoder_2, path)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_names_of_either_transformers(make, kind):
    ours, plain = make(kind), make(kind)
    parts = [part for part in ours._lora_loadable_modules if part.startswith("text_encoder")]
    old = style(ours, "toy", 1, parts=parts)
    new = renamed(old, lambda name: name.replace("text_model.", ""))
    for pipe, adapter in ((ours, new), (plain, old)):
        ex.load_into(pipe, ex.fit([adapter], energy=1.0))
    torch.testing.assert_close(picture(ours), picture(plain), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
def test_both_names_of_one_layer_in_one_pack(make):
    ours, plain = make("sd"), make("sd")
    adapters = [style(ours, "old", 1, parts=["text_encoder"]), style(ours, "new", 2, parts=["text_encoder"])]
    pack = ex.fit([adapters[0], renamed(adapters[1], lambda name: name.replace("text_model.", ""))], energy=1.0)
    # one after the other: neither may be taken to be on the other's bases
    assert ex.load_into(ours, pack, "old") | ex.load_into(ours, pack, "new") == {
        "old": {"text_encoder": 12},
        "new": {"text_encoder": 12},
    }
    with_loras(plain, adapters)
    for names in (["old"], ["new"], ["old", "new"]):
        for pipe in (ours, plain):
            pipe.set_adapters(names)
        torch.testing.assert_close(picture(ours), picture(plain), atol=1e-4, rtol=0)
