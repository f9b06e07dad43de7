"""Figures of a report that compare the pack with other methods, other sizes and chance. Units are as in `data`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of the errors of several adapters.

    Attributes:
        adapters: Number of adapters.
        mean: Mean error.
        rms: Root mean square error.
        worst: Largest error.
        worst_adapter: Name of the adapter with the largest error.
        standard_error: Standard error of `mean` from the sample of modules; 0 if all modules were measured, None if it
            is unknown.
    """

    adapters: int
    mean: float
    rms: float
    worst: float
    worst_adapter: str
    standard_error: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sample of modules on which all figures that need the originals were measured.

    Attributes:
        modules: Number of modules in the sample.
        of: Number of modules of the subspace.
        seed: Seed of the sample.
        standard_errors: Mean standard error of the figures of one adapter, by field of `AdapterFigures`; None
            where it is unknown.
    """

    modules: int
    of: int
    seed: int
    standard_errors: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Leave-one-out errors: each adapter in the subspace of a fit without it.

    Attributes:
        sampled: Number of adapters that were left out in turn.
        of: Number of adapters in the fit.
        seed: Seed of the sample.
        method: How the fit without the adapter was made, in words.
        errors: Errors of the adapters left out.
        standard_error: Standard error of errors.mean, from the samples of adapters and of modules; None if it is
            unknown, as with a single adapter.
        in_fit: Errors of the same adapters in the pack.
        chance: Their mean error in equally many random components.
        kept: Share of the squared norm that is kept beyond chance: 1 if all is kept, 0 if no more than random
            components keep.
        kept_spread: Standard deviation of `kept` if the adapters share nothing.
        kept_standard_error: Standard error of `kept` from the sample of modules; 0 if all modules were measured, None
            if it is unknown.
        sharing: Names of adapters of which at least half is kept beyond chance, and significantly more than by chance.
    """

    sampled: int
    of: int
    seed: int
    method: str
    errors: Spread
    standard_error: float | None
    in_fit: Spread
    chance: float
    kept: float
    kept_spread: float
    kept_standard_error: float | None
    sharing: list[str]


@dataclass(frozen=True, slots=True)
class SideEnergy:
    """Share of energy in the first k components of one side without sweeps, as a mean over modules.

    Attributes:
        energy: Energy of the adapters.
        null: Energy of the null model.
        spread: Standard deviation of `null` between random collections.
        standard_error: Standard error of energy − null from the sample of modules; 0 if all modules were measured, None
            if it is unknown.
    """

    energy: float
    null: float
    spread: float
    standard_error: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Null:
    """The null model: adapters with the same singular values in every module, and random singular vectors.

    Attributes:
        draws: Number of random draws of each module.
        seed: Seed of the draws.
        errors: Delta errors in a fit with the pack's options, before rounding, as means over random collections.
        spread: Standard deviation of errors.mean between random collections.
        down, up: Energy of both sides.
    """

    draws: int
    seed: int
    errors: Spread
    spread: float
    down: SideEnergy
    up: SideEnergy


@dataclass(frozen=True, slots=True)
class Baseline:
    """Errors and bytes of one method for the same adapters.

    Attributes:
        key: "pack", "left-out", "mean", "mean-scaled", "random", "null", "truncated", "int8" or "int4".
        label: Label for tables.
        errors: Delta errors.
        stored_bytes: Bytes of all adapters of the fit, without heads and carried tensors; None if the method stores
            nothing.
    """

    key: str
    label: str
    errors: Spread
    stored_bytes: int | None


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One method of storing the adapters, with one setting.

    Attributes:
        way: "pack", or a key of `frontier.METHODS`.
        settings: Parameters of the method, in words, or "".
        stored_bytes: Bytes without heads and carried tensors.
        worst: Largest delta error.
        mean: Mean delta error.
    """

    way: str
    settings: str
    stored_bytes: int
    worst: float
    mean: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Bytes against the worst error.

    Attributes:
        adapters: Number of adapters whose originals were passed.
        modules: Number of modules on which the methods were measured. Bytes are scaled to all modules.
        of: Number of all modules.
        relative_error: Relative standard error of scaled bytes, from those of truncated and rounded LoRAs in each
            module; None if all modules were measured, or a single one.
        lora_float16: Bytes of the factors at two bytes per number.
        points: The pack first, then each method, sorted by bytes.
    """

    adapters: int
    modules: int
    of: int
    relative_error: float | None
    lora_float16: int
    points: list[FrontierPoint]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes of the collection, without heads.

    Untrained adapters do not count in the bytes of the LoRAs.

    Attributes:
        lora_files: Bytes of the weights files, with all their tensors.
        lora_stored: Bytes of the factors in their own dtypes, and of carried tensors.
        lora: Bytes of the factors in the pack's narrower dtype, and of carried tensors. Ratios refer to it.
        lora_float16: Bytes of the factors at two bytes per number, and of carried tensors.
        basis: Bytes of the bases.
        coefficients: Bytes of the coefficients.
        carried: Bytes of carried tensors.
        heads: Bytes of trained heads.
        ratio: lora ÷ (basis + coefficients + carried).
        limit: The ratio for an unlimited number of such adapters.
        break_even: Smallest number of such adapters with which the pack is smaller; None if it never is.
        over_n: Pairs (number of adapters, ratio).
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
    """Errors and bytes of the collection with k components per side, from bases without sweeps.

    Attributes:
        k: Number of components.
        mean: Mean delta error.
        worst: Largest delta error.
        null: Mean delta error of the null model.
        null_spread: Standard deviation of `null` between random collections.
        left_out: Mean leave-one-out error.
        random: Mean error of the same adapters in equally many random components.
        stored_bytes: Bytes of basis, coefficients and carried tensors.
        ratio: LoRA bytes ÷ stored_bytes.
        sharing: Adapters that share a subspace, as in `LeftOut`.
        standard_error: Standard error of `mean` from the sample of modules; 0 if all modules were measured, None if it
            is unknown.
        left_out_standard_error: The same of `left_out`; None also if that is None.
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
    standard_error: float | None = 0.0
    left_out_standard_error: float | None = None
