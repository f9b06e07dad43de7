"""Every row of a batch as PEFT computes it with that row's adapter alone."""

import pytest
import torch

from served import BASE, KINDS, MIXED_ROWS


def assert_rows(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.fixture(params=KINDS)
def one(request, served):
    return served(request.param)


class TestAlone:
    @pytest.mark.parametrize("tokens", [1, 9, 40])
    def test_every_adapter(self, one, tokens):
        if tokens == 40 and one.kind.task == "SEQ_CLS":
            tokens = 31
        bank, inputs = one.bank(), one.inputs(3, tokens)
        for name in one.names:
            bank.set_adapter(name)
            with torch.no_grad():
                assert_rows(bank.model(**inputs).logits, one.wanted([name] * 3, inputs))

    def test_the_base_model_is_what_it_was(self, one):
        inputs = one.inputs(3)
        bank = one.bank()
        with torch.no_grad():
            wanted = one.kind.model()(**inputs).logits
            assert torch.equal(bank.model(**inputs).logits, wanted)
            bank.set_adapter("wide")
            assert not torch.allclose(bank.model(**inputs).logits, wanted)
            bank.set_adapter(None)
            assert torch.equal(bank.model(**inputs).logits, wanted)
            assert torch.equal(bank(**inputs, adapter_names=BASE).logits, wanted)


class TestMixed:
    @pytest.mark.parametrize("tokens", [2, 9, 30])
    @pytest.mark.parametrize(
        "names",
        [*MIXED_ROWS, [BASE, BASE]],
        ids=lambda names: "-".join(sorted(set(names))) if isinstance(names, list) else None,
    )
    def test_each_row_has_its_own(self, one, names, tokens):
        bank, inputs = one.bank(), one.inputs(len(names), tokens)
        with torch.no_grad():
            got = bank(**inputs, adapter_names=names).logits
            assert_rows(got, one.wanted(names, inputs))
            # what a request had does not stay
            assert torch.equal(bank.model(**inputs).logits, one.kind.model()(**inputs).logits)

    def test_sixty_four_adapters(self, served):
        one = served("llama")
        bank = one.bank()
        for number in range(64):
            bank.add(f"n{number}", one.names[number % 8])
        names = [f"n{number}" for number in range(64)]
        inputs = one.inputs(64, 5)
        with torch.no_grad():
            got = bank(**inputs, adapter_names=names).logits
        assert_rows(got, one.wanted([one.names[number % 8] for number in range(64)], inputs))

    def test_in_a_half_precision_model_coefficients_are_computed_in_float32(self, served):
        one = served("llama")
        bank, inputs = one.bank(), one.inputs(3)
        names = ["plain-a", "wide", BASE]
        with torch.no_grad():
            wanted = bank(**inputs, adapter_names=names).logits
            bank.model.to(torch.bfloat16)
            got = bank(**inputs, adapter_names=names).logits
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, atol=0.05 * wanted.abs().max().item(), rtol=0)

    def test_under_autocast(self, served):
        one = served("bert")
        bank, inputs = one.bank(), one.inputs(3)
        names = ["plain-a", "wide", BASE]
        with torch.no_grad():
            wanted = bank(**inputs, adapter_names=names).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = bank(**inputs, adapter_names=names).logits
        torch.testing.assert_close(got.float(), wanted, atol=0.05 * wanted.abs().max().item(), rtol=0)

    def test_gradients_reach_the_input(self, served):
        one = served("llama")
        bank, inputs = one.bank(), one.inputs(3)
        names = ["plain-a", "wide", BASE]
        embedded = bank.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        bank(inputs_embeds=embedded, adapter_names=names).logits.square().sum().backward()
        for row, name in enumerate(names):
            alone = embedded.detach()[row : row + 1].clone().requires_grad_()
            one.alone(name)(inputs_embeds=alone).logits.square().sum().backward()
            torch.testing.assert_close(embedded.grad[row : row + 1], alone.grad, rtol=1e-4, atol=1e-2)


class TestGeneration:
    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("kind", ["llama", "t5"])
    def test_tokens_are_those_of_each_adapter_alone(self, served, kind, beams):
        one = served(kind)
        bank = one.bank()
        names = ["plain-a", BASE, "wide", "patterned", "plain-a"]
        ids = one.inputs(len(names), 7)["input_ids"]
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        got = bank.generate(input_ids=ids, adapter_names=names, **options)
        for row, name in enumerate(names):
            mask = torch.ones_like(ids[row : row + 1])
            alone = one.alone(name).generate(input_ids=ids[row : row + 1], **{**options, "attention_mask": mask})
            assert torch.equal(got[row : row + 1], alone)

    def test_of_one_adapter(self, served):
        one = served("llama")
        bank, ids = one.bank(), one.inputs(2, 7)["input_ids"]
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        wanted = one.alone("wide").generate(input_ids=ids, **options)
        assert torch.equal(bank.generate(input_ids=ids, adapter_names="wide", **options), wanted)
        bank.set_adapter("wide")
        assert torch.equal(bank.generate(input_ids=ids, **options), wanted)
        assert torch.equal(bank.model.generate(input_ids=ids, **options), wanted)
        with bank.using("wide"):
            bank.set_adapter(None)
            assert torch.equal(bank.model.generate(input_ids=ids, **options), wanted)
