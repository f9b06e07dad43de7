"""Styles with a residual, in a pipeline: pictures are those of the LoRAs that they are."""

from itertools import pairwise

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core import int8_rows
from eigenlorax.tuner.layer import EigenLoraxLayer
from rests import with_rests
from tinypipes import picture, style, with_loras

pytestmark = pytest.mark.slow

SIDES = {"toy": ["both"], "clay": ["none", "down", "up"]}
PARTS = ["unet", "text_encoder"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Three styles for a Stable Diffusion: one with residuals everywhere, one here and there, one without."""
    from tinypipes import make_sd

    pipe = make_sd(tmp_path_factory.mktemp("sd"))
    adapters = [
        style(pipe, "toy", 1, size=0.15),
        style(pipe, "ink", 2, rank=2, parts=["unet"], size=0.15),
        style(pipe, "clay", 3, rank=4, size=0.15),
    ]
    return with_rests(ex.fit(adapters, n_components=5, warn_above=1.0), SIDES)


@pytest.fixture
def both(make, pack):
    ours, plain = make("sd"), make("sd")
    ex.load_into(ours, pack)
    with_loras(plain, [pack.adapter(name) for name in pack.names])
    return ours, plain


def alike(ours, plain, **fields):
    found, wanted = picture(ours, **fields), picture(plain, **fields)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    return found


def layers(pipe):
    parts = [getattr(pipe, part) for part in PARTS]
    return [one for part in parts for one in part.modules() if isinstance(one, EigenLoraxLayer)]


def test_single_and_blended(both):
    seen = []
    for names, weights in (
        (["toy"], [1.0]),
        (["ink"], [0.5]),
        (["clay", "toy"], [0.7, -0.4]),
        (["toy", "ink", "clay"], [0.3, 0.9, 0.5]),
    ):
        for pipe in both:
            pipe.set_adapters(names, adapter_weights=weights)
        seen.append(alike(*both))
    assert min((one - other).abs().max() for one, other in pairwise(seen)) > 0.01


def test_by_block_scaled_and_fused(both):
    weights = {"unet": {"down": 0.3, "mid": 0.7, "up": {"block_1": [0.2, 0.9]}}, "text_encoder": 0.4}
    for pipe in both:
        pipe.set_adapters(["toy", "clay"], [weights, 0.5])
    alike(*both)
    alike(*both, cross_attention_kwargs={"scale": 0.5})
    for pipe in both:
        pipe.fuse_lora(components=PARTS, lora_scale=0.6)
    alike(*both)
    for pipe in both:
        pipe.unfuse_lora(components=PARTS)
    alike(*both)


def test_disabled_deleted_and_unloaded(both, make):
    ours, _ = both
    untouched = picture(make("sd"))
    for pipe in both:
        pipe.set_adapters(["toy", "ink"])
        pipe.delete_adapters("toy")
    alike(*both)
    ours.disable_lora()
    assert torch.equal(picture(ours), untouched)
    ours.unload_lora_weights()
    assert torch.equal(picture(ours), untouched)


def test_switching_in_a_compiled_model(both):
    ours, _ = both
    ours.unet.compile(backend="eager", fullgraph=True)
    # there is room for as many residuals as are blended the first time
    ours.set_adapters(["toy", "clay"])
    picture(ours)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names, weights in ((["ink"], [0.5]), (["clay", "toy", "ink"], [0.2, 0.9, -0.4]), (["toy"], [1.0])):
            for pipe in both:
                pipe.set_adapters(names, weights)
            alike(*both)


def test_in_half_precision_a_rest_is_as_large_as_a_lora(make, pack):
    pipe = make("sd")
    pipe.unet.to(torch.float16)
    ex.load_into(pipe.unet, pack, ["toy"])
    ex.load_into(pipe.unet, pack, ["clay"], dtype=torch.float32)
    for name, dtype in (("toy", torch.float16), ("clay", torch.float32)):
        residuals = [residual for layer in layers(pipe) for residual in layer.residuals_of(name)]
        assert {residual.dtype for residual in residuals if residual is not None} == {dtype}


def test_of_a_coded_pack(make):
    ours, plain = make("sd"), make("sd")
    adapters = [style(ours, "toy", 1, convolutions=True), style(ours, "clay", 3, rank=4)]
    pack = ex.fit(adapters, max_error=0.3)
    ex.load_into(ours, pack)
    with_loras(plain, [pack.adapter(name) for name in pack.names])
    assert any(layer.has_residual("toy") for layer in layers(ours))
    for names, weights in ((["toy"], [1.0]), (["clay", "toy"], [0.7, -0.4])):
        for pipe in (ours, plain):
            pipe.set_adapters(names, adapter_weights=weights)
        alike(ours, plain)


@pytest.mark.parametrize("dtype", ["int8", torch.int8])
def test_bases_in_8_bits(make, pack, dtype):
    ours, floats = make("sd"), make("sd")
    ex.load_into(ours, pack, dtype=dtype)
    ex.load_into(floats, pack)
    for layer in layers(floats):
        for bases in (layer.eigenlorax_basis_down, layer.eigenlorax_basis_up):
            for key in list(bases):
                bases[key] = int8_rows.quantise_rows(bases[key]).dequantise(torch.float32)
    for layer in layers(ours):
        assert {basis.dtype for basis in layer.eigenlorax_basis_up.values()} == {torch.int8}
    for pipe in (ours, floats):
        # what is active and has a residual is filled anew with the rounded bases
        pipe.set_adapters("ink")
        pipe.set_adapters(["toy", "ink"], [0.4, 0.7])
    torch.testing.assert_close(picture(ours), picture(floats), atol=1e-4, rtol=0)


def test_a_pack_whose_bytes_were_chosen(make):
    """Adapters of directions of their own: most of each is a residual, and most bases have no row."""
    ours, plain = make("sd"), make("sd")
    adapters = [style(plain, "toy", 1, size=0.15), style(plain, "ink", 2, rank=2, parts=["unet"], size=0.15)]
    pack = ex.fit(adapters, max_error=0.2, warn_above=1.0)
    ex.load_into(ours, pack)
    with_loras(plain, [pack.adapter(name) for name in pack.names])
    for names, weights in ((["toy"], [1.0]), (["ink", "toy"], [0.5, 0.7])):
        for pipe in (ours, plain):
            pipe.set_adapters(names, adapter_weights=weights)
        alike(ours, plain)
