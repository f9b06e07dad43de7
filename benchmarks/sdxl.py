"""Fifteen LoRAs of SDXL's shape and rank 32 as one pack: bytes and seconds by the number of components.

    python benchmarks/sdxl.py               # half an hour, 3 GB of disk; writes benchmarks/results/sdxl.json
    python benchmarks/sdxl.py --quick       # a minute: three LoRAs, two sizes; the result goes to standard output

The modules are those that kohya's scripts train by default, all linear layers of the UNet's transformers, found in
diffusers' UNet of SDXL's config without its weights. The numbers are made up, so that errors mean nothing and are not
reported: bytes and times depend on shapes alone. Every size is fitted in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import eigenlorax as ex
from eigenlorax.cli import env

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "sdxl.json"
ADAPTERS, RANK, SEED, SIZES = 15, 32, 20261126, (8, 16, 32, 64)
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three LoRAs, two sizes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(**json.loads(given.measure))))
        return
    adapters, sizes = (3, SIZES[:2]) if given.quick else (ADAPTERS, SIZES)
    with tempfile.TemporaryDirectory() as scratch:
        styles = Path(scratch) / "styles"
        modules = make_up(adapters, styles)
        by_size = {}
        for k in sizes:
            asked = json.dumps({"styles": str(styles), "k": k, "scratch": str(Path(scratch) / f"k{k}")})
            ran = subprocess.run(
                [sys.executable, __file__, "--measure", asked], capture_output=True, text=True, check=True
            )
            by_size[str(k)] = json.loads(ran.stdout)
            sys.stderr.write(f"k = {k}: {by_size[str(k)]}\n")
        files = sum(path.stat().st_size for path in styles.iterdir())
    found = {
        "command": "python benchmarks/sdxl.py" + (" --quick" if given.quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": env.collect(),
        "seed": SEED,
        "adapters": adapters,
        "rank": RANK,
        "modules": modules,
        "file_bytes": files,
        "sizes": by_size,
    }
    text = json.dumps(found, indent=1) + "\n"
    if given.quick:
        print(text)
    else:
        RESULT.write_text(text, encoding="utf-8")


def shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of the UNet's transformers, by their names in a pipeline."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL)
    return {
        f"unet.{name}": (module.out_features, module.in_features)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attentions." in name
    }


def make_up(adapters: int, folder: Path) -> int:
    """LoRA files as diffusers writes them, float16; the number of their modules."""
    folder.mkdir()
    modules = shapes()
    for index in range(adapters):
        generator = torch.Generator().manual_seed(SEED + index)
        tensors = {}
        for name, (n_out, n_in) in modules.items():
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator).half()
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator).half()
        save_file(tensors, folder / f"style-{index:02d}.safetensors", metadata={"format": "pt"})
    return len(modules)


def measured(styles: str, k: int, scratch: str) -> Json:
    """One fit, from files to a pack on disk; then one adapter out of it again, in a file."""
    torch.set_num_threads(1)
    files = sorted(Path(styles).iterdir())
    for path in files:
        path.read_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    pack = ex.fit(files, n_components=k, warn_above=1)
    fitted, fitted_cpu = time.perf_counter(), time.process_time()
    pack.save(Path(scratch) / "pack")
    saved = time.perf_counter()
    opened = ex.Pack.open(Path(scratch) / "pack")
    opened.export(Path(scratch) / "out", opened.names[0])
    exported = time.perf_counter()
    cost = pack.summary.bytes
    return {
        "lora_bytes": cost.lora,
        "basis_bytes": cost.basis,
        "coefficient_bytes": cost.coefficients,
        "file_bytes": sum(path.stat().st_size for path in (Path(scratch) / "pack").rglob("*") if path.is_file()),
        "ratio": cost.ratio,
        "ratio_without_basis": cost.ratio_without_basis,
        "fit_seconds": fitted - started,
        "fit_cpu_seconds": fitted_cpu - cpu,
        "save_seconds": saved - fitted,
        "export_seconds": exported - saved,
    }


if __name__ == "__main__":
    main()
