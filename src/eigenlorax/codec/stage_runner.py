"""Run the stages of all modules, here or in other processes, and hold what the next stage needs again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..core.engine import run_serially
from ..core.iterative import RunCalls
from .held_updates import HeldUpdates

MAX_HELD_BYTES = 2**30
"""Bytes of singular components that are kept in memory between stages; the others are computed anew."""

SINGLE_PRECISION_ERROR = 0.005
"""Error bound from which singular vectors, and products of them, are in float32. Decompositions are in float64."""

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with the stage, and the numbers of modules that are done and in all."""


@dataclass(frozen=True, slots=True)
class StageRunner:
    """Runner of the stages of all modules.

    Attributes:
        progress: Called while modules are worked on.
        run: Runs the calls of a stage, one for each module, here or in other processes.
        held: Singular components that a process holds between the stages.
    """

    progress: Progress
    run: RunCalls
    held: HeldUpdates

    @classmethod
    def of(
        cls, progress: Progress, run: RunCalls = run_serially, workers: int = 1, *, error: float = 0.0
    ) -> "StageRunner":
        """Return a runner whose processes hold as many singular components as `MAX_HELD_BYTES` together.

        Args:
            progress: Called while modules are worked on.
            run: Runs the calls of a stage.
            workers: Number of processes.
            error: Smallest error bound that updates are encoded for. Products are in float32 where that resolves it.
        """
        dtype = torch.float32 if error >= SINGLE_PRECISION_ERROR else torch.float64
        return cls(progress, run, HeldUpdates(MAX_HELD_BYTES // workers, dtype))

    def run_stage(self, stage: str, calls: Sequence[Callable[[], Result]]) -> Iterator[Result]:
        """Yield the results of the calls of a stage, in their order."""
        self.progress(stage, 0, len(calls))
        for done, outcome in enumerate(self.run(calls), start=1):
            yield outcome
            self.progress(stage, done, len(calls))
