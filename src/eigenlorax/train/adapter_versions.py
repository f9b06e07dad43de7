"""Several versions of one adapter on one base model: the original, the one a pack returns, and others.

PEFT loads each version from a folder on disk, as `write_adapter` writes it. This module knows nothing about rows.
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

ORIGINAL, WITHOUT_UPDATE = "original", "without its update"


@dataclass(frozen=True, slots=True)
class LoadedVersions:
    """Versions of one adapter, loaded by PEFT.

    models: version → PEFT model and the adapter's name on it, the original first. All versions share one model, unless
    the adapter changes the base model's own weights.
    """

    models: Mapping[str, tuple[Any, str]]

    @property
    def names(self) -> list[str]:
        """The versions in the order of `activate_each`."""
        return [*self.models, WITHOUT_UPDATE]

    def activate_each(self) -> Iterator[tuple[str, Any]]:
        """Yield each version with its model, and last the head alone. A version is active until the next is drawn."""
        for version, (model, adapter_name) in self.models.items():
            model.set_adapter(adapter_name)
            yield version, model
        model, adapter_name = self.models[ORIGINAL]
        model.set_adapter(adapter_name)
        with without_updates(model):
            yield WITHOUT_UPDATE, model


class VersionLoader:
    """Loads versions of one adapter after the other on a base model.

    The base model is loaded once, and anew for adapters that would change its weights.
    """

    def __init__(self, load_base: Callable[[], Any]) -> None:
        self._load_base = load_base
        self._shared_model: Any = None
        self._calls = 0

    def load(self, name: str, versions: Mapping[str, Adapter]) -> Iterator[LoadedVersions]:
        """Yield all versions together, or the original with one other at a time if each needs its own base model.

        Args:
            name: Name of the adapter, for messages.
            versions: Must contain `ORIGINAL`. What was yielded is valid until the next is drawn.

        Raises `FormatError` if PEFT cannot load the adapter on this base model.
        """
        compared = [version for version in versions if version != ORIGINAL]
        shares_base = _leaves_base_unchanged(versions[ORIGINAL])
        for group in [compared] if shares_base else [[version] for version in compared]:
            with tempfile.TemporaryDirectory() as temporary:
                folders = {
                    version: formats.write_adapter(versions[version], Path(temporary) / str(index))
                    for index, version in enumerate([ORIGINAL, *group])
                }
                try:
                    loaded = self._load_on_shared(folders) if shares_base else self._load_separately(folders)
                except EigenloraxError:
                    raise
                except (RuntimeError, ValueError, KeyError) as error:
                    raise FormatError(
                        f"PEFT cannot load adapter {name!r} on the base model: {reason(error)} Does it belong to "
                        "another base model? Pass model= (--model)."
                    ) from error
            yield loaded

    def _load_separately(self, folders: Mapping[str, Path]) -> LoadedVersions:
        return LoadedVersions(
            {
                version: (_to_device(_peft_model(self._load_base(), folder, "default")), "default")
                for version, folder in folders.items()
            }
        )

    def _load_on_shared(self, folders: Mapping[str, Path]) -> LoadedVersions:
        self._calls += 1
        # PEFT adapter names must differ from those of the adapter before, which is deleted last
        names = {version: f"version{index}_{self._calls}" for index, version in enumerate(folders)}
        replaced: Sequence[str] = ()
        to_load = dict(folders)
        if self._shared_model is None:
            self._shared_model = _peft_model(self._load_base(), to_load.pop(ORIGINAL), names[ORIGINAL])
        else:
            replaced = list(self._shared_model.peft_config)
        for version, folder in to_load.items():
            self._shared_model.load_adapter(folder, adapter_name=names[version])
        # PEFT refuses to load adapters on a model that has lost its last one: delete the old ones after loading
        self._shared_model.set_adapter(names[ORIGINAL])
        for name in replaced:
            self._shared_model.delete_adapter(name)
        model = _to_device(self._shared_model)
        return LoadedVersions({version: (model, name) for version, name in names.items()})


def _peft_model(base: Any, folder: Path, adapter_name: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder, adapter_name=adapter_name)


def _to_device(model: Any) -> Any:
    return model.to(evaluate.device()).eval()


def _leaves_base_unchanged(adapter: Adapter) -> bool:
    """Return whether PEFT keeps the whole adapter apart from the base model's weights, so that it can be removed.

    Biases, and heads that the config does not name, overwrite the model's own; some initialisations change its weights.
    """
    config = adapter.config
    saved_modules = set(config.get("modules_to_save") or ())
    return (
        config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not config.get("kasa_config")
        and all(saved_modules & set(key.split(".")) for key in adapter.heads)
    )


@contextmanager
def without_updates(model: Any) -> Iterator[None]:
    """Disable the LoRA updates of a PEFT model inside the block. Heads stay active."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # a scaling of zero would not do: DoRA's magnitudes would still apply
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
