"""Compression ratio as a function of the number of adapters, and its break-even point."""

Number = int | float
"""Number of bytes, or a mean of such numbers."""


def ratio(n: int, lora: Number, basis: Number, packed: Number) -> float:
    """Return the LoRA bytes of n adapters divided by the bytes of a pack.

    Args:
        n: Number of adapters.
        lora: Bytes of one adapter as a LoRA.
        basis: Bytes of the pack's bases.
        packed: Bytes of one adapter in the pack.
    """
    pack = basis + n * packed
    return n * lora / pack if pack else 1.0


def break_even(lora: Number, basis: Number, packed: Number) -> int | None:
    """Return the smallest number of adapters with which a pack is smaller than the LoRAs; None if it never is."""
    if packed >= lora:
        return None
    # floor division is exact; the quotient may be rounded up to the next integer
    return int(basis // (lora - packed)) + 1


def over_n(lora: Number, basis: Number, packed: Number, n: int) -> list[tuple[int, float]]:
    """Return (adapters, ratio) for 1, 2, 5, 10, … adapters up to 1000 n, and for n itself."""
    counts = {n}
    for power in range(7):
        counts |= {step * 10**power for step in (1, 2, 5)}
    return [(count, ratio(count, lora, basis, packed)) for count in sorted(counts) if count <= max(1000 * n, 1000)]
