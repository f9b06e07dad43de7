"""`merge`: several LoRAs into one LoRA of a wished rank, without an out × in matrix."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import atomic_files, keys
from ..core.adapter import Adapter, LoRAFactors
from ..core.options import check_choice, to_float, to_int
from ..core.progress import Progress
from ..errors import AdapterNameError, ModuleNameError, OptionError
from ..formats import checks, peft, safetensors_file, sources, table
from .comparison import Comparison, ComparisonBuilder
from .coordinates import common_coordinates, merged_factors
from .derived import check_combinable, checked_rank, checked_weights, derived_adapter
from .methods import METHODS, MethodOptions, sum_is_zero

HEAD_FILE = "head.{}.safetensors"
"""Name of the file with the head of a source, in the folder of a merged adapter."""


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """Result of a merge.

    Attributes:
        adapter: The merged LoRA, with factors in float32, the scaling 1, and the head that was chosen, if any.
        method: Name of the method.
        weights: Weight by name of the source.
        density: Share of the entries that the method kept; None for methods that keep all.
        coordinates: Where entries were treated one by one, in words; None for methods that do not depend on that.
        full_rank: Largest rank of a module before the cut to the rank of `adapter`.
        cut_error: Relative Frobenius error of this cut, over all modules.
        comparison: How the merge relates to its sources, to their mean, and to random adapters.
        heads: Heads, trained biases and embeddings by name of the source; these are not merged.

    Example:
        >>> merged = eigenlorax.merge(["adapters/a", "adapters/b"], "task-arithmetic", rank=6)
        >>> merged.cut_error < 1e-6
        True
    """

    adapter: Adapter
    method: str
    weights: Mapping[str, float]
    density: float | None
    coordinates: str | None
    full_rank: int
    cut_error: float
    comparison: Comparison
    heads: Mapping[str, Mapping[str, Tensor]] = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a PEFT folder, with the heads of the sources in `head.NAME.safetensors`, and return its path.

        Image LoRAs whose sources are single files of one format can be written as such a file.

        Args:
            path: The folder, which is written completely or not at all. A path that ends in ".safetensors" is a file in
                the format of the sources.
            overwrite: Whether an existing folder or file is replaced.

        Raises:
            PackExistsError: The folder or file exists.
            OptionError: `path` is a file, and the sources do not have one format of single files.

        Example:
            >>> eigenlorax.merge(["adapters/a", "adapters/b"]).save("merged").name
            'merged'
        """
        if Path(path).suffix == keys.LORA_SUFFIX:
            self._check_file(path)
            return table.write_adapter(self.adapter, Path(path), overwrite=overwrite)
        files = peft.to_files(table.for_peft(self.adapter))
        for name, tensors in self.heads.items():
            owned = {key: peft.owned(tensor) for key, tensor in tensors.items()}
            files[HEAD_FILE.format(name)] = safetensors_file.to_bytes(owned, {"format": "pt"})
        atomic_files.write_folder(Path(path), files, overwrite=overwrite)
        return Path(path)

    def _check_file(self, path: str | os.PathLike[str]) -> None:
        """Raise `OptionError` unless the sources have one format of single files."""
        if not table.writable(table.format_of(self.adapter.origin)).suffix:
            raise OptionError(
                f"{os.fspath(path)} is a file, which the result can be if all sources are image LoRAs of one format. "
                "Pass a folder."
            )


