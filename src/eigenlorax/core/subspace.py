"""A whole model: a pair of bases for every module. Fit, augment, project and reconstruct over LoRA factors.

The mathematics, with proofs and measurements, is in docs/method.md. Nothing here knows of files or adapters' names.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NonFiniteError, OptionError, ShapeError
from . import basis as one
from . import chunks, linalg
from .adapter import LoRAFactors
from .basis import Basis
from .chunks import Chunk, CoefficientChunk
from .options import byte_count, check_choice, integer, number

WEIGHTINGS = ("delta", "factors")
SWEEPS = 2
"""How many a fit makes unless it is told."""
AIMS = ("max_error", "max_bytes", "ratio")
"""The options for which, unless numbers are to stay floats, bytes are chosen (`compact`)."""
SIZES = ("n_components", "energy", "max_error", "max_bytes", "ratio")
"""The options of which one says how many components are kept."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How a subspace is fitted; valid from birth.

    One of n_components: at most so many on each side of each module; energy: the smallest number that keeps this
        share; max_error: as few bytes as keep every adapter's delta error at most this; max_bytes, or ratio, to the
        LoRAs in 16 bits: the smallest error that every adapter can have in so many bytes (`coding`).
    weighting: "delta" weighs each factor by the other one, so that the error of the update itself is minimised;
        "factors" stacks the factors as they are (arXiv 2502.04700).
    sweeps: alternating refinements of the "delta" fit; the objective never grows with one.
    """

    n_components: int | None = None
    energy: float | None = None
    weighting: str = "delta"
    sweeps: int = SWEEPS
    max_error: float | None = None
    max_bytes: int | float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        kinds = {"n_components": integer, "energy": number, "max_error": number, "ratio": number}
        for name, kind in {**kinds, "max_bytes": byte_count, "sweeps": integer}.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, kind(name, value))
        sizes = {name: getattr(self, name) for name in SIZES}
        if sum(value is not None for value in sizes.values()) != 1:
            given = ", ".join(f"{name}={value}" for name, value in sizes.items() if value is not None) or "none of them"
            raise OptionError(
                f"give one of {', '.join(SIZES[:-1])} and {SIZES[-1]}: got {given}. "
                "For example n_components=32, energy=0.9, max_error=0.3, or ratio=18."
            )
        if self.n_components is not None or self.energy is not None:
            one.check_size(self.n_components, self.energy)
        elif self.max_error is not None and not 0 < self.max_error < 1:
            raise OptionError(f"max_error is a relative error, above 0 and below 1, got {self.max_error}.")
        elif self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise OptionError(f"ratio is by how much smaller the pack is, a number from 1 on, got {self.ratio}.")
        check_choice("weighting", self.weighting, WEIGHTINGS)
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
    """One module of one adapter in its bases: delta_weight = scaling · (U.mT @ up + up_rest) @ (down @ V + down_rest).

    V, U: the components of the two bases. down_rest, up_rest: what the bases do not hold of the two factors; None where
    nothing is kept of it. The rank need not be the one the adapter was trained with.
    """

    down: Float[Tensor, "r k_down"]
    up: Float[Tensor, "k_up r"]
    scaling: float
    kernel: tuple[int, ...] = ()
    down_rest: Float[Tensor, "r n_in"] | None = None
    up_rest: Float[Tensor, "n_out r"] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def has_rest(self) -> bool:
        """Whether there is more to the update than its coefficients."""
        return self.down_rest is not None or self.up_rest is not None

    def rest(self, side: str) -> Tensor | None:
        return self.down_rest if side == "down" else self.up_rest

    @property
    def stored_bytes(self) -> int:
        tensors = (self.down, self.up, self.down_rest, self.up_rest)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Subspace:
    """The bases of every module of one model, by module name in sorted order.

    It may have grown since its fit, by steps that each concern every side: what was there before a step stays, and is
    the subspace of an earlier fingerprint (`lineage`, `at`).
    """

    modules: Mapping[str, ModuleBases]

    def __post_init__(self) -> None:
        steps = {tuple(one.seed for one in basis.growth) for basis in self._sides()}
        if len(steps) > 1:
            raise OptionError(f"the sides of a subspace grow together; here are some of {len(steps)} histories.")

    def _sides(self) -> Iterator[Basis]:
        return (module.side(side) for module in self.modules.values() for side in ("down", "up"))

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The steps by which the subspace has grown: the seed of an augmentation, None for an extension."""
        return next((tuple(one.seed for one in basis.growth) for basis in self._sides()), ())

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """The augmentations among its steps."""
        first = next(self._sides(), None)
        growth = first.growth if first is not None else ()
        return tuple(Augmentation(one.n, one.seed) for one in growth if one.seed is not None)

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
        """Tensor bytes of the subspace's file: stored components, spectra, and the check numbers of augmented rows."""
        return sum(b.row_bytes + b.singular_values.nbytes + 4 * b.n_extra for b in self._sides())

    @property
    def fingerprint(self) -> str:
        """sha256 of module names, shapes, dtypes, component bytes and augmentation seeds: what a coefficient refers to.

        Augmented rows enter by their seed, not their floats, which may differ in the last bits between machines.
        """
        return self.lineage[-1]

    @property
    def lineage(self) -> tuple[str, ...]:
        """The fingerprints of the subspace as it was fitted, and after each of its steps; the last one is its own."""
        digest = sha256()
        for name, bases in sorted(self.modules.items()):
            for side in ("down", "up"):
                _add_rows(digest, name, side, bases.side(side).fitted)
        found = [digest.hexdigest()]
        for step, seed in enumerate(self.seeds):
            if seed is not None:
                n_extra = next(self._sides()).growth[step].n
                digest.update(f"augmentation\0{n_extra}\0{seed}\0".encode())
            else:
                digest.update(b"extension\0")
                for name, bases in sorted(self.modules.items()):
                    for side in ("down", "up"):
                        if bases.side(side).growth[step].n:
                            _add_rows(digest, name, side, bases.side(side).grown(step))
            found.append(digest.hexdigest())
        return tuple(found)

    def at(self, fingerprint: str) -> "Subspace | None":
        """The subspace as it was when this was its fingerprint, a view of this one; None if it never was."""
        lineage = self.lineage
        if fingerprint not in lineage:
            return None
        return self.before(lineage.index(fingerprint))

    def before(self, step: int) -> "Subspace":
        """The subspace as it was before that step of its growth, a view of this one; after the last one, this one."""
        if step == len(self.seeds):
            return self
        return Subspace({name: ModuleBases(b.down.before(step), b.up.before(step)) for name, b in self.modules.items()})


