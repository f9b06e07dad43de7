"""A report as data: every figure of the page, and its JSON. Nothing is computed here; docs/report.md has the meanings.

Errors are relative, √(lost / total) of squared norms; energies and overlaps are shares, 0 to 1; angles are in degrees.
None stands for what was not measured: for want of the original adapters, or because there is nothing to measure.
"""

from dataclasses import dataclass, field

SCHEMA_VERSION = 4


@dataclass(frozen=True, slots=True)
class Collection:
    """What the report is about: the pack, and how its subspace was fitted.

    size: how k was chosen, in words, such as "at most 32 components". with_originals: whether the adapters were read as
    they were before they came into the pack; without them, most figures cannot be measured.
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
    """One thing that the figures say. kind: "shared", "not-shared", "partly-shared", "unknown" (the answer to the main
    question, first in the list), "start", "mean", "clusters", "outlier", "duplicate", "untrained", "task", "loss",
    "bytes", "baseline", "rounding", "cores". text: one or two plain sentences. advice: what to do about it, or "".
    good: True where it speaks for the pack, False against it, None neither. adapters: whom it is about.
    """

    kind: str
    text: str
    advice: str = ""
    good: bool | None = None
    adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer in plain words. headline: one sentence, with its figures. findings: the most important first."""

    headline: str
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """One adapter.

    norm: ‖D‖ over its modules in the subspace. energy_kept: 1 − delta_error². factor_error_*: of A and of B alone.
    left_out_error: delta error in the subspace of all the others. mean_error: of the mean adapter in its place;
    mean_scaled_error: of the best multiple of it. random_error: in random bases of equal k. truncated_error: the
    adapter alone, cut by SVD to the bytes that it costs here; int8_error, int4_error: its factors rounded.
    nearest: the adapter with the largest |cosine| to it. overlap: how much of its directions the others have, on
    average. cluster: its number in `Similarity.clusters`, None if it is alone. x, y: its place on the map.
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

    rank: directions in the stack, numerically. energy: share of the stack's squared norm in the span of the k kept.
    spectrum: σ²/Σσ² of the first stack, descending, at most `SPECTRUM` of them. angles: principal angles between the
    subspaces of two random halves of the collection, ascending, degrees; halves_overlap: mean of their squared cosines.
    null, null_energy, null_angles, null_halves_overlap: the same of the null model (`Null`).
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
"""Values of a spectrum that a report has at most."""


@dataclass(frozen=True, slots=True)
class ModuleFigures:
    """One module of the subspace.

    layer: the first number in its name; kind: the name without the numbers, "encoder.layer.*.attention.self.query".
    delta_error: √(Σ w²·lost / Σ w²·total) over the adapters of the fit that have it, w² = 1/‖D‖² of the whole adapter;
    factor_error_*: of A and of B, √ of the mean of lost / total over those adapters; energy_kept: 1 − delta_error²;
    worst: the adapter with the largest error there.
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
    """Of a group of adapters: how many, the mean, √ of the mean square, and the worst with its name."""

    adapters: int
    mean: float
    rms: float
    worst: float
    worst_adapter: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Adapters in the subspace that was fitted without them. sampled: how many of `of`; standard_error: of the mean.
    method: in words. in_fit: the same adapters in the subspace with them.

    chance: their mean error in as many random directions. kept: the share of their squared norm that is kept, of what
    random directions do not keep; kept_spread: its standard deviation if they share nothing. sharing: those that keep
    half of theirs and more so, and more than chance scatters.
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
    """Share of energy in the first k directions of one side, without sweeps, the mean over the modules: of the
    collection, and of the null model with its standard deviation."""

    energy: float
    null: float
    spread: float


@dataclass(frozen=True, slots=True)
class Null:
    """The same adapters if they shared nothing: each keeps its singular values in every module, and with them its norm
    and its rank, and has its directions drawn at random.

    draws: of each module; seed: of these. errors: delta errors of the adapters in a fit like the pack's, before
    rounding, means over random collections. spread: the standard deviation of errors.mean from one collection to the
    next. down, up: energies.
    """

    draws: int
    seed: int
    errors: Spread
    spread: float
    down: SideEnergy
    up: SideEnergy


