"""Rounding by rate and distortion, the classes of rows, and the search for the coarsest quantisation."""

import numpy as np
import pytest

from eigenlorax.codec import class_tables, entropy
from eigenlorax.codec.logistic import bit_table
from eigenlorax.codec.versions import increments, rate_rounding
from eigenlorax.codec.versions.blocks import Block, Quantisation
from eigenlorax.codec.versions.increments import RowShape
from eigenlorax.codec.versions.lattice import ZERO_CLASS, LatticeRows, RowLabels, step_sizes
from eigenlorax.codec.versions.search import search
from eigenlorax.errors import OptionError

ROWS, WIDTH = 6, 500


def normal(seed: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(ROWS, WIDTH))


def test_without_a_multiplier_the_nearest_integer_is_chosen() -> None:
    np.testing.assert_array_equal(rate_rounding.round_by_rate(normal(1, 3.0), 0.0), np.rint(normal(1, 3.0)))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_integer_with_the_smaller_cost_is_chosen(scale: float) -> None:
    numbers, multiplier = normal(2, scale), 0.3
    rounded = rate_rounding.round_by_rate(numbers, multiplier)
    spread = np.sqrt(np.square(np.rint(numbers)).mean(1))
    bits = bit_table().numpy()[rate_rounding._class_of_spread(spread)]
    for row in range(ROWS):
        below = np.floor(np.abs(numbers[row])).astype(int)
        costs = [(np.abs(numbers[row]) - (below + up)) ** 2 + multiplier * bits[row, below + up] for up in range(2)]
        # bits may decrease for integers that are rarer than the table's least count; then the nearest one is chosen
        clear = np.abs(costs[0] - costs[1]) > 1e-9
        expected = np.sign(numbers[row]) * (below + (costs[1] < costs[0]))
        np.testing.assert_array_equal(rounded[row][clear], expected[clear])


@pytest.mark.parametrize("scale", [0.2, 0.6, 2.0, 40.0])
def test_estimated_bits_are_those_of_the_coder(scale: float) -> None:
    integers = np.rint(normal(3, scale)).astype(np.int32)
    classes, bits = rate_rounding.classes_and_bits(integers)
    (stream,) = increments.encode([RowShape(WIDTH, classes)], [integers])
    # a state of four bytes, and what the tables round
    assert 8 * len(stream) == pytest.approx(bits.sum(), rel=0.03, abs=48)
    decoded = next(iter(increments.decode([([RowShape(WIDTH, classes)], [stream])])))[0][0]
    again = np.zeros_like(integers)
    for part in decoded:
        again[part.rows] = part.integers
    np.testing.assert_array_equal(again, integers)


def test_rows_of_small_integers_are_coded_in_groups() -> None:
    integers = np.zeros((3, 50), np.int32)
    integers[0, 3], integers[1, 7] = -1, 2
    classes, bits = rate_rounding.classes_and_bits(integers)
    assert classes[0] >= class_tables.CLASSES
    assert classes[1] < class_tables.CLASSES
    assert (classes[2], bits[2]) == (ZERO_CLASS, 0)


def test_a_group_out_of_range_is_refused() -> None:
    class_of_groups = np.array([class_tables.CLASSES], np.uint8)
    (stream,) = entropy.encode([(np.array([81]), np.repeat(class_of_groups, 1))])
    with pytest.raises(ValueError, match="out of range"):
        list(increments.decode([([RowShape(4, class_of_groups)], [stream])]))


@pytest.mark.parametrize("bound", [0.3, 0.05, 1e-4])
@pytest.mark.parametrize("has_reference", [False, True])
def test_the_search_uses_the_error_that_is_allowed(bound: float, has_reference: bool) -> None:
    numbers, weights = normal(4), np.linspace(0.5, 3.0, ROWS)
    square = float(np.square(numbers).sum(1) @ np.square(weights))
    reference = None
    if has_reference:
        levels = np.full(ROWS, -40, np.int16)
        integers = np.rint((numbers + normal(5, 0.5)) / step_sizes(levels)[:, None]).astype(np.int32)
        labels = RowLabels(levels, np.zeros(ROWS, np.int8), np.zeros(ROWS, np.uint8))
        reference = LatticeRows(integers, levels, labels)
    block = Block(numbers, weights, reference)

    def attempt(quantisation: Quantisation) -> tuple[float, float]:
        quantised = block.quantise(quantisation)
        errors = np.square(quantised.rows.values - numbers).sum(1)
        return quantised.bits, float(errors @ np.square(weights))

    coarsest = search([block], bound**2 * square, -40 if has_reference else None, attempt)
    # levels are an eighth of an octave apart, and rounding fills that where integers are small
    assert (0.95 if bound > 0.01 else 0.91) * bound < np.sqrt(coarsest.square / square) <= bound
    finer = block.quantise(Quantisation(coarsest.quantisation.level - 8, 0.0))
    assert coarsest.rows < finer.bits


def test_an_error_that_cannot_be_reached_is_an_error() -> None:
    block = Block(normal(6), np.ones(ROWS), None)
    with pytest.raises(OptionError, match="cannot be met"):
        search([block], 1e-30, None, lambda _: (None, 1.0))
