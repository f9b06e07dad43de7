"""Gauges: the update does not change, and factors come as close to a reference as they were made from it."""

import numpy as np
import pytest

from eigenlorax.codec.versions import gauge

RANK, N_OUT, N_IN = 4, 30, 22


def factors(seed: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(rank, N_OUT)), random.normal(size=(rank, N_IN))


def changed(up: np.ndarray, down: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same update in a random gauge."""
    change = np.random.default_rng(seed).normal(size=(len(up), len(up)))
    return change.T @ up, np.linalg.inv(change) @ down


def distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def test_singular_gauge_has_orthogonal_rows_of_equal_norms() -> None:
    up, down = factors(1)
    new_up, new_down = gauge.singular_gauge(up, down)
    np.testing.assert_allclose(new_up.T @ new_down, up.T @ down, atol=1e-12)
    singular_values = np.linalg.svd(up.T @ down, compute_uv=False)[:RANK]
    np.testing.assert_allclose(new_up @ new_up.T, np.diag(singular_values), atol=1e-10)
    np.testing.assert_allclose(new_down @ new_down.T, np.diag(singular_values), atol=1e-10)


def test_singular_gauge_of_a_rank_above_the_widths() -> None:
    random = np.random.default_rng(2)
    up, down = random.normal(size=(9, 5)), random.normal(size=(9, 7))
    new_up, new_down = gauge.singular_gauge(up, down)
    np.testing.assert_allclose(new_up.T @ new_down, up.T @ down, atol=1e-12)
    assert not new_up[5:].any()
    assert not new_down[5:].any()


def test_alignment_undoes_a_change_of_gauge() -> None:
    reference = factors(3)
    aligned = gauge.align(*changed(*reference, seed=4), *reference, noise=1e-6)
    assert aligned is not None
    assert distance(aligned, reference) < 1e-8


@pytest.mark.parametrize("side", [0, 1])
def test_alignment_when_one_side_of_the_reference_is_zero(side: int) -> None:
    original = factors(5)
    reference = tuple(np.zeros_like(rows) if number == side else rows for number, rows in enumerate(original))
    aligned = gauge.align(*changed(*original, seed=6), *reference, noise=1e-6)
    assert aligned is not None
    np.testing.assert_allclose(aligned[0].T @ aligned[1], original[0].T @ original[1], atol=1e-9)
    np.testing.assert_allclose(aligned[1 - side], original[1 - side], atol=1e-6)


def test_alignment_keeps_small_rows_small() -> None:
    """A large change of one row does not spoil the others, as it would in plain least squares."""
    reference = factors(7)
    moved = (reference[0].copy(), reference[1].copy())
    moved[0][0] += np.random.default_rng(8).normal(size=N_OUT)
    aligned = gauge.align(*changed(*moved, seed=9), *reference, noise=1e-6)
    assert aligned is not None
    assert np.abs(aligned[1] - reference[1]).max() < 1e-3
    assert np.abs(aligned[0][1:] - reference[0][1:]).max() < 1e-3


def test_rows_without_weight_end_the_alignment() -> None:
    (reference_up, reference_down), (up, down) = factors(7), factors(8)
    reference_down[3] = 0
    aligned = gauge.align(1e-30 * up, 0 * down, reference_up, reference_down, 1e44)
    assert aligned is not None
    assert not (aligned[0].T @ aligned[1]).any()


def test_singular_factors_are_not_aligned() -> None:
    up, down = factors(10)
    up[1], down[1] = up[0], down[0]
    assert gauge.align(up, down, *factors(11), noise=1e-6) is None


def test_rows_of_a_lower_rank_are_found_in_the_reference() -> None:
    reference_up, reference_down = factors(12, rank=6)
    kept = np.array([1, 2, 5])
    _, down = changed(reference_up[kept], reference_down[kept], seed=13)
    assert gauge.match_rows(down, reference_up, reference_down).tolist() == kept.tolist()


def test_rows_of_a_higher_rank_come_after_those_of_the_reference() -> None:
    _, down = factors(14, rank=6)
    assert gauge.match_rows(down, *factors(15, rank=4)).tolist() == [0, 1, 2, 3, -1, -1]
