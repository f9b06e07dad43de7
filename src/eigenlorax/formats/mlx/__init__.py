"""Adapter folders of mlx-lm: `adapter_config.json` with `adapters.safetensors`."""
