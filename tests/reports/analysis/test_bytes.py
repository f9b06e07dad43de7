"""Bytes of LoRAs and of a pack, against counting adapter by adapter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigenlorax.reports.analysis import bytes as costs

SIZES = st.tuples(st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 10**6))


def counted(n, lora, basis, each):
    """Bytes of n LoRAs, and of a pack of them."""
    return sum(lora for _ in range(n)), basis + sum(each for _ in range(n))


class TestRatio:
    @given(st.integers(1, 50), SIZES)
    def test_counts_the_basis_once(self, n, sizes):
        loras, pack = counted(n, *sizes)
        assert costs.ratio(n, *sizes) == pytest.approx(loras / pack, rel=1e-12)

    @given(SIZES)
    def test_comes_to_its_limit(self, sizes):
        lora, _, each = sizes
        assert costs.ratio(10**18, *sizes) == pytest.approx(lora / each, rel=1e-6)

    def test_of_nothing(self):
        assert costs.ratio(3, 0, 0, 0) == 1.0


class TestBreakEven:
    @given(SIZES)
    def test_is_the_first_where_the_pack_is_smaller(self, sizes):
        lora, _, each = sizes
        n = costs.break_even(*sizes)
        if n is None:
            assert lora <= each
            return
        assert n >= 1
        loras, pack = n * lora, sizes[1] + n * each
        assert pack < loras
        assert n == 1 or pack - each >= loras - lora

    @pytest.mark.parametrize(
        ("sizes", "n"),
        [((10, 90, 1), 11), ((10, 89, 1), 10), ((10, 0, 9), 1), ((10, 5, 10), None), ((10, 5, 11), None)],
    )
    def test_equal_is_not_smaller(self, sizes, n):
        assert costs.break_even(*sizes) == n
        assert costs.break_even(*map(float, sizes)) == n

    def test_a_quotient_is_not_rounded_up(self):
        """(3·10¹⁶ − 1) / 10¹⁶ is 3.0 in floats."""
        assert costs.break_even(2 * 10**16, 3 * 10**16 - 1, 10**16) == 3


class TestOverN:
    def test_counts_and_ratios(self):
        found = costs.over_n(100, 1000, 3, 7)
        counts = [1, 2, 5, 7, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
        assert [count for count, _ in found] == counts
        for count, ratio in found:
            loras, pack = counted(count, 100, 1000, 3)
            assert ratio == pytest.approx(loras / pack)

    def test_of_thousands(self):
        counts = [count for count, _ in costs.over_n(100.5, 1000, 3.25, 1234)]
        assert 1234 in counts
        assert counts == sorted(counts)
        assert 100 * 1234 < counts[-1] <= 1000 * 1234
