"""Check for the packages of the extra `report`."""

from importlib.util import find_spec

from ..errors import MissingExtraError

HOW = "A report needs matplotlib and SciPy: pip install 'eigenlorax[report]'."


def is_installed() -> bool:
    """Return whether the packages are installed. They are not imported, because that takes a second."""
    return all(find_spec(name) is not None for name in ("matplotlib", "scipy"))


def require() -> None:
    """Raise `MissingExtraError` if a package is not installed."""
    if not is_installed():
        raise MissingExtraError(HOW)
