"""Time and memory of merges at the shapes of Llama-3.1-8B, beside the same methods on out × in matrices.

`python benchmarks/merging.py` writes `results/merging.json` after each module, in about a quarter of an hour. Random
adapters, one thread. TSV on the full matrices of the MLP would take half an hour more, and is left out.
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
DENSITY = 0.2
SCALING = 0.01

Json = dict[str, Any]


def make_adapters(n: int, rank: int, modules: Sequence[str]) -> list[Adapter]:
    """Return random LoRAs with float32 factors."""

    def factors(place: int, module: str) -> LoRAFactors:
        generator = torch.Generator().manual_seed(1000 * place + len(module))
        n_out, n_in = LAYER[module]
        down = torch.randn(rank, n_in, generator=generator)
        return LoRAFactors(down, torch.randn(n_out, rank, generator=generator), SCALING)

    return [from_factors(f"a{n}", {module: factors(n, module) for module in modules}) for n in range(n)]


def cut(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def full_update(factors: LoRAFactors) -> Tensor:
    return factors.scaling * factors.up @ factors.down


def full_ties(updates: Sequence[LoRAFactors], rank: int) -> Tensor:
    """TIES on the weights themselves, then a cut to the rank."""
    trimmed = []
    for factors in updates:
        update = full_update(factors)
        flat = update.flatten()
        kept = torch.zeros_like(flat)
        largest = flat.abs().topk(int(DENSITY * flat.numel())).indices
        kept[largest] = flat[largest]
        trimmed.append(kept.view_as(update))
    total, count = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    sign = torch.where(sum(trimmed, total) >= 0, 1.0, -1.0)
    for update in trimmed:
        agrees = update.sign() == sign
        total += update * agrees
        count += agrees
    return cut(total / count.clamp_min(1), rank)


def full_tsv(updates: Sequence[LoRAFactors], rank: int) -> Tensor:
    """TSV-Merge on the weights: an SVD of each update, of those together, and of the result for the cut."""
    parts = []
    for factors in updates:
        left, values, right = torch.linalg.svd(full_update(factors), full_matrices=False)
        n = int((values > 1e-4 * values[0]).sum())
        parts.append((left[:, :n], values[:n], right[:n]))
    polar = []
    for vectors in (torch.cat([part[0] for part in parts], 1), torch.cat([part[2] for part in parts])):
        left, _, right = torch.linalg.svd(vectors, full_matrices=False)
        polar.append(left @ right)
    return cut((polar[0] * torch.cat([part[1] for part in parts])) @ polar[1], rank)


FULL: dict[str, Callable[[Sequence[LoRAFactors], int], Tensor]] = {"ties": full_ties, "tsv": full_tsv}


FULL_MODULES: dict[str, list[str]] = {"ties": list(LAYER), "tsv": [name for name in LAYER if "self_attn" in name]}
"""Modules that each method also merges as full matrices."""


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a call, and its result."""
    started = time.process_time()
    outcome = call()
    return time.process_time() - started, outcome


def measure(n: int, rank: int, header: Json) -> None:
    """Measure seconds and memory of each method; ours comes first, so that its peak of memory is its own.

    Args:
        n: Number of adapters.
        rank: Rank of the adapters and of the merge.
        header: Fields of the result that are known beforehand.
    """
    layer = make_adapters(n, rank, list(LAYER))
    measured: Json = {}
    for method in FULL:
        seconds, _ = seconds_of(lambda method=method: ex.merge(layer, method, rank=rank))
        measured[method] = {"layer": seconds, "peak_mib": peak_mib(), "modules": {}}
        print(f"{method}: a layer in {seconds:.1f} s, {peak_mib():.0f} MiB", flush=True)
        write({**header, "methods": measured})
    for method, modules in FULL_MODULES.items():
        for module in modules:
            measured[method]["modules"][module] = measure_module(n, rank, method, module)
            measured[method]["full_peak_mib"] = peak_mib()
            write({**header, "methods": measured})


def measure_module(n: int, rank: int, method: str, module: str) -> Json:
    """Return the seconds of both implementations for one module, and the relative difference of their results."""
    adapters = make_adapters(n, rank, [module])
    seconds, merged = seconds_of(lambda: ex.merge(adapters, method, rank=rank))
    factors = merged.adapter.modules[module]
    sources = [adapter.modules[module] for adapter in adapters]
    full_seconds, full = seconds_of(lambda: FULL[method](sources, rank))
    print(f"{method}: {module} in {seconds:.2f} s, by the matrices {full_seconds:.1f} s", flush=True)
    difference = float((factors.up @ factors.down - full).norm() / full.norm())
    return {"ours": seconds, "full": full_seconds, "difference": difference}


def write(measured: Json) -> None:
    """Write what has been measured so far."""
    RESULTS.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", "utf-8")


def peak_mib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = peak_mib()
    header = {
        "command": "python benchmarks/merging.py",
        "environment": env.collect(),
        "adapters": options.adapters,
        "rank": options.rank,
        "start_mib": started,
    }
    measure(options.adapters, options.rank, header)


if __name__ == "__main__":
    main()
