"""vLLM's model loaders, each of which puts the bases of a pack into the model that it loads, or compares the two."""

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..errors import OptionError
from ..pack import Pack
from . import settings
from .agreement import check_fits
from .cores import core_name
from .placing import install


def register() -> None:
    """Make every load format put the subspace of the environment's pack into the models that it loads, or compare them.

    The weights are loaded then, and processed into what the kernels want, quantised or not; vLLM looks for layers that
    a LoRA may be for right after it.
    """
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
            if found.shared_basis:
                with_subspace(model, vllm_config, found.pack)
            elif vllm_config.lora_config is not None:
                check_fits(model, Pack.from_pretrained(found.pack, adapters=[]).info)
        return model


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
