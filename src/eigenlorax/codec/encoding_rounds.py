"""Encode all adapters of a collection in quantised bases, in rounds with other step sizes for some of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from . import module_stages
from .adapter_codes import ModuleCodes
from .module_stages import BasisPair, EncodedModule
from .module_updates import ModuleUpdates
from .packed_codes import PackedCodes
from .stage_runner import StageRunner

STEP_SIZES = "choosing bytes: steps"
"""Stage that is reported to a progress callback."""


@dataclass(frozen=True, slots=True)
class _Round:
    """Some adapters of a collection, encoded.

    Attributes:
        errors: Relative error of each adapter.
        bits: Bits of each adapter in a file, estimated.
        codes: For each adapter and module, codes of several updates, and the row of the adapter's.
    """

    errors: Float[Tensor, " n"]
    bits: Float[Tensor, " n"]
    codes: Sequence[Mapping[str, tuple[PackedCodes, int]]]


class EncodingRounds:
    """The adapters of a collection, encoded with the largest step sizes so far that are within an error bound.

    Args:
        modules: Updates of all modules.
        norms: Norm of each adapter over all modules.
        runner: Runs the stages of each module.
        bases: Bases (down, up) by module and cluster.
        bound: Bound on the error of each adapter.

    Attributes:
        step_sizes: Step size of each adapter, absolute; 0 before the first that is within the bound.
        errors: Relative error of each adapter.
        bits: Bits of each adapter in a file, estimated.
        codes: Codes of each adapter, by module.
    """

    def __init__(
        self,
        modules: Sequence[ModuleUpdates],
        norms: Float[Tensor, " n"],
        runner: StageRunner,
        bases: Mapping[tuple[str, int], BasisPair],
        bound: float,
    ) -> None:
        self._modules, self._norms, self._runner, self._bases, self._bound = modules, norms, runner, bases, bound
        self.step_sizes, self.errors, self.bits = (torch.zeros_like(norms) for _ in range(3))
        self.codes: list[dict[str, ModuleCodes]] = [{} for _ in norms]

    def measure(self, step_sizes: Tensor, needed: Tensor) -> Float[Tensor, " n"]:
        """Return the errors of the adapters in the mask `needed` with these step sizes.

        Those that are within the bound, with larger step sizes than before, are kept.
        """
        encoded = self._encode(step_sizes, needed)
        self._keep(encoded, step_sizes, needed & (encoded.errors <= self._bound) & (step_sizes > self.step_sizes))
        return encoded.errors

    def complete(self, step_sizes: Tensor) -> None:
        """Encode the adapters that are kept with other step sizes than these."""
        missing = step_sizes != self.step_sizes
        if bool(missing.any()):
            self._keep(self._encode(step_sizes, missing), step_sizes, missing)

    def _encode(self, step_sizes: Tensor, needed: Tensor) -> _Round:
        rows = [[row for row, source in enumerate(module.sources) if needed[source.index]] for module in self._modules]
        chosen = [(module, module_rows) for module, module_rows in zip(self._modules, rows, strict=True) if module_rows]
        calls = [
            partial(
                module_stages.encode,
                module,
                self._runner.held,
                self._bases[module.key],
                step_sizes[module.indices],
                module_rows,
            )
            for module, module_rows in chosen
        ]
        squared_errors, bits = torch.zeros_like(self._norms), torch.zeros_like(self._norms)
        codes: list[dict[str, tuple[PackedCodes, int]]] = [{} for _ in self._norms]
        encoded: Iterator[EncodedModule] = self._runner.run_stage(STEP_SIZES, calls)
        for (module, module_rows), outcome in zip(chosen, encoded, strict=True):
            indices = module.indices[module_rows]
            squared_errors.index_add_(0, indices, outcome.squared_errors)
            bits.index_add_(0, indices, outcome.bits)
            for position, index in enumerate(indices.tolist()):
                codes[index][module.name] = outcome.codes, position
        return _Round(squared_errors.sqrt() / self._norms, bits, codes)

    def _keep(self, encoded: _Round, step_sizes: Tensor, mask: Tensor) -> None:
        """Keep the adapters in the mask as they were encoded with these step sizes."""
        self.step_sizes = torch.where(mask, step_sizes, self.step_sizes)
        self.errors = torch.where(mask, encoded.errors, self.errors)
        self.bits = torch.where(mask, encoded.bits, self.bits)
        for index in mask.nonzero().flatten().tolist():
            self.codes[index] = {
                name: packed.codes(position) for name, (packed, position) in encoded.codes[index].items()
            }
