"""Options of a fit."""

import pytest

from eigenlorax.core.fit_options import FitOptions
from eigenlorax.errors import OptionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "at least 1"),
        ({"energy": 2.0}, "at most 1"),
        ({"max_error": 0.0}, "above 0 and below 1, got 0"),
        ({"max_error": 1.0}, "above 0 and below 1, got 1"),
        ({"max_error": float("nan")}, "above 0 and below 1, got nan"),
        ({"max_error": 0.3, "n_components": 2}, "pass exactly one of .* n_components=2, max_error=0.3"),
        ({}, "pass exactly one of n_components, energy, max_error, max_bytes and ratio"),
        ({"n_components": 2, "weighting": "deltas"}, "one of delta, factors, got 'deltas'"),
        ({"n_components": 2, "sweeps": -1}, "0 or more, got -1"),
    ],
)
def test_fit_options_are_valid_from_birth(options, message):
    with pytest.raises(OptionError, match=message):
        FitOptions(**options)
