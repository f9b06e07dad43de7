"""Many adapters of one pack on one model: `bank` for PyTorch, `diffusers` for image pipelines, `vllm` for vLLM.

`lora_tensors` is for engines that load LoRAs from memory.
"""
