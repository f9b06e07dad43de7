"""`eigenlorax env`: what a bug report needs."""

import importlib.metadata
import os
import platform

import typer

from . import console

PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "typer", "rich", "peft", "transformers", "diffusers")
EPILOG = """Example:

  eigenlorax env --json"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(env)


def env(json: console.Json = False) -> None:
    """Show versions, platform and devices: paste it into a bug report."""
    import torch

    from ..version import __version__

    found = {
        "eigenlorax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **{package: _version(package) for package in PACKAGES},
        **{
            name: os.environ[name]
            for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }
    if json:
        console.print_json(found)
    else:
        console.print_rows("", list(found.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
