"""EigenLoRAx: the principal subspace that LoRA adapters share, found, stored and trained in.

Importing this package loads neither torch nor peft; a name is looked up when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import hook
from .version import __version__

if TYPE_CHECKING:
    from .adapter import Adapter, LoRAFactors, from_factors
    from .bank import AdapterBank
    from .errors import EigenloraxError
    from .fitting import fit
    from .formats import read_adapter, write_adapter
    from .pack import Pack
    from .pipelines import load_into
    from .refitting import Refit, refit
    from .reports import Report, report
    from .subspace import Subspace
    from .summary import Summary
    from .tuner import EigenLoraxConfig, EigenLoraxModel
    from .verifying import verify

_HOME = {
    "Adapter": "adapter",
    "AdapterBank": "bank",
    "EigenLoraxConfig": "tuner",
    "EigenLoraxModel": "tuner",
    "EigenloraxError": "errors",
    "LoRAFactors": "adapter",
    "Pack": "pack",
    "Refit": "refitting",
    "Report": "reports",
    "Subspace": "subspace",
    "Summary": "summary",
    "fit": "fitting",
    "from_factors": "adapter",
    "load_into": "pipelines",
    "read_adapter": "formats",
    "refit": "refitting",
    "report": "reports",
    "verify": "verifying",
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


hook.arrange()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
