"""Time and memory of merges at the shapes of Llama-3.1-8B, beside the same methods on out × in matrices.

`python benchmarks/merging.py` writes `results/merging.json`. Random adapters, one thread. The full matrices are merged
for one module only, because all would take hours; a layer is merged by ours.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.cli import env
from eigenlorax.core.adapter import Adapter, LoRAFactors, from_factors

RESULTS = Path(__file__).resolve().parent / "results" / "merging.json"
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
METHODS = ("task-arithmetic", "ties", "tsv")
DENSITY = 0.2

Json = dict[str, Any]


def make_adapters(n: int, rank: int, modules: Sequence[str]) -> list[Adapter]:
    """Return random LoRAs with float32 factors."""

    def factors(place: int, module: str) -> LoRAFactors:
        generator = torch.Generator().manual_seed(1000 * place + len(module))
        n_out, n_in = LAYER[module]
        down = torch.randn(rank, n_in, generator=generator)
        return LoRAFactors(down, torch.randn(n_out, rank, generator=generator), 0.01)

    return [from_factors(f"a{n}", {module: factors(n, module) for module in modules}) for n in range(n)]


def cut(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def full_task_arithmetic(updates: Sequence[Tensor], rank: int) -> Tensor:
    return cut(sum(updates, torch.zeros_like(updates[0])), rank)


def full_ties(updates: Sequence[Tensor], rank: int) -> Tensor:
    """TIES on the weights themselves, then a cut to the rank."""
    trimmed = []
    for update in updates:
        flat = update.flatten()
        kept = torch.zeros_like(flat)
        largest = flat.abs().topk(int(DENSITY * flat.numel())).indices
        kept[largest] = flat[largest]
        trimmed.append(kept.view_as(update))
    sign = torch.where(sum(trimmed, torch.zeros_like(updates[0])) >= 0, 1.0, -1.0)
    agreeing = [update * (update.sign() == sign) for update in trimmed]
    count = sum(((update != 0).float() for update in agreeing), torch.zeros_like(updates[0]))
    return cut(sum(agreeing, torch.zeros_like(updates[0])) / count.clamp_min(1), rank)


def full_tsv(updates: Sequence[Tensor], rank: int) -> Tensor:
    """TSV-Merge on the weights: an SVD of each update, of those together, and of the result for the cut."""
    parts = []
    for update in updates:
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        n = int((values > 1e-4 * values[0]).sum())
        parts.append((left[:, :n], values[:n], right[:n]))
    polar = []
    for vectors in (torch.cat([part[0] for part in parts], 1), torch.cat([part[2] for part in parts])):
        left, _, right = torch.linalg.svd(vectors, full_matrices=False)
        polar.append(left @ right)
    return cut((polar[0] * torch.cat([part[1] for part in parts])) @ polar[1], rank)


FULL: dict[str, Callable[[Sequence[Tensor], int], Tensor]] = {
    "task-arithmetic": full_task_arithmetic,
    "ties": full_ties,
    "tsv": full_tsv,
}


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a call, and its result."""
    started = time.process_time()
    outcome = call()
    return time.process_time() - started, outcome


def measure(n: int, rank: int, module: str, methods: Sequence[str]) -> Json:
    layer = make_adapters(n, rank, list(LAYER))
    one = make_adapters(n, rank, [module])
    found: Json = {}
    for method in methods:
        seconds, merged = seconds_of(lambda method=method: ex.merge(layer, method, rank=rank))
        found[method] = {"layer": seconds, "peak_mib": peak_mib()}
        print(f"{method}: a layer in {seconds:.1f} s, {peak_mib():.0f} MiB", flush=True)
        found[method]["module"], merged = seconds_of(lambda method=method: ex.merge(one, method, rank=rank))
        found[method]["merged"] = merged
    for method in methods:
        updates = [0.01 * adapter.modules[module].up @ adapter.modules[module].down for adapter in one]
        merged = found[method].pop("merged").adapter.modules[module]
        seconds, full = seconds_of(lambda method=method, updates=updates: FULL[method](updates, rank))
        found[method]["full"] = seconds
        found[method]["full_peak_mib"] = peak_mib()
        found[method]["difference"] = float((merged.up @ merged.down - full).norm() / full.norm())
        print(f"{method}: {module} in {found[method]['module']:.2f} s, by the matrices {seconds:.1f} s", flush=True)
    return found


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--module", choices=LAYER, default="self_attn.k_proj", help="the one merged as full matrices")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = peak_mib()
    found = {
        "command": f"python benchmarks/merging.py --module {options.module}",
        "environment": env.collect(),
        "adapters": options.adapters,
        "rank": options.rank,
        "module": options.module,
        "shape": LAYER[options.module],
        "start_mib": started,
        "methods": measure(options.adapters, options.rank, options.module, options.methods),
    }
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
