"""Examples in the docstrings of public names run, and say what is true."""

import doctest

import pytest

import eigenlorax
from adapters import make_adapters

NAMES = [name for name in eigenlorax.__all__ if name != "__version__"]


def examples():
    finder = doctest.DocTestFinder(recurse=True)
    for name in NAMES:
        owner = getattr(eigenlorax, name)
        for test in finder.find(owner, name, module=False):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("test", list(examples()))
def test_the_example_of(test, tmp_path, monkeypatch, without_shape_checks):
    make_adapters(tmp_path / "adapters", "a b c", shared=3)
    monkeypatch.chdir(tmp_path)
    test.globs = {}
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert outcome.attempted
    assert not outcome.failed
