"""Search by similarity: cosines between the whole updates of adapters.

Sketches of all adapters choose candidates, whose cosines are then computed exactly.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import keys
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, delta_square
from ..core.batch import BATCH_SIZE
from ..core.options import to_int
from ..core.progress import Progress
from ..errors import ModuleNameError, OptionError
from ..formats import checks, sources
from ..pack.add import scan_for_pack
from ..pack.pack import Pack
from .match import TOP, Match, check_top
from .sketches import WIDTH, Sketcher, sketch_factors
from .updates import MemberUpdates, by_module, shape_of

CANDIDATES = 32
"""Default number of adapters whose cosines are computed exactly."""
_NAMED_MODULES = 2


@dataclass(frozen=True, slots=True)
class Query:
    """Adapter that others are compared with.

    Attributes:
        name: Its name in the pack; None for an adapter that is not one of the pack's.
        factors: Its factors by the modules' names in the subspace; other modules by its own names.
    """

    name: str | None
    factors: Mapping[str, LoRAFactors]


@dataclass(frozen=True, slots=True)
class SimilarityIndex:
    """Index of the updates of a pack's adapters. Heads, and versions of histories, are not in it.

    Attributes:
        pack: The pack, from which candidates are read.
        names: Names of its adapters, sorted, without those whose update is zero.
        sketches: Sketch of each of them (`sketches.Sketcher`), (n, t) float32 of norm 1.

    Example:
        >>> index = eigenlorax.SimilarityIndex.from_pack(pack)
        >>> [match.name for match in index.find("adapters/a", top=1)]
        ['a']
    """

    pack: Pack
    names: tuple[str, ...]
    sketches: Tensor

    @classmethod
    def from_pack(cls, pack: Pack, *, progress: Progress | None = None) -> "SimilarityIndex":
        """Read all adapters of a pack, and return their index.

        Args:
            pack: The pack. Later changes of it are not in the index.
            progress: Callback with the arguments (stage, done, total).

        Example:
            >>> eigenlorax.SimilarityIndex.from_pack(pack).names
            ('a', 'b', 'c')
        """
        sketcher, names, parts = Sketcher.of(pack.subspace), pack.names, [torch.zeros(0, WIDTH)]
        for start in range(0, len(names), BATCH_SIZE):
            if progress is not None:
                progress("indexing adapters", start, len(names))
            members = [MemberUpdates.read(pack, name) for name in names[start : start + BATCH_SIZE]]
            parts.append(sketcher.sketch(members))
        sketches = torch.cat(parts)
        is_trained = sketches.any(dim=1)
        return cls(pack, tuple(itertools.compress(names, is_trained.tolist())), sketches[is_trained])

    def find(
        self,
        source: sources.Source,
        top: int = TOP,
        *,
        candidates: int = CANDIDATES,
        same_base: bool = False,
        **options: Any,
    ) -> list[Match]:
        """Return the adapters whose updates are most similar to that of an adapter.

        Args:
            source: Name of an adapter of the pack, or of a version such as "run@latest"; or a folder, file, URL, Hub
                id or `Adapter` of the same base model.
            top: Maximum number of results, at least 1.
            candidates: Number of adapters whose cosines are computed exactly, chosen by sketches. An adapter can only
                be missed if its estimate is wrong by more than its distance to the others. `len(pack)` compares all.
            same_base: Accept an adapter that names another base model.
            options: Options of `read_adapter`.

        Returns:
            Matches with cosine similarities of the updates over all modules, −1 to 1, in descending order. An adapter
            of the pack is not compared with itself, and updates of zero are left out.

        Raises:
            AdapterNameError, FormatError: There is no such adapter.
            BaseModelError, ModuleNameError, ShapeError: The adapter does not belong to the pack.
            OptionError: Its update is zero, an option is out of range, or the pack has no adapters.

        Example:
            >>> index = eigenlorax.SimilarityIndex.from_pack(pack)
            >>> sorted(match.name for match in index.find("a"))
            ['b', 'c']
        """
        top = check_top(top)
        if to_int("candidates", candidates) < 1:
            raise OptionError(f"candidates (--candidates) must be at least 1, got {candidates}.")
        if not self.names:
            raise OptionError("the pack has no adapters to compare with. Versions of histories are not searched.")
        query = read_query(self.pack, source, same_base=same_base, options=options)
        square = sum(delta_square(factors) for factors in query.factors.values())
        if square == 0:
            raise OptionError(f"the update of {source if isinstance(source, str) else 'the adapter'} is zero.")
        chosen = self._candidates(query, max(top, candidates))
        matches = exact_matches(self.pack, query, square, chosen)
        return sorted(matches, key=lambda match: (-match.score, match.name))[:top]

    def _candidates(self, query: Query, n: int) -> list[str]:
        """Return the names of the n adapters with the largest estimated cosines."""
        if query.name is None:
            estimates = self.sketches @ sketch_factors(query.factors)
        else:
            own = self.names.index(query.name)
            estimates = self.sketches @ self.sketches[own]
            estimates[own] = -torch.inf
        n = min(n, len(self.names) - (query.name is not None))
        return sorted(self.names[index] for index in estimates.topk(n).indices.tolist())


def to_bytes(index: SimilarityIndex) -> bytes:
    """Return names and sketches of an index as bytes, for `from_bytes`."""
    return json.dumps(index.names).encode() + b"\n" + index.sketches.numpy().tobytes()


def from_bytes(pack: Pack, data: bytes) -> SimilarityIndex:
    """Return the index that `to_bytes` wrote, of the same pack."""
    names, _, numbers = data.partition(b"\n")
    sketches = np.frombuffer(numbers, dtype=np.float32).reshape(-1, WIDTH)
    # copied, because torch warns of memory that it must not write to
    return SimilarityIndex(pack, tuple(json.loads(names)), torch.from_numpy(sketches.copy()))


def read_query(pack: Pack, source: sources.Source, *, same_base: bool, options: Mapping[str, Any]) -> Query:
    """Read the adapter that others are compared with; arguments and errors as `SimilarityIndex.find`."""
    is_version = isinstance(source, str) and keys.split_version(source) is not None
    if isinstance(source, str) and not is_version and (source in pack or source in pack.histories):
        return Query(source, MemberUpdates.read(pack, source).factors(pack.subspace))
    adapter = _read_adapter(pack, source, options)
    scanned = scan_for_pack(adapter, pack, same_base=same_base, carry_missing=True)
    if not scanned.subspace_names:
        raise ModuleNameError(
            f"adapter {adapter.name!r} has no module in common with the pack, such as {min(pack.info.modules)!r}. It "
            "belongs to another base model, or to other modules of it."
        )
    own_names = {scanned.subspace_names.get(own, own): own for own in adapter.specs}
    return Query(None, LazyMapping(own_names, lambda module: adapter.modules[own_names[module]]))


def _read_adapter(pack: Pack, source: sources.Source, options: Mapping[str, Any]) -> Adapter:
    if isinstance(source, str) and source in pack.history_store:
        return pack.adapter(source)
    single = sources.single(None, source)
    if isinstance(source, str) and keys.is_valid_name(source) and not Path(source).exists():
        # raises the error about an unknown name, which lists those of the pack
        pack.packed(source)
    # the name does not matter, so a folder may have any
    name = sources.default_name(single)
    valid = name if keys.is_valid_name(name) else "adapter"
    return checks.read_source(sources.AdapterSource(valid, single.source), options)


def exact_matches(pack: Pack, query: Query, square: float, names: Sequence[str]) -> list[Match]:
    """Return the exact cosines of adapters of a pack with another one, in the order of `names`.

    Args:
        pack: The pack.
        query: The adapter that they are compared with.
        square: Squared norm of its update.
        names: Names of adapters whose updates are not zero.
    """
    members = [MemberUpdates.read(pack, name) for name in names]
    squares = torch.zeros(len(names), dtype=torch.float64)
    products: list[dict[str, float]] = [{} for _ in names]
    for module, updates in by_module(members, pack.subspace):
        squares += updates.squares()
        factors = query.factors.get(module)
        if factors is None or shape_of(factors) != updates.shape:
            continue
        for index, product in enumerate(updates.products(factors).tolist()):
            if updates.batch.ranks[index]:
                products[index][module] = product
    norms = (squares.sqrt() * square**0.5).tolist()
    return [_match(name, each, norm) for name, each, norm in zip(names, products, norms, strict=True)]


def _match(name: str, products: Mapping[str, float], norm: float) -> Match:
    """Return the match of an adapter.

    Args:
        name: Name of the adapter.
        products: Inner product with the query in each module that both have.
        norm: Product of the norms of both updates.
    """
    if not products:
        return Match(name, 0.0, "The two have no module in common.")
    # fsum rounds once, so that the order of modules does not matter
    cosine = min(max(math.fsum(products.values()) / norm, -1.0), 1.0)
    # largest in the direction of the sum
    largest = sorted(products.items(), key=lambda item: (-math.copysign(1.0, cosine) * item[1], item[0]))
    named = " and ".join(f"{module} ({product / norm:+.2g})" for module, product in largest[:_NAMED_MODULES])
    modules = f"{len(products)} common module{'s' * (len(products) > 1)}"
    return Match(name, cosine, f"Cosine {cosine:+.4f} over {modules}; the largest parts are from {named}.")
