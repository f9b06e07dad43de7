import math

import pytest
import torch

import planted
from eigenlorax.core import linalg
from planted import assert_same_span, decaying_rows, normal, orthonormal


def keep(k):
    return lambda sigma, shape: min(k, linalg.numerical_rank(sigma, shape))


def identity(blocks):
    return [torch.eye(block.shape[0], dtype=torch.float64) for block in blocks]


@pytest.mark.parametrize(("sizes", "d"), [((3, 4, 5), 31), ((9, 13, 11), 17)], ids=["wide", "tall"])
def test_leading_directions_are_those_of_a_dense_svd(sizes, d):
    blocks = [normal(size, d, seed=size) for size in sizes]
    weights = [normal(size, size, seed=100 + size) for size in sizes]
    weighted = torch.cat([w @ b for w, b in zip(weights, blocks, strict=True)])
    _, sigma, right = torch.linalg.svd(weighted, full_matrices=False)
    stack = linalg.RowBlocks.stack(blocks)
    leading = stack.leading(weights, keep(4))
    torch.testing.assert_close(leading.singular_values[: len(sigma)], sigma, rtol=1e-6, atol=1e-9)
    assert_same_span(leading.components(), right[:4])
    projection = stack.rows @ leading.components().mT
    torch.testing.assert_close(leading.projection.abs(), projection.abs(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("decades", [4, 6, 9])
def test_directions_that_a_gram_matrix_cannot_resolve_are_found_all_the_same(decades):
    n, d = 12, 29
    rows = decaying_rows(n, d, decades, seed=3)
    leading = linalg.RowBlocks.stack([rows]).leading(identity([rows]), keep(n))
    components = leading.components()
    assert components.shape == (n, d)
    torch.testing.assert_close(components @ components.mT, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    lost = torch.linalg.vector_norm(rows - rows @ components.mT @ components, dim=1)
    assert float((lost / torch.linalg.vector_norm(rows, dim=1)).max()) < 1e-11


def test_no_direction_is_invented_beyond_the_rank():
    rank, n, d = 4, 15, 23
    rows = normal(n, rank, seed=1) @ normal(rank, d, seed=2)
    leading = linalg.RowBlocks.stack([rows]).leading(identity([rows]), keep(n))
    assert leading.k == rank
    assert_same_span(leading.components(), torch.linalg.svd(rows)[2][:rank])


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
def test_size_of_the_rows_does_not_matter(size):
    rows = decaying_rows(7, 19, 4, seed=5)
    small = linalg.RowBlocks.stack([rows * size]).leading(identity([rows]), keep(5)).components()
    torch.testing.assert_close(
        small, linalg.RowBlocks.stack([rows]).leading(identity([rows]), keep(5)).components(), atol=1e-9, rtol=0
    )


def test_signs_are_fixed():
    rows = orthonormal(4, 9, seed=2)
    flipped = rows * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(linalg.orthonormal_rows(flipped), linalg.orthonormal_rows(rows))
    fixed = linalg.orthonormal_rows(rows)
    assert bool((fixed.gather(1, fixed.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_complement_is_orthonormal_and_orthogonal_even_to_rounded_components():
    components = orthonormal(6, 20, seed=4).half().double()
    extra = linalg.orthogonal_complement_rows(normal(9, 20, seed=5), components)
    torch.testing.assert_close(extra @ extra.mT, torch.eye(9, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float((extra @ components.mT).abs().max()) < 1e-12


def test_dual_rows_give_least_squares_coordinates():
    components, x = normal(4, 13, seed=6), normal(3, 13, seed=7)
    wanted = torch.linalg.lstsq(components.mT, x.mT).solution.mT
    torch.testing.assert_close(x @ linalg.dual_rows(components).mT, wanted)


STACKS = {
    "well-conditioned": [decaying_rows(4, 13, 1, seed=seed) for seed in (3, 4)],
    "ill-conditioned": [decaying_rows(4, 13, 5, seed=seed) for seed in (3, 4)],
    "for a QR decomposition": [decaying_rows(4, 13, 9, seed=seed) for seed in (3, 4)],
    "more rows than columns": [normal(5, 3, seed=seed) for seed in (3, 4)],
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_triangular_rows_multiply_back(stack):
    stack = torch.stack(stack)
    left, rows = linalg.triangular_rows(stack)
    torch.testing.assert_close(left @ rows, stack, atol=1e-13, rtol=1e-9)
    identity = torch.eye(rows.shape[1], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(rows @ rows.mT, identity, atol=1e-13, rtol=0)


def test_triangular_rows_do_not_depend_on_the_rest_of_the_stack():
    well, ill = decaying_rows(4, 13, 1, seed=3), decaying_rows(4, 13, 9, seed=4)
    together = linalg.triangular_rows(torch.stack([well, ill, well]))
    for index, matrix in enumerate((well, ill, well)):
        for stacked, alone in zip(together, linalg.triangular_rows(matrix[None]), strict=True):
            assert torch.equal(stacked[index], alone[0])


def test_triangular_rows_of_zero_rows():
    stack = torch.stack([normal(3, 11, seed=1), torch.cat([normal(2, 11, seed=2), torch.zeros(1, 11)])])
    left, rows = linalg.triangular_rows(stack)
    torch.testing.assert_close(left @ rows, stack)


def test_nearly_orthonormal_rows_keep_their_order():
    rows = orthonormal(4, 17, seed=9) + 1e-3 * normal(4, 17, seed=10)
    made = linalg.orthonormalised(rows)
    torch.testing.assert_close(made @ made.mT, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        made, linalg.orthonormal_rows(rows) * (made * linalg.orthonormal_rows(rows)).sum(1).sign()[:, None]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_singular_gram_matrix_is_its_pseudoinverse(dtype):
    rows = normal(3, 9, seed=11)
    for stack in (rows, torch.cat([rows, rows[:1]])):
        inverse = linalg.symmetric_inverse((stack.to(dtype) @ stack.to(dtype).mT).double())
        expected = torch.linalg.pinv(stack @ stack.mT, rtol=1e-6, hermitian=True)
        torch.testing.assert_close(inverse, expected, rtol=1e-4, atol=1e-5)
    assert linalg.symmetric_inverse(torch.zeros(0, 0, dtype=torch.float64)).shape == (0, 0)


def test_root_squares_to_its_gram_matrix_also_when_it_is_singular():
    rows = normal(5, 3, seed=8)
    gram = rows @ rows.mT
    root = linalg.psd_root(gram)
    torch.testing.assert_close(root @ root, gram)


def test_difference_of_products_keeps_its_digits():
    left, right = normal(21, 4, seed=1), normal(4, 33, seed=2)
    step_left, step_right = 1e-9 * normal(21, 4, seed=3), 1e-9 * normal(4, 33, seed=4)
    # the dense difference, expanded so that the oracle itself does not cancel
    wanted = (step_left @ right + (left + step_left) @ step_right).square().sum()
    found = linalg.difference_square(left, right, left + step_left, right + step_right)
    assert found == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one pair", "several"])
def test_difference_of_products_keeps_its_digits_in_an_ill_conditioned_gauge(batch):
    """B·G and G⁻¹·A have entries up to 1e8 times those of B·A, whose digits squares of them lose."""
    left, right, other_left, other_right = (
        normal(*batch, *shape, seed=seed) for seed, shape in enumerate([(11, 4), (4, 13), (11, 4), (4, 13)])
    )
    rotation, other_rotation = (torch.linalg.qr(normal(4, 4, seed=seed)).Q for seed in (7, 8))
    gauge = rotation * torch.logspace(0, -8, 4, dtype=torch.float64) @ other_rotation
    factors = left @ gauge, torch.linalg.solve(gauge, right)
    found = linalg.difference_square(*factors, other_left, other_right)
    dense = (factors[0] @ factors[1] - other_left @ other_right).square().sum((-2, -1))
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0)
    # of an update and itself nothing is left
    assert float(linalg.difference_square(*factors, *factors).max()) == 0


def test_product_square_is_the_dense_norm():
    left, right = normal(21, 4, seed=1), normal(4, 33, seed=2)
    assert linalg.product_square(left, right) == pytest.approx(float((left @ right).square().sum()), rel=1e-12)


def test_planted_rows_have_the_decay_they_say():
    sigma = torch.linalg.svdvals(planted.decaying_rows(6, 11, 4, seed=1))
    assert float(sigma[0] / sigma[-1]) == pytest.approx(1e4, rel=1e-9)


@pytest.mark.parametrize("n", [1, 127, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_product_is_that_of_all_pairs_of_rows(n, dtype):
    rows = normal(n, 17, seed=n).to(dtype)
    product = linalg.symmetric_product(rows)
    torch.testing.assert_close(product, rows @ rows.mT)
    assert torch.equal(product, product.mT)


def test_graded_root_has_the_digits_of_rows_that_differ_by_many_decades():
    sizes = torch.logspace(0, -12, 5, dtype=torch.float64)
    rows = normal(5, 23, seed=8) * sizes[:, None]
    # the second matrix has a row of zeros
    grams = torch.stack([rows @ rows.mT, torch.diag(sizes.roll(1) * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))])
    root = linalg.graded_root(grams)
    torch.testing.assert_close(root.mT @ root, grams, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("shape", "dim", "padding"),
    [((2, 3, 4), -2, (0, 0, 0, 5)), ((2, 3, 4), -1, (0, 5)), ((2, 0, 4), -2, (0, 0, 0, 5)), ((0, 4), -1, (0, 5))],
)
def test_zeros_are_appended_as_pad_does(shape, dim, padding):
    tensor = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(linalg.append_zeros(tensor, 5, dim), torch.nn.functional.pad(tensor, padding))


@pytest.mark.parametrize(("dim", "shape"), [(-2, (1, 8, 0)), (-1, (1, 5, 3))])
def test_zeros_are_appended_where_another_dimension_is_empty(dim, shape):
    """A core of no components has rows of no width: `pad` of torch 2.6 fails there."""
    tensor = torch.zeros(1, 5, 0)
    assert linalg.append_zeros(tensor, 3, dim).shape == shape
