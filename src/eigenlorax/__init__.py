"""EigenLoRAx: find the principal subspace that LoRA adapters share, store adapters in it, and train new ones in it.

Importing this package imports neither torch nor PEFT. Public names are imported when they are first used.
"""

import warnings
from typing import TYPE_CHECKING

from .core import import_hook, lazy_names
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
    from .merging.algebra import combine, interpolate, orthogonalize, project_out, scale, subtract
    from .merging.merge import MergedAdapter, merge
    from .pack.pack import Pack
    from .pack.random_pack import random_pack
    from .pack.summary import Summary
    from .pack.track import track
    from .reports import Report, report
    from .search.match import Match
    from .search.similarity_index import SimilarityIndex
    from .search.text_index import TextIndex
    from .serving.bank import AdapterBank
    from .serving.diffusers import load_into
    from .serving.lora_tensors import lora_tensors
    from .serving.routing import Router
    from .train.row_search import rank_by_loss
    from .train.version_callback import VersionCallback
    from .tuner import EigenLoraxConfig, EigenLoraxModel

# the module that defines each public name
_DEFINED_IN = {
    "Adapter": "core.adapter",
    "AdapterBank": "serving.bank",
    "EigenLoraxConfig": "tuner",
    "EigenLoraxModel": "tuner",
    "EigenloraxError": "errors",
    "LoRAFactors": "core.adapter",
    "Match": "search.match",
    "MergedAdapter": "merging.merge",
    "Pack": "pack.pack",
    "Refit": "fitting.refit",
    "Report": "reports",
    "Router": "serving.routing",
    "SimilarityIndex": "search.similarity_index",
    "Subspace": "core.subspace",
    "Summary": "pack.summary",
    "TextIndex": "search.text_index",
    "VersionCallback": "train.version_callback",
    "combine": "merging.algebra",
    "fit": "fitting.fit",
    "from_factors": "core.adapter",
    "interpolate": "merging.algebra",
    "load_into": "serving.diffusers",
    "lora_tensors": "serving.lora_tensors",
    "merge": "merging.merge",
    "orthogonalize": "merging.algebra",
    "project_out": "merging.algebra",
    "random_pack": "pack.random_pack",
    "rank_by_loss": "train.row_search",
    "read_adapter": "formats",
    "refit": "fitting.refit",
    "report": "reports",
    "scale": "merging.algebra",
    "subtract": "merging.algebra",
    "track": "pack.track",
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
    "Match",
    "MergedAdapter",
    "Pack",
    "Refit",
    "Report",
    "Router",
    "SimilarityIndex",
    "Subspace",
    "Summary",
    "TextIndex",
    "VersionCallback",
    "__version__",
    "combine",
    "fit",
    "from_factors",
    "interpolate",
    "load_into",
    "lora_tensors",
    "merge",
    "orthogonalize",
    "project_out",
    "random_pack",
    "rank_by_loss",
    "read_adapter",
    "refit",
    "report",
    "scale",
    "subtract",
    "track",
    "verify",
    "write_adapter",
]


__getattr__ = lazy_names.importer(__name__, _DEFINED_IN)


def _register_with_peft() -> None:
    """Register the method with PEFT, or warn: `import peft` must not fail in programs that do not need us."""
    try:
        from .tuner import registration

        registration.register()
    except MissingExtraError as error:
        warnings.warn(str(error), RegistrationWarning, stacklevel=2)


# so that PEFT loads our adapters after `import eigenlorax`, in whatever order the two packages are imported
import_hook.call_after_import("peft", _register_with_peft)


def __dir__() -> list[str]:
    return sorted(__all__)
