"""Relations between the trained adapters of a report: similarity, copies, outliers, runs, neighbours and a map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.progress import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import reconstructed_pairs, relations, sampling_errors
from .analysis import groups, runs
from .analysis.pairs import cosines
from .data import Similarity
from .history_data import Run
from .measured import Measured, SampledMeasurements
from .originals import Originals

_EQUAL_NORM = 0.02
"""Maximum difference of the norms of equal updates in a module, relative to the norm over all modules."""


@dataclass(frozen=True, slots=True)
class ReportSources:
    """Inputs of all figures.

    Attributes:
        pack: The pack.
        packed: Its adapters, by name.
        originals: The original adapters; None for a report of the pack alone.
        sampled: Measurements with the originals; None for a report of the pack alone.
        seed: Seed of all random choices.
        progress: Callback with the arguments (stage, done, total).
    """

    pack: Pack
    packed: Mapping[str, PackedAdapter]
    originals: Originals | None
    sampled: SampledMeasurements | None
    seed: int
    progress: Progress

    @property
    def measured(self) -> Measured | None:
        """Sums over all modules of the sample."""
        return self.sampled.whole if self.sampled is not None else None


@dataclass(frozen=True, slots=True)
class Related:
    """Relations between the trained adapters.

    Attributes:
        similarity: Similarity between the adapters.
        outliers: Names of adapters that share little with the others.
        duplicates: Groups of adapters with equal updates.
        runs: Adapters that look like versions of one run.
        neighbours: Fields of `AdapterFigures` on the nearest adapter, by adapter.
        positions: Coordinates (x, y) on the map, by adapter.
    """

    similarity: Similarity
    outliers: list[str]
    duplicates: list[list[str]]
    runs: list[Run]
    neighbours: Mapping[str, Mapping[str, Any]]
    positions: Mapping[str, Sequence[float]]

    @property
    def copies(self) -> set[str]:
        """Names of the adapters that have a copy in the collection."""
        return {name for group in self.duplicates for name in group}


def find_related(sources: ReportSources) -> Related:
    """Return the relations between the trained adapters, of the originals if there are any, else of the pack."""
    pack, measured, sampled = sources.pack, sources.measured, sources.sampled
    trained = [name for name, adapter in sources.packed.items() if not adapter.record.untrained]
    members = [sources.packed[name] for name in trained]
    if measured is not None and sampled is not None:
        names, pairs, modules = measured.names, measured.pairs, sampled.sample.modules
        reconstructed = reconstructed_pairs.inner_products(pack, members, modules, sources.progress)
    else:
        names, pairs = trained, reconstructed_pairs.compare_pairs(pack, members, sources.progress)
        reconstructed = pairs.delta
    positions, map_share = groups.on_a_map(cosines(reconstructed))
    copies = groups.duplicates(pairs)
    if sources.originals is not None:
        # updates that are equal in the sampled modules may differ in others
        copies = [group for group in copies if _have_equal_norms(sources, [names[index] for index in group])]
    similarity, outliers, cosine, overlap = relations.similarity(measured, pairs, names, copies, map_share)
    return Related(
        similarity=sampling_errors.similarity(sources.sampled, similarity, copies),
        outliers=outliers,
        duplicates=[[names[index] for index in group] for group in copies],
        runs=[
            Run([names[index] for index in run], float(runs.changes(pairs.delta, run).median()))
            for run in runs.find_runs(pairs.delta, names)
        ],
        neighbours=relations.neighbours(names, cosine, overlap),
        positions=dict(zip(trained, positions.tolist(), strict=True)),
    )


def _have_equal_norms(sources: ReportSources, names: Sequence[str]) -> bool:
    """Return whether these adapters have equal norms in every module."""
    assert sources.originals is not None
    norms = []
    for name in names:
        squares, own_names = sources.originals.scans[name].delta_squares, sources.packed[name].subspace_names
        norms.append({module: math.sqrt(squares[own]) for own, module in own_names.items() if squares[own] > 0})
    tolerance = _EQUAL_NORM * math.hypot(*norms[0].values())
    return all(
        abs(other.get(module, 0.0) - norms[0].get(module, 0.0)) <= tolerance
        for other in norms
        for module in norms[0].keys() | other.keys()
    )
