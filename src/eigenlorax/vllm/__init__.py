"""Serving the adapters of a pack in vLLM (docs/vllm.md)."""
