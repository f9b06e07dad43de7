"""Quantisation step sizes of adapters: the grid that is surveyed, and the search for those that meet an error bound."""

import bisect
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from .bitstream import STEP_SIZES_PER_OCTAVE

SURVEY_RANGE = 2.0**-22, 2.0**0.5
"""Step sizes, relative to the norm of an adapter, that are surveyed where the error is not known beforehand."""
MIN_ERROR_BOUND = 1e-6
"""The smallest error bound that can be asked for."""
CLOSE = 0.995
"""Error of an adapter, relative to the bound, at which the search for its step size ends."""
GOOD_ROUNDS, MAX_ROUNDS = 8, 24
"""Rounds of the search after which any step sizes within the bound are taken; and rounds at most."""

MIN_SLOPE = 0.02
"""Slope of log error against log step size above which the search extrapolates by it."""
SECANT_ROUNDS = 4
"""Rounds of the search that follow slopes alone."""
SMALLER = 0.999
"""Factor of the step size of an adapter whose decoded error exceeds the bound; squared at each further attempt."""

MeasureErrors = Callable[[Tensor, Tensor], Tensor]
"""Returns the error of each adapter, (n,), from step sizes (n,) and a mask (n,) of the adapters that are asked for."""


def check_error_bound(error: float) -> None:
    """Raise `OptionError` for an error bound that float32 numbers cannot keep."""
    if error < MIN_ERROR_BOUND:
        raise OptionError(
            f"max_error={error:g} is less than numbers in float32 can keep: ask for 1e-6 or more, or store wider ones "
            "(dtype='float64', --dtype float64)."
        )


def strict_bound(error: float) -> float:
    """Return an error bound that leaves room for rounding the decoded factors to float32."""
    check_error_bound(error)
    return error * (1 - 1e-6) - 2e-7


