"""`load_into`: adapters of a pack in the image pipelines of diffusers. Importing this does not load diffusers."""

# raises an error that says what to install if PEFT is missing
from ... import tuner  # noqa: F401
from .loading import load_into

__all__ = ["load_into"]
