"""A pack's adapters in the image pipelines of diffusers, which is not loaded by importing this."""

from .loading import load_into

__all__ = ["load_into"]