def search_step_sizes(
    measure: MeasureErrors, step_sizes: Tensor, errors: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Find the largest quantisation step size of each adapter whose error stays below `bound`.

    All adapters are searched together, since a round decodes all modules. For each, the search keeps the largest step
    size that is good and the smallest that is bad. It interpolates and bisects between them. Slopes of the last two
    rounds only tell where to look next: errors grow with the step size, but they jump where whole components vanish.

    Args:
        measure: Returns the errors of adapters from their step sizes.
        step_sizes: Step sizes to start from, (n,), as they can be written.
        errors: Errors with these step sizes, (n,).
        bound: Bound on the error of each adapter.

    Returns:
        The step sizes and the errors with them.

    Raises:
        OptionError: If no step size is small enough.
    """
    good, good_errors = torch.zeros_like(step_sizes), torch.zeros_like(errors)
    bad, bad_errors = torch.full_like(step_sizes, math.inf), torch.full_like(errors, math.inf)
    # the middle of the range in which the search ends
    target = 0.5 * (1 + CLOSE) * bound
    last_step_sizes, last_errors = step_sizes, errors
    for turn in range(MAX_ROUNDS):
        within = errors <= bound
        better, worse = within & (step_sizes > good), ~within & (step_sizes < bad)
        good, good_errors = torch.where(better, step_sizes, good), torch.where(better, errors, good_errors)
        bad, bad_errors = torch.where(worse, step_sizes, bad), torch.where(worse, errors, bad_errors)
        unfinished = (good == 0) | ((good_errors < CLOSE * bound) & (bad > 1.002 * good))
        if not bool(unfinished.any()) or (turn >= GOOD_ROUNDS and bool((good > 0).all())):
            break
        ratio = (target / errors.clamp_min(1e-300)) ** _exponents(
            step_sizes / last_step_sizes, errors / last_errors, turn
        )
        # down in short steps at first, lest the search jumps over the largest step size where errors fall at once
        smallest_ratio = max(0.9**2.0 ** (turn - 1), 0.25) if turn else 0.25
        candidates = step_sizes * ratio.clamp(smallest_ratio, 4.0)
        # log–log interpolation between the good and the bad step size
        share = (target / good_errors).log() / (bad_errors / good_errors).log()
        # bisection every other round, since errors may jump and interpolation would creep
        share = torch.full_like(share, 0.5) if turn % 2 else share.clamp(0.05, 0.95)
        bracketed = (good > 0) & bad.isfinite()
        candidates = torch.where(bracketed, good * (bad / good) ** share, candidates)
        last_step_sizes, last_errors = step_sizes, errors
        # what is finished keeps its step size and its error, which need not be measured again
        step_sizes = torch.where(unfinished, as_written(candidates), good)
        errors = torch.where(unfinished, measure(step_sizes, unfinished), good_errors)
    if bool((good == 0).any()):
        raise _beyond_reach(bound)
    return good, good_errors


def _exponents(step_ratio: Tensor, error_ratio: Tensor, turn: int) -> Tensor:
    """Return the power of the wanted change of errors by which step sizes are to change, (n,).

    Args:
        step_ratio: Change of each step size in the last round.
        error_ratio: Change of each error in it.
        turn: Number of rounds so far.
    """
    # a secant: where components come and go, errors hardly change for long, and then at once
    slope = error_ratio.log() / step_ratio.log()
    # without a slope, errors are taken to be in proportion to step sizes; further each round, lest the search creeps
    steep = torch.full_like(slope, 2.0**turn)
    exponents = torch.where(slope > MIN_SLOPE, 1 / slope, steep)
    return exponents if turn < SECANT_ROUNDS else torch.maximum(exponents, steep)


def confirm_step_sizes(encode: MeasureErrors, step_sizes: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Encode adapters with these step sizes, and again with smaller ones where the decoded error exceeds the bound.

    The search measures errors without decoding, so that they are off by rounding errors.

    Args:
        encode: Encodes adapters, and returns the errors of what is decoded.
        step_sizes: Step size of each adapter.
        bound: Bound on the error of each adapter.

    Returns:
        The step sizes and the errors with them.
    """
    missing, errors = torch.ones_like(step_sizes, dtype=torch.bool), torch.zeros_like(step_sizes)
    for turn in range(MAX_ROUNDS):
        errors = torch.where(missing, encode(step_sizes, missing), errors)
        missing = errors > bound
        if not bool(missing.any()):
            return step_sizes, errors
        smaller = as_written(step_sizes * SMALLER**2.0**turn)
        step_sizes = torch.where(missing, smaller, step_sizes)
    raise _beyond_reach(bound)


def as_written(step_sizes: Tensor) -> Tensor:
    """Return the nearest step sizes that the bytes of an adapter can hold, so that measured errors are final."""
    return (STEP_SIZES_PER_OCTAVE * step_sizes.log2()).round().div(STEP_SIZES_PER_OCTAVE).exp2()


def _beyond_reach(bound: float) -> OptionError:
    return OptionError(
        f"max_error={bound:g} takes integers beyond 32 bits for some adapter: ask for a larger max_error."
    )


def step_size_grid(error: float, numbers: int) -> list[float]:
    """Return step sizes to survey for an error bound, relative to the norm of an adapter, an octave apart.

    The smallest step size is that of an adapter whose numbers are all encoded. The largest is that of an adapter whose
    components are partly left out.

    Args:
        error: The error bound.
        numbers: Number of elements of an adapter's factors, at most.
    """
    return _log_spaced(_smallest_step_size(error, numbers), min(3 * error, SURVEY_RANGE[1]))


def wide_step_size_grid() -> list[float]:
    """Return step sizes to survey for errors of every size, an octave apart."""
    return _log_spaced(*SURVEY_RANGE)


def upper_step_size_grid(error: float, numbers: int) -> list[float]:
    """Return those step sizes of `wide_step_size_grid` that an error of at least `error` needs.

    Args:
        error: The smallest error bound.
        numbers: Number of elements of an adapter's factors, at most.
    """
    wide, smallest = wide_step_size_grid(), _smallest_step_size(error, numbers)
    # an error is interpolated between two step sizes: the next smaller one belongs to them
    return wide[max(bisect.bisect_right(wide, smallest) - 1, 0) :]


def _smallest_step_size(error: float, numbers: int) -> float:
    # a rounding error is about 0.1 of the squared step size: 1/12, and the dead zone's
    return error / math.sqrt(0.1 * numbers) / 3


def _log_spaced(smallest: float, largest: float) -> list[float]:
    count = max(math.ceil(math.log2(largest / smallest)), 2)
    return [float(step_size) for step_size in np.geomspace(smallest, largest, count + 1)]
