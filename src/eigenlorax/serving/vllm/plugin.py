"""The entry point that vLLM calls in each of its processes. It does nothing unless the environment names a pack."""

from ...errors import ServingError
from . import engine_version, settings


def register() -> None:
    """Make vLLM serve the pack that the environment names, if any. Errors end the process that vLLM is starting.

    Raises:
        OptionError: A setting in the environment is invalid.
        ServingError: This release of vLLM lacks what the plugin extends.
    """
    environment = settings.read()
    if environment is None:
        return
    import vllm

    try:
        from . import base_rows, loading, resolver
    except ImportError as error:
        raise ServingError(engine_version.import_failure(vllm.__version__, error)) from error
    resolver.register(environment)
    base_rows.register()
    loading.register()
