"""Memory of one training step in this process: bytes alive between forward and backward, the peak, and who keeps them.

- *allocated*: what PyTorch's allocator hands out, from the profiler's events. The tables use it, because it is the same
  in every run.
- *resident*: pages of the process. They include what kernels take beside PyTorch, and they vary by a few per cent:
  malloc keeps small blocks. They check the other figure.
- *saved*: storages that autograd saves, by the part of the model that saves them. Checkpointed blocks keep their inputs
  in another way, so it is measured without checkpoints only.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

Batch = dict[str, Tensor]
Json = dict[str, Any]

PARTS = {
    "norms": ("Norm",),
    "dropout": ("Dropout",),
    "attention": ("Attention",),
    "MLP": ("MLP", "Intermediate", "BertOutput"),
    "head and loss": ("Pooler", "ForCausalLM", "ForSequenceClassification"),
}
"""Words in the names of transformers' classes, by part of the model."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK = 1 << 16


def measure(model: nn.Module, batch: Batch, *, resident: bool, saved: bool) -> Json:
    """Measure a training step with AdamW, whose state exists already.

    Args:
        model: Model whose forward pass returns a loss.
        batch: Inputs and labels.
        resident: Whether to measure resident memory, which takes two more steps.
        saved: Whether to measure what autograd saves, which takes one more forward pass.

    Returns:
        Bytes: "allocated_after_forward" and "allocated_peak" beyond those before the step; "resident_after_forward" and
        "resident_peak" likewise; "saved" by part; "adapter" for the adapter with its bases; "optimizer" for its state.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # without an adapter, there is nothing to train: the gradient goes to the embeddings' output
    optimizer = torch.optim.AdamW(trained or [nn.Parameter(torch.zeros(1))])
    first = {name: tensor[:1, :8] if tensor.ndim > 1 else tensor[:1] for name, tensor in batch.items()}
    _step(model, optimizer, first)
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    return {
        **_allocated(model, optimizer, batch),
        **({"saved": saved_by_part(model, batch)} if saved else {}),
        # the last, because it changes how memory is allocated
        **(_resident(model, optimizer, batch) if resident else {}),
        "adapter": _adapter_bytes(model),
        "optimizer": sum(tensor.nbytes for tensor in states),
    }


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, after_forward: Callable[[], None] = lambda: None
) -> None:
    with record_function("forward pass"):
        loss = model(**batch).loss
    after_forward()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _resident(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Json:
    libc = ctypes.CDLL(None)
    # glibc maps every large block by itself then, and a freed one leaves the process at once
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)
    # kernels keep buffers of their first step
    _step(model, optimizer, batch)
    libc.malloc_trim(0)
    # the peak is counted from here on
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    alive: list[int] = []
    _step(model, optimizer, batch, lambda: alive.append(_status("VmRSS")))
    return {"resident_after_forward": alive[0] - before, "resident_peak": _status("VmHWM") - before}


def _status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _allocated(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Json:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, optimizer, batch)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (forward,) = (event for event in events if event.name() == "forward pass")
    forward_end = forward.start_ns() + forward.duration_ns()
    allocated = after_forward = peak = 0
    for event in events:
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
            if event.start_ns() <= forward_end:
                after_forward = allocated
    return {"allocated_after_forward": after_forward, "allocated_peak": peak}


def saved_by_part(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Return the bytes that autograd saves for backward in a forward pass, by the part of the model that saves them.

    Each storage counts once; parameters and buffers do not count. A storage that the adapter and another part save
    counts for the other part, because it is there without the adapter too.
    """
    frozen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    owners: dict[int, str] = {}
    with _running_modules() as modules:

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in frozen:
                part = _part(modules)
                sizes[storage._cdata] = storage.nbytes()
                if owners.setdefault(storage._cdata, part) == "adapter":
                    owners[storage._cdata] = part
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # the graph of the loss keeps every storage, and with it its address
            loss = model(**batch).loss
    del loss
    parts = ("adapter", *PARTS, "other")
    return {part: sum(sizes[key] for key, owner in owners.items() if owner == part) for part in parts}


@contextmanager
def _running_modules() -> Iterator[list[nn.Module]]:
    """Yield the list of modules whose forward pass is running, the outermost first."""
    modules: list[nn.Module] = []
    hooks = (
        register_module_forward_pre_hook(lambda module, args: modules.append(module)),
        register_module_forward_hook(lambda module, args, output: modules.remove(module)),
    )
    try:
        yield modules
    finally:
        for hook in hooks:
            hook.remove()


def _part(modules: list[nn.Module]) -> str:
    """Return the part of the model that the innermost running module belongs to."""
    for module, parent in zip(reversed(modules), [*reversed(modules[:-1]), None], strict=True):
        inside_adapter = isinstance(parent, BaseTunerLayer) and module is not parent.get_base_layer()
        if isinstance(module, BaseTunerLayer) or inside_adapter:
            return "adapter"
        for part, words in PARTS.items():
            if any(word in type(module).__name__ for word in words):
                return part
    return "other"


def _adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the adapter: its parameters, and the buffers of its layers, bases among them."""
    sizes: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = {tensor.data_ptr() for tensor in layer.get_base_layer().parameters()}
            tensors = (*layer.parameters(), *layer.buffers())
            sizes |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.data_ptr() not in base}
    return sum(sizes.values())
