"""Figures of a report, and the schema of its JSON.

Errors are relative Frobenius errors: the root of a squared error over a squared norm. Energies and overlaps are shares
from 0 to 1. Angles are in degrees. None means not measured: the original adapters were not passed, or do not allow it.
Fields have the same names as in the JSON, so renaming one changes the schema.
"""

from dataclasses import dataclass, field

from .comparison_data import Baseline, Bytes, Frontier, LeftOut, Null, Sampling, SizePoint, Spread
from .history_data import HistoryFigures, Run
from .task_data import Evaluation, TaskFrontier

SCHEMA_VERSION = 7
SHARING_KINDS = ("shared", "partly-shared", "not-shared", "unknown")
"""Kinds of the finding that answers whether the adapters share a subspace."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Pack of the report, and options with which its subspace was fitted.

    Attributes:
        base_model: Base model of the adapters; None if unknown.
        revision: Revision of the base model; None if unknown.
        adapters: Number of adapters.
        modules: Number of modules in the subspace.
        ranks: Ranks of the adapters.
        purpose: "storage", "training" or "serving".
        weighting: "delta" or "factors".
        sweeps: Number of alternating refinements.
        size: Choice of the number of components, in words, such as "at most 32 components".
        dtype: Storage of the components.
        coefficient_dtype: Storage of the coefficients.
        fingerprint: Fingerprint of the subspace.
        n_extra: Number of random components that were added for training.
        excluded_modules: Modules outside the subspace.
        skipped: Adapters that were left out of the fit, with the reason.
        with_originals: True if the original adapters were passed. Without them, most figures cannot be measured.
    """

    base_model: str | None
    revision: str | None
    adapters: int
    modules: int
    ranks: list[int]
    purpose: str
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

    Attributes:
        kind: One of `SHARING_KINDS` for the answer whether the adapters share a subspace, which is the first finding,
            or the second one after "bytes" of a pack for storage; then "history", "versions", "start", "mean",
            "clusters", "outlier", "duplicate", "untrained", "task", "loss", "bytes", "baseline", "rounding", "cores".
        text: One or two sentences.
        advice: Recommended action, or "".
        good: True if it speaks for the pack, False if it speaks against it, None otherwise.
        adapters: Names of the adapters that it concerns.
    """

    kind: str
    text: str
    advice: str = ""
    good: bool | None = None
    adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Conclusions of a report.

    Attributes:
        headline: One sentence with figures.
        findings: Findings, the most important first.
    """

    headline: str
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """Figures of one adapter.

    Attributes:
        name: Name of the adapter.
        in_fit: True if the subspace was fitted to it.
        untrained: True if its update is zero.
        ranks: Ranks of the adapter.
        modules: Number of its modules.
        norm: Frobenius norm of the update over its modules in the subspace.
        delta_error: Error of its update in the pack.
        rounding_error: Part of the error that is from rounding.
        energy_kept: 1 − delta_error².
        factor_error_down, factor_error_up: Errors of A and of B alone.
        left_out_error: Delta error in the subspace of all other adapters.
        mean_error: Delta error of the mean adapter in its place.
        mean_scaled_error: Delta error of the best multiple of the mean adapter.
        random_error: Delta error in random bases with the same number of components.
        truncated_error: Delta error of the adapter truncated by SVD to the bytes that it takes in the pack.
        int8_error, int4_error: Delta errors of its factors rounded to 8 and 4 bits.
        nearest: Adapter with the largest absolute cosine.
        nearest_cosine: Cosine with that adapter.
        overlap: Mean overlap with the other adapters.
        cluster: Index in `Similarity.clusters`; None if it is in no cluster.
        x, y: Position on the map.
        lora_bytes: Bytes of its factors, in the dtype of the pack.
        file_bytes: Bytes of its weights file.
        coefficient_bytes: Bytes of its coefficients in the pack.
        carried_bytes: Bytes of carried tensors.
        head_bytes: Bytes of its trained heads.
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
    """Figures of one side of one module.

    Attributes:
        dimension: Dimension of the side.
        k: Number of components.
        rank: Numerical rank of the stacked updates.
        energy: Share of their squared norm in the k components.
        spectrum: σ²/Σσ² of the stacked updates before sweeps, descending, at most `SPECTRUM` values.
        null: The same for the null model (`Null`).
        null_energy: Energy of the null model.
        angles: Principal angles between the subspaces of two random halves of the collection, ascending, in degrees.
        null_angles: The same between random subspaces.
        halves_overlap: Mean squared cosine of these angles.
        null_halves_overlap: The same for random subspaces.
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
    """Figures of one module of the subspace.

    Attributes:
        name: Name of the module.
        layer: First number in the name; None if there is none.
        kind: Name with numbers replaced, such as "encoder.layer.*.attention.self.query".
        adapters: Number of adapters that have the module.
        down, up: Figures of both sides.
        delta_error: √(Σ w² ‖D − D̂‖² / Σ w² ‖D‖²) over the adapters of the fit that have the module. w is 1 / ‖D‖ over
            all modules of the adapter.
        energy_kept: 1 − delta_error².
        factor_error_down, factor_error_up: Root mean square error of A and of B over these adapters.
        worst: Adapter with the largest error in this module.
        worst_error: Error of that adapter.
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
    """Adapters whose A was initialised with the same random numbers.

    Attributes:
        adapters: Names of the adapters.
        cosine_down: Mean cosine of their A over pairs.
        cosine_up: Mean cosine of their B over pairs.
    """

    adapters: list[str]
    cosine_down: float
    cosine_up: float


@dataclass(frozen=True, slots=True)
class StartEnergy:
    """Share of energy that k components keep of a group of adapters, as means over modules.

    Attributes:
        who: Group of adapters: "all", "group 1", …, "others".
        adapters: Number of adapters.
        k: Largest rank of all adapters, which is the rank of one random start.
        factors_down, factors_up: Energy of the stacked A and of the stacked B, with each adapter at equal norm.
        null_down, null_up: The same with random singular vectors.
        delta_down, delta_up: Energy of the updates on either side.
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
    """Random starts that adapters share.

    Attributes:
        groups: Groups of adapters with one start.
        energies: Energies with and without these groups; empty if there are no groups.
    """

    groups: list[StartGroup]
    energies: list[StartEnergy]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Adapters that overlap with each other more than with the other adapters.

    Attributes:
        adapters: Names of the adapters.
        overlap: Mean overlap over pairs within the cluster.
        overlap_with_others: Mean overlap with adapters outside the cluster.
    """

    adapters: list[str]
    overlap: float
    overlap_with_others: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """Similarity between the adapters.

    Attributes:
        of: "originals", or "pack" if the originals were not passed.
        names: Names of the trained adapters, in the order of the dendrogram's leaves.
        cosine: Cosines of the updates, in that order, (n, n); empty in the JSON of more than `MATRIX` adapters.
        overlap: Overlaps of the adapters' row and column spaces, likewise.
        tree: SciPy's average linkage over the indices of `names`. Distances are 1 minus the overlap beyond chance,
            (overlap − chance) / (1 − chance).
        clusters: Clusters of adapters, the largest first.
        silhouette: Mean silhouette of the clusters; None if none was computed.
        map_share: Share of the squared distances that the map shows.
        chance_overlap: Mean overlap over pairs if the singular vectors were random.
        mean_cosine: Mean cosine over pairs.
        mean_energy: Mean share of an update's squared norm that the mean of the other adapters explains.
        mean_cosine_error, mean_energy_error: Standard errors of these two from the sample of modules; 0 if all modules
            were measured, None if they are unknown.
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
    mean_cosine_error: float | None = 0.0
    mean_energy_error: float | None = 0.0


