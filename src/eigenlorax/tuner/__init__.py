"""EigenLoRAx as a method of PEFT: coefficients over a frozen subspace are trained, saved, merged and served."""

from . import registration

# before the imports below, which fail with less helpful errors if PEFT is missing or too old
registration.check_peft()

from .components import lora_from_components  # noqa: E402
from .config import EigenLoraxConfig  # noqa: E402
from .convert import combine, from_lora, scaled, swap, to_lora  # noqa: E402
from .gradient_components import initialize_gradient_components  # noqa: E402
from .layer import EigenLoraxLayer  # noqa: E402
from .model import EigenLoraxModel  # noqa: E402
from .optim import SOAP, coefficient_groups, lora_groups  # noqa: E402
from .serving import serve  # noqa: E402

registration.register()

__all__ = [
    "SOAP",
    "EigenLoraxConfig",
    "EigenLoraxLayer",
    "EigenLoraxModel",
    "coefficient_groups",
    "combine",
    "from_lora",
    "initialize_gradient_components",
    "lora_from_components",
    "lora_groups",
    "scaled",
    "serve",
    "swap",
    "to_lora",
]
