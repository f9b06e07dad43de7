"""Numbers as integers of 8 or 4 bits, with one scale for each group of a row.

A number is code · scale · 2^exponent, with one exponent for a whole matrix. This module does not know what the rows
represent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 64
"""Numbers of a row that share a scale; the last group of a row may have fewer."""
CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)}
"""Candidates, by bits, for the largest representable number of a group, relative to its largest number. Larger numbers
are clipped. With 127 levels, clipping one number costs more squared error than a finer scale saves for the others."""
PARTS = CODES, SCALES, EXPONENT = "codes", "scales", "exponent"
SMALLEST, LARGEST = 2.0**-12, 2.0**15
"""A matrix whose largest scale lies between these has the exponent 0: float16 has room, and digits, for that scale and
for scales so much smaller that their groups do not matter beside it."""
_OFFSET = 8
"""Added to a code of 4 bits. So no code is 0, which fills the last half byte of a row of odd width."""

Payload = Mapping[str, Tensor]
"""Tensors of a file, by name."""


def encode(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """Round rows, (…, r, n), to 8 or 4 bits; leading dimensions are a batch of matrices.

    Returns codes, (…, r, n) int8, or (…, r, ⌈n / 2⌉) uint8 for 4 bits; scales, (…, r, groups) float16, for each group
    the candidate of `CLIPS` with the least squared error; exponent, (…) int16.
    """
    if not rows.numel():
        return _empty(rows.shape, bits)
    exact = rows.to(torch.float64)
    # symmetric, −127 to 127 or −7 to 7: −rows has the codes of rows, negated
    levels = 2 ** (bits - 1) - 1
    groups = _grouped(exact)
    full_scales = groups.abs().amax(3) / levels
    exponent = _exponents(full_scales)
    groups, full_scales = (t * (-exponent).double().exp2().view(-1, *[1] * (t.ndim - 1)) for t in (groups, full_scales))
    codes, scales = torch.zeros_like(groups), torch.zeros_like(full_scales)
    least_error = torch.full_like(full_scales, torch.inf)
    # a group of zeros has the scale 0 and the codes 0, which no division may turn into NaN
    for clip in CLIPS[bits]:
        # codes are made for the scale as it will be stored, so that its rounding costs nothing more
        scale = (full_scales * clip).to(torch.float16).to(torch.float64)
        divisor = torch.where(scale > 0, scale, 1.0)[..., None]
        candidate = torch.where(scale[..., None] > 0, (groups / divisor).round().clamp(-levels, levels), 0.0)
        error = (groups - candidate * scale[..., None]).square().sum(3)
        better = error < least_error
        codes = torch.where(better[..., None], candidate, codes)
        scales, least_error = torch.where(better, scale, scales), torch.where(better, error, least_error)
    unpadded = codes.flatten(2)[..., : exact.shape[-1]].to(torch.int8).reshape(exact.shape)
    return {
        CODES: unpadded.contiguous() if bits == 8 else _pack_halves(unpadded),
        SCALES: scales.to(torch.float16).reshape(*exact.shape[:-1], -1),
        EXPONENT: exponent.reshape(exact.shape[:-2]).to(torch.int16),
    }


def decode(payload: Payload) -> Tensor:
    """Return the rounded rows, (…, r, n) float32: code · scale · 2^exponent, exact within float32's range.

    A payload without an exponent has the exponent 0. `ValueError` where the tensors are not what `encode` returns.
    """
    codes, scales = payload[CODES], payload[SCALES]
    if codes.dtype == torch.uint8:
        codes = _unpack_halves(codes)
    scales_shape = (*codes.shape[:-1], _groups(codes.shape[-1]))
    if codes.dtype != torch.int8 or scales.dtype != torch.float16 or tuple(scales.shape) != scales_shape:
        raise ValueError(
            f"codes {tuple(codes.shape)}, {codes.dtype}, go with scales {scales_shape}, torch.float16, not with "
            f"{tuple(scales.shape)}, {scales.dtype}"
        )
    if not bool(scales.isfinite().all()):
        raise ValueError("a scale is not finite")
    if not codes.numel():
        return codes.float()
    row_scales = scales.float().repeat_interleave(GROUP, dim=-1)[..., : codes.shape[-1]]
    # at most 7 bits times the 11 of float16 fit float32's 24: the product is exact
    rows = codes.float() * row_scales
    if EXPONENT in payload and bool((payload[EXPONENT] != 0).any()):
        exponent = payload[EXPONENT]
        if exponent.dtype != torch.int16 or exponent.shape != codes.shape[:-2]:
            raise ValueError(f"exponent is {tuple(exponent.shape)}, {exponent.dtype}, not int16, one a matrix")
        rows = (rows.double() * exponent.double().exp2()[..., None, None]).float()
    return rows


def drop_zero_exponent(payload: Payload) -> dict[str, Tensor]:
    """Remove the exponent of one matrix if it is zero, as files omit it."""
    return {name: tensor for name, tensor in payload.items() if name != EXPONENT or int(tensor)}


def _empty(shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
    *leading, n = shape
    return {
        CODES: torch.zeros(*leading, -(-n * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8),
        SCALES: torch.zeros(*leading, _groups(n), dtype=torch.float16),
        EXPONENT: torch.zeros(leading[:-1], dtype=torch.int16),
    }


def _grouped(exact: Tensor) -> Tensor:
    """Return the rows in groups, (batch, r, groups, GROUP), padded with zeros."""
    batch = exact.reshape(exact.shape[:-2].numel(), *exact.shape[-2:])
    n = batch.shape[-1]
    padded = torch.nn.functional.pad(batch, (0, _groups(n) * GROUP - n))
    return padded.view(*batch.shape[:2], _groups(n), GROUP)


def _groups(n: int) -> int:
    return -(-n // GROUP)


def _exponents(scales: Tensor) -> Tensor:
    """Return the exponent of each matrix that brings its exact scales, (batch, r, groups), into float16."""
    largest = scales.flatten(1).amax(1)
    fits = (largest == 0) | ((largest >= SMALLEST) & (largest < LARGEST))
    return torch.where(fits, 0.0, torch.where(largest > 0, largest, 1.0).log2().floor())


def _pack_halves(codes: Tensor) -> Tensor:
    """Pack two codes of 4 bits into each byte, the first one in its lower half."""
    halves = (codes + _OFFSET).to(torch.uint8)
    halves = torch.nn.functional.pad(halves, (0, halves.shape[-1] % 2))
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def _unpack_halves(packed: Tensor) -> Tensor:
    """Return the codes of 4 bits in bytes, without the filling of an odd width; `ValueError` for a half byte of 0."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    # encoded halves are 1 to 15: a column of zeros is the filling of an odd width
    odd = halves.numel() > 0 and not bool(halves[..., -1].any())
    halves = halves[..., :-1] if odd else halves
    if not bool(halves.all()):
        raise ValueError("half a byte is 0, which is no code of 4 bits")
    return halves.to(torch.int8) - _OFFSET
