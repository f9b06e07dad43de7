"""Measure all adapters of a collection in quantised bases, in rounds with other step sizes for some of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from . import module_stages
from .adapter_codes import ModuleCodes
from .module_stages import BasisPair, EncodedModule, MeasuredModule
from .module_updates import ModuleUpdates
from .stage_runner import StageRunner
from .step_sizes import confirm_step_sizes

STEP_SIZES, CODES = "choosing bytes: steps", "choosing bytes: codes"
"""Stages that are reported to a progress callback."""

Stage = Callable[..., MeasuredModule] | Callable[..., EncodedModule]


class EncodingRounds:
    """The adapters of a collection with the largest step sizes so far that are within an error bound.

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

    def measure(self, step_sizes: Tensor, needed: Tensor) -> Float[Tensor, " n"]:
        """Return the errors of the adapters in the mask `needed` with these step sizes.

        Those that are within the bound, with larger step sizes than before, are kept.
        """
        errors, bits = self._measure(step_sizes, needed)
        self._keep(step_sizes, errors, bits, needed & (errors <= self._bound) & (step_sizes > self.step_sizes))
        return errors

    def complete(self, step_sizes: Tensor) -> None:
        """Measure the adapters that are kept with other step sizes than these."""
        missing = step_sizes != self.step_sizes
        if bool(missing.any()):
            self._keep(step_sizes, *self._measure(step_sizes, missing), missing)

    def encode(self) -> list[dict[str, ModuleCodes]]:
        """Return the codes of each adapter by module, whose decoded errors are within the bound."""
        codes: list[dict[str, ModuleCodes]] = [{} for _ in self._norms]

        def encode(step_sizes: Tensor, needed: Tensor) -> Tensor:
            squared_errors = torch.zeros_like(self._norms)
            encoded: Iterator[tuple[ModuleUpdates, Tensor, EncodedModule]]
            encoded = self._run(CODES, module_stages.encode, step_sizes, needed)
            for module, indices, outcome in encoded:
                squared_errors.index_add_(0, indices, outcome.squared_errors)
                for position, index in enumerate(indices.tolist()):
                    codes[index][module.name] = outcome.codes.codes(position)
            return squared_errors.sqrt() / self._norms

        self.step_sizes, self.errors = confirm_step_sizes(encode, self.step_sizes, self._bound)
        return codes

    def _measure(self, step_sizes: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
        squared_errors, bits = torch.zeros_like(self._norms), torch.zeros_like(self._norms)
        measured: Iterator[tuple[ModuleUpdates, Tensor, MeasuredModule]]
        measured = self._run(STEP_SIZES, module_stages.measure, step_sizes, needed)
        for _, indices, outcome in measured:
            squared_errors.index_add_(0, indices, outcome.squared_errors)
            bits.index_add_(0, indices, outcome.bits)
        return squared_errors.sqrt() / self._norms, bits

    def _run(self, name: str, stage: Stage, step_sizes: Tensor, needed: Tensor) -> Iterator[tuple]:
        """Run a stage on the adapters in the mask `needed`, and yield modules, indices of adapters, and outcomes."""
        rows = [[row for row, source in enumerate(module.sources) if needed[source.index]] for module in self._modules]
        chosen = [(module, module_rows) for module, module_rows in zip(self._modules, rows, strict=True) if module_rows]
        calls = [
            partial(
                stage,
                module,
                self._runner.held,
                self._bases[module.key],
                step_sizes[module.indices],
                module_rows,
            )
            for module, module_rows in chosen
        ]
        for (module, module_rows), outcome in zip(chosen, self._runner.run_stage(name, calls), strict=True):
            yield module, module.indices[module_rows], outcome

    def _keep(self, step_sizes: Tensor, errors: Tensor, bits: Tensor, mask: Tensor) -> None:
        """Keep the adapters in the mask as they were measured with these step sizes."""
        self.step_sizes = torch.where(mask, step_sizes, self.step_sizes)
        self.errors = torch.where(mask, errors, self.errors)
        self.bits = torch.where(mask, bits, self.bits)
