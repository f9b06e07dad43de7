"""`test_config.py` of PEFT: saving, loading and copying configs."""

import pytest
from peft_tests import test_config as peft

from . import subject

ours = [(subject.config_class(), {})]
subject.rows(peft.LAYER_INDEXING_CONFIG_CLASSES, ours)
if not subject.control:
    subject.written(peft.TestPeftConfig.test_save_pretrained_with_target_modules)[:] = [subject.config_class()]
for function in vars(peft.TestPeftConfig).values():
    # a tuple, and no list: the mark has to be another one
    for index, mark in enumerate(getattr(function, "pytestmark", ())):
        if mark.name == "parametrize" and mark.args[1] is peft.ALL_CONFIG_CLASSES:
            function.pytestmark[index] = pytest.mark.parametrize(mark.args[0], ours).mark


class TestPeftConfig(peft.TestPeftConfig):
    """As it is."""
