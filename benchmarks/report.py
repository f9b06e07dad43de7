"""How long a report of a thousand adapters takes, and how much memory: the whole of it, from PEFT folders to the page.

The adapters are made up: a part of each update lies in directions that all share, the rest is its own. The command runs
in a process of its own, which opens the pack, reads every original, measures, and writes the page and the JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from eigenlorax.cli.env import collect

RESULTS = Path(__file__).with_name("results") / "report.json"
PREFIX = "base_model.model."


def modules(n: int) -> list[str]:
    return [f"encoder.layer.{i // 2}.attention.self.{('query', 'value')[i % 2]}" for i in range(n)]


def make(folder: Path, adapters: int, rank: int, width: int, names: list[str], shared: int) -> None:
    """Adapters in float16, a seed each."""
    common = torch.Generator().manual_seed(0)
    bases = {name: [torch.randn(shared, width, generator=common) / width**0.5 for _ in range(2)] for name in names}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["query", "value"]}
    config |= {"base_model_name_or_path": "made/up", "task_type": "SEQ_CLS"}
    for index in range(adapters):
        generator = torch.Generator().manual_seed(1 + index)
        tensors = {}
        for name in names:
            rows = []
            for basis in bases[name]:
                own = torch.randn(rank, width, generator=generator) / width**0.5
                rows.append(torch.randn(rank, shared, generator=generator) @ basis / shared**0.5 + 0.5 * own)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = rows[0].half()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = rows[1].mT.contiguous().half()
        place = folder / f"adapter-{index:04}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))


def run(threads: int, *arguments: str | Path) -> tuple[float, float]:
    """Seconds, and peak memory in GB, of the command in a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "eigenlorax", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"eigenlorax {arguments[0]} failed.")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--modules", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--shared", type=int, default=48, help="directions that all of them share")
    parser.add_argument("--folder", type=Path, help="where to make the adapters and the pack, or to find them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        adapters, pack = folder / "adapters", folder / "pack"
        if not adapters.exists():
            make(adapters, options.adapters, options.rank, options.width, modules(options.modules), options.shared)
        if not pack.exists():
            run(1, "fit", adapters, "-o", pack, "-k", "32", "--no-report", "--warn-above", "1")
        page, data = folder / "report.html", folder / "report.json"
        runs = []
        for threads in (1, 2):
            seconds, memory = run(threads, "report", pack, "--adapters", adapters, "-o", page, "-o", data)
            runs.append({"threads": threads, "seconds": round(seconds, 1), "peak_gb": round(memory, 2)})
        report = json.loads(data.read_text("utf-8"))
        found = {
            "command": "python benchmarks/report.py",
            "environment": collect(),
            "adapters": options.adapters,
            "modules": options.modules,
            "rank": options.rank,
            "width": options.width,
            "shared": options.shared,
            "runs": runs,
            "left_out": report["left_out"]["sampled"],
            "page_bytes": page.stat().st_size,
            "headline": report["verdict"]["headline"],
        }
    RESULTS.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
