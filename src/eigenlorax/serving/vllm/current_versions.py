"""Versions in vLLM's server, which are looked up in the pack at the start of every request.

vLLM asks a resolver once for a name and keeps the answer: "run@latest" would stay the version of its first request.
"""

from contextlib import suppress
from functools import partial, wraps
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry

from ...core import keys
from .resolver import NAME, PackResolver


def register() -> None:
    """Extend vLLM's check of a request's model, with which every request begins."""
    for serving in (BaseServing, PoolingBaseServing):
        if not hasattr(serving._check_model, "__wrapped__"):
            serving._check_model = _update_before(serving._check_model)


def _update_before(check: Any) -> Any:
    """Wrap vLLM's check of a request's model with a look-up of the version that the request names.

    Args:
        check: Method `_check_model` of one of vLLM's classes.
    """

    @wraps(check)
    async def check_model(self: Any, request: Any) -> Any:
        name, resolver = request.model, LoRAResolverRegistry.resolvers.get(NAME)
        if keys.is_version(name) and isinstance(resolver, PackResolver):
            await update(self.models, name, resolver)
        return await check(self, request)

    return check_model


async def update(models: OpenAIServingModels, name: str, resolver: PackResolver) -> None:
    """Load the version that a name stands for now, unless vLLM has it. Requests that have started keep theirs.

    The version's folder is written again if it was removed, because vLLM may load it at any time. If anything fails,
    vLLM forgets the name. It then asks the resolver, and answers with the error.

    Args:
        models: vLLM's table of adapters.
        name: Name of a version, such as "run@latest".
        resolver: The resolver of the pack.
    """
    async with models.lora_resolver_lock[name]:
        folder = await resolver.find(models.model_config.model, name, partial(_names_in_use, models))
        if folder is not None:
            known = {request.lora_name: request for request in models.lora_requests.values()}
            request = known.get(folder.name)
            # vLLM reports a failure by any kind of exception
            with suppress(Exception):
                if request is None:
                    request = LoRARequest(folder.name, models.lora_id_counter.inc(1), str(folder.path))
                    await models.engine_client.add_lora(request)
                models.lora_requests[name] = request
                return
        models.lora_requests.pop(name, None)


def _names_in_use(models: OpenAIServingModels) -> set[str]:
    """Return the names of adapters and versions that unfinished requests have."""
    # a copy, because requests start and end in another thread
    states = list(models.engine_client.output_processor.request_states.values())
    return {state.lora_name for state in states if state.lora_name is not None}
