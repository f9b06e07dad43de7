"""What a collection costs, as LoRAs and as a pack, and from how many adapters on the pack is the smaller one."""

Number = int | float
"""Bytes, or a mean of them."""


def ratio(n: int, lora: Number, basis: Number, each: Number) -> float:
    """LoRA bytes of n adapters over those of a pack: `lora` and `each` bytes an adapter, `basis` once."""
    ours = basis + n * each
    return n * lora / ours if ours else 1.0


def break_even(lora: Number, basis: Number, each: Number) -> int | None:
    """The fewest adapters of which a pack is smaller than the LoRAs; None if it never is."""
    if each >= lora:
        return None
    # not the floor of a quotient, which may have been rounded up to the next integer
    return int(basis // (lora - each)) + 1


def over_n(lora: Number, basis: Number, each: Number, n: int) -> list[tuple[int, float]]:
    """The ratio for 1, 2, 5, 10, … adapters, up to a thousand times as many as there are, and for n itself."""
    counts = {n}
    for power in range(7):
        counts |= {step * 10**power for step in (1, 2, 5)}
    return [(count, ratio(count, lora, basis, each)) for count in sorted(counts) if count <= max(1000 * n, 1000)]
