"""EigenLoRAx: the principal subspace that LoRA adapters share, found, stored and trained in.

Importing this package loads neither torch nor peft; a name is looked up when it is first used.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core import import_hook
from .errors import MissingExtraError, RegistrationWarning
from .version import __version__

if TYPE_CHECKING:
    from .core.adapter import Adapter, LoRAFactors, from_factors
    from .core.subspace import Subspace
    from .errors import EigenloraxError
    from .fitting.fit import fit
    from .fitting.refit import Refit, refit
    from .fitting.verify import verify
    from .formats import read_adapter, write_adapter
    from .pack.pack import Pack
    from .pack.summary import Summary
    from .reports import Report, report
    from .serving.bank import AdapterBank
    from .serving.diffusers import load_into
    from .tuner import EigenLoraxConfig, EigenLoraxModel

_HOME = {
    "Adapter": "core.adapter",
    "AdapterBank": "serving.bank",
    "EigenLoraxConfig": "tuner",
    "EigenLoraxModel": "tuner",
    "EigenloraxError": "errors",
    "LoRAFactors": "core.adapter",
    "Pack": "pack.pack",
    "Refit": "fitting.refit",
    "Report": "reports",
    "Subspace": "core.subspace",
    "Summary": "pack.summary",
    "fit": "fitting.fit",
    "from_factors": "core.adapter",
    "load_into": "serving.diffusers",
    "read_adapter": "formats",
    "refit": "fitting.refit",
    "report": "reports",
    "verify": "fitting.verify",
    "write_adapter": "formats",
}
__all__ = [
    "Adapter",
    "AdapterBank",
    "EigenLoraxConfig",
    "EigenLoraxModel",
    "EigenloraxError",
    "LoRAFactors",
    "Pack",
    "Refit",
    "Report",
    "Subspace",
    "Summary",
    "__version__",
    "fit",
    "from_factors",
    "load_into",
    "read_adapter",
    "refit",
    "report",
    "verify",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def _register_with_peft() -> None:
    """Make PEFT know the method. An `import peft` of a program that wants something else does not fail for our sake."""
    try:
        from .tuner import registration

        registration.register()
    except MissingExtraError as error:
        warnings.warn(str(error), RegistrationWarning, stacklevel=2)


# `import eigenlorax` anywhere is enough for PEFT to load our adapters, in whatever order the two are imported
import_hook.call_after_import("peft", _register_with_peft)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
