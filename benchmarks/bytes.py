"""Bytes at an error: how much a pack takes in which no adapter loses more, beside everything else that could be done.

    python benchmarks/bytes.py                     # hours; writes results/bytes.json as it goes, and goes on there
    python benchmarks/bytes.py --collections demo --errors .1 .2
    python benchmarks/bytes.py --quick             # a smoke run, to standard output
    python benchmarks/table.py --write             # the tables in docs/bytes-results.md and README.md

For each collection and each error X: the fewest bytes of each baseline (`tuned_baselines.py`, and lorashare and
vlora-dev where they are installed), each tuned so that the worst adapter's delta error is X at most; and those of
`eigenlorax.fit(max_error=X)`, saved, opened again, and measured adapter by adapter against the originals in whole
float64 matrices. Bytes are those of tensors; heads, and what is carried as it is, are on neither side. A baseline
that shares is looked for up to `--beyond` times the fewest bytes of those before it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import methods
import torch
from byte_collections import Collection, Folders, collections
from collection import copies_in_float32, delta_error, head_keys, saved_tensor_bytes
from run import commit, say, text_of, write
from tuned_baselines import CLUSTERS, COMBINATIONS, least

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.core.adapter import Adapter, LazyMapping, LoRAFactors
from eigenlorax.core.batch import ModuleBatch, pad_factors
from eigenlorax.reports.analysis.per_adapter import Point

RESULTS = Path(__file__).with_name("results") / "bytes.json"
ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
PACKAGES = {"lorashare": 100, "vlora": 100}
"""Installed packages, and the largest number of adapters for each: every fit of theirs reads all files again."""
WIDEST = 1024
"""Largest width for lorashare, which finds all eigenvectors of d × d matrices for each number of components."""
WIDE = "16 bits"
"""Key of baselines whose shared factors and cores are in 16 bits, as in papers and packages."""
TOGETHER = {"baselines": COMBINATIONS, WIDE: ((16, 16),)}
WHO = ("ours", *TOGETHER, *PACKAGES)
Json = dict[str, Any]


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output = options.output or (None if options.quick else RESULTS)
    result = opened(output, options)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        for collection in collections(options.zoo, options.adapters, options.quick):
            if options.collections and not any(part in collection.name for part in options.collections):
                continue
            if collection.absent:
                result["notes"][collection.name] = collection.absent
                say(f"{collection.name}: {collection.absent}")
                continue
            for key, cell in cells(collection, options, scratch, result["cells"]):
                result["cells"][key] = cell
                say(f"{key}: {cell['seconds']:.1f} s")
                if output is not None:
                    write(output, result)
    if output is None:
        print(text_of(result), end="")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collections", nargs="+", default=(), help="those whose name has one of these words in it")
    parser.add_argument("--errors", nargs="+", type=float, default=ERRORS, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes; the result goes to standard output")
    parser.add_argument("--zoo", type=Path, help="a folder of strangers' adapters, by base model")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], help="folders of further adapters of one model")
    parser.add_argument("--beyond", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--clusters", nargs="+", type=int, default=CLUSTERS, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=WHO, default=WHO, help="(default: %(default)s)")
    parser.add_argument(
        "--again", action="store_true", help="measure the packs again, and no baseline that was measured"
    )
    parser.add_argument("--output", type=Path, help="the result's file, read first (default: results/bytes.json)")
    parser.add_argument("--scratch", type=Path, help="where planted adapters are made, or found again")
    return parser.parse_args()


def opened(output: Path | None, options: argparse.Namespace) -> Json:
    """Return the result so far, with this run added."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    run = {
        "command": " ".join(["python", "benchmarks/bytes.py", *words]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "environment": collect(),
        "versions": methods.versions(),
    }
    exists = output is not None and output.is_file()
    result: Json = json.loads(output.read_text("utf-8")) if exists else {"runs": [], "cells": {}, "notes": {}}  # type: ignore[union-attr]
    result["runs"].append(run)
    if options.again:
        result["cells"] = {key: cell for key, cell in result["cells"].items() if cell["who"] != "ours"}
    return result


