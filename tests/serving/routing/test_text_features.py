"""Embeddings and squared cosines against dense updates in float64, one text at a time."""

import pytest
import torch

import eigenlorax as ex
import tiny
from coded import coded_pack
from eigenlorax.errors import ModuleNameError, NonFiniteError, OptionError, ShapeError
from eigenlorax.serving.routing.encoder import TextEncoder, make_encoder
from eigenlorax.serving.routing.prototypes import pack_prototypes
from planted import random_factors
from tiny import BERT, IN

TEXTS = ["one", "one two three four five", "six seven eight", "a b c d e f g h i j k l m n o p q r"]


def pack_of_unequal_modules():
    """Adapters of several ranks, one of them with half of the modules, one untrained."""
    adapters = []
    for number, modules in enumerate((BERT, BERT[:2], BERT)):
        factors = {
            module: random_factors(2 + number, IN, IN, seed=100 * number + place, dtype=torch.float32)
            for place, module in enumerate(modules)
        }
        adapters.append(ex.from_factors(f"a{number}", factors))
    zero = {module: ex.LoRAFactors(torch.ones(2, IN), torch.zeros(IN, 2), 1.0) for module in BERT}
    with pytest.warns(ex.errors.UntrainedAdapterWarning):
        return ex.fit([*adapters, ex.from_factors("zero", zero)], n_components=12)


def wanted_features(model, pack, tokenizer):
    """Mean of the last hidden states, and mean over the tokens of cos² with the first right singular vectors."""
    names, embeddings, cosines = pack.names, [], []
    for text in TEXTS:
        inputs, rows = {}, []
        handles = [
            model.get_submodule(module).register_forward_pre_hook(
                lambda _, args, module=module, inputs=inputs: inputs.update({module: args[0][0].double()})
            )
            for module in BERT
        ]
        ids = tokenizer([text], truncation=True, max_length=12)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor(ids), output_hidden_states=True).hidden_states[-1][0]
        for handle in handles:
            handle.remove()
        mean = hidden.mean(0)
        embeddings.append(mean / mean.norm())
        for module in sorted(BERT):
            x, row = inputs[module], []
            for name in names:
                adapter = pack.adapter(name, torch.float64)
                if module not in adapter.modules or not adapter.modules[module].up.any():
                    row.append(torch.tensor(0.0, dtype=torch.float64))
                    continue
                factors = adapter.modules[module]
                vector = torch.linalg.svd(factors.up @ factors.down).Vh[0]
                row.append(((x @ vector) / x.norm(dim=1)).square().mean())
            rows.append(torch.stack(row))
        cosines.append(torch.stack(rows))
    return torch.stack(embeddings), torch.stack(cosines).float()


@pytest.mark.parametrize("kind", ["unequal modules", "residuals", "residuals beside a shared basis"])
def test_as_dense_updates_and_one_text_at_a_time(kind, model, tokenizer):
    if kind == "unequal modules":
        pack = pack_of_unequal_modules()
    else:
        pack = coded_pack(dict.fromkeys(BERT, (IN, IN)), "nothing" if kind == "residuals" else "much")
    embeddings, cosines = wanted_features(model, pack, tokenizer)
    features = TextEncoder(pack, model, tokenizer).encode(TEXTS, pack_prototypes(pack, pack.names))
    torch.testing.assert_close(features.embeddings, embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.cosines, cosines, atol=1e-5, rtol=0)


def test_modules_that_an_adapter_lacks_are_known():
    pack = pack_of_unequal_modules()
    has_module = pack_prototypes(pack, ["a0", "a1", "zero"]).has_module()
    assert has_module.tolist() == [[module in each for each in (BERT, BERT[:2], ())] for module in sorted(BERT)]


def test_a_model_that_serves_a_bank_is_read_without_adapters(model, tokenizer, pack):
    prototypes = pack_prototypes(pack, pack.names)
    wanted = TextEncoder(pack, tiny.make_bert(), tokenizer).encode(TEXTS, prototypes)
    bank = ex.AdapterBank(model, pack)
    bank.set_adapter("a0")
    features = TextEncoder(pack, bank, tokenizer).encode(TEXTS, prototypes)
    assert torch.equal(features.embeddings, wanted.embeddings)
    assert torch.equal(features.cosines, wanted.cosines)
    # the same model without the bank's word has the adapter's hidden states
    changed = TextEncoder(pack, bank.model, tokenizer).encode(TEXTS, None)
    assert not torch.allclose(changed.embeddings, wanted.embeddings, atol=1e-3)


def test_the_model_stays_as_it_was(model, tokenizer, pack):
    model.train()
    TextEncoder(pack, model, tokenizer).encode(TEXTS, pack_prototypes(pack, pack.names))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_function_embeds_in_place_of_the_model(model, tokenizer, pack):
    encoder = TextEncoder(pack, model, tokenizer, lambda texts: [[3.0, 4.0]] * len(texts))
    features = encoder.encode(TEXTS, pack_prototypes(pack, pack.names))
    torch.testing.assert_close(features.embeddings, torch.tensor([[0.6, 0.8]] * 4))
    assert features.cosines.shape == (4, len(BERT), 4)


@pytest.mark.parametrize(
    ("embed", "error", "message"),
    [
        (lambda texts: [[1.0, 2.0]], ShapeError, r"expected \(4, d\)"),
        (lambda texts: [1.0] * 4, ShapeError, r"shape \(4,\)"),
        (lambda texts: [[float("nan")]] * 4, NonFiniteError, "NaN"),
    ],
)
def test_what_a_function_returns_is_checked(embed, error, message, pack):
    with pytest.raises(error, match=message):
        TextEncoder(pack, embed=embed).encode(TEXTS, None)


def test_models_that_cannot_be_read_are_errors(model, tokenizer, pack):
    with pytest.raises(OptionError, match="belong together"):
        make_encoder(pack, model, None, None)
    model.config.is_encoder_decoder = True
    with pytest.raises(OptionError, match="encoder–decoder"):
        make_encoder(pack, model, tokenizer, None)
    model.config.is_encoder_decoder = False
    with pytest.raises(OptionError, match="no token in the text"):
        make_encoder(pack, model, tokenizer, None).encode(["one", " "], None)
    with pytest.raises(OptionError, match="cannot read texts"):
        make_encoder(pack, None, None, None).encode(TEXTS, None)
    with pytest.raises(ModuleNameError, match="none of the"):
        TextEncoder(pack, tiny.make_gpt2(), tokenizer).encode(TEXTS, pack_prototypes(pack, pack.names))


@pytest.mark.parametrize("through_a_bank", [False, True])
def test_a_text_is_cut_to_the_positions_of_the_model(model, tokenizer, through_a_bank):
    tokenizer.model_max_length = 10**30
    positions = model.config.max_position_embeddings
    words = [f"word{n}" for n in range(2 * positions)]
    pack = pack_of_unequal_modules()
    given = ex.AdapterBank(model, pack) if through_a_bank else model
    long, cut = (
        TextEncoder(pack, given, tokenizer).encode([" ".join(part)], None).embeddings
        for part in (words, words[:positions])
    )
    torch.testing.assert_close(long, cut)
