"""`AdapterBank`: many adapters of a pack on one PyTorch model, with one adapter per row of a batch."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
