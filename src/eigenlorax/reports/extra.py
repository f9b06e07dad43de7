"""Whether what a report needs beside our own requirements is installed."""

from importlib.util import find_spec

HOW = "A report needs matplotlib and scikit-learn: pip install 'eigenlorax[report]'."


def is_installed() -> bool:
    """Without importing them, which takes a second."""
    return all(find_spec(name) is not None for name in ("matplotlib", "scipy", "sklearn"))