def cells(collection: Collection, options: argparse.Namespace, scratch: Path, known: Mapping[str, Json]) -> Any:
    """Yield key and content of each cell that is not in the result yet."""
    errors = sorted(options.errors)
    todo: dict[str, Callable[[Folders, Sequence[Adapter]], Json]] = {}
    missing = {
        who: [error for error in errors if f"{collection.name} | {who} | {error:g}" not in known]
        for who in TOGETHER
        if who in options.only
    }
    for error in errors if "ours" in options.only else ():
        todo[f"{collection.name} | ours | {error:g}"] = lambda folders, adapters, error=error: ours_cell(
            folders, adapters, error
        )
    for package, most in PACKAGES.items():
        if package in options.only and methods.is_here(package):
            todo[f"{collection.name} | {package}"] = lambda folders, adapters, package=package, most=most: package_cell(
                package, folders, adapters, errors, most
            )
    todo = {key: measure for key, measure in todo.items() if key not in known}
    if not todo and not any(missing.values()):
        return
    folders = collection.folders(scratch)
    adapters = [ex.read_adapter(folder, name=name, allow_pickle=True) for name, folder in folders.items()]
    shape = {"adapters": len(adapters), "lora_bytes": lora_bytes(adapters)}
    for who, absent in missing.items():
        if not absent:
            continue
        started = time.perf_counter()
        points_by_method = least(
            stacks(adapters), absent, clusters=options.clusters, combinations=TOGETHER[who], beyond=options.beyond
        )
        seconds = (time.perf_counter() - started) / len(absent)
        for index, error in enumerate(absent):
            points = {method: as_json(by_error[index]) for method, by_error in points_by_method.items()}
            cell = {"who": who, "error": error, "beyond": options.beyond, "methods": points, "seconds": seconds}
            yield f"{collection.name} | {who} | {error:g}", {"collection": collection.name, **shape, **cell}
    for key, measure in todo.items():
        started = time.perf_counter()
        measured = measure(folders, adapters)
        yield key, {"collection": collection.name, **shape, **measured, "seconds": time.perf_counter() - started}


def lora_bytes(adapters: Sequence[Adapter]) -> int:
    """Return the bytes of all factors in 16 bits."""
    return 2 * sum(spec.numbers for adapter in adapters for spec in adapter.specs.values())


def stacks(adapters: Sequence[Adapter]) -> Mapping[str, ModuleBatch]:
    """Return the adapters by module; with many adapters, each access reads the module again."""
    specs = {module: spec for adapter in adapters for module, spec in adapter.specs.items()}

    def read(module: str) -> ModuleBatch:
        factors: list[LoRAFactors | None] = [adapter.modules.get(module) for adapter in adapters]
        return pad_factors(factors, specs[module].in_features, specs[module].out_features)

    return LazyMapping(specs, read) if len(adapters) > 200 else {module: read(module) for module in specs}


def as_json(point: Point | None) -> Json | None:
    if point is None:
        return None
    return {
        "bytes": point.stored_bytes,
        "worst": round(point.worst, 6),
        "mean": round(point.mean, 6),
        "settings": dict(point.settings),
    }


def ours(folders: Folders, error: float, target: Path) -> int:
    """Write a pack with this error bound to `target`, and return its bytes."""
    pack = ex.fit(
        {name: str(folder) for name, folder in folders.items()},
        max_error=error,
        same_base=True,
        warn_above=1,
        allow_pickle=True,
    )
    pack.save(target)
    written = ex.Pack.from_pretrained(target).summary.bytes
    return written.basis + written.coefficients


