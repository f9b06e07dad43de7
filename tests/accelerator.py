"""A device that stands for an accelerator: tensors on it are computed on the CPU, and every transfer is recorded.

As on a real one, an operation on tensors of two devices fails, and so does one that needs the memory of a tensor.
"""

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("meta")
_SCALARS = ("_local_scalar_dense", "is_nonzero", "equal")
# operations whose other operands may be on the CPU: copies, and indices
_MIXED = ("copy_", "index", "index_put_")


class OnDevice(torch.Tensor):
    """A tensor that says it is on `DEVICE`, and holds one on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnDevice({self.inner})"

    def tolist(self):
        # torch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation} is computed outside of an `Accelerator`, as in another thread.")


@dataclass
class Accelerator(TorchDispatchMode):
    """While it is entered, `DEVICE` computes. Lists hold the shapes of tensors that were moved, or the operations.

    Attributes:
        uploads: Tensors that were copied to the device.
        downloads: Tensors that were copied from the device.
        scalars: Operations that hand a number to Python, for which it waits.
    """

    uploads: list = field(default_factory=list)
    downloads: list = field(default_factory=list)
    scalars: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        tensors = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        on_device = [isinstance(tensor, OnDevice) for tensor in tensors]
        if any(on_device) and name not in _MIXED:
            strangers = [tuple(t.shape) for t in tensors if not isinstance(t, OnDevice) and t.dim()]
            assert not strangers, f"{name} of tensors on the device and of tensors on the CPU: {strangers}"
        if any(on_device) and name in _SCALARS:
            self.scalars.append(name)
        if "device" in kwargs and kwargs["device"] is not None:
            stays = torch.device(kwargs["device"]) == DEVICE
            kwargs = {**kwargs, "device": torch.device("cpu")}
        else:
            # an operation in place stays where its first operand is
            stays = any(on_device[:1] if name in _MIXED else on_device)
        if name in ("copy_", "_to_copy") and on_device[-1] != stays:
            (self.uploads if stays else self.downloads).append(tuple(tensors[-1].shape))
        inner_args, inner_kwargs = tree_map_only(OnDevice, lambda t: t.inner, (args, kwargs))
        output = operation(*inner_args, **inner_kwargs)
        return tree_map_only(torch.Tensor, OnDevice, output) if stays else output
