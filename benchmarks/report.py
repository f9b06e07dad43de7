"""Processor time and size of reports beside the fit of the same adapters, and how both grow with the collection.

Each verb runs in a process of its own with one thread: `fit` from PEFT folders to a pack without a report, then
`report` from the pack and the folders to the page and the JSON. Planted adapters share a part of each update; the rest
is noise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from growth import fitted
from safetensors.torch import save_file

from eigenlorax.cli.env import collect
from eigenlorax.train import demo

RESULTS = Path(__file__).with_name("results") / "report.json"
PREFIX = "base_model.model."
SHARED = 24
"""Rank of the part that planted adapters share, per module and side."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planted:
    """A planted collection, of square modules or of a Llama's.

    Attributes:
        adapters: Number of adapters.
        modules: Number of modules.
        width: Dimension of the model.
        rank: Rank of the adapters.
        kinds: Shapes (out, in) of a layer's modules by name, in units of `width`.
    """

    adapters: int
    modules: int
    width: int
    rank: int
    kinds: tuple[tuple[str, float, float], ...] = (("self_attn.q_proj", 1, 1), ("self_attn.v_proj", 1, 1))

    @property
    def label(self) -> str:
        """Description for tables."""
        kind = "Llama-8B's modules" if self.kinds is LLAMA else "modules"
        return f"{self.adapters:,} planted adapters, {self.modules} {kind}, {self.width} wide, r = {self.rank}"

    def shapes(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, out, in) of each module."""
        for index in range(self.modules):
            layer, kind = divmod(index, len(self.kinds))
            name, n_out, n_in = self.kinds[kind]
            yield f"model.layers.{layer}.{name}", int(n_out * self.width), int(n_in * self.width)


LLAMA = (
    ("self_attn.q_proj", 1, 1),
    ("self_attn.k_proj", 0.25, 1),
    ("self_attn.v_proj", 0.25, 1),
    ("self_attn.o_proj", 1, 1),
    ("mlp.gate_proj", 3.5, 1),
    ("mlp.up_proj", 3.5, 1),
    ("mlp.down_proj", 1, 3.5),
)
COLLECTIONS = {
    "100": (Planted(100, 24, 768, 8), 32),
    "llama": (Planted(8, 224, 4096, 16, LLAMA), 16),
    "1000": (Planted(1000, 24, 768, 8), 32),
    "1000 small": (Planted(1000, 12, 64, 4), 8),
}
"""Collection and number of components, by name."""
BASE = Planted(40, 24, 384, 8)
SIZES = {"adapters": (40, 80, 160), "width": (384, 768, 1536), "modules": (24, 48, 96)}
"""Sizes of the collections whose growth is measured, by field of `BASE` that varies; that of `BASE` first."""


def make(folder: Path, planted: Planted) -> None:
    """Write adapters in float16 as PEFT folders."""
    common = torch.Generator().manual_seed(0)
    bases = {
        name: [torch.randn(SHARED, width, generator=common) / width**0.5 for width in (n_in, n_out)]
        for name, n_out, n_in in planted.shapes()
    }
    targets = sorted({name.rsplit(".", 1)[1] for name, _, _ in planted.kinds})
    config = {"peft_type": "LORA", "r": planted.rank, "lora_alpha": 2 * planted.rank, "target_modules": targets}
    config |= {"base_model_name_or_path": "planted/model", "task_type": "CAUSAL_LM"}
    for index in range(planted.adapters):
        generator = torch.Generator().manual_seed(1 + index)
        tensors = {}
        for name, sides in bases.items():
            down, up = (
                torch.randn(planted.rank, SHARED, generator=generator) @ basis / SHARED**0.5
                + 0.5 * torch.randn(planted.rank, basis.shape[1], generator=generator) / basis.shape[1] ** 0.5
                for basis in sides
            )
            tensors[f"{PREFIX}{name}.lora_A.weight"] = down.half()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = up.mT.contiguous().half()
        adapter = folder / f"adapter-{index:04}"
        adapter.mkdir(parents=True)
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def run(*arguments: str | Path) -> float:
    """Run the command in a process of its own; return its processor seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eigenlorax", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"eigenlorax {arguments[0]} failed.")
    return usage.ru_utime + usage.ru_stime


def measure(adapters: Path, options: Sequence[str], folder: Path) -> Json:
    """Fit and report a folder of adapters, and return seconds, memory and bytes."""
    pack, page, document = folder / "pack", folder / "report.html", folder / "report.json"
    fit_seconds = run("fit", adapters, "-o", pack, "--overwrite", "--no-report", "--warn-above", "1", *options)
    report_seconds = run("report", pack, "--adapters", adapters, "-o", page, "-o", document)
    report = json.loads(document.read_text("utf-8"))
    sampling = report["sampling"]
    shutil.rmtree(pack)
    return {
        "fit_seconds": round(fit_seconds, 2),
        "report_seconds": round(report_seconds, 2),
        "ratio": round(report_seconds / fit_seconds, 2),
        "page_bytes": page.stat().st_size,
        "json_bytes": document.stat().st_size,
        "measured": sampling["modules"] if sampling else report["collection"]["modules"],
        "modules": report["collection"]["modules"],
        "left_out": report["left_out"]["sampled"],
        "error": report["left_out"]["errors"]["mean"],
        "standard_error": report["left_out"]["standard_error"],
    }


def measure_planted(planted: Planted, k: int, folder: Path) -> Json:
    """Make a planted collection, measure it, and remove it."""
    adapters = folder / "adapters"
    make(adapters, planted)
    figures = {**asdict(planted), "k": k, "label": planted.label, **measure(adapters, ["-k", str(k)], folder)}
    shutil.rmtree(adapters)
    print(json.dumps(figures))
    return figures


def measure_growth(folder: Path) -> Json:
    """Return seconds over each size, and the exponents of their growth."""
    growth: Json = {}
    base = measure_planted(BASE, 16, folder)
    for field, (_, *sizes_above) in SIZES.items():
        runs = [base, *(measure_planted(replace(BASE, **{field: size}), 16, folder) for size in sizes_above)]
        sizes = SIZES[field]
        growth[field] = {"sizes": list(sizes)}
        for verb in ("fit", "report"):
            seconds = [figures[f"{verb}_seconds"] for figures in runs]
            power = fitted(list(zip(sizes, seconds, strict=True)))
            growth[field][verb] = {"seconds": seconds, "exponent": round(power.exponent, 2) if power else None}
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["demo", *COLLECTIONS, "growth"], help="measure this alone, and print it")
    parser.add_argument("--folder", type=Path, help="folder for adapters and packs, which are removed; needs 1 GB")
    options = parser.parse_args()
    results: Json = {"command": "python benchmarks/report.py", "environment": collect(), "collections": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if options.only in (None, "demo"):
            for label, arguments in (("the demo, k = 32", ["-k", "32"]), ("the demo, as `fit` chooses", [])):
                figures = {"label": label, **measure(demo.data() / "adapters", arguments, folder)}
                print(json.dumps(figures))
                results["collections"].append(figures)
        for name, (planted, k) in COLLECTIONS.items():
            if options.only in (None, name):
                results["collections"].append(measure_planted(planted, k, folder))
        if options.only in (None, "growth"):
            results["growth"] = measure_growth(folder)
    if options.only is None:
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
