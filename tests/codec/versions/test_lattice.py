"""Rows on lattices: their predictions, and the same numbers with other references."""

from fractions import Fraction

import numpy as np
import pytest

from eigenlorax.codec.versions.lattice import LatticeRows, Prediction, RowLabels, step_sizes
from eigenlorax.codec.versions.relabelling import relabel

RNG = np.random.default_rng(0)
WIDTH = 40


def labels(step_levels: list[int], gains: list[int] | None = None) -> RowLabels:
    count = len(step_levels)
    return RowLabels(
        np.array(step_levels, np.int16), np.array(gains or [0] * count, np.int8), np.zeros(count, np.uint8)
    )


def key_rows(levels: list[int], spread: float = 20.0) -> LatticeRows:
    integers = np.rint(RNG.normal(0, spread, (len(levels), WIDTH))).astype(np.int32)
    return LatticeRows(integers, np.array(levels, np.int16), labels(levels))


def following(reference: LatticeRows, step_levels: list[int], gains: list[int] | None = None) -> LatticeRows:
    """Return rows that a reference predicts, with increments of a few steps."""
    row_labels = labels(step_levels, gains)
    prediction = reference.predict(row_labels)
    prediction.add(RNG.integers(-2, 3, prediction.integers.shape))
    return LatticeRows(prediction.integers.astype(np.int32), prediction.levels, row_labels)


@pytest.mark.parametrize("octaves", [-3, -1, 0, 1, 2, 4])
def test_predictions_whole_octaves_away_are_exact(octaves: int) -> None:
    reference = key_rows([-37, 5])
    prediction = reference.predict(labels([-37 + 8 * octaves, 5 + 8 * octaves]))
    np.testing.assert_array_equal(prediction.integers * step_sizes(prediction.levels)[:, None], reference.values)
    np.testing.assert_array_equal(prediction.octaves, max(octaves, 0))


def test_predictions_are_at_most_four_octaves_finer_than_steps() -> None:
    reference = key_rows([0])
    prediction = reference.predict(labels([64]))
    np.testing.assert_array_equal(prediction.levels, [32])
    np.testing.assert_array_equal(prediction.integers, np.rint(reference.integers / 16))


@pytest.mark.parametrize(("step_level", "gain"), [(-35, 0), (-37, 31), (-29, -20), (-40, 127), (-37, -64)])
def test_other_predictions_are_rounded_to_steps(step_level: int, gain: int) -> None:
    reference = key_rows([-37])
    prediction = reference.predict(labels([step_level], [gain]))
    np.testing.assert_array_equal(prediction.levels, [step_level])
    wanted = reference.values * float(Fraction(64 + gain, 64)) / step_sizes(np.array([step_level]))
    assert np.abs(prediction.integers - wanted).max() <= 0.5 + 1e-9


def test_rows_of_zeros_predict_nothing() -> None:
    reference = LatticeRows(np.zeros((1, WIDTH), np.int32), np.array([-80], np.int16), labels([-80]))
    prediction = reference.predict(labels([-40], [9]))
    assert not prediction.integers.any()
    np.testing.assert_array_equal((prediction.levels, prediction.octaves), [[-40], [0]])


def with_zeros(rows: LatticeRows) -> LatticeRows:
    integers = rows.integers.copy()
    integers[0] = 0
    return LatticeRows(integers, rows.levels, rows.labels)


@pytest.mark.parametrize("has_one_level", [False, True])
@pytest.mark.parametrize("steps", [[0, 0, 0], [8, 8, 8], [-16, -16, -16], [24, 16, -8], [3, 3, 3], [40, 48, 80]])
def test_relabelled_rows_have_the_same_numbers(steps: list[int], *, has_one_level: bool) -> None:
    first = key_rows([-33, -33, -33])
    if has_one_level:
        steps = steps[:1] * 3
    gains = None if has_one_level else [0, 25, -40]
    second = following(first, [-33 + step for step in steps], gains)
    third = following(second, [-33 + 2 * step for step in steps])
    references = [None, first, second, third, with_zeros(first), with_zeros(second), key_rows([-30, -30, -30])]
    for rows in (second, third, with_zeros(third)):
        for reference in references:
            again = relabel(rows, reference, has_one_level=has_one_level)
            assert again is not None
            np.testing.assert_array_equal(again.values, rows.values)
            if has_one_level:
                assert len(set(again.labels.step_levels.tolist())) == 1
            decoded = Prediction.of(again.labels, WIDTH, reference)
            decoded.add(again.increments(reference))
            np.testing.assert_array_equal(decoded.integers, again.integers)
            np.testing.assert_array_equal(decoded.levels, again.levels)


def test_relabelled_rows_take_the_coarsest_steps() -> None:
    first = key_rows([-33])
    second = following(first, [-17])
    third = following(second, [-17])
    again = relabel(third, first, has_one_level=False)
    assert again is not None
    np.testing.assert_array_equal(again.labels.step_levels, [-17])
    # without a reference, the numbers are still those of the finer lattice
    alone = relabel(third, None, has_one_level=False)
    assert alone is not None
    np.testing.assert_array_equal(alone.labels.step_levels, [-33])


def test_rows_that_grow_as_a_whole_are_relabelled_with_a_gain() -> None:
    first = key_rows([-33, -33], 300.0)
    grown = LatticeRows(np.rint(first.integers * [[1.75], [1.0]]).astype(np.int32), first.levels, first.labels)
    again = relabel(grown, first, has_one_level=False)
    assert again is not None
    np.testing.assert_array_equal(again.labels.gains, [48, 0])
    assert np.abs(again.increments(first)).max() <= 1


def test_differences_beyond_memory_have_no_labels() -> None:
    near, far = key_rows([-800]), key_rows([800])
    assert relabel(far, near, has_one_level=False) is None
