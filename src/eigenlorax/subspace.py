"""A whole model: a pair of bases for every module. Fit, augment, project and reconstruct over LoRA factors.

The mathematics, with proofs and measurements, is in docs/method.md. Nothing here knows of files or adapters' names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from jaxtyping import Float
from torch import Tensor

from . import basis as one
from . import linalg
from .adapter import LoRAFactors
from .basis import Basis
from .errors import NonFiniteError, OptionError
from .options import integer, number

WEIGHTINGS = ("delta", "factors")


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How a subspace is fitted; valid from birth.

    n_components: at most so many on each side of each module; or energy: the smallest number that keeps this share.
    weighting: "delta" weighs each factor by the other one, so that the error of the update itself is minimised;
        "factors" stacks the factors as they are (arXiv 2502.04700).
    sweeps: alternating refinements of the "delta" fit; the objective never grows with one.
    """

    n_components: int | None = None
    energy: float | None = None
    weighting: str = "delta"
    sweeps: int = 2

    def __post_init__(self) -> None:
        for name, kind in (("n_components", integer), ("energy", number), ("sweeps", integer)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, kind(name, value))
        one.check_size(self.n_components, self.energy)
        if self.weighting not in WEIGHTINGS:
            raise OptionError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        if self.sweeps < 0:
            raise OptionError(f"sweeps must be 0 or more, got {self.sweeps}.")


