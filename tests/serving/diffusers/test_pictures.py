"""Pictures of a pipeline with a pack's adapters are those with the LoRAs themselves."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.tuner.layer import EigenLoraxLayer
from tinypipes import picture, style, with_loras

pytestmark = pytest.mark.slow

BLENDS = [
    (["toy"], [1.0]),
    (["ink_v2"], [0.5]),
    (["clay", "toy"], [0.7, -0.4]),
    (["toy", "ink_v2", "clay"], [0.3, 0.9, 0.5]),
]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_pictures_are_those_of_the_loras(make, packs, kind):
    path, adapters = packs[kind]
    ours, plain = make(kind), make(kind)
    untouched = picture(ours)
    counts = ex.load_into(ours, path)
    with_loras(plain, [ex.from_factors(a.name.replace(".", "_"), a.modules) for a in adapters])
    assert counts.keys() == {"toy", "ink_v2", "clay"}
    assert ours.get_list_adapters().keys() == plain.get_list_adapters().keys()
    for names, weights in BLENDS:
        for pipe in (ours, plain):
            pipe.set_adapters(names, adapter_weights=weights)
        assert ours.get_active_adapters() == names
        wanted = picture(plain)
        assert (wanted - untouched).abs().max() > 0.01
        torch.testing.assert_close(picture(ours), wanted, atol=1e-4, rtol=0)


def test_a_pack_that_has_grown(make):
    ours, plain = make("sd"), make("sd")
    adapters = [style(ours, name, seed) for seed, name in enumerate(("toy", "ink", "late"))]
    pack = ex.fit(adapters[:2], energy=1.0)
    pack.add(adapters[2], extend=3)
    assert pack.records["late"].delta_error < 1e-5
    ex.load_into(ours, pack)
    with_loras(plain, adapters)
    for pipe in (ours, plain):
        pipe.set_adapters(["toy", "late"], [0.4, 0.7])
    torch.testing.assert_close(picture(ours), picture(plain), atol=1e-4, rtol=0)


def test_packs_of_one_pipeline_beside_each_other(make):
    ours, plain = make("sd"), make("sd")
    adapters = [style(ours, name, seed) for seed, name in enumerate(("toy", "ink", "clay"))]
    ex.load_into(ours, ex.fit(adapters[:2], energy=1.0))
    ex.load_into(ours, ex.fit(adapters[2:], energy=1.0))
    with_loras(plain, adapters)
    for pipe in (ours, plain):
        pipe.set_adapters(["toy", "clay"], [0.4, 0.7])
    torch.testing.assert_close(picture(ours), picture(plain), atol=1e-4, rtol=0)


def test_a_model_that_nobody_has_set_to_eval(make, packs):
    path, _ = packs["sd"]
    ours, other = make("sd"), make("sd")
    ours.unet.train()
    for pipe in (ours, other):
        ex.load_into(pipe, path)
        pipe.set_adapters(["toy", "clay"], [0.4, 0.7])
    # what is there runs, and is not trained
    layers = [one for one in ours.unet.modules() if isinstance(one, EigenLoraxLayer)]
    assert not any(layer.training for layer in layers)
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.eigenlorax_down.values())
    torch.testing.assert_close(picture(ours), picture(other), atol=1e-5, rtol=0)
