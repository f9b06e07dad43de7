"""Adapters of a coded pack in the tuner: against PEFT's LoRA of what the pack gives back."""

import copy

import pytest
import torch
from peft import get_peft_model

import eigenlorax as ex
from coded import SHARES, coded_pack
from convnets import conv_pack, images, make_convnet, with_updates
from eigenlorax.errors import OptionError
from eigenlorax.tuner import EigenLoraxConfig, serve, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from loaders import several
from tiny import BERT, IN, make_bert

CLOSE = {"atol": 3e-6, "rtol": 2e-5}
NAMES = ["a0", "a1", "a2"]


@pytest.fixture(scope="module", params=SHARES)
def path(request, tmp_path_factory):
    pack = coded_pack(dict.fromkeys(BERT, (IN, IN)), request.param)
    return pack.save(tmp_path_factory.mktemp("coded") / "pack")


@torch.no_grad()
def test_alone_mixed_served_and_merged(path, ids, tmp_path):
    pack = ex.Pack.open(path)
    loras = pack.export(tmp_path)
    ours = several(lambda name: path / "adapters" / name, make_bert(), NAMES)
    theirs = several(lambda name: loras[name], make_bert(), NAMES)
    served, bytes_served = copy.deepcopy(ours), copy.deepcopy(ours)
    serve(served)
    serve(bytes_served, torch.int8)
    rows = ["a0", "__base__", "a2", "a1", "a0"]
    torch.testing.assert_close(ours(ids, adapter_names=rows).logits, theirs(ids, adapter_names=rows).logits, **CLOSE)
    for names in (["a0"], ["a2", "a0"], ["a1"]):
        for model in (ours, theirs, served, bytes_served):
            model.base_model.set_adapter(names)
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, wanted, **CLOSE)
        torch.testing.assert_close(served(ids).logits, wanted, **CLOSE)
        torch.testing.assert_close(bytes_served(ids).logits, wanted, atol=2e-3, rtol=0)
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
    for module, factors in to_lora(served, "a2").modules.items():
        torch.testing.assert_close(factors.down, pack.adapter("a2").modules[module].down)


def test_training_on_no_direction_is_refused(tmp_path):
    path = coded_pack(dict.fromkeys(BERT, (IN, IN)), "nothing").save(tmp_path / "pack")
    with pytest.raises(OptionError, match=r"no component in any.*basis=32 \(--basis 32\).*purpose='training'"):
        get_peft_model(make_bert(), EigenLoraxConfig(subspace=str(path), r=2))
    model = get_peft_model(make_bert(), EigenLoraxConfig(subspace=str(path), r=2, n_extra=3))
    shapes = {parameter.shape for parameter in model.parameters() if parameter.requires_grad}
    assert {(2, 3), (3, 2)} <= shapes


def test_bases_are_used_where_adapters_share_some(tmp_path):
    """What the tests here are about: with a rest and with coefficients, or with a rest and no basis at all."""
    much, nothing = (coded_pack(dict.fromkeys(BERT, (IN, IN)), shared) for shared in ("much", "nothing"))
    assert all(sides["down"].k > 0 for sides in much.info.modules.values())
    assert all(sides["down"].k == 0 for sides in nothing.info.modules.values())
    assert any(one.has_residual for one in nothing.packed("a0").coefficients.values())


@torch.no_grad()
@pytest.mark.parametrize("max_error", [0.05, 0.6])
def test_convolutions(tmp_path, max_error):
    pack, _ = conv_pack(energy=None, max_error=max_error)
    path = pack.save(tmp_path / "pack")
    model = several(lambda name: path / "adapters" / name, make_convnet(), NAMES)
    assert any(
        layer.has_residual(name) for layer in model.modules() if isinstance(layer, EigenLoraxLayer) for name in NAMES
    )
    served = copy.deepcopy(model)
    serve(served)
    x = images(3)
    mixed = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        dense = with_updates(pack.adapter(name))
        for one in (model, served):
            one.set_adapter(name)
            torch.testing.assert_close(one(x), dense(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[row : row + 1], dense(x[row : row + 1]), atol=1e-5, rtol=1e-5)
