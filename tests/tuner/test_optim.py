"""SOAP: against a slow oracle in float64, AdamW where nothing is rotated, and what the method is for."""

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

import eigenlorax as ex
from eigenlorax.errors import OptionError
from eigenlorax.tuner import SOAP, coefficient_groups, lora_groups
from tiny import BERT, make_bert


def gradients(shape, steps, *, seed=0):
    """One for each step, of a second moment that is far from diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mixing = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in shape]
    return [mixing[0] @ torch.randn(shape, generator=generator, dtype=torch.float64) @ mixing[1] for _ in range(steps)]


def run(parameter, given, **options):
    optimizer = SOAP([parameter], **options)
    for gradient in given:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


def oracle(start, given, *, lr, betas, eps, weight_decay, every, max_side=512):
    """The method as its paper has it, an entry at a time: a matrix is moved along pairs of eigenvectors.

    A side that is longer than `max_side` has unit vectors in their place.
    """
    first, second = betas
    weight, mean = start.clone(), torch.zeros_like(start)
    left, right = (torch.zeros(n, n, dtype=torch.float64) for n in start.shape)
    square = torch.zeros_like(start)
    for step, gradient in enumerate(given, 1):
        left = second * left + (1 - second) * gradient @ gradient.T
        right = second * right + (1 - second) * gradient.T @ gradient
        if step == 1 or step % every == 0:
            u, v = (
                torch.linalg.eigh(moment)[1] if len(moment) <= max_side else torch.eye(len(moment)).double()
                for moment in (left, right)
            )
        mean = first * mean + (1 - first) * gradient
        change = torch.zeros_like(start)
        for i in range(start.shape[0]):
            for j in range(start.shape[1]):
                pair = torch.outer(u[:, i], v[:, j])
                square[i, j] = second * square[i, j] + (1 - second) * (pair * gradient).sum() ** 2
                along = (pair * mean).sum() / (1 - first**step)
                change += along / (math.sqrt(square[i, j] / (1 - second**step)) + eps) * pair
        if step > 1:
            weight = weight * (1 - lr * weight_decay) - lr * change
    return weight


# with a longer wait, only where one gradient has all directions is there but one eigenbasis
@pytest.mark.parametrize(("shape", "every"), [((3, 5), 1), ((4, 4), 1), ((1, 6), 1), ((4, 4), 3)])
def test_is_adam_in_the_eigenbasis(shape, every):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    given = gradients(shape, 8)
    parameter = nn.Parameter(start.clone())
    run(parameter, given, precondition_frequency=every, **options)
    assert torch.allclose(parameter, oracle(start, given, every=every, **options), atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_long_side_is_not_decomposed(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "max_side": 4}
    given = gradients(shape, 8)
    parameter = nn.Parameter(start.clone())
    optimizer = run(parameter, given, precondition_frequency=1, **options)
    assert torch.allclose(parameter, oracle(start, given, every=1, **options), atol=1e-10)
    assert max(max(entry.shape) for entry in optimizer.state[parameter].values() if torch.is_tensor(entry)) == 5


def test_does_not_depend_on_the_basis():
    """Coefficients over a turned basis are the same adapter, and are trained alike; AdamW would tell them apart."""
    turned = [torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0]
              for n in (1, 2)]  # fmt: skip
    given = gradients((4, 4), 6)
    here, there = (nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2))
    run(here, given, precondition_frequency=1)
    run(there, [turned[0] @ one @ turned[1].T for one in given], precondition_frequency=1)
    assert torch.allclose(turned[0] @ here @ turned[1].T, there, atol=1e-9)
    assert here.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(7,), (10, 9), (2, 3, 2)])
def test_what_is_no_small_matrix_gets_adamw(shape):
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    given = [torch.randn(shape) for _ in range(5)]
    run(ours, given, max_side=8, **options)
    optimizer = torch.optim.AdamW([theirs], **options)
    for gradient in given:
        theirs.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("shape", "share"), [((32, 32), 1.0), ((128, 8), 1.0), ((128, 128), 0.5), ((50, 72), 0.8)])
def test_wide_cores_are_moved_by_less(shape, share):
    """Once, of a gradient that stays: every entry in the eigenbasis moves by the rate."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    run(parameter, [torch.outer(torch.ones(shape[0]), torch.ones(shape[1]))] * 2, lr=0.1)
    # the gradient is one pair of eigenvectors, of which a step is as long as the rate
    assert float(parameter.detach().norm()) == pytest.approx(0.1 * share, rel=1e-6)


def test_groups_have_rates_of_their_own():
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = SOAP([{"params": [still], "lr": 0.0}, {"params": [moved]}], lr=0.1)
    for _ in range(2):
        still.grad, moved.grad = torch.eye(2), torch.eye(2)
        optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))


