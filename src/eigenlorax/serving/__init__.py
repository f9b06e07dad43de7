"""Many adapters of one pack on one model: `bank` for PyTorch, `diffusers` for image pipelines, `vllm` for vLLM."""
