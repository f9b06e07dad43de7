"""A workaround for vLLM 0.32 on CPUs, where rows without an adapter get the adapter in the last slot.

Its kernels in plain torch use −1, "no adapter", as an index of slots (vllm-project/vllm, pull requests 48421 and
49656); those for GPUs skip such rows.
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class WithBaseRows(PunicaWrapperCPU):
    """vLLM's LoRA products on CPUs, with zeros for rows without an adapter."""

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        y.copy_(_without_base_rows(y, self.token_lora_indices))

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **options: Any) -> None:
        super().add_lora_embedding(y, _without_base_rows(x, self.token_lora_indices), *args, **options)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **options: Any) -> None:
        rows = x.view(-1, x.shape[-1])
        super().add_lora_logits(y, _without_base_rows(rows, self.sampler_indices), *args, **options)


def _without_base_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """Return `rows` with zeros in the rows that have no slot."""
    return rows.masked_fill((slots[: rows.shape[0]] < 0).unsqueeze(1), 0)


def register() -> None:
    """Make vLLM use `WithBaseRows` if its platform is a CPU."""
    if current_platform.is_cpu():
        name = f"{WithBaseRows.__module__}.{WithBaseRows.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