@dataclass(frozen=True, slots=True)
class ModuleBases:
    """The two bases of a module: `down` spans rows of width in_features, `up` rows of width out_features."""

    down: Basis
    up: Basis

    def side(self, side: str) -> Basis:
        return self.down if side == "down" else self.up

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as the weight's."""
        return self.up.dimension, self.down.dimension


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Extra directions that were added to every side of every module, and the seed that rebuilds them."""

    n_extra: int
    seed: int


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One module of one adapter in its bases: delta_weight = scaling · upᵀ-basis @ up @ down @ down-basis."""

    down: Float[Tensor, "r k_down"]
    up: Float[Tensor, "k_up r"]
    scaling: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def stored_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Subspace:
    """The bases of every module of one model, by module name in sorted order."""

    modules: Mapping[str, ModuleBases]
    augmentations: tuple[Augmentation, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the stored components."""
        dtypes = {bases.side(side).components.dtype for bases in self.modules.values() for side in ("down", "up")}
        widest = dtypes.pop()
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest

    @property
    def stored_bytes(self) -> int:
        """Tensor bytes of the subspace's file: fitted components, spectra, and the check numbers of augmented rows."""
        bases = [module.side(side) for module in self.modules.values() for side in ("down", "up")]
        return sum(b.fitted.nbytes + b.singular_values.nbytes + 4 * b.n_extra for b in bases)

    @property
    def fingerprint(self) -> str:
        """sha256 of module names, shapes, dtypes, component bytes and augmentation seeds: what a coefficient refers to.

        Augmented rows enter by their seed, not their floats, which may differ in the last bits between machines.
        """
        digest = sha256()
        for name, bases in sorted(self.modules.items()):
            for side in ("down", "up"):
                rows = bases.side(side).fitted.contiguous()
                digest.update(f"{name}\0{side}\0{tuple(rows.shape)}\0{rows.dtype}\0".encode())
                digest.update(tensor_bytes(rows))
        for augmentation in self.augmentations:
            digest.update(f"augmentation\0{augmentation.n_extra}\0{augmentation.seed}\0".encode())
        return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, any dtype, without a copy."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def gram_pair(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    """down @ downᵀ and upᵀ @ up, (r, r) float64: all that norms of a delta weight need."""
    down, up = factors.down.to(torch.float64), factors.up.to(torch.float64)
    return down @ down.mT, up.mT @ up


def delta_square(factors: LoRAFactors) -> float:
    """‖scaling · up @ down‖²_F without the out × in matrix."""
    down_gram, up_gram = gram_pair(factors)
    return max(factors.scaling**2 * float((down_gram * up_gram).sum()), 0.0)


def fit_module(factors: Sequence[LoRAFactors], weights: Sequence[float], options: FitOptions) -> ModuleBases:
    """The bases of one module, float64, from its adapters' factors, none of which may be a zero update.

    weights: one positive number an adapter, 1 / ‖its whole delta weight‖ where every adapter should count alike; they
    enter the "delta" weighting only. `rounded` makes the bases ready to be stored.
    """
    down = linalg.RowStack([f.down for f in factors])
    up = linalg.RowStack([f.up.mT for f in factors])
    choose = one.chooser(options.n_components, options.energy)
    if options.weighting == "factors":
        identities = [torch.eye(f.down.shape[0], dtype=torch.float64, device=f.down.device) for f in factors]
        first_down, first_up = down.leading(identities, choose), up.leading(identities, choose)
        return ModuleBases(
            down=_finished(first_down, first_down, identities, down),
            up=_finished(first_up, first_up, identities, up),
        )
    grams = [gram_pair(f) for f in factors]
    scales = [abs(f.scaling) * weight for f, weight in zip(factors, weights, strict=True)]
    down_roots = [scale * linalg.psd_root(gram) for scale, (_, gram) in zip(scales, grams, strict=True)]
    up_roots = [scale * linalg.psd_root(gram) for scale, (gram, _) in zip(scales, grams, strict=True)]
    first_down, first_up = down.leading(down_roots, choose), up.leading(up_roots, choose)
    last_down, last_up = first_down, first_up
    keep_down, keep_up = one.chooser(first_down.k, None), one.chooser(first_up.k, None)
    for _ in range(options.sweeps):
        last_down = down.leading(_projected_roots(last_up, up.blocks, scales), keep_down)
        last_up = up.leading(_projected_roots(last_down, down.blocks, scales), keep_up)
    return ModuleBases(
        down=_finished(first_down, last_down, down_roots, down),
        up=_finished(first_up, last_up, up_roots, up),
    )


def _projected_roots(other: linalg.Leading, blocks: Sequence[slice], scales: Sequence[float]) -> list[Tensor]:
    """Roots of the other side's Gram matrices as its basis sees them: what is left of each row's weight."""
    projected = [other.projection[block] for block in blocks]
    return [scale * linalg.psd_root(rows @ rows.mT) for scale, rows in zip(scales, projected, strict=True)]


def _finished(first: linalg.Leading, last: linalg.Leading, roots: Sequence[Tensor], stack: linalg.RowStack) -> Basis:
    """The last sweep's basis, with the first spectrum and the share of *its* stack that the basis keeps."""
    kept = sum(
        float((root @ last.projection[block]).square().sum()) for root, block in zip(roots, stack.blocks, strict=True)
    )
    return Basis(
        components=last.components().cpu(),
        singular_values=first.singular_values.float().cpu(),
        energy=min(kept / float(first.singular_values.square().sum()), 1.0),
    )


def rounded(bases: ModuleBases, dtype: torch.dtype) -> ModuleBases:
    """The same bases with their components rounded to `dtype`."""
    return ModuleBases(
        down=replace(bases.down, components=bases.down.components.to(dtype)),
        up=replace(bases.up, components=bases.up.components.to(dtype)),
    )


def empty_bases(in_features: int, out_features: int, dtype: torch.dtype) -> ModuleBases:
    """The bases of a module that no adapter has trained: no component on either side."""

    def none(dimension: int) -> Basis:
        return Basis(torch.zeros(0, dimension, dtype=dtype), torch.zeros(0), energy=1.0)

    return ModuleBases(down=none(in_features), up=none(out_features))


def augment(subspace: Subspace, n_extra: int, seed: int) -> Subspace:
    """Every side of every module with `n_extra` further directions from `seed` (arXiv 2502.04700 §3.3)."""
    n_extra, seed = integer("n_extra", n_extra), integer("seed", seed)
    if any(seed == old.seed for old in subspace.augmentations):
        raise OptionError(
            f"the subspace already has directions from seed {seed}; those it would give again. Choose another seed."
        )
    modules = {
        name: ModuleBases(
            down=one.augment(bases.down, n_extra, seed, f"{name}.down"),
            up=one.augment(bases.up, n_extra, seed, f"{name}.up"),
        )
        for name, bases in subspace.modules.items()
    }
    return Subspace(modules, (*subspace.augmentations, Augmentation(n_extra, seed)))


Duals = tuple[Float[Tensor, "k_down n_in"], Float[Tensor, "k_up n_out"]]


def duals(bases: ModuleBases) -> Duals:
    """What `project` multiplies with: worth keeping where many adapters share the bases."""
    return one.dual(bases.down), one.dual(bases.up)


def project(
    factors: LoRAFactors, bases: ModuleBases, dtype: torch.dtype = torch.float64, dual: Duals | None = None
) -> Coefficients:
    """The best approximation of a module's update in its two spans: C_A = A·Vᵀ, C_B = U·B, rounded to `dtype`.

    Where `dtype` is too narrow for the numbers, a power of two moves from one factor to the other, which changes
    neither the update nor its exactness (`balance`).
    """
    shift = balance(factors, dtype)
    down_dual, up_dual = dual or (None, None)
    down = one.project(factors.down.to(torch.float64) * 2.0**-shift, bases.down, down_dual)
    up = one.project(factors.up.mT.to(torch.float64) * 2.0**shift, bases.up, up_dual).mT
    rounded = Coefficients(down.to(dtype).contiguous(), up.to(dtype).contiguous(), factors.scaling)
    _check_kept(down, rounded.down)
    _check_kept(up, rounded.up)
    if not (bool(rounded.down.isfinite().all()) and bool(rounded.up.isfinite().all())):
        raise NonFiniteError(
            f"coefficients up to {float(max(down.abs().max(), up.abs().max())):.1e} do not fit "
            f"{dtype}, which ends at {torch.finfo(dtype).max:.1e}. Store them as float32."
        )
    return rounded


def _check_kept(exact: Tensor, rounded: Tensor) -> None:
    """`NonFiniteError` where a dtype is too coarse for numbers: what is below its smallest one becomes zero."""
    size = float(torch.linalg.vector_norm(exact))
    if size > 0 and float(torch.linalg.vector_norm(rounded.to(torch.float64))) < size / 2:
        raise NonFiniteError(
            f"coefficients of norm {size:.1e} vanish in {rounded.dtype}, whose smallest number is "
            f"{torch.finfo(rounded.dtype).smallest_normal:.1e}. Store them as float32."
        )


def balance(factors: LoRAFactors, dtype: torch.dtype) -> int:
    """The power of two to take out of `down` and into `up` so that both factors fit `dtype`; 0 where they do.

    A factor fits if the norms of its rows leave room below the largest number of `dtype`, and its largest entry is far
    enough above the smallest normal one to keep the digits of those a thousand times smaller.
    """
    info = torch.finfo(dtype)
    sizes = [float(torch.linalg.vector_norm(t.to(torch.float64))) for t in (factors.down, factors.up)]
    if 0.0 in sizes or all(info.tiny * 2.0**20 < size < info.max / 2 for size in sizes):
        return 0
    return round(math.log2(sizes[0] / sizes[1]) / 2)


def reconstruct(coefficients: Coefficients, bases: ModuleBases, dtype: torch.dtype = torch.float64) -> LoRAFactors:
    """An ordinary LoRA again: A = C_A·V and B = Uᵀ·C_B, rank and scaling kept, no decomposition."""
    return LoRAFactors(
        down=one.reconstruct(coefficients.down, bases.down).to(dtype),
        up=one.reconstruct(coefficients.up.mT, bases.up).mT.to(dtype).contiguous(),
        scaling=coefficients.scaling,
    )


def pad(coefficients: Coefficients, n_extra: int) -> Coefficients:
    """The same adapter in bases that were augmented by `n_extra`: zeros on the new directions."""
    return replace(
        coefficients,
        down=torch.nn.functional.pad(coefficients.down, (0, n_extra)),
        up=torch.nn.functional.pad(coefficients.up, (0, 0, 0, n_extra)),
    )
