"""What a collection costs, as LoRAs and as a pack, and from how many adapters on the pack is the smaller one."""

import math


def ratio(n: float, lora: float, basis: float, each: float) -> float:
    """LoRA bytes of n adapters over those of a pack: `lora` and `each` bytes an adapter, `basis` once."""
    ours = basis + n * each
    return n * lora / ours if ours else 1.0


def break_even(lora: float, basis: float, each: float) -> int | None:
    """The fewest adapters of which a pack is smaller than the LoRAs; None if it never is."""
    if each >= lora:
        return None
    n = math.floor(basis / (lora - each)) + 1
    return max(n, 1)


def over_n(lora: float, basis: float, each: float, n: int) -> list[tuple[int, float]]:
    """The ratio for 1, 2, 5, 10, … adapters, up to a thousand times as many as there are, and for n itself."""
    counts = {n}
    for power in range(7):
        counts |= {step * 10**power for step in (1, 2, 5)}
    return [(count, ratio(count, lora, basis, each)) for count in sorted(counts) if count <= max(1000 * n, 1000)]
