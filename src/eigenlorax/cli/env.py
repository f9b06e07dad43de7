"""`eigenlorax env`: versions and platform, for bug reports."""

import importlib.metadata
import os
import platform
from pathlib import Path

import typer

from . import arguments, console, verbs

PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "typer", "rich", "peft", "transformers", "diffusers")
EXAMPLES = """
eigenlorax env
eigenlorax env --json
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, env, EXAMPLES)


def env(json: arguments.Json = False) -> None:
    """Show versions, platform and devices, to paste into a bug report."""
    environment = collect()
    if json:
        console.print_json(environment)
    else:
        console.print_rows("", list(environment.items()))


def collect() -> dict[str, str]:
    """Return versions, hardware and environment variables that affect this process."""
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
    """Return the model name of the CPU, if the system has one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
