"""A compiled model is not compiled again for other styles, other weights, or none."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.errors import WrappedModelWarning
from tinypipes import picture, with_loras

pytestmark = pytest.mark.slow

FIRST = ["toy", "clay"]
LATER = [(["ink_v2"], [0.5]), (["clay", "toy", "ink_v2"], [0.2, 0.9, -0.4]), (["toy"], [1.0])]


@pytest.fixture
def plain(make, packs):
    """By kind: a pipeline with the LoRAs themselves, not compiled."""

    def made(kind):
        _, adapters = packs[kind]
        return with_loras(make(kind), [ex.from_factors(a.name.replace(".", "_"), a.modules) for a in adapters])

    return made


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_switching_blending_and_disabling(make, packs, plain, kind):
    path, _ = packs[kind]
    ours, theirs = make(kind), plain(kind)
    untouched = picture(ours)
    # one of them has a place in every layer of the pack
    ex.load_into(ours, path, FIRST)
    denoiser = getattr(ours, ours._lora_loadable_modules[0])
    denoiser.compile(backend="eager", fullgraph=True)
    ours.set_adapters(FIRST)
    picture(ours)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # nor for one that is loaded later
        ex.load_into(ours, path, "ink.v2")
        for names, weights in LATER:
            for pipe in (ours, theirs):
                pipe.set_adapters(names, weights)
            torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)
        ours.disable_lora()
        torch.testing.assert_close(picture(ours), untouched)
        ours.enable_lora()
        torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)
        ours.delete_adapters("ink_v2")
        torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)


def test_a_model_wrapped_by_torch_compile(make, packs, plain):
    path, _ = packs["flux"]
    ours, theirs = make("flux"), plain("flux")
    ours.transformer = torch.compile(ours.transformer, backend="eager")
    with pytest.warns(WrappedModelWarning, match=r"ignores it. Compile in place, pipe.transformer.compile\(\)"):
        ex.load_into(ours, path)
    picture(ours)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # diffusers does not see that it is a model with adapters
        assert ours.get_list_adapters().keys() == {"text_encoder"}
        ours.transformer.set_adapters(["toy", "clay"], [0.7, 0.2])
        ours.set_adapters(["toy", "clay"], [0.7, 0.2])
        theirs.set_adapters(["toy", "clay"], [0.7, 0.2])
        torch.testing.assert_close(picture(ours), picture(theirs), atol=1e-4, rtol=0)
