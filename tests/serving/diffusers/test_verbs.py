"""What diffusers does with adapters of a pipeline is done with a pack's as with LoRAs."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import eigenlorax as ex
from tinypipes import picture, style, with_loras

pytestmark = pytest.mark.slow

PARTS = ["unet", "text_encoder"]


def as_loras(adapters):
    """With the names that they have in a pipeline."""
    return [ex.from_factors(one.name.replace(".", "_"), one.modules) for one in adapters]


@pytest.fixture
def both(make, packs):
    """A pipeline with a pack's adapters, and one with the LoRAs themselves."""
    path, adapters = packs["sd"]
    ours, plain = make("sd"), make("sd")
    ex.load_into(ours, path)
    with_loras(plain, as_loras(adapters))
    return ours, plain


def alike(ours, plain, **fields):
    """Whether both make the same picture, and which."""
    found, wanted = picture(ours, **fields), picture(plain, **fields)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    return found


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    from tinypipes import make_sd

    return picture(make_sd(tmp_path_factory.mktemp("untouched")))


def test_the_last_one_is_active(make, packs):
    path, _ = packs["sd"]
    pipe = make("sd")
    assert ex.load_into(pipe, path, ["toy", "clay"]) == {
        "toy": {"unet": 65, "text_encoder": 12},
        "clay": {"unet": 32, "text_encoder": 12},
    }
    assert pipe.get_active_adapters() == ["clay"]
    ex.load_into(pipe, path, "ink.v2")
    # of every model, though this one has nothing for the text encoder
    assert {name for layer in layers(pipe) for name in layer.active_adapters} == {"ink_v2"}
    assert pipe.get_list_adapters() == {"unet": ["toy", "clay", "ink_v2"], "text_encoder": ["toy", "clay"]}


def layers(pipe):
    return [layer for part in PARTS for layer in getattr(pipe, part).modules() if isinstance(layer, BaseTunerLayer)]


def test_disabling(both, untouched):
    ours, plain = both
    for pipe in both:
        pipe.set_adapters("toy")
        pipe.disable_lora()
    assert torch.equal(picture(ours), untouched)
    for pipe in both:
        pipe.enable_lora()
    assert not torch.equal(alike(ours, plain), untouched)


def test_what_is_disabled_stays_so(make, packs, untouched):
    path, _ = packs["sd"]
    pipe = make("sd")
    ex.load_into(pipe, path, "clay")
    pipe.disable_lora()
    # which has layers of its own
    ex.load_into(pipe, path, "toy")
    assert torch.equal(picture(pipe), untouched)
    pipe.enable_lora()
    assert not torch.equal(picture(pipe), untouched)


@pytest.mark.parametrize("scale", [0.5, 0.0, 1.0])
def test_a_scale_for_one_picture(both, scale):
    for pipe in both:
        pipe.set_adapters(["toy", "clay"], [0.8, 0.5])
    alike(*both, cross_attention_kwargs={"scale": scale})