def merge(
    adapters: sources.Sources,
    method: str = "mean",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    head: str | None = None,
    name: str = "merged",
    same_base: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> MergedAdapter:
    """Merge adapters of one base model into one LoRA, whatever ranks and scalings they have.

    Heads cannot be merged: outputs of one task have no counterpart in another. They are kept by name.

    Args:
        adapters: Two or more adapters, in any form that `fit` takes.
        method: "mean", "task-arithmetic", "ties", "dare", "knots", "tsv" or "iso-c" (`methods`).
        weights: One weight for each adapter, in their order. Default: 1 each. "mean" divides them by their sum.
        rank: Rank of the result, which keeps the largest singular components. Default: the largest rank of a source.
        density: Share of entries that TIES, DARE and KnOTS keep, above 0 and at most 1. Default: 0.2 for TIES and
            KnOTS, 0.5 for DARE.
        seed: Seed of the entries that DARE keeps, and of the random adapters of the comparison.
        head: Name of the source whose head the result has. Default: none.
        name: Name of the result.
        same_base: Accept adapters that name different base models.
        progress: Callback with the arguments (stage, done, total).
        options: Options of `read_adapter`.

    Returns:
        The merged adapter, with a comparison to its sources, to their mean, and to random adapters of equal norm.

    Raises:
        AdapterNameError: Two adapters have one name, or `head` names none of them.
        BaseModelError, ShapeError: The adapters do not belong to one base model.
        FormatError: An adapter has tensors that cannot be merged, such as the magnitudes of DoRA.
        ModuleNameError: No two adapters have a module in common.
        OptionError: There are fewer than two adapters, or an option is invalid.

    Example:
        >>> merged = eigenlorax.merge(["adapters/a", "adapters/b"], "ties", rank=4)
        >>> merged.adapter.ranks
        (4,)
    """
    read = [checks.read_source(source, options) for source in sources.find_adapters(adapters, **options)]
    _check_sources(read, head, same_base)
    density = _checked_density(method, density)
    weights = [1.0] * len(read) if weights is None else checked_weights(weights, read)
    if method == "mean":
        if sum_is_zero(weights):
            raise OptionError(f"mean divides by the sum of the weights, which must not be zero; got {weights}.")
        effective = [weight / sum(weights) for weight in weights]
    else:
        effective = weights
    rank = max(max(adapter.ranks) for adapter in read) if rank is None else checked_rank(rank, read)
    modules = sorted({module for adapter in read for module in adapter.specs})
    comparison = ComparisonBuilder(read, modules, effective, METHODS[method], seed=to_int("seed", seed))
    merged: dict[str, LoRAFactors] = {}
    full_rank, whole, lost = 0, 0.0, 0.0
    for done, module in enumerate(modules):
        if progress is not None:
            progress("merging", done, len(modules))
        updates = [adapter.modules.get(module) for adapter in read]
        spec = next(adapter.specs[module] for adapter in read if module in adapter.specs)
        shape = spec.out_features, spec.in_features
        method_options = MethodOptions(effective, density or 1.0, _generator(seed, module), shape)
        coordinates = common_coordinates(updates)
        components = METHODS[method].merge(coordinates, method_options)
        squares = components.values.square()
        full_rank = max(full_rank, components.rank)
        whole, lost = whole + float(squares.sum()), lost + float(squares[rank:].sum())
        merged[module] = merged_factors(components, rank, updates)
        comparison.add(module, coordinates, method_options, merged[module])
    chosen = next((adapter for adapter in read if adapter.name == head), None)
    return MergedAdapter(
        adapter=derived_adapter(name, merged, read, head=chosen),
        method=method,
        weights={adapter.name: weight for adapter, weight in zip(read, weights, strict=True)},
        density=density,
        coordinates=METHODS[method].coordinates,
        full_rank=full_rank,
        cut_error=math.sqrt(lost / whole) if whole else 0.0,
        comparison=comparison.result(),
        heads={adapter.name: adapter.heads for adapter in read if adapter.heads},
    )


def _check_sources(adapters: Sequence[Adapter], head: str | None, same_base: bool) -> None:
    """Raise the errors of `merge` for adapters that cannot be merged, or a head that none of them has."""
    names = [adapter.name for adapter in adapters]
    if len(names) < 2:
        raise OptionError(f"a merge needs at least two adapters, got {len(names)}.")
    empty = next((adapter.name for adapter in adapters if not adapter.specs), None)
    if empty is not None:
        raise OptionError(f"adapter {empty!r} has no module that could be merged. Leave it out.")
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise AdapterNameError(
            f"adapter {twice!r} is listed twice. List it once, with a larger weight (weights, --weights); for two "
            "adapters of one name, pass NAME=PATH."
        )
    if head is not None and head not in names:
        raise AdapterNameError(f"there is no adapter {head!r} whose head could be used. There are: {', '.join(names)}.")
    check_combinable(adapters, same_base)
    modules = [module for adapter in adapters for module in adapter.specs]
    if len(set(modules)) == len(modules):
        raise ModuleNameError(
            f"no two of the {len(names)} adapters have a module in common: {names[0]!r} has modules like "
            f"{min(adapters[0].specs)!r}, {names[1]!r} like {min(adapters[1].specs)!r}. There is nothing to merge. Are "
            "they for one model?"
        )


def _checked_density(method: str, density: float | None) -> float | None:
    """Return the density of a method. Raises `OptionError` for an unknown method, or one that keeps all entries."""
    check_choice("method", method, METHODS)
    default = METHODS[method].density
    if density is None:
        return default
    if default is None:
        with_density = [name for name, entry in METHODS.items() if entry.density is not None]
        raise OptionError(f"{method} keeps all entries: density is an option of {', '.join(with_density)}.")
    number = to_float("density", density)
    if not 0 < number <= 1:
        raise OptionError(f"density must be above 0 and at most 1, got {number:g}.")
    return number


def _generator(seed: int, module: str) -> torch.Generator:
    """Return the source of random numbers of one module, which does not depend on the other modules."""
    digest = sha256(f"{seed}\0{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
