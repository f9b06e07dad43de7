"""A report as data: the figures of the page, and the schema of its JSON. docs/report.md describes each field.

Errors are relative Frobenius errors: the root of a squared error over a squared norm. Energies and overlaps are shares
from 0 to 1. Angles are in degrees. None means not measured: the original adapters were not given, or do not allow it.
The names of fields are those of the JSON; renaming one changes the schema.
"""

from dataclasses import dataclass, field

from .comparison_data import Baseline, Bytes, Frontier, LeftOut, Null, SizePoint, Spread
from .task_data import Evaluation, TaskFrontier

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
