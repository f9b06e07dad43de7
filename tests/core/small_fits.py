"""Fits of one small module, for tests of the fit and of what is computed from it."""

from eigenlorax.core.adapter import delta_square
from eigenlorax.core.exact_fit import fit_module
from eigenlorax.core.fit_options import FitOptions
from planted import random_factors

OUT, IN = 47, 31
RANKS = (2, 5, 3, 4)


def collection(seed=0, ranks=RANKS, **options):
    return [random_factors(r, OUT, IN, seed=seed + 10 * i, scaling=0.5 + i, **options) for i, r in enumerate(ranks)]


def unit_weights(factors):
    return [delta_square(f) ** -0.5 for f in factors]


def fitted(factors, weights=None, **options):
    return fit_module(factors, weights or unit_weights(factors), FitOptions(**options))
