"""PEFT's patterns of ranks and alphas, against PEFT itself."""

import pytest

from eigenlorax.core import module_patterns


class TestPatterns:
    @pytest.mark.parametrize(
        "module",
        ["query", "encoder.layer.0.query", "encoder.layer.1", "layer.10.query", "xquery", "x-query", "b+", "a", ""],
    )
    def test_are_matched_as_peft_does(self, module):
        other = pytest.importorskip("peft.utils.other")
        patterns = r"""
            query 0.query layer.1 layer\.\d ^encoder self.query .* quer ^query$ ^.query 0\.query layer_0_query a)|(b
            (0|1)\.query query|value [0-9]+.query layer\.\d+\..* que(ry)?$ \-query x-query b+ ^encoder.layer.0.query
            ........query ..query$ er.0.query ^(encoder\.)?layer.*y$ (?:.*\.)?query
        """
        for pattern in ["", *patterns.split()]:
            wanted = {pattern: 7}.get(other.get_pattern_key([pattern], module), 3)
            assert module_patterns.ModulePatterns({pattern: 7}).value(module, 3) == wanted, pattern

    def test_the_first_that_fits_counts(self):
        assert module_patterns.ModulePatterns({"key": 1, "query": 2, "0.query": 3}).value("layer.0.query", 8) == 2
