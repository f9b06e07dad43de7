"""What each method adds to a model: its numbers by hand, heads apart."""

import pytest
import torch

import eigenlorax as ex
import tiny
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import OptionError
from eigenlorax.train import methods
from eigenlorax.train.methods import CommonConfig
from planted import random_factors

pytestmark = pytest.mark.slow

SHAPES = {
    "bert.encoder.layer.0.attention.self.query": (tiny.IN, tiny.IN),
    "bert.encoder.layer.1.intermediate.dense": (tiny.INNER, tiny.IN),
}
K, RANK, HEAD = 9, 4, 3 * tiny.IN + 3
SIDES = sum(n_in + n_out for n_out, n_in in SHAPES.values())


@pytest.fixture(scope="module")
def pack():
    return tiny.make_pack(SHAPES, n_components=K)[0]


def applied(pack, kind, **options):
    torch.manual_seed(0)
    return methods.apply_method(kind, options, tiny.make_bert(), CommonConfig(list(SHAPES), "SEQ_CLS", pack=pack))


BY_HAND = {
    "lora": ("lora", {"r": RANK}, RANK * SIDES),
    "init": ("init", {"r": RANK}, RANK * SIDES),
    "factors": ("eigenlorax", {"r": RANK, "core": False}, len(SHAPES) * RANK * 2 * K),
    "core": ("eigenlorax", {"r": RANK, "core": True}, len(SHAPES) * K * K),
    # a number for each of r shared directions, and one for each output
    "vera": ("vera", {"r": 64}, sum(64 + n_out for n_out, _ in SHAPES.values())),
    "lora_xs": ("lora_xs", {"r": 5}, len(SHAPES) * 5 * 5),
    # a bank of vectors, and a logit for each of them wherever one is chosen
    "vblora": ("vblora", {"r": 2, "num_vectors": 7, "vector_length": 8}, 7 * 8 + 2 * 7 * SIDES // 8),
    "head": ("head", {}, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_trained_numbers_are_those_of_the_formula_and_heads_are_counted_apart_and_once(pack, name):
    kind, options, numbers = BY_HAND[name]
    model = applied(pack, kind, **options)
    assert methods.count_parameters(model) == (numbers, HEAD)


def test_all_of_a_model_is_trained(pack):
    total = sum(parameter.numel() for parameter in tiny.make_bert().parameters())
    assert methods.count_parameters(applied(pack, "full")) == (total - HEAD, HEAD)


def test_sides_that_differ():
    """Adapters with equal `down` in one module and equal `up` in the other share that side's components."""
    query, dense = SHAPES
    first, second = ({name: random_factors(2, *shape, seed=n) for name, shape in SHAPES.items()} for n in (0, 1))
    second[query] = LoRAFactors(first[query].down, second[query].up, 1.0)
    second[dense] = LoRAFactors(second[dense].down, first[dense].up, 1.0)
    pack = ex.random_pack(ex.fit([from_factors("a", first), from_factors("b", second)], n_components=K))
    assert methods.count_parameters(applied(pack, "eigenlorax", r=2, core=False)) == (2 * (2 + 4) + 2 * (4 + 2), HEAD)
    assert methods.count_parameters(applied(pack, "eigenlorax", core=True)) == (2 * 4 + 4 * 2, HEAD)


@pytest.mark.parametrize("name", sorted(set(BY_HAND) - {"vblora"}))
def test_a_model_begins_as_the_base_model_with_a_head(pack, name):
    """VB-LoRA's bank is not zero, and a random head is the same one everywhere."""
    kind, options, _ = BY_HAND[name]
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        wanted = tiny.make_bert()(ids).logits
        found = applied(pack, kind, **options).eval()(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_what_there_is_not(pack, tmp_path):
    with pytest.raises(OptionError, match="there is no method 'magic'. There are: head, full, lora"):
        applied(pack, "magic")
    with pytest.raises(OptionError, match="Pass a pack"):
        applied(None, "eigenlorax")
