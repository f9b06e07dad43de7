"""Numbers as integers of 8 or 4 bits, with one scale for each group of a row: rounding them, and reading them again.

A number is code · scale · 2^exponent, with one exponent for a whole matrix. Nothing here knows what the rows stand for.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 64
"""Numbers of a row that share a scale; the last group of a row may have fewer."""
CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)}
"""By bits, shares of a group's largest number that its largest code may stand for; what is beyond is cut off. With 127
levels even a little off one number costs more than finer steps for the 63 others can bring."""
PARTS = CODES, SCALES, EXPONENT = "codes", "scales", "exponent"
SMALLEST, LARGEST = 2.0**-12, 2.0**15
"""Between these the largest scale of a matrix is kept as it is: float16 has room, and digits, for it and for scales so
much smaller that their groups do not matter beside it."""
_OFFSET = 8
"""What is added to a code of 4 bits. So none of them is 0, which fills up the last byte of a row of odd width."""

Payload = Mapping[str, Tensor]
"""Tensors as they lie in a file, by name."""


def encode(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """The rounding of rows, (…, r, n), to 8 or 4 bits; what leads is a batch of matrices.

    codes: (…, r, n) int8, or (…, r, ⌈n / 2⌉) uint8 for 4 bits. scales: (…, r, groups) float16; of each group the one
        that loses least of `CLIPS`. exponent: (…) int16.
    """
    if not rows.numel():
        return _empty(rows.shape, bits)
    exact = rows.to(torch.float64)
    levels = 2 ** (bits - 1) - 1
    groups = _grouped(exact)
    largest = groups.abs().amax(3) / levels
    exponent = _exponents(largest)
    groups, largest = (t * (-exponent).double().exp2().view(-1, *[1] * (t.ndim - 1)) for t in (groups, largest))
    codes, scales = torch.zeros_like(groups), torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for clip in CLIPS[bits]:
        scale = (largest * clip).to(torch.float16).to(torch.float64)
        step = torch.where(scale > 0, scale, 1.0)[..., None]
        code = torch.where(scale[..., None] > 0, (groups / step).round().clamp(-levels, levels), 0.0)
        lost = (groups - code * scale[..., None]).square().sum(3)
        better = lost < least
        codes = torch.where(better[..., None], code, codes)
        scales, least = torch.where(better, scale, scales), torch.where(better, lost, least)
    whole = codes.flatten(2)[..., : exact.shape[-1]].to(torch.int8).reshape(exact.shape)
    return {
        CODES: whole.contiguous() if bits == 8 else _packed(whole),
        SCALES: scales.to(torch.float16).reshape(*exact.shape[:-1], -1),
        EXPONENT: exponent.reshape(exact.shape[:-2]).to(torch.int16),
    }


def decode(payload: Payload) -> Tensor:
    """The rows that were rounded, (…, r, n) float32: code · scale · 2^exponent, exact within float32's range. No
    exponent is one of 0. `ValueError` where tensors are not what `encode` gives."""
    codes, scales = payload[CODES], payload[SCALES]
    if codes.dtype == torch.uint8:
        codes = _unpacked(codes)
    wanted = (*codes.shape[:-1], _groups(codes.shape[-1]))
    if codes.dtype != torch.int8 or scales.dtype != torch.float16 or tuple(scales.shape) != wanted:
        raise ValueError(
            f"codes {tuple(codes.shape)}, {codes.dtype}, go with scales {wanted}, torch.float16, not with "
            f"{tuple(scales.shape)}, {scales.dtype}"
        )
    if not bool(scales.isfinite().all()):
        raise ValueError("a scale is not finite")
    if not codes.numel():
        return codes.float()
    wide = scales.float().repeat_interleave(GROUP, dim=-1)[..., : codes.shape[-1]]
    rows = codes.float() * wide
    if EXPONENT in payload and bool((payload[EXPONENT] != 0).any()):
        exponent = payload[EXPONENT]
        if exponent.dtype != torch.int16 or exponent.shape != codes.shape[:-2]:
            raise ValueError(f"exponent is {tuple(exponent.shape)}, {exponent.dtype}, not int16, one a matrix")
        rows = (rows.double() * exponent.double().exp2()[..., None, None]).float()
    return rows


def without_zero_exponent(payload: Payload) -> dict[str, Tensor]:
    """What is written of one matrix: an exponent that is 0 is left out."""
    return {name: tensor for name, tensor in payload.items() if name != EXPONENT or int(tensor)}


def _empty(shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
    *leading, n = shape
    return {
        CODES: torch.zeros(*leading, -(-n * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8),
        SCALES: torch.zeros(*leading, _groups(n), dtype=torch.float16),
        EXPONENT: torch.zeros(leading[:-1], dtype=torch.int16),
    }


def _grouped(exact: Tensor) -> Tensor:
    """(b, r, groups, GROUP): the batch in one, rows filled up by zeros."""
    batch = exact.reshape(exact.shape[:-2].numel(), *exact.shape[-2:])
    n = batch.shape[-1]
    filled = torch.nn.functional.pad(batch, (0, _groups(n) * GROUP - n))
    return filled.view(*batch.shape[:2], _groups(n), GROUP)


def _groups(n: int) -> int:
    return -(-n // GROUP)


def _exponents(largest: Tensor) -> Tensor:
    """Of each matrix of a batch, by its scales (b, r, groups) as they should be, what brings them into float16."""
    most = largest.flatten(1).amax(1)
    inside = (most == 0) | ((most >= SMALLEST) & (most < LARGEST))
    return torch.where(inside, 0.0, torch.where(most > 0, most, 1.0).log2().floor())


def _packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits to a byte, the first one in its lower half."""
    halves = (codes + _OFFSET).to(torch.uint8)
    halves = torch.nn.functional.pad(halves, (0, halves.shape[-1] % 2))
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    odd = halves.numel() > 0 and not bool(halves[..., -1].any())
    halves = halves[..., :-1] if odd else halves
    if not bool(halves.all()):
        raise ValueError("half a byte is 0, which is no code of 4 bits")
    return halves.to(torch.int8) - _OFFSET
