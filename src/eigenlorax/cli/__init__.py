"""Command line: one file per verb, which parses, calls and prints. No logic, and no torch before a verb runs."""

from .main import command_line, main

__all__ = ["command_line", "main"]
