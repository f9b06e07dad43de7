"""Reports of progress to the caller of a long computation."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Takes the stage in words, how many of its steps are done, and how many there are."""
