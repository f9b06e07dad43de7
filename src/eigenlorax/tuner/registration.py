"""Registration of the method in PEFT's three tables, since `register_peft_method` rejects unknown types."""

from ..core import keys
from ..errors import MissingExtraError
from .peft_type import peft_type

OLDEST_PEFT = (0, 21)
_GET_PEFT = f"pip install 'peft>={OLDEST_PEFT[0]}.{OLDEST_PEFT[1]}'"


def check_peft() -> None:
    """Raise `MissingExtraError` if PEFT is not installed or too old."""
    try:
        import peft
        from packaging.version import Version
    except ImportError as error:
        raise MissingExtraError(
            f"eigenlorax.tuner requires {error.name}, which is not installed: pip install 'eigenlorax[peft]'."
        ) from error
    if Version(peft.__version__).release[:2] < OLDEST_PEFT:
        raise MissingExtraError(f"eigenlorax.tuner requires a newer PEFT than {peft.__version__}: {_GET_PEFT}.")


def register() -> None:
    """Register the config, the tuner and the prefix of the method in PEFT. A second call changes nothing.

    Raises:
        MissingExtraError: PEFT itself has a method of this name.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    from .config import EigenLoraxConfig
    from .model import EigenLoraxModel

    method = peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(method)
    if registered not in (None, EigenLoraxConfig):
        raise MissingExtraError(
            f"this PEFT has its own method {keys.PEFT_TYPE} ({registered.__module__}): use that, or an older PEFT."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = EigenLoraxConfig
    PEFT_TYPE_TO_TUNER_MAPPING[method] = EigenLoraxModel
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = EigenLoraxModel.prefix
