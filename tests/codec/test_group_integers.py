"""Rows as integers: what comes back to the bit, what is lost, and tensors that are no such rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eigenlorax.codec import group_integers
from eigenlorax.core import linalg
from planted import normal

BITS = [8, 4]
LEVELS = {8: 127, 4: 7}


def rounded(rows, bits):
    return group_integers.decode(group_integers.encode(rows, bits))


def by_hand(payload, n):
    """The numbers of one matrix, read one by one in Python."""
    exponent = int(payload.get("exponent", 0))
    found = []
    for codes, scales in zip(payload["codes"].tolist(), payload["scales"].tolist(), strict=True):
        if payload["codes"].dtype == torch.uint8:
            codes = [half - 8 for byte in codes for half in (byte & 15, byte >> 4)][:n]
        found.append([code * scales[column // 64] * 2.0**exponent for column, code in enumerate(codes)])
    return torch.tensor(found, dtype=torch.float64).reshape(len(found), n)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 130])
class TestAMatrix:
    def test_reads_as_it_is_specified(self, bits, n):
        payload = group_integers.encode(normal(3, n, seed=n), bits)
        assert payload["codes"].shape == (3, n if bits == 8 else (n + 1) // 2)
        assert payload["scales"].shape == (3, (n + 63) // 64)
        found = group_integers.decode(payload)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), by_hand(payload, n))

    def test_is_off_by_less_than_a_level(self, bits, n):
        rows = normal(3, n, seed=n)
        off = (rounded(rows, bits).double() - rows).abs()
        largest = torch.stack([part.abs().amax(1) for part in rows.split(64, dim=1)], dim=1)
        level = largest.repeat_interleave(64, dim=1)[:, :n] / LEVELS[bits]
        if bits == 8:
            # a scale in float16 may be 2⁻¹¹ too small, and the largest number with it
            assert bool((off <= level * (0.5 + 127 / 2048)).all())
        assert float(off.norm() / rows.norm()) < 0.9 / LEVELS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_a_batch_is_its_matrices_one_by_one(bits):
    rows = torch.stack([normal(5, 70, seed=1), 1e-12 * normal(5, 70, seed=2), torch.zeros(5, 70).double()])
    payload = group_integers.encode(rows, bits)
    for index, one in enumerate(rows):
        alone = group_integers.encode(one, bits)
        assert all(torch.equal(payload[name][index], alone[name]) for name in alone)
    assert torch.equal(group_integers.decode(payload), torch.stack([rounded(one, bits) for one in rows]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power", [-110, -60, -30, -11, 0, 14, 17, 60, 110])
def test_sizes_far_beyond_float16_lose_no_more(bits, power):
    rows = normal(4, 90, seed=3)
    size = 2.0**power
    ordinary, found = rounded(rows, bits).double(), rounded(size * rows, bits).double()
    assert float((found / size - rows).norm()) == pytest.approx(float((ordinary - rows).norm()), rel=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_very_different_sizes(bits):
    rows = normal(2, 192, seed=4)
    rows[:, 64:128] *= 1e-9
    rows[0, 128:] = 0
    found = rounded(rows, bits).double()
    assert bool((found[0, 128:] == 0).all())
    assert bool((found[:, 64:128].abs() <= 1e-8).all())
    assert float((found - rows).norm() / rows.norm()) < 0.9 / LEVELS[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 11), (3, 0), (0, 0), (2, 0, 5), (0, 3, 5)])
def test_nothing(bits, shape):
    found = rounded(torch.zeros(shape, dtype=torch.float64), bits)
    # that rows of an odd width have it can be read off a row alone
    assert found.shape[:-1] == shape[:-1]
    assert found.numel() == 0


@pytest.mark.parametrize("bits", BITS)
def test_what_is_whole_numbers_of_a_scale_already_stays_to_the_bit(bits):
    rows = rounded(normal(6, 100, seed=5), bits)
    assert torch.equal(rounded(rows, bits), rows)


def test_four_bits_take_the_best_of_the_clips():
    rows = normal(200, 64, seed=6)
    chosen = (rounded(rows, 4).double() - rows).square().sum(1)
    scale = (rows.abs().amax(1, keepdim=True) / 7).half().double()
    plain = ((rows / scale).round().clamp(-7, 7) * scale - rows).square().sum(1)
    assert bool((chosen <= plain).all())
    assert float(chosen.sum()) < 0.9 * float(plain.sum())


@given(st.integers(1, 9), st.integers(1, 140), st.sampled_from(BITS), st.integers(0, 10**6))
def test_codes_in_bytes_come_back(r, n, bits, seed):
    payload = group_integers.encode(normal(r, n, seed=seed), bits)
    assert group_integers.decode(payload).shape == (r, n)
    assert torch.equal(group_integers.decode(payload).double(), by_hand(payload, n))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"codes": p["codes"].to(torch.int16)}, "codes .*torch.int16"),
        (lambda p: p | {"scales": p["scales"].float()}, "not with .*torch.float32"),
        (lambda p: p | {"scales": p["scales"][:, :1]}, r"scales \(3, 2\)"),
        (lambda p: p | {"scales": torch.full_like(p["scales"], float("inf"))}, "not finite"),
        (lambda p: p | {"exponent": torch.tensor([1], dtype=torch.int16)}, "exponent"),
        (lambda p: p | {"exponent": torch.tensor(1.5)}, "exponent"),
    ],
)
def test_tensors_that_are_no_rows(change, message):
    payload = group_integers.encode(normal(3, 70, seed=7), 8)
    with pytest.raises(ValueError, match=message):
        group_integers.decode(change(payload))


def test_half_a_byte_that_is_no_code():
    payload = group_integers.encode(normal(3, 7, seed=8), 4)
    payload["codes"][1, 2] = 0
    with pytest.raises(ValueError, match="half a byte is 0"):
        group_integers.decode(payload)


class TestMixing:
    @pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 6, 8, 12, 16, 64])
    def test_is_orthogonal_and_even(self, r):
        found = linalg.mixing_matrix(r)
        torch.testing.assert_close(found @ found.mT, torch.eye(r, dtype=torch.float64), atol=1e-12, rtol=0)
        assert float(found.square().max()) <= (1 if r & (r - 1) == 0 else 2) / r + 1e-12

    @pytest.mark.parametrize(("r", "n", "m"), [(3, 11, 17), (8, 5, 9), (4, 0, 0), (6, 6, 2), (1, 7, 3)])
    def test_even_rows_are_the_singular_vectors(self, r, n, m):
        down, up = normal(2, r, n, seed=1), normal(2, r, m, seed=2)
        even_down, even_up = linalg.svd_factors(down, up)
        assert (even_down.shape, even_up.shape) == (down.shape, up.shape)
        torch.testing.assert_close(even_up.mT @ even_down, up.mT @ down, atol=1e-12, rtol=1e-12)
        sigma = torch.zeros(2, r, dtype=torch.float64)
        values = torch.linalg.svdvals(up.mT @ down)[:, :r]
        sigma[:, : values.shape[1]] = values
        for rows in (even_down, even_up):
            torch.testing.assert_close(rows @ rows.mT, torch.diag_embed(sigma), atol=1e-10, rtol=1e-10)
