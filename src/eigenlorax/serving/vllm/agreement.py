"""Whether the adapters of a pack are for the model that vLLM has loaded, and whether it applies all of an adapter.

vLLM loads adapters of a narrower model, and of one with more layers, and answers something else; it looks at no names
but the last, and at no sizes. Of an adapter it leaves out what it has no slot for, and does not say so.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ...errors import ModuleNameError, ServingError
from ...pack.manifest import SubspaceInfo
from .placing import check_shape, lora_names, names_in, places


def check_fits(model: nn.Module, info: SubspaceInfo) -> None:
    """`ShapeError` or `ModuleNameError` if modules of a subspace are not those of a loaded model.

    Modules of a kind that is no linear layer there (experts, embeddings) are left to vLLM, which refuses those that it
    does not know.
    """
    known, names = places(model), names_in(model, info.modules)
    kinds = {name.rpartition(".")[2] for name in known}
    missing = [module for module, name in names.items() if name not in known and _is_layer(name, kinds)]
    if missing:
        raise ModuleNameError(
            f"{type(model).__name__} has no linear layer for {len(missing)} of the {len(names)} modules of the pack's "
            f"subspace, as {missing[0]!r}. Serve the base model that the pack's adapters are for."
        )
    for module, name in names.items():
        if name in known:
            sides = info.modules[module]
            check_shape(module, (sides["up"].dimension, sides["down"].dimension), known[name])


def check_all_have_slots(
    modules: Iterable[str], slots: Iterable[str], fused: Mapping[str, Sequence[str]], targets: Sequence[str] | None
) -> None:
    """`ServingError` if modules of an adapter that vLLM has read have no slot, so that it would leave them out.

    slots: the layers that have some, by vLLM's names. fused: what each kind of layer was made of. targets: what vLLM
    was asked to make slots for; None for all that it can.
    """
    served = {name for path in slots for name in lora_names(path, fused)}
    every = sorted(modules)
    # those of experts have one name in the adapter and another one in the model
    left_out = [module for module in every if module not in served and "experts" not in module.split(".")]
    if left_out:
        only = f", which has slots for {', '.join(sorted(targets))} alone (--lora-target-modules)" if targets else ""
        raise ServingError(
            f"{len(left_out)} of {len(every)} modules of an adapter would be left out by this server, as "
            f"{left_out[0]!r}{only}. `eigenlorax serve-check` prints the flags for a pack as it is now; a model that "
            "holds a pack's bases takes that pack's adapters alone."
        )


def _is_layer(name: str, kinds: set[str]) -> bool:
    return ".experts." not in name and name.rpartition(".")[2] in kinds
