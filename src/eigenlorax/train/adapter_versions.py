"""Versions of one adapter on one base model: the original adapter, the adapter from a pack, and others.

Each version is written to a folder by `formats.write_adapter`, and loaded from there by PEFT.
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
"""Names of two versions: the original adapter, and its head on the base model with the LoRA update disabled."""


@dataclass(frozen=True, slots=True)
class LoadedVersions:
    """Versions of one adapter, loaded by PEFT.

    Attributes:
        models: Version → PEFT model and the adapter's name in that model; `ORIGINAL` is first. All versions share one
            model, unless the adapter changes the base model's own weights.
    """

    models: Mapping[str, tuple[Any, str]]

    @property
    def names(self) -> list[str]:
        """The versions in the order of `activate_each`."""
        return [*self.models, WITHOUT_UPDATE]

    def activate_each(self) -> Iterator[tuple[str, Any]]:
        """Activate the versions one after the other, `WITHOUT_UPDATE` last.

        Yields:
            The version and its PEFT model. The version stays active until the next one is requested.
        """
        for version, (model, adapter_name) in self.models.items():
            model.set_adapter(adapter_name)
            yield version, model
        model, adapter_name = self.models[ORIGINAL]
        model.set_adapter(adapter_name)
        with without_updates(model):
            yield WITHOUT_UPDATE, model


class VersionLoader:
    """Loader of adapters, in several versions each, on one base model.

    The base model is loaded once, and loaded again for each version of an adapter that would change its weights.

    Args:
        load_base: Function that loads the base model.
    """

    def __init__(self, load_base: Callable[[], Any]) -> None:
        self._load_base = load_base
        self._shared_model: Any = None
        self._calls = 0

    def load(self, name: str, versions: Mapping[str, Adapter]) -> Iterator[LoadedVersions]:
        """Yield all versions together, or the original with one other at a time if each needs its own base model.

        Args:
            name: Name of the adapter, for messages.
            versions: Version → adapter; must contain `ORIGINAL`.

        Yields:
            Loaded versions, which are valid until the next ones are requested.

        Raises:
            FormatError: PEFT cannot load the adapter on this base model.
        """
        compared = [version for version in versions if version != ORIGINAL]
        shares_base = _leaves_base_unchanged(versions[ORIGINAL])
        for group in [compared] if shares_base or not compared else [[version] for version in compared]:
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
        """Load each version on a base model of its own. folders: version → adapter folder."""
        return LoadedVersions(
            {
                version: (_to_device(_peft_model(self._load_base(), folder, "default")), "default")
                for version, folder in folders.items()
            }
        )

    def _load_on_shared(self, folders: Mapping[str, Path]) -> LoadedVersions:
        """Load all versions on the shared base model, and delete those of the adapter before."""
        self._calls += 1
        # names must differ from those of the previous adapter, which is deleted after loading
        names = {version: f"version{index}_{self._calls}" for index, version in enumerate(folders)}
        replaced: Sequence[str] = ()
        to_load = dict(folders)
        if self._shared_model is None:
            self._shared_model = _peft_model(self._load_base(), to_load.pop(ORIGINAL), names[ORIGINAL])
        else:
            replaced = list(self._shared_model.peft_config)
        for version, folder in to_load.items():
            self._shared_model.load_adapter(folder, adapter_name=names[version])
        # PEFT cannot load an adapter after the model's last one was deleted, so delete the old ones after loading
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
    """Return whether PEFT keeps all tensors of the adapter apart from the base model's weights.

    Biases, and heads that `modules_to_save` does not name, overwrite weights of the base model. Some values of
    `init_lora_weights` change its weights too.
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
    # setting the scaling to zero is not enough: DoRA's magnitudes would still apply
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
