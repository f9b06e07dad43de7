"""Decoded versions as ordinary adapters."""

import json
from dataclasses import replace

import torch

from ..codec.versions.version import DecodedVersion
from ..core import keys, narrowing
from ..core.adapter import Adapter
from ..core.limits import damaged_on_error
from ..formats import checks, files, peft
from .history import History, VersionRecord


def to_adapter(
    history: History, record: VersionRecord, decoded: DecodedVersion, dtype: torch.dtype | None = None
) -> Adapter:
    """Return a version as an adapter, with its tensors in memory.

    Args:
        history: The history.
        record: The version.
        decoded: The version as its bytes say.
        dtype: Dtype of the factors. Default: that of the source.

    Raises:
        PackDamagedError: The version's config does not fit its tensors.
    """
    name = history.full_name(record)
    with damaged_on_error(f"version {name} ({record.file})"):
        config = history.config(record)
        files.check_config(json.loads(config), keys.ADAPTER_CONFIG)
        others = peft.from_tensors(name, config, decoded.tensors, where=name)
        misnamed = sorted(decoded.tensors.keys() ^ {*others.heads, *others.carried})
        if misnamed or others.specs:
            raise ValueError(f"{[*misnamed, *others.specs][0]!r} is no name of a tensor beside the LoRA factors")
        # copies, because a caller may change the tensors, from which later versions are predicted
        modules = {
            module: replace(factors, down=factors.down.clone(), up=factors.up.clone())
            for module, factors in sorted(decoded.modules.items())
        }
        adapter = Adapter(
            name=name,
            specs={module: factors.spec for module, factors in modules.items()},
            modules=modules,
            base_model=others.base_model,
            revision=others.revision,
            heads={key: tensor.clone() for key, tensor in others.heads.items()},
            carried={key: tensor.clone() for key, tensor in others.carried.items()},
            source_config=others.source_config,
            origin=record.origin,
        )
        checks.check_in_memory(adapter)
    if dtype is None:
        return adapter
    narrowed = {module: narrowing.narrow(factors, dtype) for module, factors in modules.items()}
    specs = {module: factors.spec for module, factors in narrowed.items()}
    return replace(adapter, specs=specs, modules=narrowed)
