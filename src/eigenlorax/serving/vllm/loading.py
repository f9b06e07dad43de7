"""Extensions of vLLM's loaders: model loaders install or check a subspace, the adapter loader checks for slots."""

from functools import wraps
from typing import Any

import torch
import vllm
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ...errors import OptionError
from ...pack.pack import Pack
from . import engine_version, settings
from .agreement import check_all_have_slots, check_fits, check_sizes
from .cores import core_name
from .install import correct_fused_names, install

_log = init_logger("vllm.plugins.eigenlorax")


def register() -> None:
    """Extend the loaders of all load formats, and the loader of adapters.

    A subspace is installed at the end of `load_model`: the weights are then loaded and processed for the kernels, and
    vLLM searches for layers that can have a LoRA right after it.
    """
    if not hasattr(WorkerLoRAManager._load_adapter, "__wrapped__"):
        WorkerLoRAManager._load_adapter = _check_after(WorkerLoRAManager._load_adapter)
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in loaders.items():
        # vLLM's function for registering a loader would warn that it replaces one
        if not issubclass(loader, _WithSubspace):
            loaders[load_format] = type(loader.__name__, (_WithSubspace, loader), {})


class _WithSubspace(BaseModelLoader):
    """Mixin for loaders of models, which installs or checks the subspace of the pack in the environment."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        model = super().load_model(vllm_config, model_config, prefix)
        # read again, because a process may load several models
        environment = settings.read()
        # a draft model for speculative decoding has no adapters
        if environment is not None and model_config.runner_type != "draft":
            _prepare(environment, model, vllm_config)
        return model


def _prepare(environment: settings.Settings, model: nn.Module, vllm_config: VllmConfig) -> None:
    """Install or check the subspace of a pack in a loaded model, and log how its adapters are served.

    The log is written here, because vLLM has no log yet when plugins are loaded.

    Args:
        environment: Settings of the plugin.
        model: The loaded model.
        vllm_config: vLLM's configuration.

    Raises:
        OptionError: vLLM's options do not allow a shared basis.
        ModuleNameError: The model lacks a module of the pack.
        ShapeError: A module has another shape in the model.
        PackError, HubError: The pack cannot be opened.
    """
    untested = engine_version.untested_warning(vllm.__version__)
    if untested is not None:
        _log.warning_once("eigenlorax: %s", untested, scope="global")
    correct_fused_names(model)
    if environment.shared_basis:
        add_subspace(model, vllm_config, environment.pack)
    elif vllm_config.lora_config is None:
        _log.warning("eigenlorax: no adapter of %s can be served without --enable-lora.", environment.pack)
        return
    else:
        check_fits(model, Pack.from_pretrained(environment.pack, adapters=[]).info)
    mode = "as coefficients in the model's bases" if environment.shared_basis else "as LoRAs, on demand"
    hint = (
        ""
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        else ". A server needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 to load them"
    )
    _log.info("eigenlorax: adapters of the pack %s are served by name, %s%s.", environment.pack, mode, hint)


def add_subspace(model: nn.Module, vllm_config: VllmConfig, source: str) -> None:
    """Install the subspace of a pack in a loaded model, and restrict LoRAs to its cores.

    Args:
        model: The loaded model.
        vllm_config: vLLM's configuration, whose `lora_config.target_modules` is set to the cores.
        source: Folder of the pack, or a repository on the Hub.

    Raises:
        OptionError: LoRA is not enabled, `--lora-target-modules` is set, or the pack has no bases.
        ModuleNameError: The model lacks a module of the pack.
        ShapeError: A module has another shape in the model.
    """
    lora_config = vllm_config.lora_config
    if lora_config is None:
        raise OptionError(f"{settings.SHARED_BASIS}=1 serves adapters: start the server with --enable-lora.")
    pack = Pack.from_pretrained(source, adapters=[]).training_pack
    if not pack.info.modules:
        raise OptionError(
            f"{settings.SHARED_BASIS}=1 needs a pack with bases, and {source} has none. Serve it without a shared "
            "basis."
        )
    core = core_name(pack.info.fingerprint)
    if lora_config.target_modules and lora_config.target_modules != [core]:
        raise OptionError(
            f"{settings.SHARED_BASIS}=1 chooses the modules of LoRAs itself: remove --lora-target-modules (got "
            f"{', '.join(lora_config.target_modules)})."
        )
    install(model, pack.subspace, core, torch.device(vllm_config.device_config.device))
    lora_config.target_modules = [core]


def _check_after(load: Any) -> Any:
    """Wrap vLLM's loader of adapters with checks that no module of the adapter is ignored or has another size.

    Args:
        load: `WorkerLoRAManager._load_adapter`.

    Returns:
        The wrapped loader, which raises `ServingError` if a module has no slot, and `ShapeError` if its size differs.
    """

    @wraps(load)
    def load_adapter(self: WorkerLoRAManager, *args: Any, **options: Any) -> Any:
        lora, manager = load(self, *args, **options), self._adapter_manager
        # with pipeline parallelism, each stage has some of the layers only
        if get_pp_group().world_size == 1:
            targets = self.lora_config.target_modules
            check_all_have_slots(lora.loras, manager.modules, manager.packed_modules_mapping, targets)
        check_sizes(lora.loras, manager.modules, manager.packed_modules_mapping)
        return lora

    return load_adapter
