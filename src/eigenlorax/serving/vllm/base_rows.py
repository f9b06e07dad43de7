"""Rows without an adapter, on CPUs: there vLLM (0.32) gives them the adapter in its last slot.

Its kernels in plain torch index the slots with −1 for "none" (vllm-project/vllm, pull requests 48421 and 49656); those
for GPUs skip such rows.
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class WithBaseRows(PunicaWrapperCPU):
    """The products of adapters on CPUs, zero for rows without one."""

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        y.copy_(_without_base_rows(y, self.token_lora_indices))

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **options: Any) -> None:
        super().add_lora_embedding(y, _without_base_rows(x, self.token_lora_indices), *args, **options)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **options: Any) -> None:
        rows = x.view(-1, x.shape[-1])
        super().add_lora_logits(y, _without_base_rows(rows, self.sampler_indices), *args, **options)


def _without_base_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """Zeros in the rows that have no slot."""
    return rows.masked_fill((slots[: rows.shape[0]] < 0).unsqueeze(1), 0)


def register() -> None:
    """Let vLLM on this process's CPU multiply so."""
    if current_platform.is_cpu():
        name = f"{WithBaseRows.__module__}.{WithBaseRows.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
