"""Command line: one file per verb, which parses, calls and prints. No logic, and no torch before a verb runs."""

from .main import app, main

__all__ = ["app", "main"]
