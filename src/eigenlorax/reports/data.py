"""A report as data: the figures of the page, and the schema of its JSON. docs/report.md describes each field.

Errors are relative Frobenius errors: the root of a squared error over a squared norm. Energies and overlaps are shares
from 0 to 1. Angles are in degrees. None means not measured: the original adapters were not given, or do not allow it.
The names of fields are those of the JSON; renaming one changes the schema.
"""

from dataclasses import dataclass, field

SCHEMA_VERSION = 4


@dataclass(frozen=True, slots=True)
class Collection:
    """The pack that the report describes, and how its subspace was fitted.

    size: how the number of components was chosen, in words, such as "at most 32 components".
    with_originals: whether the original adapters were given; without them, most figures cannot be measured.
    """

    base_model: str | None
    revision: str | None
    adapters: int
    modules: int
    ranks: list[int]
    weighting: str
    sweeps: int
    size: str
    dtype: str
    coefficient_dtype: str
    fingerprint: str
    n_extra: int
    excluded_modules: list[str]
    skipped: dict[str, str]
    with_originals: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One conclusion from the figures.

    kind: "shared", "not-shared", "partly-shared" or "unknown" for the answer to the main question, which is the first
        finding; then "start", "mean", "clusters", "outlier", "duplicate", "untrained", "task", "loss", "bytes",
        "baseline", "rounding", "cores".
    text: one or two sentences. advice: what to do about it, or "".
    good: True if it speaks for the pack, False if against it, None if neither.
    adapters: the names of the adapters that it concerns.
    """

    kind: str
    text: str
    advice: str = ""
    good: bool | None = None
    adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusions in plain words. headline: one sentence with figures. findings: the most important first."""

    headline: str
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """One adapter.

    norm: Frobenius norm of the update over its modules in the subspace. energy_kept: 1 − delta_error².
    factor_error_down, factor_error_up: errors of A and of B alone.
    left_out_error: delta error in the subspace of all other adapters.
    mean_error: delta error of the mean adapter in its place; mean_scaled_error: of the best multiple of that mean.
    random_error: delta error in random bases with the same number of components.
    truncated_error: delta error of the adapter truncated by SVD to the bytes that it takes in the pack.
    int8_error, int4_error: delta errors of its factors rounded to so many bits.
    nearest: the adapter with the largest absolute cosine. overlap: mean overlap of its directions with the others'.
    cluster: index in `Similarity.clusters`, None if it is in none. x, y: its position on the map.
    """

    name: str
    in_fit: bool
    untrained: bool
    ranks: list[int]
    modules: int
    norm: float | None
    delta_error: float
    rounding_error: float
    energy_kept: float
    factor_error_down: float | None
    factor_error_up: float | None
    left_out_error: float | None
    mean_error: float | None
    mean_scaled_error: float | None
    random_error: float | None
    truncated_error: float | None
    int8_error: float | None
    int4_error: float | None
    nearest: str | None
    nearest_cosine: float | None
    overlap: float | None
    cluster: int | None
    x: float | None
    y: float | None
    lora_bytes: int
    file_bytes: int
    coefficient_bytes: int
    carried_bytes: int
    head_bytes: int


@dataclass(frozen=True, slots=True)
class SideFigures:
    """One side of one module.

    rank: numerical rank of the stacked updates. energy: share of their squared norm in the k components.
    spectrum: σ²/Σσ² of the stacked updates before sweeps, descending, at most `SPECTRUM` values.
    angles: principal angles between the subspaces of two random halves of the collection, ascending, in degrees;
    halves_overlap: mean of their squared cosines.
    null, null_energy, null_angles, null_halves_overlap: the same for the null model (`Null`).
    """

    dimension: int
    k: int
    rank: int
    energy: float
    spectrum: list[float]
    null: list[float]
    null_energy: float | None
    angles: list[float]
    null_angles: list[float]
    halves_overlap: float | None
    null_halves_overlap: float | None


SPECTRUM = 256
"""Maximum number of values in a spectrum."""


@dataclass(frozen=True, slots=True)
class ModuleFigures:
    """One module of the subspace.

    layer: the first number in the name. kind: the name with numbers replaced, "encoder.layer.*.attention.self.query".
    delta_error: √(Σ w²·lost / Σ w²·total) over the adapters of the fit that have the module, with w = 1/‖D‖ of the
        whole adapter. factor_error_down, factor_error_up: the root mean square over those adapters, of A and of B.
    energy_kept: 1 − delta_error². worst: the adapter with the largest error in this module.
    """

    name: str
    layer: int | None
    kind: str
    adapters: int
    down: SideFigures
    up: SideFigures
    delta_error: float | None
    energy_kept: float | None
    factor_error_down: float | None
    factor_error_up: float | None
    worst: str | None
    worst_error: float | None


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
class StartGroup:
    """Adapters whose A began as the same random numbers.

    cosine_down, cosine_up: mean cosine of their A, and of their B, over pairs.
    """

    adapters: list[str]
    cosine_down: float
    cosine_up: float


