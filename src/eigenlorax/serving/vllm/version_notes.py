"""Sentences of `serve-check` on the histories of a pack. Nothing here imports vLLM."""

from collections.abc import Callable, Mapping

from ...core import keys
from ...pack.pack import Pack
from . import servable
from .plan import max_lora_rank


def version_notes(
    pack: Pack, check_modules: Callable[[Mapping[str, tuple[int, int]]], object], no_lora: str | None
) -> list[str]:
    """Return a sentence for each history: whether its versions can be served, judged by the last one, and their cost.

    Args:
        pack: The pack.
        check_modules: Raises an error unless the model has modules of these shapes, (out, in).
        no_lora: The reason why vLLM has no LoRA for the model; None if it has.

    Raises:
        PackDamagedError: The last version of a history cannot be read.
        ModuleNameError, ShapeError: The model lacks a module of it, or has another shape.
    """
    notes = []
    for name, history in pack.histories.items():
        latest = f"{name}{keys.VERSION_MARK}{keys.LATEST}"
        version = pack.adapter(latest)
        check_modules({module: (spec.out_features, spec.in_features) for module, spec in version.specs.items()})
        reason = no_lora or servable.version_refusal_reason(version)
        if reason is not None:
            notes.append(f"versions of the history {name!r} cannot be served: {reason}.")
            continue
        rank, n_bytes = max_lora_rank(servable.version_rank(version)), history.latest.source_lora_bytes
        notes.append(
            f"versions of the history {name!r} ({len(history):,}) are served on demand, by names such as {latest!r}. "
            f"The last one needs --max-lora-rank {rank} and {n_bytes:,} bytes in the cache."
        )
    return notes
