"""Numbers as compressed byte planes, without loss (docs/pack-format.md, "Lossless versions").

The bits of a number become an integer in the order of the numbers, so that numbers that are close have integers that
are close. The difference to the earlier number is folded, so that small differences of either sign have zeros in their
high bytes. All lowest bytes are compressed together, then all second bytes, and so on.

An optimizer changes large and small weights by about the same amount, which is a greater difference of integers where
the exponent is small. Differences are therefore sorted by the exponent of the earlier number, which the decoder knows.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import FormatError, reason
from .. import varint

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Higher levels make the planes of weights larger by up to 1 %: they look for repetitions, and there are none.
_LEVEL = 1
# A frame states how much memory its window takes. At this level it is at most 2^19 bytes.
_DECODER_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 20}


@dataclass(frozen=True, slots=True)
class NumberLayout:
    """Bits of a dtype.

    Attributes:
        width: Number of bytes.
        mantissa: Number of mantissa bits; None for integers.
    """

    width: int
    mantissa: int | None = None

    @property
    def integers(self) -> np.dtype:
        """Signed integers of this width."""
        return np.dtype(f"<i{self.width}")

    def to_integers(self, tensor: Tensor) -> np.ndarray:
        """Return the numbers of a tensor as integers (n,) in the same order. NaN are beyond the infinities."""
        bits = tensor.detach().cpu().contiguous().view(_BITS[self.width]).reshape(-1).numpy()
        return self._flip(bits.astype(self.integers, copy=False))

    def to_tensor(self, integers: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor that `to_integers` was given."""
        bits = self._flip(integers).astype(self.integers.newbyteorder("="))
        return torch.from_numpy(bits).reshape(shape).view(dtype)

    def order(self, earlier: np.ndarray) -> np.ndarray:
        """Return the indices (n,) that sort earlier integers by the exponent of their numbers.

        Equal exponents keep their order; integers have none, and stay as they are.
        """
        if self.mantissa is None:
            return np.arange(len(earlier))
        # folded floats are the exponent, the mantissa and the sign; NumPy sorts single bytes in linear time
        exponents = (fold(earlier) >> (self.mantissa + 1)).astype(np.uint8)
        return np.argsort(exponents, kind="stable")

    def _flip(self, bits: np.ndarray) -> np.ndarray:
        """Map bits of floats to ordered integers, or back: the magnitude of negative numbers is complemented."""
        if self.mantissa is None:
            return bits
        flipped: np.ndarray = bits ^ (bits >> (8 * self.width - 1) & np.iinfo(self.integers).max)
        return flipped


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LAYOUTS = {
    torch.float64: NumberLayout(8, 52),
    torch.float32: NumberLayout(4, 23),
    torch.float16: NumberLayout(2, 10),
    torch.bfloat16: NumberLayout(2, 7),
    torch.float8_e4m3fn: NumberLayout(1, 3),
    torch.float8_e5m2: NumberLayout(1, 2),
    torch.int64: NumberLayout(8),
    torch.int32: NumberLayout(4),
    torch.int16: NumberLayout(2),
    torch.int8: NumberLayout(1),
    torch.uint64: NumberLayout(8),
    torch.uint32: NumberLayout(4),
    torch.uint16: NumberLayout(2),
    torch.uint8: NumberLayout(1),
    torch.bool: NumberLayout(1),
}
"""Layouts of the dtypes that can be encoded: all of safetensors' but complex numbers and those below 8 bits."""


def fold(integers: np.ndarray) -> np.ndarray:
    """Return unsigned integers: 0, −1, 1, −2, … become 0, 1, 2, 3, …"""
    bits = 8 * integers.itemsize
    return ((integers << 1) ^ (integers >> (bits - 1))).view(f"<u{integers.itemsize}")


def unfold(folded: np.ndarray) -> np.ndarray:
    """Return the integers that `fold` was given."""
    signed = folded.view(f"<i{folded.itemsize}")
    integers: np.ndarray = (folded >> 1).view(signed.dtype) ^ -(signed & 1)
    return integers


def encode(integers: np.ndarray, earlier: np.ndarray | None, layout: NumberLayout) -> bytes:
    """Return the compressed planes of integers, each after its length.

    Args:
        integers: Integers (n,) that `NumberLayout.to_integers` returned.
        earlier: Integers (n,) that they are predicted from; None for no prediction.
        layout: Layout of their dtype.
    """
    return b"".join(_with_length(_compress_plane(plane)) for plane in _planes(integers, earlier, layout))


def encode_uncompressed(integers: np.ndarray, layout: NumberLayout) -> bytes:
    """Return the planes of integers that are not predicted, without compression. `decode` reads them too."""
    return b"".join(_with_length(plane) for plane in _planes(integers, None, layout))


def decode(data: bytes, start: int, n: int, earlier: np.ndarray | None, layout: NumberLayout) -> tuple[np.ndarray, int]:
    """Return the integers (n,) whose planes begin at an index, and the index after their planes.

    Raises:
        FormatError: A plane is damaged, or has another number of bytes.
    """
    planes = np.empty((n, layout.width), dtype=np.uint8)
    at = start
    for plane in planes.T:
        size, at = varint.decode(data, at)
        # a plane that compression does not make smaller is there as it is
        stored = data[at : at + size] if size == n else decompress(data[at : at + size], n)
        if len(stored) != n:
            raise FormatError(f"a plane of {n:,} numbers has {len(stored):,} bytes.")
        plane[:] = np.frombuffer(stored, dtype=np.uint8)
        at += size
    folded = planes.reshape(-1).view(f"<u{layout.width}")
    if earlier is None:
        return unfold(folded), at
    restored = np.empty_like(folded)
    restored[layout.order(earlier)] = folded
    return unfold(restored) + earlier, at


def _planes(integers: np.ndarray, earlier: np.ndarray | None, layout: NumberLayout) -> list[bytes]:
    """Return the planes of integers, the lowest bytes first; arguments as in `encode`."""
    # the difference may overflow: it wraps, and wraps back when the earlier integer is added
    folded = fold(integers) if earlier is None else fold(integers - earlier)[layout.order(earlier)]
    return [plane.tobytes() for plane in folded.view(np.uint8).reshape(-1, layout.width).T]


def compress(data: bytes) -> bytes:
    """Return bytes as one Zstandard frame."""
    return zstd.compress(data, _LEVEL)


def decompress(frame: bytes, limit: int) -> bytes:
    """Return the content of one Zstandard frame.

    Args:
        frame: The frame.
        limit: Maximum number of bytes of the content. No more memory is allocated for it.

    Raises:
        FormatError: The frame is damaged, is followed by more, or has more content.
    """
    decompressor = zstd.ZstdDecompressor(options=_DECODER_OPTIONS)
    try:
        content = decompressor.decompress(frame, limit + 1)
    except zstd.ZstdError as error:
        raise FormatError(f"a Zstandard frame is damaged: {reason(error)}.") from error
    if len(content) > limit or not decompressor.eof or decompressor.unused_data:
        raise FormatError("a Zstandard frame ends too early or too late.")
    return content


def _compress_plane(plane: bytes) -> bytes:
    frame = compress(plane)
    return frame if len(frame) < len(plane) else plane


def _with_length(part: bytes) -> bytes:
    return varint.encode(len(part)) + part
