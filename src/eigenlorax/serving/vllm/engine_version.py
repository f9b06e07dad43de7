"""The releases of vLLM that the plugin was run with, and what it says of others. Nothing here imports vLLM."""

RELEASES = ((0, 32),)
"""The releases, major and minor, that `scripts/vllm-suite` was run with, oldest first."""
RUN_WITH = ", ".join(f"{major}.{minor}" for major, minor in RELEASES)
"""The same as text."""
_NONE = "none of the releases"
_INSTALL = f"install vllm=={RELEASES[-1][0]}.{RELEASES[-1][1]}.*, or a newer release of eigenlorax"


def untested_warning(installed: str) -> str | None:
    """Return a warning if the plugin was not run with an installed version of vLLM; None if it was.

    Args:
        installed: `vllm.__version__`.
    """
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(installed).release[:2]
    except InvalidVersion:
        comparison = _NONE
    else:
        if release in RELEASES:
            return None
        newer, older = release > RELEASES[-1], release < RELEASES[0]
        comparison = "newer than the releases" if newer else "older than the releases" if older else _NONE
    return (
        f"vLLM {installed} is {comparison} that this version of eigenlorax was run with ({RUN_WITH}). The plugin "
        "extends vLLM's loaders and LoRA layers, which differ between releases. Compare the tokens of some adapters "
        f"with PEFT's before you rely on them, or {_INSTALL}."
    )


def import_failure(installed: str, error: ImportError) -> str:
    """Return the message if vLLM lacks what the plugin extends.

    Args:
        installed: `vllm.__version__`.
        error: The error of the plugin's import.
    """
    return (
        f"eigenlorax cannot extend vLLM {installed}: {error}. It was run with vLLM {RUN_WITH}: {_INSTALL}. Without "
        "EIGENLORAX_PACK the server starts, and serves no pack."
    )
