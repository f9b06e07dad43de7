"""Packs: the folder format, its manifest, and adding adapters."""
