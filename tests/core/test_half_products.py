"""Products with float32 rows by blocks are those of the plain expressions, and so are their derivatives."""

import pytest
import torch

from eigenlorax.core import half_products, layer_update

K = 3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(half_products, "_MIN_BLOCK_NUMBERS", 1)


@pytest.fixture
def rows():
    return torch.randn(K, 11, generator=torch.Generator().manual_seed(1))


def numbers(*shape, dtype=torch.float64):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return tensor.to(dtype).requires_grad_()


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives(check):
    rows = numbers(2, 3).detach()
    x, output, hidden = numbers(5, 3), numbers(5, 3), numbers(5, 2)
    assert check(lambda x: half_products.project_by_blocks(x * x, rows), x)
    assert check(
        lambda output, hidden: half_products.add_product_by_blocks(output * output, hidden * hidden, rows),
        (output, hidden),
    )


def test_a_bfloat16_input_is_projected_as_in_float64(rows):
    x = numbers(2, 19, 11, dtype=torch.bfloat16)
    product = layer_update.project(x, rows)
    torch.testing.assert_close(product, (x.double() @ rows.double().mT).float())
    gradient = numbers(2, 19, K, dtype=torch.float32)
    product.backward(gradient)
    wanted = (gradient.double() @ rows.double()).bfloat16()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, wanted)


def test_a_bfloat16_output_is_rounded_once(rows):
    output, hidden = numbers(2, 19, 11, dtype=torch.bfloat16), numbers(2, 19, K, dtype=torch.float32)
    total = layer_update.add_product(output, hidden, rows)
    torch.testing.assert_close(total, (output.double() + hidden.double() @ rows.double()).bfloat16())
    gradient = numbers(2, 19, 11, dtype=torch.bfloat16)
    total.backward(gradient)
    assert torch.equal(output.grad, gradient)
    torch.testing.assert_close(hidden.grad, (gradient.double() @ rows.double().mT).float())


def test_a_basis_without_components_adds_nothing():
    none = torch.zeros(0, 11)
    x = numbers(2, 19, 11, dtype=torch.bfloat16)
    product = layer_update.project(x, none)
    assert product.shape == (2, 19, 0)
    total = layer_update.add_product(x, product, none)
    assert torch.equal(total, x)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (8, 8), (9, 5), (100, 8)])
def test_there_are_at_most_eight_blocks(n, blocks):
    slices = list(half_products._blocks(torch.empty(n, 11)))
    assert len(slices) == blocks
    assert [index for block in slices for index in range(n)[block]] == list(range(n))


def test_what_others_convert_is_left_to_them():
    x = torch.ones(2, 11, dtype=torch.bfloat16)
    assert half_products.is_by_blocks(x, torch.float32)
    assert not half_products.is_by_blocks(x, torch.bfloat16)
    assert not half_products.is_by_blocks(x.to("meta"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not half_products.is_by_blocks(x, torch.float32)
