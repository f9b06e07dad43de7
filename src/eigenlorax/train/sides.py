"""Several versions of one adapter on one base model: as it was, as it comes back from a pack, and others. Nothing here
knows what a row is.

PEFT loads each from a folder on disk, as `write_adapter` writes it.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formats
from ..core.adapter import Adapter
from ..errors import EigenloraxError, FormatError, reason
from . import evaluate

ORIGINAL, WITHOUT = "original", "without its update"


@dataclass(frozen=True, slots=True)
class Sides:
    """PEFT models and what the adapter is called on each, by version, the original first: one model for all, or one for
    each where the adapter changes the base model."""

    models: Mapping[str, tuple[Any, str]]

    @property
    def names(self) -> list[str]:
        """What `each` gives, in its order."""
        return [*self.models, WITHOUT]

    def each(self) -> Iterator[tuple[str, Any]]:
        """The versions, and the head without the update: a model is each of them until the next."""
        for side, (network, name) in self.models.items():
            network.set_adapter(name)
            yield side, network
        network, name = self.models[ORIGINAL]
        network.set_adapter(name)
        with without_updates(network):
            yield WITHOUT, network


class Bench:
    """A base model for one adapter after the other, loaded once; anew for those that would change it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._shared: Any = None
        self._turn = 0

    def sides(self, name: str, versions: Mapping[str, Adapter]) -> Iterator[Sides]:
        """Versions of an adapter, the original among them, each until the next: all of them beside one base model; or
        the original with each of the others, where each takes a model of its own."""
        original = versions[ORIGINAL]
        others = [side for side in versions if side != ORIGINAL]
        together = _leaves_base_alone(original)
        for group in [others] if together else [[side] for side in others]:
            with tempfile.TemporaryDirectory() as temporary:
                folders = {
                    side: formats.write_adapter(versions[side], Path(temporary) / str(place))
                    for place, side in enumerate([ORIGINAL, *group])
                }
                try:
                    found = self._on_shared(folders) if together else self._apart(folders)
                except EigenloraxError:
                    raise
                except (RuntimeError, ValueError, KeyError) as error:
                    raise FormatError(
                        f"PEFT cannot load adapter {name!r} on the base model: {reason(error)} Is it of another base "
                        "model?"
                    ) from error
            yield found

    def _apart(self, folders: Mapping[str, Path]) -> Sides:
        return Sides(
            {side: (_ready(_new(self._load(), folder, "default")), "default") for side, folder in folders.items()}
        )

    def _on_shared(self, folders: Mapping[str, Path]) -> Sides:
        self._turn += 1
        names = {side: f"version{place}_{self._turn}" for place, side in enumerate(folders)}
        before: Sequence[str] = ()
        left = dict(folders)
        if self._shared is None:
            self._shared = _new(self._load(), left.pop(ORIGINAL), names[ORIGINAL])
        else:
            before = list(self._shared.peft_config)
        for side, folder in left.items():
            self._shared.load_adapter(folder, adapter_name=names[side])
        # PEFT refuses adapters on a model that has lost its last one, so the next comes before the last goes
        self._shared.set_adapter(names[ORIGINAL])
        for name in before:
            self._shared.delete_adapter(name)
        network = _ready(self._shared)
        return Sides({side: (network, name) for side, name in names.items()})


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
