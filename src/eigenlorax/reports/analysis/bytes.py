"""Compression ratio by number of adapters, and the number from which on a pack is smaller than the LoRAs."""

Number = int | float
"""A number of bytes, or a mean."""


def ratio(n: int, lora: Number, basis: Number, each: Number) -> float:
    """Return the LoRA bytes of n adapters divided by those of a pack.

    lora: bytes of an adapter as LoRA. basis: bytes of the pack's bases. each: bytes of an adapter in the pack.
    """
    pack = basis + n * each
    return n * lora / pack if pack else 1.0


def break_even(lora: Number, basis: Number, each: Number) -> int | None:
    """Return the smallest number of adapters with which a pack is smaller than the LoRAs; None if it never is."""
    if each >= lora:
        return None
    # not the floor of a quotient, which may have been rounded up to the next integer
    return int(basis // (lora - each)) + 1


def over_n(lora: Number, basis: Number, each: Number, n: int) -> list[tuple[int, float]]:
    """Return (adapters, ratio) for 1, 2, 5, 10, … adapters up to 1000 n, and for n itself."""
    counts = {n}
    for power in range(7):
        counts |= {step * 10**power for step in (1, 2, 5)}
    return [(count, ratio(count, lora, basis, each)) for count in sorted(counts) if count <= max(1000 * n, 1000)]