def _add_rows(digest: Any, name: str, side: str, rows: Tensor) -> None:
    digest.update(f"{name}\0{side}\0{tuple(rows.shape)}\0{rows.dtype}\0".encode())
    digest.update(tensor_bytes(rows))


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


Chooser = Callable[[Tensor, tuple[int, int]], int]
"""From a spectrum and the shape of its stack to how many directions to keep."""


def fit_module(
    factors: Sequence[LoRAFactors],
    weights: Sequence[float],
    options: FitOptions,
    k: tuple[int, int] | None = None,
) -> ModuleBases:
    """The bases of one module, float64, from its adapters' factors, none of which may be a zero update.

    weights: one positive number an adapter, 1 / ‖its whole delta weight‖ where every adapter should count alike; they
    enter the "delta" weighting only. k: so many components (down, up), which `max_error` needs to be told; in place of
    what the options say. `rounded` makes the bases ready to be stored.
    """
    stack = ModuleStack(factors, weights, options)
    if k is not None:
        return stack.fit(stack.whole(), k)
    return stack.finished(stack.first(one.chooser(options.n_components, options.energy)))


Pair = tuple[linalg.Leading, linalg.Leading]


class ModuleStack:
    """One module's factors, stacked and weighted: what fits of every size start from."""

    __slots__ = ("_sweeps", "down", "down_roots", "scales", "up", "up_roots")

    def __init__(self, factors: Sequence[LoRAFactors], weights: Sequence[float], options: FitOptions) -> None:
        self.down = linalg.RowStack([f.down for f in factors])
        self.up = linalg.RowStack([f.up.mT for f in factors])
        self.scales = [abs(f.scaling) * weight for f, weight in zip(factors, weights, strict=True)]
        self._sweeps = options.sweeps if options.weighting == "delta" else 0
        if options.weighting == "factors":
            identities = [torch.eye(f.down.shape[0], dtype=torch.float64, device=f.down.device) for f in factors]
            self.down_roots = self.up_roots = identities
        else:
            grams = [gram_pair(f) for f in factors]
            self.down_roots = [s * linalg.psd_root(gram) for s, (_, gram) in zip(self.scales, grams, strict=True)]
            self.up_roots = [s * linalg.psd_root(gram) for s, (gram, _) in zip(self.scales, grams, strict=True)]

    def without(self, index: int) -> "ModuleStack":
        """The same but for one adapter. What is known of the others is not computed again."""
        found = object.__new__(ModuleStack)
        found.down, found.up = self.down.without(index), self.up.without(index)
        for name in ("scales", "down_roots", "up_roots"):
            values = getattr(self, name)
            setattr(found, name, [*values[:index], *values[index + 1 :]])
        found._sweeps = self._sweeps
        return found

    def sizes(self, whole: Pair, options: FitOptions) -> tuple[int, int]:
        """How many components (down, up) the options ask for."""
        choose = one.chooser(options.n_components, options.energy)
        down, up = (
            choose(leading.singular_values, (stack.rows.shape[0], stack.rows.shape[1]))
            for leading, stack in zip(whole, (self.down, self.up), strict=True)
        )
        return down, up

    def first(self, choose: Chooser) -> Pair:
        """The leading directions of each side by itself, as many as `choose` says."""
        return self.down.leading(self.down_roots, choose), self.up.leading(self.up_roots, choose)

    def whole(self) -> Pair:
        """All directions of each side by itself, up to its numerical rank; `fit` takes as many as it is asked for."""
        return self.first(one.chooser(None, 1.0))

    def fit(self, whole: Pair, k: tuple[int, int]) -> ModuleBases:
        """The bases with `k` components (down, up), or fewer where the rank is less; 0 on both sides drops the module.

        whole: what `whole` gave, which fits of several sizes share.
        """
        if k == (0, 0):
            return ModuleBases(down=_without(whole[0], self.down), up=_without(whole[1], self.up))
        return self.finished((_cut(whole[0], k[0]), _cut(whole[1], k[1])))

    def finished(self, first: Pair) -> ModuleBases:
        """The bases after the sweeps, as wide as those of `first`."""
        down, up = first
        keep_down, keep_up = one.chooser(down.k, None), one.chooser(up.k, None)
        for _ in range(self._sweeps):
            down = self.down.leading(_projected_roots(up, self.up.blocks, self.scales), keep_down)
            up = self.up.leading(_projected_roots(down, self.down.blocks, self.scales), keep_up)
        return ModuleBases(
            down=_finished(first[0], down, self.down_roots, self.down),
            up=_finished(first[1], up, self.up_roots, self.up),
        )


