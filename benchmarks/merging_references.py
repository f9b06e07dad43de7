"""Merges by mergekit and by the authors' code of KnOTS beside ours, at a shape of Llama-3.1-8B.

In an environment with `mergekit`, and with a checkout of https://github.com/gstoica27/KnOTS (MIT):

    python benchmarks/merging_references.py --knots KNOTS

writes `results/merging_references.json`. Both work on full matrices: their time begins with the product of the factors,
and ends with the cut to the rank. Random adapters, one thread, processor time.
"""

import argparse
import json
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigenlorax as ex
from eigenlorax.cli import env
from eigenlorax.core.adapter import LoRAFactors
from merging import DENSITY, LAYER, Json, cut, full_update, make_adapters, peak_mib, seconds_of

RESULTS = Path(__file__).resolve().parent / "results" / "merging_references.json"
KEY = "layer.weight"


def mergekit_merge(method: str) -> Callable[[Sequence[LoRAFactors], int], Tensor]:
    """Return a function that merges one module by a method of mergekit, onto a base of zeros."""
    from mergekit.merge_methods import base, registry

    registered = registry.get(method)

    def merge(updates: Sequence[LoRAFactors], rank: int) -> Tensor:
        tensors = [full_update(factors) for factors in updates]
        group = base.TensorGroup.from_tensors([torch.zeros_like(tensors[0]), *tensors], base_index=0)
        ids = [entry.id for entry in group.non_base]
        parameters = {"weight": dict.fromkeys(ids, 1.0), "density": dict.fromkeys(ids, DENSITY)}
        shared = {"normalize": registered.default_normalize, "rescale": False, "int8_mask": False, "lambda": 1.0}
        return cut(registered.merge_group(group, **parameters, **shared), rank)

    return merge


def knots_merge(checkout: Path) -> Callable[[Sequence[LoRAFactors], int], Tensor]:
    """Return a function that merges one module by KnOTS with TIES, by the classes of its authors.

    Their module `utils` imports CLIP, so the one function of it that is needed here is put in its place.
    """
    sys.path.insert(0, str(checkout))
    import masking_ops

    utils = types.ModuleType("utils")
    utils.get_mask_fn = lambda method: masking_ops.ties_masking
    utils.get_merging_fn = lambda method: None
    sys.modules["utils"] = utils
    import task_merger

    class Weights:
        """The parameters of one model, in the form that the authors' handlers have."""

        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def get_ft_parameters(self) -> dict[str, Tensor]:
            return dict(self.model.state_dict())

    def merge(updates: Sequence[LoRAFactors], rank: int) -> Tensor:
        models = [_one_layer(full_update(factors)) for factors in updates]
        base = _one_layer(torch.zeros_like(models[0].state_dict()[KEY]))
        merger = task_merger.SVDMerger(models, base, Weights, device="cpu")
        merger.transform({})
        merged = merger.merge({"merge_method": "ties", "topK": 100 * DENSITY, "merging_type": "mean"})
        return cut(merged.state_dict()[KEY], rank)

    return merge


def _one_layer(weight: Tensor) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def measure(module: str, n: int, rank: int, merges: dict[str, tuple[str, Any]]) -> Json:
    """Return seconds of each program and of ours, and the relative difference of their results."""
    adapters = make_adapters(n, rank, [module])
    updates = [adapter.modules[module] for adapter in adapters]
    rows: Json = {}
    for name, (method, merge) in merges.items():
        ours_seconds, merged = seconds_of(lambda method=method: ex.merge(adapters, method, rank=rank))
        seconds, full = seconds_of(lambda merge=merge: merge(updates, rank))
        factors = merged.adapter.modules[module]
        difference = float((factors.scaling * factors.up @ factors.down - full).norm() / full.norm())
        rows[name] = {"ours": ours_seconds, "reference": seconds, "difference": difference, "peak_mib": peak_mib()}
        print(f"{name}, {module}: {seconds:.1f} s; ours {ours_seconds:.2f} s, difference {difference:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--knots", type=Path, required=True, metavar="FOLDER", help="checkout of KnOTS")
    parser.add_argument("--modules", nargs="+", choices=LAYER, default=["self_attn.q_proj"], metavar="MODULE")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    merges = {
        "mergekit, task_arithmetic": ("task-arithmetic", mergekit_merge("task_arithmetic")),
        "mergekit, ties": ("ties", mergekit_merge("ties")),
        "KnOTS, ties": ("knots", knots_merge(options.knots)),
    }
    measured: Json = {
        "command": "python benchmarks/merging_references.py --knots KNOTS",
        "environment": env.collect(),
        "mergekit": version("mergekit"),
        "adapters": options.adapters,
        "rank": options.rank,
        "modules": {},
    }
    for module in options.modules:
        measured["modules"][module] = measure(module, options.adapters, options.rank, merges)
        RESULTS.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
