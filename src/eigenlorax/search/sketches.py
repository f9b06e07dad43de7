"""Short vectors whose inner products estimate those of updates: tensor sketches.

A count sketch adds each entry of a row, with a random sign, to one of t buckets. The sketch of an outer product u·vᵀ is
the circular convolution of the count sketches of u and v, a product in the frequency domain, so that the sketch of
s·B·A takes no out × in matrix (Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps",
KDD 2013). The sketch of an adapter is the sum over its modules. The standard deviation of an estimated cosine is about
1/√t for unrelated updates, and less for related ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from ..core import keys
from ..core.adapter import LoRAFactors
from ..core.basis import Basis
from ..core.batch import pad_factors
from ..core.subspace import Subspace
from .updates import MemberUpdates, ModuleUpdates, by_module

WIDTH = 1024
"""Number t of buckets."""
_SEED = 1


@dataclass(frozen=True, slots=True)
class SideSketch:
    """Count sketch of rows of one length, for one side of one module.

    Attributes:
        buckets: Bucket of each entry, (d,).
        signs: Sign of each entry, (d,), float32.
    """

    buckets: Tensor
    signs: Tensor

    @classmethod
    def of(cls, module: str, side: str, dimension: int) -> "SideSketch":
        """Return the count sketch of rows of this length. It is a function of the arguments alone."""
        label = f"{_SEED}\0{module}\0{side}\0{dimension}"
        key = np.frombuffer(sha256(label.encode()).digest()[:16], dtype="<u8")
        # the raw stream of Philox is the same in all releases of NumPy
        numbers = np.random.Philox(key=key).random_raw(dimension)
        buckets = torch.from_numpy((numbers % np.uint64(WIDTH)).astype(np.int64))
        return cls(buckets, torch.from_numpy(1.0 - 2.0 * (numbers >> np.uint64(63)).astype(np.float32)))

    def spectra(self, rows: Tensor) -> Tensor:
        """Return the Fourier transforms of the sketches of rows, (…, d) to (…, t / 2 + 1) complex64."""
        if not rows.numel():
            # a basis without components; not every FFT library takes empty batches
            return torch.zeros(*rows.shape[:-1], WIDTH // 2 + 1, dtype=torch.complex64)
        counted = torch.zeros(*rows.shape[:-1], WIDTH)
        spectra: Tensor = torch.fft.rfft(counted.index_add_(-1, self.buckets, rows.float() * self.signs))
        return spectra


@dataclass(frozen=True, slots=True)
class Sketcher:
    """Sketches of adapters of a pack.

    Attributes:
        subspace: The pack's subspace.
        components: `SideSketch.spectra` of the components of each basis, by module and side, from which the spectra of
            coefficients follow by one product.
    """

    subspace: Subspace
    components: Mapping[tuple[str, str], Tensor]

    @classmethod
    def of(cls, subspace: Subspace) -> "Sketcher":
        """Return a sketcher with the spectra of all components."""

        def spectra(module: str, side: str, basis: Basis) -> Tensor:
            return SideSketch.of(module, side, basis.dimension).spectra(basis.components)

        components = {
            (module, side): spectra(module, side, bases.side(side))
            for module, bases in subspace.modules.items()
            for side in keys.SIDES
        }
        return cls(subspace, components)

    def sketch(self, members: Sequence[MemberUpdates]) -> Tensor:
        """Return the sketch of each adapter, (n, t) float32 of norm 1; zeros for an update of zero."""
        total = torch.zeros(len(members), WIDTH // 2 + 1, dtype=torch.complex128)
        for module, updates in by_module(members, self.subspace):
            total += _product(*(self._spectra(module, side, updates) for side in keys.SIDES))
        return _unit_sketches(total)

    def _spectra(self, module: str, side: str, updates: ModuleUpdates) -> Tensor:
        rows = updates.batch.rows(side)
        if updates.bases is None:
            return SideSketch.of(module, side, rows.shape[2]).spectra(rows)
        # a real matrix times pairs of real numbers: half the time of a complex product
        parts = torch.view_as_real(self.components[module, side]).flatten(1)
        products = rows.float() @ parts
        return torch.view_as_complex(products.view(*products.shape[:2], -1, 2))


def sketch_factors(factors: Mapping[str, LoRAFactors]) -> Tensor:
    """Return the sketch of one adapter, (t,), from its factors by module."""
    total = torch.zeros(1, WIDTH // 2 + 1, dtype=torch.complex128)
    for module, update in factors.items():
        batch = pad_factors([update], update.down.shape[1], update.up.shape[0])
        sides = {side: SideSketch.of(module, side, batch.rows(side).shape[2]) for side in keys.SIDES}
        total += _product(*(sides[side].spectra(batch.rows(side)) for side in keys.SIDES))
    return _unit_sketches(total)[0]


def _product(down: Tensor, up: Tensor) -> Tensor:
    """Return the spectra of updates from those of their rows, (n, r, t / 2 + 1) to (n, t / 2 + 1)."""
    # the product of small factors may be below the smallest float32
    return (down.to(torch.complex128) * up).sum(1)


def _unit_sketches(spectra: Tensor) -> Tensor:
    sketches = torch.fft.irfft(spectra, n=WIDTH, dim=1)
    norms = sketches.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, sketches / norms.where(norms > 0, 1.0), 0.0).float()
