"""Errors and bytes of a pack beside those of other methods, sizes and chance, as data of a report.

Units, and fields that are None, are as in `data`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Errors of several adapters. rms: root mean square. worst_adapter: the name of the one with the largest error."""

    adapters: int
    mean: float
    rms: float
    worst: float
    worst_adapter: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Adapters in the subspace of a fit without them.

    sampled: number of adapters left out in turn, of `of`. method: how, in words.
    standard_error: of errors.mean. in_fit: errors of the same adapters in the subspace of all.
    chance: their mean error in as many random directions.
    kept: share of the squared norm that is kept, of what random directions do not keep; kept_spread: its standard
        deviation if the adapters share nothing.
    sharing: adapters that keep at least half of that, and more than chance scatters.
    """

    sampled: int
    of: int
    seed: int
    method: str
    errors: Spread
    standard_error: float
    in_fit: Spread
    chance: float
    kept: float
    kept_spread: float
    sharing: list[str]


@dataclass(frozen=True, slots=True)
class SideEnergy:
    """Share of energy in the first k directions of one side without sweeps, the mean over modules.

    null: the same for the null model; spread: its standard deviation.
    """

    energy: float
    null: float
    spread: float


@dataclass(frozen=True, slots=True)
class Null:
    """The null model: the same adapters if they shared nothing.

    Each adapter keeps its singular values in every module, and so its norm and rank; its singular vectors are random.

    draws: random draws of each module. errors: delta errors in a fit like the pack's, before rounding, means over
    random collections. spread: standard deviation of errors.mean between random collections.
    """

    draws: int
    seed: int
    errors: Spread
    spread: float
    down: SideEnergy
    up: SideEnergy


@dataclass(frozen=True, slots=True)
class Baseline:
    """Another method for the same adapters.

    key: "pack", "left-out", "mean", "mean-scaled", "random", "null", "truncated", "int8" or "int4". label: for a table.
    stored_bytes: of all adapters of the fit, without heads and carried tensors; None if the method stores nothing.
    """

    key: str
    label: str
    errors: Spread
    stored_bytes: int | None


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One method of storing the adapters, at one setting.

    way: "pack", or a key of `frontier.METHODS`. settings: what the method was tuned to, in words, or "".
    stored_bytes: without heads and carried tensors. worst, mean: delta errors.
    """

    way: str
    settings: str
    stored_bytes: int
    worst: float
    mean: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Bytes against the worst error: the pack first, then each method by bytes.

    adapters: those whose originals were given. modules: number of modules, of `of`, on which the methods were measured;
    their bytes are scaled to all modules. lora_float16: bytes of the factors at two bytes per number.
    """

    adapters: int
    modules: int
    of: int
    lora_float16: int
    points: list[FrontierPoint]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes of the collection, without heads.

    lora_files: weights files, with all their tensors. lora_stored: the factors in their own dtypes; lora: at the pack's
    narrower dtype, from which ratios are computed; lora_float16: at two bytes per number. These three include carried
    tensors; all four leave out untrained adapters.
    ratio: lora ÷ (basis + coefficients + carried). limit: the ratio for an unlimited number of such adapters.
    break_even: number of adapters from which on the pack is smaller, None if never. over_n: pairs (adapters, ratio).
    """

    lora_files: int
    lora_stored: int | None
    lora: int
    lora_float16: int
    basis: int
    coefficients: int
    carried: int
    heads: int
    ratio: float
    limit: float
    break_even: int | None
    over_n: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class SizePoint:
    """The collection with k components on every side, bases without sweeps.

    mean, worst: delta errors; null: mean error of the null model, fitted alike; null_spread: as `Null.spread`.
    left_out: mean error of the adapters left out of the fit; random: of the same ones in as many random directions.
    sharing: as in `LeftOut`. stored_bytes: basis, coefficients and carried tensors.
    """

    k: int
    mean: float
    worst: float
    null: float | None
    null_spread: float | None
    left_out: float | None
    random: float | None
    stored_bytes: int
    ratio: float
    sharing: list[str]
