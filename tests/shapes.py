"""Shapes in signatures are checked at some of the calls: jaxtyping's check takes many times as long as a small call."""

import functools
import inspect
from collections import Counter

import jaxtyping._decorator

FIRST, EVERY = 50, 25
"""Calls of a function that are checked: so many at first, and one in so many of the others."""
calls = Counter()
"""By a function's code: those that it has had."""
_jaxtyped = jaxtyping.jaxtyped


def check_some_calls():
    """From here on, of what jaxtyping's import hook decorates."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _some_calls_jaxtyped


def _some_calls_jaxtyped(of=None, *, typechecker):
    if of is None:
        return functools.partial(_some_calls_jaxtyped, typechecker=typechecker)
    # methods of classes and properties come here one by one
    if not inspect.isfunction(of):
        return _jaxtyped(of, typechecker=typechecker)
    code = of.__code__
    # functions inside of others are made again at each call of these, and each time what checks them would be compiled
    if calls[code] >= FIRST:
        return of
    checked = _jaxtyped(of, typechecker=typechecker)
    from torch.compiler import is_compiling

    @functools.wraps(of)
    def call(*args, **kwargs):
        if is_compiling():
            return of(*args, **kwargs)
        calls[code] += 1
        return (checked if calls[code] <= FIRST or calls[code] % EVERY == 0 else of)(*args, **kwargs)

    return call