def test_a_scale_leaves_weights_as_they_were(both):
    for pipe in both:
        pipe.set_adapters(["toy", "clay"], [0.8, 0.5])
    before = alike(*both)
    alike(*both, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(alike(*both), before, atol=1e-5, rtol=0)


def test_weights_by_block(make):
    ours, plain = make("sd"), make("sd")
    # of attention alone: diffusers has no weight for layers outside of blocks
    adapters = [style(ours, "toy", 1), style(ours, "clay", 3, rank=4)]
    ex.load_into(ours, ex.fit(adapters, energy=1.0))
    with_loras(plain, adapters)
    weights = {"unet": {"down": 0.3, "mid": 0.7, "up": {"block_1": [0.2, 0.9]}}, "text_encoder": 0.4}
    for pipe in (ours, plain):
        pipe.set_adapters(["toy", "clay"], [weights, 0.5])
    blocks = alike(ours, plain)
    ours.set_adapters(["toy", "clay"], [0.3, 0.5])
    assert (picture(ours) - blocks).abs().max() > 0.01


def test_fusing(both):
    ours, plain = both
    weights = ours.unet.conv_in.weight.clone()
    for pipe in both:
        pipe.set_adapters(["toy", "ink_v2"], [0.8, 0.5])
        pipe.fuse_lora(components=PARTS, lora_scale=0.6)
    assert ours.fused_loras == plain.fused_loras == {"toy", "ink_v2"}
    alike(*both)
    for pipe in both:
        pipe.unfuse_lora(components=PARTS)
    assert not ours.fused_loras
    torch.testing.assert_close(ours.unet.conv_in.weight, weights)
    alike(*both)
    for pipe in both:
        pipe.fuse_lora(components=["unet"], adapter_names=["clay"], safe_fusing=True)
    assert ours.fused_loras == {"clay"}
    alike(*both)


def test_fused_and_unloaded(both):
    for pipe in both:
        pipe.set_adapters(["toy", "clay"], [0.8, 0.5])
        pipe.fuse_lora(components=PARTS)
        pipe.unload_lora_weights()
    assert not layers(both[0])
    alike(*both)


def test_deleting(both, packs, untouched):
    ours, plain = both
    for pipe in both:
        pipe.set_adapters(["toy", "ink_v2"], [0.8, 0.5])
        pipe.delete_adapters("toy")
    assert ours.get_active_adapters() == plain.get_active_adapters() == ["ink_v2"]
    assert not any("toy" in name for name in ours.unet.state_dict())
    alike(*both)
    with pytest.warns(UserWarning, match="Setting active adapter to clay"):
        ours.delete_adapters(["ink_v2", "clay"])
    assert ours.get_list_adapters() == {}
    assert torch.equal(picture(ours), untouched)
    # and its bases went with the last adapter
    assert not any("basis" in name for name, _ in ours.unet.named_buffers())
    path, _ = packs["sd"]
    ex.load_into(ours, path, "clay")
    plain.set_adapters("clay")
    alike(*both)


def test_unloading(both, packs, untouched):
    ours, _ = both
    ours.unload_lora_weights()
    assert not layers(ours)
    assert ours.get_list_adapters() == {}
    assert torch.equal(picture(ours), untouched)
    assert ex.load_into(ours, packs["sd"][0], "toy") == {"toy": {"unet": 65, "text_encoder": 12}}


@pytest.mark.parametrize("first", ["lora", "pack"])
def test_ordinary_loras_beside(make, packs, first, untouched):
    path, adapters = packs["sd"]
    ours, plain = make("sd"), make("sd")
    own = style(ours, "own", 7)
    with_loras(plain, [*as_loras(adapters), own])
    if first == "lora":
        with_loras(ours, [own])
        ex.load_into(ours, path, ["toy", "ink.v2"])
        ex.load_into(ours, path, ["clay"])
    else:
        ex.load_into(ours, path, ["toy", "ink.v2"])
        with_loras(ours, [own])
        # beside those that were there before, and not around the LoRA again
        ex.load_into(ours, path, ["clay"])
    deepest = max(name.count("base_layer") for name, _ in ours.unet.named_modules())
    assert deepest == 2
    for names, weights in ((["own"], [1.0]), (["toy"], [0.5]), (["own", "clay", "ink_v2"], [0.4, 0.6, 0.2])):
        for pipe in (ours, plain):
            pipe.set_adapters(names, weights)
        alike(ours, plain)
    for pipe in (ours, plain):
        pipe.fuse_lora(components=PARTS)
    alike(ours, plain)
    for pipe in (ours, plain):
        pipe.unfuse_lora(components=PARTS)
        pipe.delete_adapters("own")
        pipe.set_adapters("toy")
    alike(ours, plain)
    ours.unload_lora_weights()
    torch.testing.assert_close(picture(ours), untouched, atol=1e-4, rtol=0)


def test_what_is_exported_loads_as_any_lora(make, packs, tmp_path):
    path, adapters = packs["sd"]
    pack = ex.Pack.open(path)
    plain, exported = make("sd"), make("sd")
    with_loras(plain, as_loras(adapters))
    with_loras(exported, [ex.from_factors(name.replace(".", "_"), pack.adapter(name).modules) for name in pack.names])
    for pipe in (plain, exported):
        pipe.set_adapters(["toy", "clay"], [0.6, 0.3])
    alike(exported, plain)


@pytest.mark.parametrize("way", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make, packs, both, way, dtype):
    ours, plain = both if way == "after" else (make("sd"), both[1])
    plain.set_adapters(["toy", "clay"], [0.8, 0.5])
    wanted = picture(plain)
    for pipe in (ours, plain):
        pipe.to(dtype)
    if way == "before":
        ex.load_into(ours, packs["sd"][0])
    ours.set_adapters(["toy", "clay"], [0.8, 0.5])
    assert picture(ours).dtype == dtype
    # what rounding does to ordinary LoRAs
    allowed = (picture(plain).float() - wanted).abs().mean()
    assert (picture(ours).float() - wanted).abs().mean() < 2 * allowed


def test_offloading_by_models(make, packs, both):
    pipe = make("sd")
    pipe.enable_model_cpu_offload(device="cpu")
    ex.load_into(pipe, packs["sd"][0])
    assert hasattr(pipe.unet, "_hf_hook")
    for one in (pipe, both[1]):
        one.set_adapters(["toy", "clay"], [0.8, 0.5])
    alike(pipe, both[1])


def test_offloading_by_groups(make, packs, both):
    pipe = make("sd")
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    ex.load_into(pipe, packs["sd"][0])
    for one in (pipe, both[1]):
        one.set_adapters(["toy", "clay"], [0.8, 0.5])
    alike(pipe, both[1])
