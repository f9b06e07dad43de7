"""Figures of the histories of a pack: the path of the updates, distances, bytes, metrics, and left-out errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import LoRAFactors
from ..core.batch import ModuleBatch, delta_squares, pad_factors
from ..core.fit_options import FitOptions
from ..core.progress import Progress
from ..pack.history import History, VersionRecord
from ..pack.history_store import HistoryStore
from ..pack.pack import Pack
from . import spreads
from .analysis import crowded, groups, runs
from .analysis.left_out import left_out
from .analysis.pairs import products
from .history_data import HistoryFigures, VersionFigures

N_COMPONENTS = 32
"""Maximum number of components per side in which versions that were left out are represented."""
MAX_VERSIONS = 256
"""Maximum number of versions of a history that are decoded for the path."""
MAX_NUMBERS = 2**27
"""Maximum number of elements of all decoded factors: 512 MiB in float32."""
MAX_LEFT_OUT = 8
"""Maximum number of versions of a history that are left out in turn."""
MIN_FITTED = 3
"""Minimum number of versions for left-out errors."""
MAX_MODULES = 48
"""Maximum number of modules on which left-out errors are measured, evenly spaced."""

Versions = Sequence[Mapping[str, LoRAFactors]]
"""Factors by module, for each version of a history that was decoded."""


@dataclass(frozen=True, slots=True)
class _Path:
    """Measurements of sampled versions.

    Attributes:
        positions: Coordinates (x, y) in the leading two components ÷ norm of the last version, (n, 2).
        share: Share of the squared distances that they show.
        to_final: Distances to the last version ÷ its norm, (n,).
    """

    positions: Tensor
    share: float
    to_final: Tensor


def measure(pack: Pack, progress: Progress) -> list[HistoryFigures]:
    """Return the figures of all histories of a pack.

    Versions are taken as the pack decodes them. Of a long history, evenly spaced versions are sampled for the path and
    for left-out errors.

    Args:
        pack: The pack.
        progress: Callback with the arguments (stage, done, total).
    """
    return [_measure(history, pack.history_store, progress) for history in pack.histories.values()]


def _measure(history: History, store: HistoryStore, progress: Progress) -> HistoryFigures:
    first = store.decode(history, history.versions[0])
    numbers = sum(factors.down.numel() + factors.up.numel() for factors in first.modules.values())
    sample = _evenly_spaced(len(history), max(2, min(MAX_VERSIONS, MAX_NUMBERS // max(numbers, 1))))
    versions = []
    for done, index in enumerate(sample):
        progress(f"reading versions of {history.name}", done, len(sample))
        versions.append(store.decode(history, history.versions[index]).modules)
    progress(f"reading versions of {history.name}", len(sample), len(sample))
    path = _path(versions)
    rows = max(len(factors.down) for modules in versions for factors in modules.values())
    fitted = _evenly_spaced(len(versions), max(2, crowded.MANY // max(rows, 1)))
    errors = _left_out_errors([versions[index] for index in fitted], progress) if len(fitted) >= MIN_FITTED else {}
    position_of = {index: position for position, index in enumerate(sample)}
    left_out_errors = {sample[fitted[member]]: error for member, error in errors.items()}
    return HistoryFigures(
        name=history.name,
        versions=[
            _version(record, path, position_of.get(index), left_out_errors.get(index))
            for index, record in enumerate(history.versions)
        ],
        path_share=path.share if len(versions) > 1 else None,
        k=N_COMPONENTS,
        fitted=len(fitted) if errors else 0,
    )


def _evenly_spaced(n: int, most: int) -> list[int]:
    """Return at most this many evenly spaced indices below n, the first and the last among them."""
    count = min(n, most)
    return [index * (n - 1) // max(count - 1, 1) for index in range(count)]


def _path(versions: Versions) -> _Path:
    """Return positions and distances of versions, from inner products of their updates."""
    total = torch.zeros(len(versions), len(versions), dtype=torch.float64)
    for module in versions[0]:
        total += products(_stack(versions, module))
    square = float(total[-1, -1])
    relative = total / square if square > 0 else total
    positions, share = groups.on_a_map(relative)
    return _Path(positions, share, runs.distances(relative)[-1])


def _left_out_errors(versions: Versions, progress: Progress) -> dict[int, float]:
    """Return the errors of versions in components that are fitted without them, by index.

    At most `MAX_LEFT_OUT` versions with a nonzero update are left out, evenly spaced.
    """
    names = list(versions[0])
    modules = [names[index] for index in _evenly_spaced(len(names), MAX_MODULES)]
    # one stack of a module at a time is in memory
    squares = {module: delta_squares(_stack(versions, module)) for module in modules}
    total = torch.stack(list(squares.values())).sum(0)
    trained = total.nonzero().flatten().tolist()
    if len(trained) < MIN_FITTED:
        return {}
    chosen = [trained[index] for index in _evenly_spaced(len(trained), MAX_LEFT_OUT)]
    kept = torch.zeros(len(versions), dtype=torch.float64)
    size = (N_COMPONENTS, N_COMPONENTS)
    for done, module in enumerate(modules):
        progress("leaving versions out", done, len(modules))
        members = squares[module].nonzero().flatten().tolist()
        removed = [members.index(index) for index in chosen if index in members]
        stack = [versions[index][module] for index in members], total[members].rsqrt().tolist()
        batch = _stack(versions, module).select(members)
        fits = left_out(stack, batch, removed, FitOptions(n_components=size[0]), size, [size[0]])
        kept[[members[member] for member in removed]] += fits.fitted
    progress("leaving versions out", len(modules), len(modules))
    return dict(zip(chosen, spreads.relative(total[chosen] - kept[chosen], total[chosen]), strict=True))


def _stack(versions: Versions, module: str) -> ModuleBatch:
    factors = [version[module] for version in versions]
    return pad_factors(factors, factors[0].down.shape[1], factors[0].up.shape[0])


def _version(record: VersionRecord, path: _Path, index: int | None, left_out_error: float | None) -> VersionFigures:
    """Return the figures of a version, whose index among the sampled ones is `index`."""
    x, y = path.positions[index].tolist() if index is not None else (None, None)
    return VersionFigures(
        version=record.version,
        sha256=record.sha256,
        step=record.step,
        metrics=record.metrics,
        delta_error=record.delta_error,
        lora_stored=record.lora_bytes,
        tensors_stored=record.tensor_bytes,
        source_bytes=record.source_file_bytes or record.source_lora_bytes + record.source_tensor_bytes,
        change=record.change,
        to_final=float(path.to_final[index]) if index is not None else None,
        left_out_error=left_out_error,
        x=x,
        y=y,
    )