def _cut(leading: linalg.Leading, k: int) -> linalg.Leading:
    """The first `k` directions alone."""
    # contiguous copies: a slice would keep the others alive
    return replace(
        leading,
        projection=leading.projection[:, :k].contiguous(),
        components=lambda: leading.components()[:k].clone(),
    )


def _without(leading: linalg.Leading, stack: linalg.RowStack) -> Basis:
    """No component, beside the spectrum of what is dropped."""
    none = torch.zeros(0, stack.rows.shape[1], dtype=torch.float64)
    return Basis(none, leading.singular_values.float().cpu(), energy=0.0)


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


def on(bases: ModuleBases, device: torch.device) -> ModuleBases:
    """The same bases with their components on a device."""
    return ModuleBases(
        down=replace(bases.down, components=bases.down.components.to(device)),
        up=replace(bases.up, components=bases.up.components.to(device)),
    )


def rounded(bases: ModuleBases, dtype: torch.dtype) -> ModuleBases:
    """The same bases with their components rounded to `dtype`, which is how they are stored."""
    return ModuleBases(
        down=replace(bases.down, components=bases.down.components.to(dtype), payload=None),
        up=replace(bases.up, components=bases.up.components.to(dtype), payload=None),
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
    return Subspace(modules)


def extend(
    subspace: Subspace,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    append: Callable[[Basis, Tensor], Basis] = one.extend,
) -> Subspace:
    """The subspace with further rows (down, up) of some modules, at least one in all, each side's orthonormal and
    orthogonal to what is there. What refers to the subspace refers to the same rows of this one.

    append: adds rows to a basis, rounded as they will be stored.
    """
    if not any(len(side) for pair in rows.values() for side in pair):
        raise OptionError("no direction was given to extend the subspace by.")
    modules = {}
    for name, bases in subspace.modules.items():
        none = tuple(torch.zeros(0, basis.dimension) for basis in (bases.down, bases.up))
        down, up = rows.get(name, none)
        modules[name] = ModuleBases(append(bases.down, down), append(bases.up, up))
    return Subspace(modules)


Duals = tuple[Float[Tensor, "k_down n_in"], Float[Tensor, "k_up n_out"]]


def duals(bases: ModuleBases) -> Duals:
    """What `project` multiplies with: worth keeping where many adapters share the bases."""
    return one.dual(bases.down), one.dual(bases.up)


def project(
    factors: LoRAFactors, bases: ModuleBases, dtype: torch.dtype = torch.float64, dual: Duals | None = None
) -> Coefficients:
    """The best approximation of a module's update in its two spans: C_A = A·Vᵀ, C_B = U·B, rounded to `dtype`.

    Where `dtype` is too narrow for the numbers, a power of two moves from one factor to the other, which changes
    neither the update nor its exactness (`balanced`).
    """
    found = project_chunk(balanced(chunks.chunk([factors], [0.0]), dtype), bases, dtype, dual)
    return Coefficients(found.down[0], found.up[0], factors.scaling, factors.kernel)


def project_chunk(
    wide: Chunk, bases: ModuleBases, dtype: torch.dtype = torch.float64, dual: Duals | None = None
) -> CoefficientChunk:
    """`project` for several adapters at a time, as `balanced` gives them. An error does not say which it is about."""
    exact = {}
    for side, rows in zip(("down", "up"), dual or duals(bases), strict=True):
        one.check_width(wide.rows(side).shape[2], bases.side(side))
        exact[side] = chunks.project(wide, side, rows.mT.to(wide.down.dtype))
    down, up = exact["down"], exact["up"].mT
    rounded = CoefficientChunk(down.to(dtype).contiguous(), up.to(dtype).contiguous(), wide.scaling)
    check_rounded(CoefficientChunk(down, up, wide.scaling), rounded)
    return rounded


def check_rounded(exact: CoefficientChunk, rounded: CoefficientChunk) -> None:
    """`NonFiniteError` where a dtype has no room for coefficients."""
    check_kept(exact.down, rounded.down)
    check_kept(exact.up, rounded.up)


def check_kept(exact: Float[Tensor, "n a b"], rounded: Float[Tensor, "n a b"]) -> None:
    """The same of one of their tensors: a dtype may end below a number, or be too coarse for it, so that it becomes
    zero."""
    wider = f"Store them as {'float32' if rounded.dtype.itemsize < 4 else 'float64'}."
    size, kept = (torch.linalg.vector_norm(each, dim=(1, 2), dtype=torch.float64) for each in (exact, rounded))
    vanished = (size > 0) & (kept < size / 2)
    if bool(vanished.any()):
        raise NonFiniteError(
            f"coefficients of norm {float(size[vanished][0]):.1e} vanish in {rounded.dtype}, whose smallest number is "
            f"{torch.finfo(rounded.dtype).smallest_normal:.1e}. {wider}"
        )
    if not bool(rounded.isfinite().all()):
        raise NonFiniteError(
            f"coefficients up to {float(exact.abs().max()):.1e} do not fit {rounded.dtype}, which ends at "
            f"{torch.finfo(rounded.dtype).max:.1e}. {wider}"
        )


def balanced(one_chunk: Chunk, dtype: torch.dtype, products: torch.dtype = torch.float64) -> Chunk:
    """The same updates in factors whose coefficients fit `dtype`, in a dtype that large products may be made in.

    A factor fits if the norms of its rows leave room below the largest number of `dtype`, and its largest entry is far
    enough above the smallest normal one to keep the digits of those a thousand times smaller. Where one does not, a
    power of two goes out of it, and into the other (`shifts`).
    products: float32 will do where factors, components and coefficients are narrower than that; the result is float64
    all the same where sizes leave float32 no room for squares.
    """
    wide = one_chunk.to(products)
    if products == torch.float32 and not _has_room(wide):
        wide = one_chunk.to(torch.float64)
    powers = shifts(wide, dtype).exp2().to(wide.down.dtype)[:, None, None]
    if bool((powers == 1).all()):
        return wide
    return replace(wide, down=wide.down / powers, up=wide.up * powers)


def _has_room(one_chunk: Chunk) -> bool:
    sizes = torch.cat([chunks.norms(one_chunk, side) for side in ("down", "up")])
    return bool(((sizes == 0) | ((sizes > 1e-8) & (sizes < 1e8))).all())


def shifts(wide: Chunk, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """The power of two to take out of `down` and into `up` of each adapter so that both fit `dtype`; 0 where they do.

    wide: with room for the squares of its numbers.
    """
    info = torch.finfo(dtype)
    down, up = (chunks.norms(wide, side) for side in ("down", "up"))
    fits = [(info.tiny * 2.0**20 < size) & (size < info.max / 2) for size in (down, up)]
    return torch.where((fits[0] & fits[1]) | (down == 0) | (up == 0), 1.0, down / up).log2().div(2).round()


def reconstruct(coefficients: Coefficients, bases: ModuleBases, dtype: torch.dtype = torch.float64) -> LoRAFactors:
    """An ordinary LoRA again: A = C_A·V and B = Uᵀ·C_B, and the rest beside them; scaling kept, no decomposition."""
    down, up = one.reconstruct(coefficients.down, bases.down), one.reconstruct(coefficients.up.mT, bases.up).mT
    if coefficients.down_rest is not None:
        down = down + coefficients.down_rest
    if coefficients.up_rest is not None:
        up = up + coefficients.up_rest
    return LoRAFactors(down.to(dtype), up.to(dtype).contiguous(), coefficients.scaling, coefficients.kernel)


def widened(coefficients: Coefficients, bases: ModuleBases) -> Coefficients:
    """The same update in bases that have grown since: zeros on the later directions."""
    return padded(coefficients, bases.down.k, bases.up.k)


def padded(coefficients: Coefficients, k_down: int, k_up: int) -> Coefficients:
    """The same on so many components of each side. `ShapeError` if the coefficients have more."""
    more_down, more_up = k_down - coefficients.down.shape[1], k_up - coefficients.up.shape[0]
    if not (more_down or more_up):
        return coefficients
    if min(more_down, more_up) < 0:
        raise ShapeError(
            f"coefficients of {coefficients.down.shape[1]} and {coefficients.up.shape[0]} components are wider than "
            f"their bases, which have {k_down} and {k_up}."
        )
    return replace(
        coefficients,
        down=torch.nn.functional.pad(coefficients.down, (0, more_down)),
        up=torch.nn.functional.pad(coefficients.up, (0, 0, 0, more_up)),
    )
