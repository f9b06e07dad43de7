"""vLLM's model loaders, each of which puts the bases of a pack into the model that it loads, or compares the two; and
its loader of adapters, which is to leave nothing of one out.
"""

from functools import wraps
from typing import Any

import torch
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
from . import settings
from .agreement import check_all_have_slots, check_fits
from .cores import core_name
from .placing import install

_log = init_logger("vllm.plugins.eigenlorax")


def register() -> None:
    """Make every load format put the subspace of the environment's pack into the models that it loads, or compare them.

    The weights are loaded then, and processed into what the kernels want, quantised or not; vLLM looks for layers that
    a LoRA may be for right after it.
    """
    if not hasattr(WorkerLoRAManager._load_adapter, "__wrapped__"):
        WorkerLoRAManager._load_adapter = _with_nothing_left_out(WorkerLoRAManager._load_adapter)
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in loaders.items():
        # vLLM's own function for this warns of each format that its loader is lost
        if not issubclass(loader, _WithSubspace):
            loaders[load_format] = type(loader.__name__, (_WithSubspace, loader), {})


class _WithSubspace(BaseModelLoader):
    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        model = super().load_model(vllm_config, model_config, prefix)
        # asked again: a process may load one model after another
        found = settings.read()
        # a draft model for speculative decoding is loaded too
        if found is not None and model_config.runner_type != "draft":
            _serve(found, model, vllm_config)
        return model


def _serve(found: settings.Settings, model: nn.Module, vllm_config: VllmConfig) -> None:
    """Prepare a loaded model for a pack, and say so: vLLM has a log by now, which it lacks when plugins are loaded."""
    if found.shared_basis:
        with_subspace(model, vllm_config, found.pack)
    elif vllm_config.lora_config is None:
        _log.warning("eigenlorax: no adapter of %s can be served without --enable-lora.", found.pack)
        return
    else:
        check_fits(model, Pack.from_pretrained(found.pack, adapters=[]).info)
    way = "in its bases, which the model holds" if found.shared_basis else "as LoRAs, expanded when they are asked for"
    asked = (
        "" if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING else ". A server asks with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 only"
    )
    _log.info("eigenlorax: adapters of the pack %s are served by name, %s%s.", found.pack, way, asked)


def with_subspace(model: nn.Module, vllm_config: VllmConfig, source: str) -> None:
    """Put the subspace of a pack into a loaded model, and tell vLLM that LoRAs are for its cores alone."""
    lora_config = vllm_config.lora_config
    if lora_config is None:
        raise OptionError(f"{settings.SHARED_BASIS}=1 serves adapters: start the server with --enable-lora.")
    pack = Pack.from_pretrained(source, adapters=[])
    core = core_name(pack.info.fingerprint)
    if lora_config.target_modules and lora_config.target_modules != [core]:
        raise OptionError(
            f"{settings.SHARED_BASIS}=1 chooses the modules of LoRAs itself: leave --lora-target-modules away (got "
            f"{', '.join(lora_config.target_modules)})."
        )
    install(model, pack.subspace, core, torch.device(vllm_config.device_config.device))
    lora_config.target_modules = [core]


def _with_nothing_left_out(load: Any) -> Any:
    """vLLM's loader of adapters, with an error where it would go on without a part of one."""

    @wraps(load)
    def load_adapter(self: WorkerLoRAManager, *args: Any, **options: Any) -> Any:
        found, manager = load(self, *args, **options), self._adapter_manager
        # with several stages, each has some of the layers
        if get_pp_group().world_size == 1:
            targets = self.lora_config.target_modules
            check_all_have_slots(found.loras, manager.modules, manager.packed_modules_mapping, targets)
        return found

    return load_adapter
