"""The search for quantisation step sizes: the largest ones within an error bound, however errors depend on them."""

import pytest
import torch

from eigenlorax.codec.step_sizes import search_step_sizes
from eigenlorax.errors import OptionError


def test_step_sizes_are_found_where_errors_jump():
    """An error that hardly changes for long and then falls at once, well below the bound or just below it."""

    def measured(step_sizes, needed):
        return torch.where(step_sizes > edges, 0.5001 + 0.0001 * step_sizes, lower * step_sizes / edges)

    edges = torch.tensor([0.7, 1e-3, 1e-6, 40.0], dtype=torch.float64)
    lower = torch.tensor([0.1, 0.4999, 0.3, 0.49], dtype=torch.float64)
    start = torch.ones(4, dtype=torch.float64)
    step_sizes, errors = search_step_sizes(measured, start, measured(start, None), 0.5)
    torch.testing.assert_close(errors, measured(step_sizes, None))
    assert bool((errors <= 0.5).all())
    assert bool((step_sizes > 0.5 * edges).all())


def test_an_error_bound_that_no_step_size_meets_is_refused():
    start = torch.ones(2, dtype=torch.float64)
    with pytest.raises(OptionError, match="32 bits"):
        search_step_sizes(lambda step_sizes, needed: torch.full_like(step_sizes, 0.6), start, 0.6 * start, 0.5)
