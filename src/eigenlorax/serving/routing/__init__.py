"""`Router`: which adapter of a pack a request belongs to, or none."""

from .router import Router

__all__ = ["Router"]
