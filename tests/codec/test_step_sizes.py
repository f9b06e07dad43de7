"""The search for quantisation step sizes: the largest ones within an error bound, however errors depend on them."""

import pytest
import torch

from coded_collections import of_ranks, shared
from eigenlorax.codec.encoder import CollectionEncoder
from eigenlorax.codec.module_updates import ModuleUpdates, UpdateSource
from eigenlorax.codec.stage_runner import StageRunner
from eigenlorax.codec.step_sizes import (
    as_written,
    confirm_step_sizes,
    search_step_sizes,
    upper_step_size_grid,
    wide_step_size_grid,
)
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


@pytest.mark.parametrize("make", [lambda: shared(4), lambda: of_ranks([1, 3, 2])], ids=["shared", "of other ranks"])
def test_estimates_do_not_depend_on_step_sizes_below_those_of_the_errors(make):
    adapters = make()
    modules = [
        ModuleUpdates(
            name,
            (factors.up.shape[0], factors.down.shape[1]),
            tuple(
                UpdateSource(index, lambda adapter=adapter, name=name: adapter.modules[name])
                for index, adapter in enumerate(adapters)
            ),
        )
        for name, factors in adapters[0].modules.items()
    ]
    squares = [
        sum(float((f.scaling * f.up.double() @ f.down.double()).square().sum()) for f in adapter.modules.values())
        for adapter in adapters
    ]
    norms = torch.tensor(squares, dtype=torch.float64).sqrt()
    numbers = max(sum(f.up.numel() + f.down.numel() for f in adapter.modules.values()) for adapter in adapters)
    errors = [0.02, 0.1, 0.5]
    upper, wide = upper_step_size_grid(errors[0], numbers), wide_step_size_grid()
    assert upper == wide[len(wide) - len(upper) :]
    assert len(upper) < len(wide)
    estimates = [
        CollectionEncoder(modules, norms, grid, StageRunner.of(lambda *_: None, error=errors[0])).frontier(errors)
        for grid in (upper, wide)
    ]
    assert estimates[0] == estimates[1]


def test_flat_errors_take_few_rounds():
    """Errors that hardly change with the step size, as where bases represent nearly all of each update."""
    rounds = []

    def measured(step_sizes, needed):
        rounds.append(int(needed.sum()))
        return 0.5 * step_sizes ** torch.tensor([0.05, 0.1, 0.9], dtype=torch.float64)

    start = torch.tensor([0.5, 2.0, 1.1], dtype=torch.float64)
    _, errors = search_step_sizes(measured, start, measured(start, torch.ones(3)), 0.5)
    assert bool(((errors <= 0.5) & (errors > 0.99 * 0.5)).all())
    assert len(rounds) <= 5


def test_step_sizes_shrink_where_the_decoded_error_exceeds_the_bound():
    encoded = []

    def encode(step_sizes, needed):
        encoded.append(needed.tolist())
        return step_sizes * torch.tensor([0.4, 0.5004, 0.5, 0.51], dtype=torch.float64)

    start = as_written(torch.ones(4, dtype=torch.float64))
    step_sizes, errors = confirm_step_sizes(encode, start, 0.5)
    assert step_sizes[[0, 2]].tolist() == [1.0, 1.0]
    assert errors[[0, 2]].tolist() == [0.4, 0.5]
    assert bool((errors <= 0.5).all())
    assert bool((step_sizes > 0.95).all())
    assert encoded[:2] == [[True] * 4, [False, True, False, True]]
