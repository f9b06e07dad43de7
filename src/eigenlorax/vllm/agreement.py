"""Whether the adapters of a pack are for the model that vLLM has loaded.

vLLM loads adapters of a narrower model, and of one with more layers, and answers something else; it looks at no names
but the last, and at no sizes.
"""

from torch import nn

from ..errors import ModuleNameError
from ..manifest import SubspaceInfo
from .placing import check_shape, names_in, places


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


def _is_layer(name: str, kinds: set[str]) -> bool:
    return ".experts." not in name and name.rpartition(".")[2] in kinds
