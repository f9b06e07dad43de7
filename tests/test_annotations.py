"""Types and shapes in signatures are checked while tests run, whichever of the two ways a module goes (conftest.py)."""

import re
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

import eigenlorax as ex
import shapes
from eigenlorax import metrics, subspace
from eigenlorax.knapsack import Menu
from planted import random_factors

PACKAGE = Path(ex.__file__).parent


def test_modules_with_shapes_are_those_of_the_check_that_knows_shapes(request):
    listed = request.config.getoption("jaxtyping_packages").split(",")[:-1]
    # a name for shapes takes them to the modules that use it
    names = re.findall(r"^(\w+) = .*\b(?:Float|Int|Bool)\[", (PACKAGE / "subspace.py").read_text("utf-8"), re.MULTILINE)
    assert names
    shaped = re.compile(rf"from jaxtyping import|\b(?:{'|'.join(names)})\b")
    found = [path for path in PACKAGE.rglob("*.py") if shaped.search(path.read_text("utf-8"))]
    assert len(found) > 10
    for path in found:
        module = ".".join(("eigenlorax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        assert any(f"{module}.".startswith(f"{one}.") for one in listed), f"{module}: add it in pyproject.toml"


def test_a_shape_that_is_wrong_is_found():
    # other tests may have had the calls that are all checked
    shapes.calls.clear()
    factors = random_factors(3, 7, 5, seed=1)
    pack = ex.fit([ex.from_factors("a", {"m": factors})], n_components=2)
    bases = pack.subspace.modules["m"]
    one = subspace.project(factors, bases)
    assert metrics.module_error(factors, one, bases).lost > 0
    with pytest.raises(jaxtyping.TypeCheckError, match="down"):
        subspace.Coefficients(one.down[0], one.up, 1.0)


def test_a_type_that_is_wrong_is_found():
    with pytest.raises(BeartypeCallHintParamViolation, match="prices"):
        Menu(torch.ones(3), [])
