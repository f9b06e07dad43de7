"""One adapter as it was and as it comes back from a pack, on one base model. Nothing here knows what a row is.

PEFT loads both from folders on disk, the recycled one from what `Pack.export` writes.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formats
from ..adapter import Adapter
from ..errors import EigenloraxError, FormatError, reason
from ..pack import Pack
from . import evaluate

_SIDES = ("original", "recycled")


@dataclass(frozen=True, slots=True)
class Sides:
    """PEFT models and what the adapter is called on each: one model twice, or two where it changes the base model."""

    original: tuple[Any, str]
    recycled: tuple[Any, str]

    def each(self) -> Iterator[tuple[str, Any]]:
        """The original, the recycled, and the head without the update: a model is each of them until the next."""
        for side, (network, name) in zip(_SIDES, (self.original, self.recycled), strict=True):
            network.set_adapter(name)
            yield side, network
        network, name = self.original
        network.set_adapter(name)
        with without_updates(network):
            yield "without its update", network


class Bench:
    """A base model for one adapter after the other, loaded once; anew for those that would change it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._shared: Any = None
        self._turn = 0

    def sides(self, original: Adapter, pack: Pack, name: str) -> Sides:
        """An adapter of the pack beside its original, until the next one."""
        with tempfile.TemporaryDirectory() as temporary:
            folders = (
                formats.write_adapter(original, Path(temporary) / _SIDES[0]),
                pack.export(Path(temporary) / _SIDES[1], [name])[name],
            )
            try:
                if _leaves_base_alone(original):
                    return self._on_shared(folders)
                return Sides(*((_ready(_new(self._load(), folder, "default")), "default") for folder in folders))
            except EigenloraxError:
                raise
            except (RuntimeError, ValueError, KeyError) as error:
                raise FormatError(
                    f"PEFT cannot load adapter {name!r} on the base model: {reason(error)} Is it of another base model?"
                ) from error

    def _on_shared(self, folders: Sequence[Path]) -> Sides:
        self._turn += 1
        names = [f"{side}_{self._turn}" for side in _SIDES]
        before = []
        if self._shared is None:
            self._shared = _new(self._load(), folders[0], names[0])
            self._shared.load_adapter(folders[1], adapter_name=names[1])
        else:
            before = list(self._shared.peft_config)
            for folder, name in zip(folders, names, strict=True):
                self._shared.load_adapter(folder, adapter_name=name)
        # PEFT refuses adapters on a model that has lost its last one, so the next comes before the last goes
        self._shared.set_adapter(names[0])
        for name in before:
            self._shared.delete_adapter(name)
        network = _ready(self._shared)
        return Sides((network, names[0]), (network, names[1]))


def _new(base: Any, folder: Path, name: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder, adapter_name=name)


def _ready(network: Any) -> Any:
    return network.to(evaluate.device()).eval()


def _leaves_base_alone(adapter: Adapter) -> bool:
    """Whether PEFT keeps all of the adapter beside the base model's weights, so that it can be taken away again.

    Biases, and heads that the config does not name, are written over the model's own; some starts change its weights.
    """
    config = adapter.config
    kept_beside = set(config.get("modules_to_save") or ())
    return (
        config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not config.get("kasa_config")
        and all(kept_beside & set(key.split(".")) for key in adapter.heads)
    )


@contextmanager
def without_updates(network: Any) -> Iterator[None]:
    """A block in which the LoRAs of a PEFT model do nothing, and the heads stay."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    # not their scaling: with a scaling of zero, DoRA's magnitudes would still be there
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
