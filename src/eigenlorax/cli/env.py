"""`eigenlorax env`: what a bug report needs."""

import importlib.metadata
import os
import platform
from pathlib import Path

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
    found = collect()
    if json:
        console.print_json(found)
    else:
        console.print_rows("", list(found.items()))


def collect() -> dict[str, str]:
    """What this process runs on and with, by name."""
    import torch

    from ..version import __version__

    return {
        "eigenlorax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
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


def _processor() -> str:
    """The CPU's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
