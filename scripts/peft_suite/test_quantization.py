"""`test_quantization.py` of PEFT: our layer on bitsandbytes' linear ones, 8-bit and 4-bit, on the CPU."""

from importlib.util import find_spec

import pytest
from peft_tests import test_quantization as peft

from eigenlorax import EigenLoraxConfig

from . import packs, subject

if find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

QUERIES_AND_VALUES = {"target_modules": ["q_proj", "v_proj"]}

peft.QUANTIZATION_BACKENDS[:] = [one for one in peft.QUANTIZATION_BACKENDS if one.name.startswith("bnb_")]
for loader in (peft.Bnb8bitLoader, peft.Bnb4bitLoader):
    # bitsandbytes quantises 64 weights of a row together
    loader.model_id = packs.local("OPT-of-64")
    loader.expected_layer_count = 4  # two in each of two blocks
subject.rows(
    peft.TEST_CASES,
    [
        (EigenLoraxConfig, QUERIES_AND_VALUES),
        (EigenLoraxConfig, {**QUERIES_AND_VALUES, "core": True}),
        (EigenLoraxConfig, {**QUERIES_AND_VALUES, "embed_subspace": True, "n_extra": 3}),
    ],
)


class TestQuantization(peft.TestQuantization):
    """As it is."""
