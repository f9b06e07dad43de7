"""What adapters still answer in so many bytes: as a pack, and in each other way, on rows that trained none of them.

One run is one way at one size, of a whole collection. Answers are those of a PEFT model with the adapter's own head.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from eigenlorax.train import demo

from . import record, size_rivals, text
from .jobs import Job
from .recycled import delta_error
from .size_rivals import PACK, Collection, Factors, Kept

Json = dict[str, Any]

BATCH = 128
WORK = record.ROOT / "experiments" / "work" / "bytes"


def shipped(config: Json) -> Iterator[Job]:
    """The adapters that come with the package, each on the test rows of its task."""
    adapters = {name: about["task"] for name, about in demo.descriptions().items()}
    yield from at_every_size(config, "demo", adapters, config["demo"]["ratios"])


def sources(config: Json) -> Iterator[Job]:
    """The source adapters of `text`, of more kinds of tasks."""
    asked = config["text"]
    adapters = {f"{task}-{asked['set']}": task for task in asked["tasks"]}
    yield from at_every_size(config, "text", adapters, asked["ratios"])


def at_every_size(config: Json, stage: str, adapters: Mapping[str, str], ratios: list[float]) -> Iterator[Job]:
    for ratio in ratios:
        for way in size_rivals.WAYS:
            job = {
                "collection": stage,
                "adapters": dict(adapters),
                "way": way,
                "ratio": ratio,
                "recipe": config["recipe"],
            }
            yield Job(f"bytes/{stage}/{ratio:g}--{file_name(way)}", job, measured)


def file_name(way: str) -> str:
    return way.replace(",", "").replace(" ", "-")


def folder_of(collection: str, name: str) -> Path:
    return demo.shipped()[name] if collection == "demo" else text.adapter_folder(name)


def measured(config: Json) -> Json:
    """One way at one size: bytes, and what became of each adapter."""
    collection = Collection({name: folder_of(config["collection"], name) for name in config["adapters"]})
    lora = 2 * sum(spec.numbers for one in collection.adapters.values() for spec in one.specs.values())
    pack = pack_of(collection, config["ratio"])
    kept = pack if config["way"] == PACK else size_rivals.kept(config["way"], collection, config["ratio"], pack.bytes)
    if kept is None:
        return {"test": {"lora_bytes": lora, "pack_bytes": pack.bytes, "bytes": None, "adapters": {}}}
    adapters = {}
    for name, task in config["adapters"].items():
        bench = Bench(task, collection.folders[name], config["recipe"])
        original, found = bench.first(), bench.answers(kept.adapters[name])
        error = delta_error(collection.adapters[name].modules, kept.adapters[name])
        adapters[name] = {"delta_error": error, **compared(original, found, bench.wanted)}
    sizes = {"lora_bytes": lora, "pack_bytes": pack.bytes, "bytes": kept.bytes, "settings": kept.settings}
    return {"test": {**sizes, "adapters": adapters}}


def compared(original: Tensor, found: Tensor, wanted: Tensor) -> Json:
    """Two sets of logits beside each other and beside the labels. kl: Kullback-Leibler divergence of what is found from
    the original, in nats, mean over rows. lost, won: rows that only one of them has right."""
    before, after = original.argmax(-1) == wanted, found.argmax(-1) == wanted
    logs = [logits.double().log_softmax(-1) for logits in (original, found)]
    return {
        "rows": len(wanted),
        "before": before.double().mean().item(),
        "score": after.double().mean().item(),
        "lost": int((before & ~after).sum()),
        "won": int((after & ~before).sum()),
        "agreement": (original.argmax(-1) == found.argmax(-1)).double().mean().item(),
        "kl": (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item(),
    }


def pack_of(collection: Collection, ratio: float) -> Kept:
    """The pack of a ratio, whose bytes all other ways have: fitted once."""
    return _once("pack", [digests(collection.folders), ratio], lambda: size_rivals.packed(collection, ratio))


def digests(folders: Mapping[str, Path]) -> Json:
    """Of the adapters' weights."""
    return {
        name: hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name, folder in folders.items()
    }


def _once(kind: str, key: Any, make: Any) -> Any:
    """What was made of the same before."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{kind}-{digest}.pt"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            torch.save(make(), path)
    # written here, by this function
    return torch.load(path, weights_only=False)


class Bench:
    """One adapter's model, in which factors are put."""

    def __init__(self, task: str, folder: Path, recipe: Json) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(text.new_base(task, recipe), folder).eval()
        rows = text.encoded(text.test_rows(task, recipe["test_rows"]), recipe["max_length"])
        self.test = sorted(rows, key=text.length)
        self.wanted = torch.tensor([row["labels"] for row in self.test])
        self.key = [task, recipe, digests({"": folder})]

    def first(self) -> Tensor:
        """Logits with the adapter as it was trained."""
        found: Tensor = _once("answers", self.key, self.logits)
        return found

    def answers(self, factors: Factors) -> Tensor:
        """Logits with these factors in its place."""
        for module, one in factors.items():
            layer = self.model.get_submodule(f"base_model.model.{module}")
            layer.lora_A["default"].weight.data = one.down.float()
            # the layer scales by what the adapter's config says
            layer.lora_B["default"].weight.data = (one.up * (one.scaling / layer.scaling["default"])).float()
        return self.logits()

    @torch.inference_mode()
    def logits(self) -> Tensor:
        collate, found = text.collate(), []
        for start in range(0, len(self.test), BATCH):
            inputs = collate([dict(row) for row in self.test[start : start + BATCH]])
            inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                found.append(self.model(**inputs).logits.float())
        return torch.cat(found)


STAGES = {"demo": shipped, "text": sources}
