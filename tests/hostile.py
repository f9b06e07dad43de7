"""Packs that an attacker wrote and signed: changes, their digests, and what comes of the pack when it is used."""

import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenlorax as ex
from children import run
from eigenlorax.codec import varint
from signing import signed_again

MEGABYTE = 1_000_000


def change_json(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return what changes the content of a JSON file of a pack, or of all adapters if its name is that of such a file.

    change: returns the new content, or None where it has changed what it was given.
    """

    def apply(pack: Path) -> None:
        for path in [pack / file] if (pack / file).exists() else sorted((pack / "adapters").glob(f"*/{file}")):
            content = json.loads(path.read_text())
            changed = change(content)
            path.write_text(json.dumps(content if changed is None else changed))

    return apply


def manifest(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return what changes the manifest."""
    return change_json("subspace_config.json", change)


def sides(**fields: Any) -> Callable[[Path], None]:
    """Return what changes fields of the `down` side of every module in the manifest."""

    def change(body: Any) -> None:
        for pair in body["subspace"]["modules"].values():
            pair.setdefault("down", {}).update(fields)

    return manifest(change)


def tensors(
    change: Callable[[dict[str, Tensor]], None], file: str = "adapter_model.safetensors"
) -> Callable[[Path], None]:
    """Return what changes the tensors of every adapter, or of the subspace if that is the file."""

    def apply(pack: Path) -> None:
        for path in pack.glob("subspace-*" if file == "subspace" else f"adapters/*/{file}"):
            found = load_file(path)
            change(found)
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)

    return apply


def coded_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of every coded adapter."""

    def apply(found: dict[str, Tensor]) -> None:
        data = change(found["eigenlorax_coded"].numpy().tobytes())
        found["eigenlorax_coded"] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())

    return tensors(apply)


def packed_levels(body: bytes) -> Callable[[bytes], bytes]:
    """Return what gives a coded adapter the step it has, and these levels, deflated."""

    def change(data: bytes) -> bytes:
        return data[:3] + varint.encode(2) + varint.encode(len(body)) + body

    return change


def use(pack: Path, out: Path) -> None:
    """Open a pack and read, describe, verify and export all that is in it."""
    opened = ex.Pack.open(pack)
    assert opened.summary.adapters == len(opened)
    opened.verify()
    for name in opened.names:
        found = opened.packed(name)
        for module in found.coefficients:
            found.coefficients[module]
        opened.adapter(name)
        opened.export(out, name, overwrite=True)
    assert len(opened.subspace.modules) == len(opened.info.modules)


def outcome(pack: Path) -> tuple[str, int]:
    """Use a pack in a process of its own: "ok", or the class and message of our error; and the peak of its memory above
    that of this process, in bytes. Any other exception, and a signal, is an `AssertionError`."""
    with tempfile.TemporaryDirectory() as out:

        def call() -> None:
            # a bomb ends with a MemoryError instead of taking the machine with it
            resource.setrlimit(resource.RLIMIT_AS, (16_000 * MEGABYTE, resource.RLIM_INFINITY))
            reset_peak()
            before, text = peak(), "ok"
            try:
                use(pack, Path(out))
            except ex.errors.EigenloraxError as error:
                text = f"{type(error).__name__}: {error}"
            sys.stdout.write(json.dumps([text, peak() - before]))

        done = run(call)
    assert done.code == 0, done
    text, memory = json.loads(done.out)
    return text, memory


def reset_peak() -> None:
    """Let the peak of this process's memory be what it takes now, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak of this process's memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def allowed(pack: Path, exported: int) -> int:
    """Return the memory that SECURITY.md grants: ten times the files, three times the largest export, and 200 MB."""
    size = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    return 10 * size + 3 * exported + 200 * MEGABYTE


def changed(pack: Path, place: Path, *changes: Callable[[Path], None]) -> Path:
    """Return a copy of a pack with changes, signed again."""
    shutil.copytree(pack, place)
    for change in changes:
        change(place)
    signed_again(place)
    return place


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc to measure memory")