def ours_cell(folders: Folders, adapters: Sequence[Adapter], error: float) -> Json:
    """Measure the bytes of a pack, and the error of each adapter by the files on disk."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "pack"
        try:
            stored = ours(folders, error, target)
        except ex.EigenLoraxError as refusal:
            return {"who": "ours", "error": error, "refused": str(refusal)}
        pack = ex.Pack.from_pretrained(target)
        errors = [whole_error(adapter, pack.adapter(adapter.name).modules) for adapter in adapters]
        files = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    written = {"who": "ours", "error": error, "bytes": stored, "file_bytes": files}
    return {**written, "worst": max(errors), "mean": sum(errors) / len(errors)}


def whole_error(adapter: Adapter, reconstructed: Mapping[str, LoRAFactors]) -> float:
    """Return √(Σ‖D − D̂‖² / Σ‖D‖²) by out × in matrices in float64; 0 for an update of zero."""
    lost = total = 0.0
    for module, factors in adapter.modules.items():
        update, approximation = (f.scaling * f.up.double() @ f.down.double() for f in (factors, reconstructed[module]))
        lost += float((update - approximation).square().sum())
        total += float(update.square().sum())
    return math.sqrt(lost / total) if total else 0.0


def package_cell(
    package: str, folders: Folders, adapters: Sequence[Adapter], errors: Sequence[float], most: int
) -> Json:
    """Find the fewest bytes of an installed package for each error, by bisection over its number of components."""
    head = {"who": package, "errors": list(errors)}
    widths = [max(spec.in_features, spec.out_features) for adapter in adapters for spec in adapter.specs.values()]
    if package == "lorashare" and max(widths) > WIDEST:
        return {**head, "skipped": f"{max(widths)} wide: all eigenvectors of a matrix of that width, again and again"}
    if not 1 < len(folders) <= most:
        return {**head, "skipped": f"{len(folders)} adapters; it is tried on 2 to {most}"}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            measured = Package(package, folders, Path(temporary))
            points = {f"{error:g}": measured.least(error) for error in sorted(errors, reverse=True)}
        # other packages raise errors of their own
        except Exception as failure:  # noqa: BLE001
            return {**head, "skipped": f"{type(failure).__name__}: {failure}"[:300]}
    return {**head, "points": points}


class Package:
    """An installed package on one collection; each number of components is fitted once."""

    def __init__(self, package: str, folders: Folders, scratch: Path) -> None:
        links = scratch / "links"
        links.mkdir()
        for name, folder in folders.items():
            (links / name).symlink_to(folder.resolve(), target_is_directory=True)
        self.sources = copies_in_float32(links, scratch / "float32")
        self.fit = methods.METHODS[package]
        self.scratch = scratch
        widths = [max(down.shape[1], up.shape[0]) for down, up in self.sources[0].modules.values()]
        ranks = [down.shape[0] for down, _ in self.sources[0].modules.values()]
        # vlora has one component for each adapter at most
        n = len(self.sources)
        self.most = n if package == "vlora" else min(n * max(ranks), max(widths))
        self.known: dict[int, Json] = {}

    def least(self, error: float) -> Json | None:
        """Return the point with the fewest components within the error; None if there is none."""
        low = max([0, *(k for k, point in self.known.items() if point["worst"] > error)])
        high = min([self.most + 1, *(k for k, point in self.known.items() if point["worst"] <= error)])
        if high > self.most:
            if low >= self.most or self.measure(self.most)["worst"] > error:
                return None
            high = self.most
        while high - low > 1:
            middle = (low + high) // 2
            if self.measure(middle)["worst"] <= error:
                high = middle
            else:
                low = middle
        return self.measure(high)

    def measure(self, k: int) -> Json:
        """Return size and errors with k components, counting its numbers in 16 bits, which costs no error here."""
        if k not in self.known:
            fitted = self.fit({source.name: source.path for source in self.sources}, k)
            lost = [delta_error(source, fitted.reconstruct(source.name)) for source in self.sources]
            with tempfile.TemporaryDirectory(dir=self.scratch) as saved:
                assert fitted.save is not None
                fitted.save(Path(saved) / "saved")
                heads = sorted({key for source in self.sources for key in head_keys(source)})
                stored = saved_tensor_bytes(Path(saved), heads) // 2
            self.known[k] = {"bytes": stored, "worst": max(lost), "mean": sum(lost) / len(lost), "settings": {"k": k}}
        return self.known[k]


if __name__ == "__main__":
    raise SystemExit(main())
