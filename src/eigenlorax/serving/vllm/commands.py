"""The commands that start a vLLM server for a pack, ready to paste into a shell."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plan import Choices, MemoryUse
from .settings import PACK, SERVE_WITHIN, SHARED_BASIS


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """Options that the commands of both serving modes share.

    Attributes:
        pack: The pack.
        model: The base model.
        revision: Revision of the model.
        dtype: vLLM's `--dtype`.
        choices: The flags of the server.
        serve_within: Largest error of an adapter that the pack's basis serves; None if the pack has no basis.
        model_impl: vLLM's `--model-impl`; None for the default.
    """

    pack: str
    model: str
    revision: str | None
    dtype: str
    choices: Choices
    serve_within: float | None = None
    model_impl: str | None = None

    def expanded(self, memory: MemoryUse | None, targets: Sequence[str]) -> str | None:
        """Return the command for expanded adapters, with these `--lora-target-modules`; None if none is served."""
        return None if memory is None else self._command(memory, {}, ["--lora-target-modules", *targets])

    def shared(self, memory: MemoryUse | None) -> str | None:
        """Return the command for a shared basis, which chooses modules itself; None if no adapter is served."""
        within = {SERVE_WITHIN: f"{self.serve_within:g}"} if self.serve_within is not None else {}
        return None if memory is None else self._command(memory, {SHARED_BASIS: "1", **within}, [])

    def _command(self, memory: MemoryUse, settings: dict[str, str], flags: list[str]) -> str:
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", PACK: _absolute(self.pack), **settings}
        words = ["vllm", "serve", _absolute(self.model)]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--model-impl", self.model_impl] if self.model_impl else []
        words += ["--dtype", self.dtype] if self.dtype != "auto" else []
        gpus = self.choices.gpus
        words += ["--tensor-parallel-size", str(gpus)] if gpus > 1 else []
        words += ["--enable-lora", "--max-loras", str(self.choices.max_loras)]
        words += ["--max-cpu-loras", str(self.choices.max_cpu_loras), "--max-lora-rank", str(memory.max_lora_rank)]
        assignments = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        return " ".join([*assignments, shlex.join([*words, *flags])])


def _absolute(source: str) -> str:
    """Return the absolute path of a folder; a repository on the Hub stays as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source
