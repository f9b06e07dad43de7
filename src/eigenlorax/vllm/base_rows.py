"""Rows without an adapter, on CPUs: there vLLM (0.32) gives them the adapter in its last slot.

Its kernels in plain torch index the slots with −1 for "none" (vllm-project/vllm, pull requests 48421 and 49656); those
for GPUs skip such rows.
"""

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class WithBaseRows(PunicaWrapperCPU):
    """The products of adapters on CPUs, zero for rows without one."""

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        without = self.token_lora_indices[: y.shape[0]] < 0
        y.masked_fill_(without.unsqueeze(1), 0)


def register() -> None:
    """Let vLLM on this process's CPU multiply so."""
    if current_platform.is_cpu():
        name = f"{WithBaseRows.__module__}.{WithBaseRows.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
