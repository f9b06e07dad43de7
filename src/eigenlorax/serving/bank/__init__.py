"""Many adapters of a pack on one model: each row of a batch with its own, added and removed while it serves."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
