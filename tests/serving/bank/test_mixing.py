"""Mixtures of adapters for each token: as PEFT's Arrow computes them, and against dense updates in float64."""

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora import create_arrow_model

import eigenlorax as ex
from coded import SHARES, coded_pack
from convnets import conv_pack, images, make_convnet
from eigenlorax.errors import AdapterNameError, OptionError, ShapeError
from planted import of_spectrum
from served import make_llama, shapes
from tiny import BERT, IN, make_bert

NAMES = ["first", "second", "third", "fourth"]
IDS = torch.randint(3, 53, (3, 9), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Folders of LoRAs of a Llama, of one rank, with singular values that PEFT's fifteen iterations tell apart."""
    folder, modules = tmp_path_factory.mktemp("loras"), shapes(make_llama(), ("q_proj", "v_proj"))
    for number, name in enumerate(NAMES):
        factors = {
            module: of_spectrum([1.5, 0.4, 0.1], n_out, n_in, seed=100 * number + place, size=2.0)
            for place, (module, (n_out, n_in)) in enumerate(modules.items())
        }
        made = {module: ex.LoRAFactors(one.down.float(), one.up.float(), 2.0) for module, one in factors.items()}
        ex.write_adapter(ex.from_factors(name, made), folder / name, format="peft")
    return folder


def dense_mixture(model, pack, names, top, temperature):
    """The model with hooks that mix dense updates in float64, by the definition."""
    updates = {}
    for name in names:
        for module, factors in pack.adapter(name, torch.float64).modules.items():
            delta = factors.scaling * factors.up @ factors.down.flatten(1)
            updates.setdefault(module, []).append((delta, torch.linalg.svd(delta).Vh[0]))
    for module, members in updates.items():
        deltas, vectors = (torch.stack(each) for each in zip(*members, strict=True))

        def hook(_, args, output, deltas=deltas, vectors=vectors):
            x = args[0].double()
            scores = (x @ vectors.mT).abs()
            kept = scores >= scores.sort(descending=True).values[..., min(top, len(deltas)) - 1, None]
            weights = torch.where(kept, scores / temperature, -torch.inf).softmax(-1)
            return (output + torch.einsum("...e,eoi,...i->...o", weights, deltas, x)).to(output.dtype)

        model.get_submodule(module).register_forward_hook(hook)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("top", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.3), (4, 5.0)])
def test_as_pefts_arrow(loras, top, temperature):
    config = ArrowConfig(top_k=top, router_temperature=temperature, rng_seed=0)
    peft_model = create_arrow_model(make_llama(), [str(loras / name) for name in NAMES], config).eval()
    bank = ex.AdapterBank(make_llama(), ex.fit(loras, n_components=12))
    with bank.mixing(NAMES, top=top, temperature=temperature):
        mixed = bank.model(IDS).logits
    torch.testing.assert_close(mixed, peft_model(IDS).logits, atol=1e-5, rtol=0)
    assert (mixed - make_llama()(IDS).logits).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("names", [["plain-a", "wide", "narrow"], ["patterned", "scaled", "partial", "wide"]])
def test_ranks_scalings_and_modules_may_differ(served, names):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(3)
    wanted = dense_mixture(one.kind.model(), ex.Pack.open(one.pack), names, 2, 0.7)(**inputs).logits
    with bank.mixing(names, top=2, temperature=0.7):
        mixed = bank.model(**inputs).logits
    torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("share", SHARES)
def test_residuals(share):
    pack = coded_pack(dict.fromkeys(BERT, (IN, IN)), share)
    bank = ex.AdapterBank(make_bert(), pack)
    with bank.mixing(["a0", "a1", "a2"], top=2):
        mixed = bank.model(IDS).logits
    wanted = dense_mixture(make_bert(), pack, ["a0", "a1", "a2"], 2, 1.0)(IDS).logits
    torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_adapter_is_that_adapter(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(3)
    with bank.mixing("wide", top=1):
        mixed = bank.model(**inputs).logits
    torch.testing.assert_close(mixed, one.wanted(["wide"] * 3, inputs), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mixture_ends_with_its_block_and_generates(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(2)
    before = bank.model(**inputs).logits
    mixing = bank.mixing(["plain-a", "wide"], top=2)
    with mixing:
        first = bank.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    bank.remove("wide")
    with mixing:
        # it keeps the adapters that it was made with
        again = bank.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, first)
    assert torch.equal(bank.model(**inputs).logits, before)


@pytest.mark.slow
@torch.no_grad()
def test_in_a_compiled_model(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(2)
    with bank.mixing(["plain-a", "wide", "narrow"], top=2):
        wanted = bank.model(**inputs).logits
        torch.testing.assert_close(torch.compile(bank.model)(**inputs).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_of_images_are_tokens():
    pack, _ = conv_pack()
    bank, name = ex.AdapterBank(make_convnet(), pack), pack.names[0]
    with bank.mixing(name, top=1):
        mixed = bank.model(images(2))
    torch.testing.assert_close(mixed, bank(images(2), adapter_names=name), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("names", "options", "message", "error"),
    [
        (None, {"top": 0}, "at least 1", OptionError),
        (["wide", "narrow"], {"top": 3}, "number of adapters, 2; got 3", OptionError),
        (None, {"top": 1.5}, "top must be an integer", OptionError),
        (None, {"temperature": 0.0}, "above 0, got 0", OptionError),
        (None, {"temperature": float("inf")}, "finite", OptionError),
        ([], {"top": 1}, "needs adapters", OptionError),
        (["wide", "__base__"], {"top": 1}, "base model has no update", OptionError),
        (["wide", "wdie"], {"top": 1}, "Did you mean 'wide'", AdapterNameError),
    ],
)
def test_what_cannot_be_mixed_is_an_error(served, names, options, message, error):
    with pytest.raises(error, match=message):
        served("llama").bank().mixing(names, **options)


def test_shape_errors_are_those_of_other_requests():
    bank = ex.AdapterBank(make_convnet(), conv_pack()[0])
    with bank.mixing(top=1), pytest.raises(ShapeError, match="the bank serves batches"):
        bank.model(images(1)[0])
