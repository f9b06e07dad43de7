"""Methods that merge the updates of one module into one, in common coordinates.

Mean, task arithmetic, TSV and Iso-C do not depend on coordinates: their results equal those from the out × in matrices.
TIES, DARE and KnOTS treat each entry by itself, so that their results depend on the coordinates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coordinates import CommonCoordinates, SingularComponents, from_core, significant


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """Options of a merge of one module.

    Attributes:
        weights: Weight of each adapter.
        density: Share of entries that TIES, DARE and KnOTS keep, above 0 and at most 1.
        generator: Source of the entries that DARE keeps.
        shape: Number of outputs and of inputs of the module.
    """

    weights: Sequence[float]
    density: float
    generator: torch.Generator
    shape: tuple[int, int]


Merger = Callable[[CommonCoordinates, MethodOptions], SingularComponents]


def mean(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Return the mean, weighted by the weights divided by their sum, which is not zero."""
    total = sum(options.weights)
    return from_core(weighted_sum(coordinates.cores, [weight / total for weight in options.weights]), coordinates)


def task_arithmetic(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Return the weighted sum (Ilharco et al. 2023, arXiv 2212.04089)."""
    return from_core(weighted_sum(coordinates.cores, options.weights), coordinates)


def ties(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Trim, elect signs and merge (TIES, Yadav et al. 2023, arXiv 2306.01708, section 4), entry by entry of cores."""
    return from_core(elect_and_merge(coordinates.cores, options), coordinates)


def dare(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Drop random entries of the cores, rescale the others, and add (DARE, Yu et al. 2024, arXiv 2311.03099)."""
    kept = torch.rand(coordinates.cores.shape, generator=options.generator, dtype=torch.float64) < options.density
    return from_core(weighted_sum(coordinates.cores * kept / options.density, options.weights), coordinates)


def knots(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Do TIES on aligned updates (KnOTS, Stoica et al. 2025, arXiv 2410.19735, section 4).

    The SVD of the updates side by side is U · Σ · [V₁ … Vₙ]. TIES treats the entries of the Σ · Vᵢ: rows are in the
    common coordinates of the outputs, which are U, and columns in those of the layer's inputs.
    """
    merged = elect_and_merge(coordinates.cores @ coordinates.down, options)
    # rows of zeros in `merged`, and more rows than columns, are fine for this QR
    basis, triangle = torch.linalg.qr(merged.mT)
    left, values, right = torch.linalg.svd(triangle.mT, full_matrices=False)
    return SingularComponents(coordinates.up.mT @ left, values, right @ basis.mT)


def tsv(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Merge orthogonalised singular vectors (TSV-Merge, Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1).

    Each of n adapters keeps at most min(out, in) / n singular components, which no LoRA of a small rank exceeds. The
    singular vectors of all are replaced by the nearest orthonormal ones. Components of zero norm take no part.
    """
    most = max(1, min(options.shape) // len(options.weights))
    lefts, values, rights = [], [], []
    for (right, left), weight in zip(coordinates.components, options.weights, strict=True):
        roots = right[:most].norm(dim=1, keepdim=True)
        lefts.append((left[:most] / roots).mT)
        values.append(weight * roots[:, 0].square())
        rights.append(right[:most] / roots)
    left = _nearest_orthonormal(torch.cat(lefts, dim=1))
    right = _nearest_orthonormal(torch.cat(rights))
    return from_core(left @ (torch.cat(values)[:, None] * right), coordinates)


def iso_c(coordinates: CommonCoordinates, options: MethodOptions) -> SingularComponents:
    """Set all singular values of the sum to their mean (Iso-C, Marczak et al. 2025, arXiv 2502.04959, section 4).

    The mean is over the singular values that are not zero: the others have no direction of their own in low-rank
    updates. An implementation that averages over all min(out, in) of them gets the same update times
    rank / min(out, in). The components keep the order of the singular values that they had.
    """
    components = task_arithmetic(coordinates, options)
    rank = components.rank
    values = torch.full((rank,), float(components.values[:rank].mean()) if rank else 0.0, dtype=torch.float64)
    return SingularComponents(components.left[:, :rank], values, components.right[:rank])


def sum_is_zero(weights: Sequence[float]) -> bool:
    """Return whether weights add up to zero, but for rounding, so that they have no mean."""
    return abs(sum(weights)) <= 1e-9 * sum(map(abs, weights))


def elect_and_merge(parts: Tensor, options: MethodOptions) -> Tensor:
    """Return the TIES merge of tensors, entry by entry, as PEFT's `ties` computes it.

    Each part keeps its largest entries. The sign of each entry is that of the sum. Entries of this sign are weighted,
    added, and divided by their number.

    Args:
        parts: One tensor for each adapter, (n, …).
        options: Options, of which the density is the share of entries that are kept.
    """
    trimmed = torch.stack([_keep_largest(part, options.density) for part in parts])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    total = torch.zeros_like(trimmed[0])
    for part, part_agrees, weight in zip(trimmed, agree, options.weights, strict=True):
        total += weight * part * part_agrees
    return total / agree.sum(0).clamp_min(1)


def _keep_largest(part: Tensor, density: float) -> Tensor:
    """Return a tensor with all but its largest entries set to zero. density: share of entries that are kept."""
    flat = part.flatten()
    kept = torch.zeros_like(flat)
    largest = flat.abs().topk(max(1, int(density * flat.numel())), sorted=False).indices
    kept[largest] = flat[largest]
    return kept.view_as(part)


def weighted_sum(cores: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum (q, p) of cores (n, q, p)."""
    return torch.einsum("n,nqp->qp", torch.tensor(weights, dtype=torch.float64), cores)


def _nearest_orthonormal(vectors: Tensor) -> Tensor:
    """Return the orthonormal vectors nearest to the given ones, all columns or all rows: their polar factor.

    Linearly dependent vectors have the partial isometry of their span.
    """
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    rank = significant(values)
    isometry: Tensor = left[:, :rank] @ right[:rank]
    return isometry


@dataclass(frozen=True, slots=True)
class Method:
    """A merging method.

    Attributes:
        merge: Function that merges the updates of one module.
        density: Default share of entries that are kept; None for methods that keep all.
        coordinates: Where entries are treated one by one, in words; None for methods that do not depend on coordinates.
        needs_inputs: Whether the result depends on the axes of the layer's inputs, not on their geometry alone.
    """

    merge: Merger
    density: float | None = None
    coordinates: str | None = None
    needs_inputs: bool = False


_CORES = "entry by entry of each module's cores in the singular vectors that all updates span together"

METHODS: Mapping[str, Method] = {
    "mean": Method(mean),
    "task-arithmetic": Method(task_arithmetic),
    "ties": Method(ties, 0.2, _CORES),
    "dare": Method(dare, 0.5, _CORES),
    "knots": Method(
        knots,
        0.2,
        "entry by entry of Σ·Vᵢ, rows in the left singular vectors of all updates side by side, columns in the layer's "
        "inputs",
        needs_inputs=True,
    ),
    "tsv": Method(tsv),
    "iso-c": Method(iso_c),
}
"""Name → merging method."""
