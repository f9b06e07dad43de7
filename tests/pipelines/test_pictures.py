"""Pictures of a pipeline with a pack's adapters are those with the LoRAs themselves."""

import pytest
import torch

import eigenlorax as ex
from tinypipes import picture, with_loras

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