@dataclass(frozen=True, slots=True)
class StartEnergy:
    """Share of energy that k directions keep of a group of adapters, means over modules.

    who: "all", "group 1", …, "others". k: the largest rank of all adapters, as many directions as one start has.
    factors_down, factors_up: of the stacked A, and B, each adapter at equal norm; null_down, null_up: of the same with
    random directions; delta_down, delta_up: of the updates.
    """

    who: str
    adapters: int
    k: int
    factors_down: float
    factors_up: float
    null_down: float
    null_up: float
    delta_down: float
    delta_up: float


@dataclass(frozen=True, slots=True)
class Starts:
    """Random starts that adapters share. energies: empty without groups."""

    groups: list[StartGroup]
    energies: list[StartEnergy]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Adapters whose directions overlap with each other more than with the remaining ones; mean overlaps."""

    adapters: list[str]
    overlap: float
    overlap_with_others: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """Similarity between the adapters.

    of: "originals", or "pack" if those were not given.
    names: the trained adapters, in the order of the dendrogram's leaves.
    cosine, overlap: matrices in that order, of the updates and of their directions; empty in the JSON of more than
        `MATRIX` adapters. chance_overlap: mean overlap over pairs in random directions.
    tree: SciPy's linkage by average over the indices of `names`; distances are 1 minus the overlap beyond chance,
        (overlap − chance) / (1 − chance).
    map_share: share of the squared distances that the map shows. mean_cosine: over pairs.
    mean_energy: mean share of an update's squared norm that the mean of the others explains.
    """

    of: str
    names: list[str]
    cosine: list[list[float]]
    overlap: list[list[float]]
    tree: list[list[float]]
    clusters: list[Cluster]
    silhouette: float | None
    map_share: float | None
    chance_overlap: float | None
    mean_cosine: float | None
    mean_energy: float | None


MATRIX = 200
"""Number of adapters up to which the JSON contains their matrices."""


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One adapter on a file of rows: the original, and the one reconstructed from the pack ("recycled").

    task: "text-classification" or "causal-lm". Accuracies only for labelled rows, perplexities for language models.
    agreement: share of rows, or of predicted tokens, with equal predictions.
    kl: mean KL divergence of the recycled from the original prediction, in nats per row or token.
    without_*: the base model with the adapter's head but no update.
    """

    name: str
    data: str
    task: str
    rows: int
    tokens: int | None
    labelled: bool
    original_accuracy: float | None
    recycled_accuracy: float | None
    without_accuracy: float | None
    agreement: float
    without_agreement: float
    kl: float
    without_kl: float
    original_perplexity: float | None
    recycled_perplexity: float | None
    without_perplexity: float | None


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One version of an adapter on a file of rows; fields as in `Evaluation`, of this version."""

    name: str
    data: str
    accuracy: float | None
    perplexity: float | None
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class TaskPoint:
    """One method of storing the adapters, measured on their task.

    way: "pack", "fit" (a new fit at a ratio), or a key of `frontier.TASK_METHODS`. ratio: the requested one; for a
        baseline, that of the fit whose bytes it takes at most.
    stored_bytes: of all adapters, with carried tensors, without heads. worst, mean: delta errors.
    accuracy, agreement, kl: means of `runs`, accuracy of those that have one. perplexity: exponential of the mean loss.
    """

    way: str
    ratio: float | None
    stored_bytes: int
    worst: float
    mean: float
    accuracy: float | None
    perplexity: float | None
    agreement: float
    kl: float
    runs: list[TaskRun]


@dataclass(frozen=True, slots=True)
class TaskFrontier:
    """Bytes against scores on a task: the pack first, then by ratio a fit and its baseline.

    adapters: those whose bytes are counted. lora_float16: of their factors at two bytes per number, and what is
    carried. original_*: scores of the original adapters; without_*: with their heads but no update. Means as in
    `TaskPoint`.
    """

    task: str
    adapters: int
    lora_float16: int
    original_accuracy: float | None
    original_perplexity: float | None
    without_accuracy: float | None
    without_perplexity: float | None
    without_kl: float
    points: list[TaskPoint]


@dataclass(frozen=True, slots=True)
class ReportData:
    """All figures of a report.

    adapters: the largest delta error first. module_errors: for each adapter, in that order, the delta error in each of
    `modules`; None where it has no update. notes: what was not measured, or only on a sample, and why.
    """

    eigenlorax_version: str
    collection: Collection
    verdict: Verdict
    adapters: list[AdapterFigures]
    modules: list[ModuleFigures]
    module_errors: list[list[float | None]]
    in_fit: Spread | None
    projected: Spread | None
    left_out: LeftOut | None
    null: Null | None
    baselines: list[Baseline]
    frontier: Frontier | None
    starts: Starts | None
    similarity: Similarity | None
    duplicates: list[list[str]]
    outliers: list[str]
    untrained: list[str]
    bytes: Bytes
    sizes: list[SizePoint]
    evaluations: list[Evaluation]
    task_frontiers: list[TaskFrontier]
    notes: list[str]
