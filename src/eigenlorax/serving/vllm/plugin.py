"""The entry point that vLLM calls in each of its processes. It does nothing unless the environment names a pack."""

from . import settings


def register() -> None:
    """Make vLLM serve the pack that the environment names, if any. Errors end the process that vLLM is starting."""
    environment = settings.read()
    if environment is None:
        return
    from . import base_rows, loading, resolver

    resolver.register(environment)
    base_rows.register()
    loading.register()
