"""Batches of updates: factors at their own ranks, and coordinates in the span of the rows."""

import pytest
import torch

from eigenlorax.core.batch import delta_squares, in_row_spaces, pad_factors, unpadded
from planted import random_factors

N_OUT, N_IN = 31, 53


@pytest.fixture
def factors():
    return [random_factors(rank, N_OUT, N_IN, seed=10 * rank, scaling=0.5 * rank) for rank in (2, 5, 3)]


def test_unpadded_factors_are_those_of_the_batch(factors):
    for original, update in zip(factors, unpadded(pad_factors(factors, N_IN, N_OUT)), strict=True):
        assert update.scaling == original.scaling
        torch.testing.assert_close(update.down, original.down)
        torch.testing.assert_close(update.up, original.up)


def test_coordinates_in_the_span_of_rows_keep_inner_products(factors):
    batch = pad_factors(factors, N_IN, N_OUT)
    narrow = in_row_spaces(batch)
    # three adapters, padded to rank 5
    assert narrow.down.shape == narrow.up.shape == (3, 5, 15)
    for side in ("down", "up"):
        rows, coordinates = batch.rows(side).flatten(0, 1), narrow.rows(side).flatten(0, 1)
        torch.testing.assert_close(coordinates @ coordinates.mT, rows @ rows.mT)
    torch.testing.assert_close(delta_squares(narrow), delta_squares(batch))


def test_sides_narrower_than_the_stack_stay_as_they_are(factors):
    batch = pad_factors(factors * 3, N_IN, N_OUT)
    narrow = in_row_spaces(batch)
    assert narrow.up is batch.up
    assert narrow.down.shape == (9, 5, 45)
