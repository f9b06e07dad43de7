"""Reports of progress to the caller of a long computation."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Function of a description of the stage, the number of its steps that are done, and the number of all its steps."""
