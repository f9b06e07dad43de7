"""A pack's adapters in the image pipelines of diffusers, which is not loaded by importing this."""

# without PEFT it says so, and what to install, before a module of ours asks for PEFT's own
from ... import tuner  # noqa: F401
from .loading import load_into

__all__ = ["load_into"]
