"""Bytes of a pack's files by kind, beside those that a pack of another commit takes, and beside the Gaussian bound.

    git worktree add ../before e3f87bd1
    python benchmarks/file_bytes.py --zoo zoo --before ../before/src     # minutes; writes results/file_bytes.json
    python benchmarks/table.py --write                                   # the table in docs/bytes-results.md

Every file counts: the manifest, the card, configs, headers and tensors. Packs are fitted by `eigenlorax fit`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from byte_collections import DEMO, SHAPES, Folders, below, planted

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import losses, rate_bound

RESULTS = Path(__file__).with_name("results") / "file_bytes.json"
ERRORS = (0.05, 0.1, 0.3, 0.5)
KINDS = {"subspace_config.json": "manifest", "README.md": "card"}
"""Kinds of files of a pack by name; all other JSON files are configs."""
TENSORS = {"eigenlorax_coded": "adapters", "components.coded": "bases"}
"""Kinds of tensors by name; all others are heads, what heads refer to, and carried tensors."""
Json = dict[str, Any]


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    cells: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name, sources in collections(options.zoo, scratch).items():
            bounds = least_bytes(sources)
            for error, bound in zip(ERRORS, bounds, strict=True):
                after = fitted(sources, error, scratch / "after", None)
                before = fitted(sources, error, scratch / "before", options.before) if options.before else None
                cells[f"{name} | {error:g}"] = {
                    "adapters": len(sources),
                    "bound": bound,
                    "after": after,
                    **({"before": before} if before is not None else {}),
                }
                print(f"{name} | {error:g}: {sum(after.values()):,} bytes", file=sys.stderr)
    command = "python benchmarks/file_bytes.py --zoo zoo" + " --before ../before/src" * (options.before is not None)
    # here, because experiments have a module of this name too, which tests import
    from run import commit, write

    write(options.output, {"command": command, "commit": commit(), "environment": collect(), "cells": cells})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="a folder of folders of strangers' adapters, by base model")
    parser.add_argument("--before", type=Path, help="the folder `src` of another commit")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(default: %(default)s)")
    return parser.parse_args()


def collections(zoo: Path | None, scratch: Path) -> dict[str, Folders]:
    """Sources of the adapters of each collection, by name."""
    found = {
        "demo": below(DEMO),
        "variants, 100": planted("variants", SHAPES["narrow"], 100, scratch / "variants"),
    }
    if zoo is not None:
        found |= {base: below(zoo / base) for base in ("distilbert-base-uncased", "gpt2")}
        found["stable-diffusion-v1"] = {
            path.parent.name: path for path in zoo.glob("stable-diffusion-v1/*/*.safetensors")
        }
    return found


def least_bytes(sources: Folders) -> list[float]:
    """Return the Gaussian bound of the adapters, each by itself, at each error."""
    adapters = [ex.read_adapter(path, allow_pickle=True) for path in sources.values()]
    total = [0.0] * len(ERRORS)
    for adapter in adapters:
        spectra = []
        for module in adapter.specs:
            factors = adapter.modules[module]
            n_out, n_in = factors.spec.out_features, factors.spec.in_features
            spectra.append((losses.singular_squares(pad_factors([factors], n_in, n_out)), (n_out, n_in)))
        total = [sum(pair) for pair in zip(total, rate_bound.least_bytes(spectra, ERRORS), strict=True)]
    return total


def fitted(sources: Folders, error: float, target: Path, library: Path | None) -> dict[str, int]:
    """Return the bytes by kind of a pack that `eigenlorax fit` makes.

    Args:
        sources: Sources of the adapters, by name.
        error: Error bound.
        target: Folder of the pack, which is replaced.
        library: Folder `src` of another commit; None for the library that is imported here.
    """
    named = [f"{name}={path}" for name, path in sources.items()]
    command = [sys.executable, "-W", "ignore", "-m", "eigenlorax", "fit", *named, "-o", str(target)]
    options = ["--max-error", str(error), "--allow-pickle", "--no-report", "--overwrite"]
    source = library if library is not None else Path(ex.__file__).parents[1]
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(source.absolute()), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options], env=environment, stdout=subprocess.DEVNULL, check=True)
    return file_bytes(target)


def file_bytes(pack: Path) -> dict[str, int]:
    """Return the bytes of a pack's files by kind; headers of safetensors files are a kind of their own."""
    sizes: Counter[str] = Counter()
    for path in pack.rglob("*"):
        if path.suffix == ".safetensors":
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            sizes["headers"] += end
            for name, place in json.loads(data[8:end]).items():
                if name != "__metadata__":
                    first, last = place["data_offsets"]
                    sizes[TENSORS.get(name, "heads")] += last - first
        elif path.is_file():
            sizes[KINDS.get(path.name, "configs")] += path.stat().st_size
    return dict(sorted(sizes.items()))


if __name__ == "__main__":
    main()