MATRIX = 200
"""Maximum number of adapters for which the JSON contains similarity matrices."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """All figures of a report.

    Attributes:
        eigenlorax_version: Version that made the report.
        collection: Pack and options of its fit.
        verdict: Conclusions.
        adapters: Figures by adapter, the largest delta error first.
        modules: Figures by module, in the order of the model.
        module_errors: For each of `adapters`, the delta error in each of `modules`; None where it has no update.
        in_fit: Errors of the adapters in the fit.
        projected: Errors of the adapters that were projected afterwards.
        left_out: Leave-one-out results.
        null: The null model.
        baselines: Errors and bytes of other methods.
        frontier: Bytes against the worst error, for the pack and for tuned methods.
        starts: Random starts that adapters share.
        similarity: Similarity between the adapters.
        duplicates: Groups of adapters with equal updates.
        outliers: Adapters that share little with the others.
        untrained: Adapters whose update is zero.
        runs: Adapters that look like versions of one run.
        histories: Figures of the histories, by name.
        bytes: Bytes of the collection as LoRAs and as a pack.
        sizes: Errors and bytes with other numbers of components.
        evaluations: Scores of adapters on their tasks.
        task_frontiers: Bytes against scores on a task.
        sampling: Sample of modules that were measured; None if all were, or if the originals were not passed.
        notes: Figures that were not measured, or only on a sample, with the reason.
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
    runs: list[Run]
    histories: list[HistoryFigures]
    bytes: Bytes
    sizes: list[SizePoint]
    evaluations: list[Evaluation]
    task_frontiers: list[TaskFrontier]
    sampling: Sampling | None
    notes: list[str]
