"""The commands that start a vLLM server for a pack, ready to paste into a shell."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plan import Choices, Tier
from .settings import PACK, SHARED_BASIS


@dataclass(frozen=True, slots=True)
class Start:
    """What both commands share. revision: of the model. dtype: `auto`, which no flag is needed for, or another."""

    pack: str
    model: str
    revision: str | None
    dtype: str
    choices: Choices

    def expanded(self, tier: Tier | None, targets: Sequence[str]) -> str | None:
        """The command for expanded adapters, which have LoRAs for modules of these names; None if none is served."""
        return None if tier is None else self._command(tier, {}, ["--lora-target-modules", *targets])

    def shared(self, tier: Tier | None) -> str | None:
        """The command for a shared basis, which chooses modules itself; None if no adapter is served."""
        return None if tier is None else self._command(tier, {SHARED_BASIS: "1"}, [])

    def _command(self, tier: Tier, settings: dict[str, str], flags: list[str]) -> str:
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", PACK: _absolute(self.pack), **settings}
        words = ["vllm", "serve", _absolute(self.model)]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--dtype", self.dtype] if self.dtype != "auto" else []
        gpus = self.choices.gpus
        words += ["--tensor-parallel-size", str(gpus)] if gpus > 1 else []
        words += ["--enable-lora", "--max-loras", str(self.choices.max_loras)]
        words += ["--max-cpu-loras", str(self.choices.max_cpu_loras), "--max-lora-rank", str(tier.max_lora_rank)]
        assignments = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        return " ".join([*assignments, shlex.join([*words, *flags])])


def _absolute(place: str) -> str:
    """A folder wherever the command is started; what is none is a repository."""
    return str(Path(place).absolute()) if Path(place).exists() else place
