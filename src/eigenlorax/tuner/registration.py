"""Makes the method known to PEFT without a change of its files: entries in three tables."""

from ..core import keys
from ..errors import MissingExtraError
from .peft_type import peft_type

OLDEST_PEFT = (0, 21)
_GET_PEFT = f"pip install 'peft>={OLDEST_PEFT[0]}.{OLDEST_PEFT[1]}'"


def check_peft() -> None:
    """`MissingExtraError` where PEFT is not installed or too old."""
    try:
        import peft
        from packaging.version import Version
    except ImportError as error:
        raise MissingExtraError(
            f"adapters on models need {error.name}, which is not installed: pip install 'eigenlorax[peft]'."
        ) from error
    if Version(peft.__version__).release[:2] < OLDEST_PEFT:
        raise MissingExtraError(f"adapters on models need a newer PEFT than {peft.__version__}: {_GET_PEFT}.")


def register() -> None:
    """Make the method known to PEFT. Calling it again changes nothing.

    `MissingExtraError` where PEFT has a method of this name of its own.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    from .config import EigenLoraxConfig
    from .model import EigenLoraxModel

    kind = peft_type()
    there = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if there not in (None, EigenLoraxConfig):
        raise MissingExtraError(
            f"this PEFT has a method {keys.PEFT_TYPE} of its own ({there.__module__}): use that, or an older PEFT."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = EigenLoraxConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = EigenLoraxModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = EigenLoraxModel.prefix