TARGETS = ["query", "value"]


def names_of(model, groups):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{by_id[id(parameter)] for parameter in group["params"]} for group in groups]


class TestGroupsOfAModel:
    @pytest.mark.parametrize("core", [False, True])
    def test_are_the_coefficients_and_the_head(self, bert, bert_pack, core):
        config = ex.EigenLoraxConfig(subspace=bert_pack, r=2, core=core, task_type="SEQ_CLS")
        model = get_peft_model(bert, config)
        ours, head = names_of(model, groups := coefficient_groups(model, lr=0.03, head_lr=0.004))
        assert len(ours) == len(BERT) * (1 if core else 2)
        assert all("eigenlorax_" in name for name in ours)
        wanted = {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
        assert head == wanted
        assert [(group["lr"], group.get("max_side")) for group in groups] == [(0.03, None), (0.004, 0)]
        assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())

    def test_have_trained_biases_and_layers_beside_the_head(self, bert, bert_pack):
        config = ex.EigenLoraxConfig(subspace=bert_pack, r=2, modules_to_save=["pooler"])
        model = get_peft_model(bert, config)
        bias = model.base_model.model.bert.encoder.layer[0].output.dense.bias.requires_grad_(True)
        _, others = names_of(model, coefficient_groups(model))
        pooler = "base_model.model.bert.pooler.modules_to_save.default.dense"
        assert others == {
            f"{pooler}.weight",
            f"{pooler}.bias",
            "base_model.model.bert.encoder.layer.0.output.dense.bias",
        }
        assert bias.requires_grad

    def test_have_no_head_where_there_is_none(self, gpt2, gpt2_pack):
        model = get_peft_model(gpt2, ex.EigenLoraxConfig(subspace=gpt2_pack, r=2))
        assert len(coefficient_groups(model)) == 1

    def test_are_of_the_adapter_that_is_trained(self, bert, bert_pack):
        model = get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, r=2))
        model.add_adapter("other", ex.EigenLoraxConfig(subspace=bert_pack, r=3))
        model.set_adapter("other")
        (names,) = names_of(model, coefficient_groups(model))
        assert len(names) == 2 * len(BERT)
        assert all(name.endswith(".other") for name in names)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: make_bert(),
            lambda: get_peft_model(
                make_bert(), LoraConfig(target_modules=TARGETS, r=2, task_type="SEQ_CLS")
            ).requires_grad_(False),
        ],
        ids=["no adapter", "a frozen LoRA"],
    )
    def test_without_coefficients(self, make):
        with pytest.raises(
            OptionError, match=r"trains no coefficients: no layer has any\. get_peft_model\(model, Eigen"
        ):
            coefficient_groups(make())

    def test_of_an_adapter_that_was_loaded_to_serve(self, bert_pack, tmp_path):
        get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, r=2)).save_pretrained(tmp_path / "new")
        with pytest.raises(OptionError, match="its coefficients are frozen. Load the adapter with is_trainable=True"):
            coefficient_groups(PeftModel.from_pretrained(make_bert(), tmp_path / "new"))
        model = PeftModel.from_pretrained(make_bert(), tmp_path / "new", is_trainable=True)
        assert len(coefficient_groups(model)[0]["params"]) == 2 * len(BERT)

    @pytest.mark.parametrize(
        ("config", "kind", "part"),
        [
            (LoraConfig(target_modules=TARGETS, r=2, task_type="SEQ_CLS"), "lora", "lora_A"),
            (LoraConfig(target_modules=TARGETS, r=2, use_dora=True), "lora", "lora_A"),
            (IA3Config(target_modules=["value"], feedforward_modules=[]), "ia3", "ia3_l"),
        ],
        ids=["LoRA", "DoRA", "IA3"],
    )
    def test_of_another_kind_of_adapter(self, config, kind, part):
        with pytest.raises(OptionError, match=rf"weights of another kind of adapter \({kind}\), such as .*{part}"):
            coefficient_groups(get_peft_model(make_bert(), config))

    def test_of_two_kinds_of_adapters(self, bert, bert_pack):
        inner = get_peft_model(bert, LoraConfig(target_modules=["dense"], r=2)).base_model.model
        model = get_peft_model(inner, ex.EigenLoraxConfig(subspace=bert_pack, r=2, task_type="SEQ_CLS"))
        lora = [one for name, one in model.named_parameters() if "lora_" in name]
        for one in lora:
            one.requires_grad_(True)
        with pytest.raises(OptionError, match=rf"trains {len(lora)} weights of another kind .*requires_grad_\(False\)"):
            coefficient_groups(model)
        for one in lora:
            one.requires_grad_(False)
        assert [len(group["params"]) for group in coefficient_groups(model)] == [2 * len(BERT), 2]


