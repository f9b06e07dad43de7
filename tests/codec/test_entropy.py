"""The entropy coder: what comes back, what it takes, and what broken bytes do."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from eigenlorax.codec import class_tables, entropy, logistic
from eigenlorax.errors import FormatError


def class_of(spread: float) -> int:
    return int(logistic.classes_of_spread(torch.tensor(spread, dtype=torch.float64)))


def integers(n: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    values = np.rint(np.random.default_rng(seed).normal(size=n) * spread).astype(np.int64)
    return values, np.full(n, class_of(spread))


def bits_in_class(values: np.ndarray, number: int) -> float:
    """Return the bits that integers take by the distribution of a class."""
    table = class_tables.class_table(number)
    bits = class_tables.PRECISION - np.log2(np.diff(table.bounds)) + table.raw_bits
    bits[-1] += 32 - table.raw_bits
    symbols = (values >> table.raw_bits) - table.first
    escaped = (symbols < 0) | (symbols >= table.escape)
    return float(bits[np.where(escaped, table.escape, symbols)].sum())


@pytest.mark.parametrize("spread", [0.05, 0.4, 1.5, 30.0, 1e4, 1e7])
@pytest.mark.parametrize("n", [0, 1, 7, 3000])
def test_integers_come_back(n: int, spread: float) -> None:
    values, classes = integers(n, spread)
    (data,) = entropy.encode([(values, classes)])
    (found,) = entropy.decode([(data, classes)])
    assert found.tolist() == values.tolist()


def test_integers_that_their_class_does_not_expect_come_back() -> None:
    values = np.array([0, 5, -(2**31), 2**31 - 1, 40, -40, 0])
    classes = np.array([0, 0, 0, 3, 8, 60, 127])
    (data,) = entropy.encode([(values, classes)])
    assert entropy.decode([(data, classes)])[0].tolist() == values.tolist()


def test_the_largest_integers_come_back_in_a_class_that_expects_them() -> None:
    values = np.array([2**31 - 1, -(2**31), 2**31 - 2**26, 0])
    classes = np.full(4, 127)
    (data,) = entropy.encode([(values, classes)])
    assert len(data) < 4 * 5 + 4
    assert entropy.decode([(data, classes)])[0].tolist() == values.tolist()


@pytest.mark.parametrize("n", [5000, 70_001])
def test_classes_may_differ_from_integer_to_integer(n: int) -> None:
    random = np.random.default_rng(1)
    classes = random.integers(0, 70, n)
    values = np.rint(random.logistic(size=n) * 2.0 ** (classes / 4 - 4)).astype(np.int64)
    (data,) = entropy.encode([(values, classes)])
    assert entropy.decode([(data, classes)])[0].tolist() == values.tolist()


def test_streams_that_are_coded_together_have_the_bytes_they_have_alone() -> None:
    streams = [integers(n, 2.0, seed=n) for n in (0, 9000, 3, 20000, 1)]
    together = entropy.encode(streams)
    assert together == [entropy.encode([one])[0] for one in streams]
    found = entropy.decode([(data, classes) for data, (_, classes) in zip(together, streams, strict=True)])
    assert [one.tolist() for one in found] == [values.tolist() for values, _ in streams]


@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0, 200.0])
def test_bytes_are_near_the_entropy(spread: float) -> None:
    values, classes = integers(40_000, spread)
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    # of a Gaussian sample the true distribution, not the counts, is what nobody can code below
    least = 40_000 * float(-(share * np.log2(share)).sum()) / 8
    (data,) = entropy.encode([(values, classes)])
    assert len(data) < 1.04 * least + 16
    assert bits_in_class(values, int(classes[0])) / 8 == pytest.approx(len(data), rel=0.02)


def test_zeros_are_nearly_free() -> None:
    (data,) = entropy.encode([(np.zeros(100_000, dtype=np.int64), np.zeros(100_000, dtype=np.int64))])
    assert len(data) < 100


@pytest.mark.parametrize("number", [0, 9, 16, 24, 31, 60, 127])
def test_tables_are_the_logistic_distribution(number: int) -> None:
    table = class_tables.class_table(number)
    assert table.bounds[0] == 0
    assert table.bounds[-1] == 1 << class_tables.PRECISION
    assert (np.diff(table.bounds) >= 1).all()
    with localcontext() as context:
        context.prec = 40
        scale = Decimal(2) ** (Decimal(number) / 4 - 4)
        # what is below the integers whose first bits are one more than 0's
        edge = (Decimal(2**table.raw_bits) - Decimal("0.5")) / scale
        below = 1 / (1 + (-edge).exp())
    assert table.bounds[1 - table.first] / (1 << class_tables.PRECISION) == pytest.approx(float(below), abs=0.01)


@pytest.mark.parametrize("number", [0, 13, 23, 24, 70, 127])
def test_tables_are_those_of_an_exponential_for_each_bound(number: int) -> None:
    table = class_tables.class_table(number)
    symbols = len(table.bounds) - 2
    with localcontext() as context:
        context.prec = 40
        scale = Decimal(2) ** (Decimal(number) / 4 - 4)
        edges = [
            (Decimal((index + table.first) * 2**table.raw_bits) - Decimal("0.5")) / scale for index in range(symbols)
        ]
        shares = [(class_tables.TOTAL - symbols - 1) / (1 + (-edge).exp()) for edge in edges[1:]]
        bounds = [index + int(share + Decimal("0.5")) for index, share in enumerate(shares, start=1)]
    assert table.bounds.tolist() == [0, *bounds, class_tables.TOTAL - 1, class_tables.TOTAL]


@pytest.mark.parametrize("group_class", range(class_tables.GROUP_CLASSES))
def test_tables_of_groups_are_products_of_their_integers(group_class: int) -> None:
    changed = 0.75 * 2 ** (-group_class / 4)
    table = class_tables.class_table(class_tables.CLASSES + group_class)
    frequencies = np.diff(table.bounds)[:-1] / class_tables.TOTAL
    for symbol in range(81):
        digits = [symbol // 3**place % 3 - 1 for place in range(4)]
        probability = np.prod([changed / 2 if digit else 1 - changed for digit in digits])
        # each symbol has at least one count, which the group of zeros pays
        assert frequencies[symbol] == pytest.approx(probability, abs=83 / class_tables.TOTAL)
    assert (table.raw_bits, table.first, table.escape) == (0, 0, 81)


def test_groups_come_back() -> None:
    random = np.random.default_rng(3)
    classes = random.integers(class_tables.CLASSES, class_tables.ALL_CLASSES, 4000)
    values = random.integers(0, 81, 4000)
    (data,) = entropy.encode([(values, classes)])
    assert entropy.decode([(data, classes)])[0].tolist() == values.tolist()


@pytest.mark.parametrize("number", [3, 61])
def test_tables_do_not_depend_on_what_a_program_does_with_decimals(number: int) -> None:
    wanted = class_tables.class_table(number).bounds.tolist()
    with localcontext() as context:
        context.prec = 3
        assert class_tables.class_table.__wrapped__(number).bounds.tolist() == wanted


def test_the_class_of_a_spread_is_the_cheapest_or_next_to_it() -> None:
    for spread in (0.3, 1.0, 3.0, 20.0, 500.0):
        values, _ = integers(20_000, spread)
        costs = [bits_in_class(values, number) for number in range(class_tables.CLASSES)]
        assert abs(int(np.argmin(costs)) - class_of(spread)) <= 2


@pytest.mark.parametrize("n", [1, 5000, 20001])
def test_a_stream_is_decoded_alone_as_it_is_beside_others(n: int) -> None:
    classes = np.random.default_rng(n).integers(0, 60, size=n)
    values = np.rint(np.random.default_rng(n + 1).normal(size=n) * 2.0 ** (classes / 4 - 4)).astype(np.int64)
    other = integers(97, 3.0)
    data, other_data = entropy.encode([(values, classes), other])
    (alone,) = entropy.decode([(data, classes)])
    beside, _ = entropy.decode([(data, classes), (other_data, other[1])])
    assert alone.tolist() == beside.tolist() == values.tolist()
    for cut in range(1, len(data), max(len(data) // 50, 1)):
        for streams in ([(data[:cut], classes)], [(data[:cut], classes), (other_data, other[1])]):
            with pytest.raises(FormatError, match="coded|bytes follow"):
                entropy.decode(streams)


def test_broken_bytes_are_refused() -> None:
    values, classes = integers(4000, 2.0)
    (data,) = entropy.encode([(values, classes)])
    for broken in (b"", data[:2], data[:-40], data + b"xy", bytes([data[0] ^ 1]) + data[1:]):
        with pytest.raises(FormatError, match="coded"):
            entropy.decode([(broken, classes)])


def test_integers_and_classes_out_of_range_are_refused() -> None:
    with pytest.raises(FormatError, match="beyond 32 bits"):
        entropy.encode([(np.array([2**31]), np.array([127]))])
    with pytest.raises(FormatError, match="classes are 0 to 175"):
        entropy.encode([(np.array([0]), np.array([176]))])
