"""Ticks and units of the axes of figures."""

from typing import Any


def byte_unit(largest: int) -> tuple[int, str]:
    """Return the decimal unit for bytes up to `largest`, and its name."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next(((size, name) for size, name in units if largest >= size), (1, "bytes"))


def count_along(axis: Any) -> None:
    """Label the x axis with whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    # the default minimum of two ticks may need fractions
    axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