class TestGroupsOfALoRA:
    @pytest.mark.parametrize("dora", [False, True])
    def test_are_the_factors_and_the_head(self, bert, dora):
        config = LoraConfig(target_modules=TARGETS, r=2, use_dora=dora, task_type="SEQ_CLS")
        model = get_peft_model(bert, config)
        factors, head = names_of(model, groups := lora_groups(model, lr=0.03, head_lr=0.004))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert factors == {name for name in trained if "lora_" in name}
        assert head == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
        assert factors | head == trained
        assert [(group["lr"], group.get("max_side")) for group in groups] == [(0.03, None), (0.004, 0)]

    def test_step_as_hand_made_ones(self, bert):
        model = get_peft_model(bert, LoraConfig(target_modules=TARGETS, r=2, task_type="SEQ_CLS"))
        copied = copy.deepcopy(model)
        factors = [p for name, p in copied.named_parameters() if "lora_" in name]
        head = [p for name, p in copied.named_parameters() if p.requires_grad and "lora_" not in name]
        by_hand = SOAP([{"params": factors, "lr": 1e-2}, {"params": head, "lr": 2e-2, "max_side": 0}])
        ids, labels = torch.arange(12).reshape(3, 4), torch.tensor([0, 1, 0])
        for network, optimizer in ((model, SOAP(lora_groups(model))), (copied, by_hand)):
            for _ in range(3):
                network.eval()(input_ids=ids, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
            assert torch.equal(ours, theirs), name

    def test_of_coefficients(self, bert, bert_pack):
        model = get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, r=2))
        with pytest.raises(OptionError, match=r"of adapter \(tuner\).*lora_groups has learning rates for LoRA"):
            lora_groups(model)

    def test_without_a_lora(self, bert):
        with pytest.raises(OptionError, match=r"no LoRA factors: no layer has any. get_peft_model\(model, LoraC"):
            lora_groups(bert)


def test_gets_down_a_narrow_valley_that_adam_does_not():
    """A quadratic whose axes are none of the coordinates'."""
    generator = torch.Generator().manual_seed(3)
    sides = [torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] for _ in range(2)]
    steep = torch.logspace(0, -3, 8)
    wanted = torch.randn(8, 8, generator=generator)

    def loss(weight):
        turned = sides[0].mT @ (weight - wanted) @ sides[1]
        return (turned.square() * torch.outer(steep, steep)).sum()

    def lowest(make):
        found = []
        for lr in (0.003, 0.01, 0.03, 0.1, 0.3):
            weight = nn.Parameter(torch.zeros(8, 8))
            optimizer = make([weight], lr)
            for _ in range(60):
                optimizer.zero_grad()
                loss(weight).backward()
                optimizer.step()
            found.append(float(loss(weight)))
        return min(found)

    ours = lowest(lambda parameters, lr: SOAP(parameters, lr=lr))
    adam = lowest(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)))
    assert ours < adam / 2


def test_goes_on_from_its_state():
    given = gradients((4, 3), 9)
    whole, halves = (nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    run(whole, given)
    first = run(halves, given[:4])
    fresh = SOAP([halves])
    fresh.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in given[4:]:
        halves.grad = gradient.float()
        fresh.step()
    assert torch.equal(whole, halves)


@pytest.mark.parametrize("gradient", [torch.zeros(3, 3), torch.full((3, 3), 1e-30), torch.full((3, 3), math.nan)])
def test_takes_any_gradient(gradient):
    """What is no number goes into the weights, where the Trainer finds it; nothing fails on the way."""
    parameter = nn.Parameter(torch.zeros(3, 3))
    run(parameter, [gradient] * 6)
    assert torch.isfinite(parameter).all() == torch.isfinite(gradient).all()


def test_the_closure_gives_the_loss():
    parameter = nn.Parameter(torch.ones(2, 2))

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer = SOAP([parameter])
    assert float(optimizer.step(closure)) == 4.0
    assert parameter.grad is not None


def test_parameters_without_gradients_stay():
    parameter = nn.Parameter(torch.ones(2, 2))
    SOAP([parameter]).step()
    assert torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"eps": math.nan}, "eps must be"),
        ({"weight_decay": "much"}, "weight_decay must be a number"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"precondition_frequency": 0}, "precondition_frequency must be at least 1, got 0"),
        ({"max_side": 2.5}, "max_side must be an integer, got 2.5"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        SOAP([nn.Parameter(torch.ones(2, 2))], **options)