@dataclass(frozen=True, slots=True)
class Baseline:
    """What else could be done with the same adapters. key: "pack", "left-out", "mean", "mean-scaled", "random", "null",
    "truncated", "int8", "int4". label: for a table. errors over the adapters of the fit. stored_bytes: of all of them
    together, heads and carried tensors aside (None where that is no way to store them)."""

    key: str
    label: str
    errors: Spread
    stored_bytes: int | None


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One way of storing the adapters. way: "pack", or one of `analysis.rivals`. settings: by what it was tuned, in
    words, or "". stored_bytes: heads and carried tensors aside. worst, mean: delta errors."""

    way: str
    settings: str
    stored_bytes: int
    worst: float
    mean: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Bytes against the worst error, the pack first, then each way from few bytes to many.

    adapters: those whose originals are at hand. modules: on how many of `of` the ways were tried; their bytes are then
    in proportion. lora_float16: of the factors, two bytes a number.
    """

    adapters: int
    modules: int
    of: int
    lora_float16: int
    points: list[FrontierPoint]


@dataclass(frozen=True, slots=True)
class StartGroup:
    """Adapters whose A began as the same random numbers.

    cosine_down, cosine_up: mean cosine of their A, and of their B, between pairs.
    """

    adapters: list[str]
    cosine_down: float
    cosine_up: float


@dataclass(frozen=True, slots=True)
class StartEnergy:
    """Energy that k directions keep of some of the adapters, means over modules. who: "all", "group 1", …, "others".
    k: the highest rank among all of them, so many directions as one start has. factors_*: of the stacked A, and B, as
    the paper stacks them, each adapter of equal norm; null_*: of the same in random directions; delta_*: of the
    updates."""

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
    """Random starts that adapters share. energies: empty where there is no group."""

    groups: list[StartGroup]
    energies: list[StartEnergy]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Adapters that share directions with each other more than with the rest; mean overlaps."""

    adapters: list[str]
    overlap: float
    overlap_with_others: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """How the adapters lie to one another.

    of: "originals", or "pack" where those were not at hand. names: the trained ones, in the order of the dendrogram's
    leaves. cosine: of the updates, row by row in that order; overlap: how much of their directions two adapters share,
    0 to 1; chance_overlap: what that is in random directions, the mean over pairs. JSON leaves both matrices empty
    where there are more than `MATRIX` adapters. tree: scipy's linkage of 1 − overlap by average, over the places in
    `names`; of the overlap beyond chance, (overlap − chance) / (1 − chance). map_share: the share of squared distance
    that the map shows. mean_cosine: between pairs; mean_energy: the share of an update that the mean of the others
    explains, on average.
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
"""Adapters up to which a report's JSON has their matrices."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes of the collection, heads aside.

    lora_files: weights files. lora_stored: the factors in the dtypes they came in; lora: at the pack's (narrower)
    dtype, which ratios are taken of; lora_float16: two bytes a number. All three with what is carried; all four without
    untrained adapters. ratio = lora ÷
    (basis + coefficients + carried); limit: of endlessly many such adapters; break_even: adapters from which on the
    pack is smaller, None if never. over_n: (N, ratio).
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
    """The collection at another k, one for all sides, bases without sweeps.

    Errors as in `Spread`; null: mean of the null model, fitted alike, and null_spread as in `Null`. left_out: mean of
    the adapters left out of the fit; random: of the same ones in as many random directions. sharing: as in `LeftOut`.
    stored_bytes: basis, coefficients and carried.
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
    """One adapter on a file of rows, as it was, and as it comes back.

    task: "text-classification" or "causal-lm". Accuracies only of labelled rows. agreement: share of rows (of predicted
    tokens) on which both predict the same. kl: mean KL divergence of the recycled from the original prediction, nats a
    row or token. without_*: with the head but no update.
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
    """One way of storing the adapters, on their task. way: "pack", "fit" (anew, at a ratio), or one of
    `analysis.rivals`. ratio: the one that was asked for; of a rival, that of the fit whose bytes it has at most.

    stored_bytes: of all adapters, with what is carried, heads aside. worst, mean: delta errors. accuracy, agreement,
    kl: means of `runs`, accuracy of those that have one; perplexity: the exponential of the mean loss.
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
    """Bytes against what becomes of a task: the pack first, then, by ratio, a fit and its rival.

    adapters: those whose bytes are counted; lora_float16: of their factors, two bytes a number, and what is carried.
    original_*: of the adapters as they were; without_*: with their heads but no update; means as in `TaskPoint`.
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
    """All figures.

    adapters: the worst delta error first. module_errors: adapter by adapter, in the order of `adapters`, the delta
    error in each of `modules`; None where it has no update there. notes: what was not measured, or only of a sample,
    and why.
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
