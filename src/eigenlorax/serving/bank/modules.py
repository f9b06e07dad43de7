"""Modules of a model that a bank can serve, and their names in the pack and in versions."""

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...core import convolution, module_names
from ...core.adapter import Adapter
from ...errors import ModuleNameError, OptionError, ShapeError
from ...pack.pack import Pack


def match_modules(model: nn.Module, pack: Pack) -> dict[str, str]:
    """Return the model's name of each module of the subspace that the model has. A pack of histories only has none."""
    sizes = module_sizes(model)
    subspace_names = module_names.resolve_all(sizes, pack.info.modules)
    model_names = {subspace_name: name for name, subspace_name in subspace_names.items() if subspace_name is not None}
    if not model_names and pack.info.modules:
        raise ModuleNameError(
            f"the model has none of the {len(pack.info.modules)} modules of the pack, such as "
            f"{min(pack.info.modules)!r}. It is a different base model; the pack is for {pack.base_model!r}."
        )
    for subspace_name, name in sorted(model_names.items()):
        sides = pack.info.modules[subspace_name]
        expected = sides["up"].dimension, sides["down"].dimension
        if sizes[name] != expected:
            raise ShapeError(
                f"module {name}: (out, in) is {sizes[name]} in the model and {expected} in the pack. It belongs to a "
                "different base model."
            )
        _check_called(model, name)
    return model_names


def match_version(model: nn.Module, version: Adapter) -> dict[str, str]:
    """Return the model's name of each module of a version.

    Raises:
        ModuleNameError: The model lacks a module, or does not call it.
        ShapeError: A module has another shape or kernel in the model.
        OptionError: A module is inside a compiled module.
    """
    sizes = module_sizes(model)
    model_names = {}
    for module, name in module_names.resolve_all(version.specs, sizes).items():
        spec = version.specs[module]
        if name is None:
            raise ModuleNameError(
                f"version {version.name!r} has module {module!r}, which the model lacks. It belongs to another base "
                f"model; the pack states {version.base_model!r}."
            )
        if sizes[name] != (spec.out_features, spec.in_features):
            raise ShapeError(
                f"module {name}: (out, in) is {sizes[name]} in the model and {spec.out_features, spec.in_features} in "
                f"version {version.name!r}. It belongs to a different base model."
            )
        check_kernel(model, name, spec.kernel, f"version {version.name!r}, module {module}")
        _check_called(model, name)
        model_names[module] = name
    return model_names


def check_kernel(model: nn.Module, name: str, kernel: tuple[int, ...], adapter: str) -> None:
    """Raise `ShapeError` unless a module of the model has the kernel of an adapter.

    Args:
        model: The model.
        name: Name of the module in the model.
        kernel: Kernel of the adapter; empty for a linear module.
        adapter: The adapter and its module, for the message.
    """
    expected = convolution.kernel_size(model.get_submodule(name))
    if not convolution.kernels_match(kernel, expected):
        raise ShapeError(
            f"{adapter}: its kernel is {kernel}, and the model's kernel is {expected}. It belongs to a different base "
            "model."
        )


def _check_called(model: nn.Module, name: str) -> None:
    """Raise an error if a hook on a module would not run."""
    check_not_compiled(model, name)
    if isinstance(model.get_submodule(name), NonDynamicallyQuantizableLinear):
        raise ModuleNameError(
            f"module {name} is a part of nn.MultiheadAttention, which does not call it: "
            "the bank cannot serve it. Load exported adapters with PEFT (`eigenlorax export`)."
        )


def module_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linear, quantised, Conv1D and ungrouped convolution modules, which can be served.

    The input size of a convolution is channels · kernel.
    """
    sizes = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if convolution.is_supported(module):
            sizes[name] = convolution.row_sizes(module)[::-1]
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
            sizes[name] = (weight.shape[1], weight.shape[0])
        else:
            out_features, in_features = (getattr(module, field, None) for field in ("out_features", "in_features"))
            if isinstance(out_features, int) and isinstance(in_features, int):
                sizes[name] = (out_features, in_features)
    return sizes


def check_not_compiled(model: nn.Module, name: str) -> None:
    """Raise `OptionError` if a module is inside a compiled module, whose graph would ignore a new hook."""
    path = name.split(".")
    for depth in range(1, len(path) + 1):
        outer = ".".join(path[:depth])
        if model.get_submodule(outer)._compiled_call_impl is not None:
            raise OptionError(
                f"module {outer} is already compiled, and would ignore the bank's hook on {name}. Create the "
                "bank with an adapter that has this module, and then compile."
            )
