"""Arrow prototypes of a pack's adapters, k numbers a module, and how well inputs of the modules fit them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...core.coefficients import Coefficients
from ...core.projection import widen_coefficients
from ...core.prototypes import ModulePrototypes, module_prototypes
from ...pack.pack import Pack


@dataclass(frozen=True, slots=True)
class PackPrototypes:
    """Prototypes of several adapters, by module name in the subspace.

    Attributes:
        modules: Prototypes of all adapters in one module, float32.
        bases: Rows of the down basis of each module, (k, in) float32.
    """

    modules: Mapping[str, ModulePrototypes]
    bases: Mapping[str, Tensor]

    def squared_cosines(self, module: str, x: Tensor) -> Tensor:
        """Return cos² of the angle between inputs of a module and the prototypes, (…, adapters).

        It is the fraction of the input's squared norm that lies along the prototype, and 0 for a prototype of zero.

        Args:
            module: Name of the module in the subspace.
            x: Inputs, (…, in).
        """
        prototypes, basis = self.modules[module].to(x.device), self.bases[module].to(x.device)
        x = x.float()
        products = linear(linear(x, basis), prototypes.coordinates)
        if prototypes.outside is not None:
            products = products + linear(x, prototypes.outside)
        squares: Tensor = products.square() / x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return squares

    def has_module(self) -> Tensor:
        """Return whether each adapter changes each module, (modules, adapters)."""
        rows = []
        for prototypes in self.modules.values():
            outside = prototypes.outside
            changes = prototypes.coordinates.any(1)
            rows.append(changes if outside is None else changes | outside.any(1))
        return torch.stack(rows)


def pack_prototypes(pack: Pack, names: Sequence[str]) -> PackPrototypes:
    """Return the prototypes of adapters of a pack. Convolutions have none.

    Args:
        pack: The pack.
        names: Names of the adapters.
    """
    by_module: dict[str, dict[str, Coefficients]] = {}
    for name in names:
        packed = pack.packed(name)
        for module, coefficients in packed.coefficients.items():
            if not coefficients.kernel:
                by_module.setdefault(packed.subspace_names[module], {})[name] = coefficients
    modules, rows = {}, {}
    for module, members in sorted(by_module.items()):
        bases = pack.subspace.modules[module]
        widened = {name: widen_coefficients(each, bases) for name, each in members.items()}
        found = module_prototypes([widened.get(name) for name in names], bases.down.components, bases.up.components)
        modules[module] = found.to(dtype=torch.float32)
        rows[module] = bases.down.components.float()
    return PackPrototypes(modules, rows)
