"""Scores of source adapters after projection and after other methods that reduce their bytes.

Every method returns the two factors of a LoRA. They are put into one PEFT model, with the adapter's head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.reports.analysis import losses

from . import text, training
from .jobs import Job
from .metrics import METRICS

MANY = 100

Json = dict[str, Any]
Factors = Mapping[str, ex.LoRAFactors]


def jobs(config: Json) -> Iterator[Job]:
    """Yield a job for each adapter: all methods that store it, on the same rows."""
    yield from ways(config, "recycled", {"k": config["recycled"]["k"]})


def sized(config: Json) -> Iterator[Job]:
    """Yield the same for packs with an error bound instead of a number of components."""
    yield from ways(config, "sized", {"k": [], "max_error": config["recycled"]["max_error"]})


def ways(config: Json, stage: str, sizes: Json) -> Iterator[Job]:
    spec = config["recycled"]
    everyone = text.source_names(config, config["pack"]["sets"])
    for task in config["sources"]["tasks"]:
        name = f"{task}-{spec['evaluated']}"
        job = {
            "name": name,
            "task": task,
            "sources": everyone,
            "left_out": strangers(config, task),
            **sizes,
            "test_rows": spec["test_rows"],
            "weighting": config["pack"]["weighting"],
            "recipe": config["recipe"],
        }
        yield Job(f"text/{stage}/{name}", job, recycle)


def strangers(config: Json, task: str) -> list[str]:
    """Return the adapters of other groups of tasks, whose basis has not seen the task.

    Tasks that share texts are in one group. With few groups, a few fits serve all tasks.
    """
    return [
        f"{source_task}-{source_set}"
        for source_set in config["pack"]["sets"]
        for source_task in config["sources"]["tasks"]
        if group(config, source_task) != group(config, task)
    ]


def group(config: Json, task: str) -> int:
    """Return the number of a task's group. The tasks of clinc share texts; the others are in three groups."""
    if task.startswith("clinc"):
        return 0
    unrelated = [source_task for source_task in config["sources"]["tasks"] if not source_task.startswith("clinc")]
    return 1 + unrelated.index(task) % 3


def recycle(config: Json) -> Json:
    """Score an adapter as each method stores it."""
    name, task, recipe = config["name"], config["task"], config["recipe"]
    test = text.encoded(text.test_rows(task, config["test_rows"]), recipe["max_length"])
    adapter = ex.read_adapter(training.adapter_folder("text", name))
    original = dict(adapter.modules)
    bench = Bench(name, task, test, recipe)
    rows = [{"way": "original", "k": None, "bits": None, "delta_error": 0.0, **bench.answers(original)}]
    rows += [{"way": "base", "k": None, "bits": None, "delta_error": 1.0, **bench.answers(nothing(original))}]
    rows.append(mean_of_others(config, original, bench))
    n = len(config["sources"])
    for k in config["k"]:
        for way, sources in (("seen", config["sources"]), ("left out", config["left_out"])):
            pack = training.pack_of("text", {"sources": sources, "k": k, "weighting": config["weighting"]})
            factors = pack.adapter(name).modules if way == "seen" else projected(original, pack)
            rows.append({"way": way, "k": k, **compared(original, factors, bench)})
            if way == "seen":
                rows[-1] |= numbers(original, pack, n)
                cut = truncated(original, rows[-1]["numbers_an_adapter"])
                rows.append({"way": "truncated", "k": k, **compared(original, cut, bench)})
    for error in config.get("max_error", ()):
        pack = training.pack_of(
            "text", {"sources": config["sources"], "max_error": error, "weighting": config["weighting"]}
        )
        row = {"way": "seen", "k": None, "max_error": error}
        rows.append({**row, **compared(original, pack.adapter(name).modules, bench), **numbers(original, pack, n)})
    for bits in (8, 4):
        rows.append({"way": "rounded", "k": None, **compared(original, rounded(original, bits), bench)})
        rows[-1]["bits"] = bits
        rows[-1]["bytes"] = sum(
            losses.rounded_bytes(module.spec.rank, module.spec.out_features, module.spec.in_features, bits)
            for module in original.values()
        )
    full = sum(module.spec.numbers for module in original.values())
    return {"test": {"metric": text.metric(task), "rows": len(test), "numbers": full, "ways": rows}}


class Bench:
    """A model with an adapter's head, in which the factors are replaced."""

    def __init__(self, name: str, task: str, test: list[Json], recipe: Json) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(
            text.new_base(task, recipe), training.adapter_folder("text", name)
        ).eval()
        self.test = sorted(test, key=text.length)
        self.metric = METRICS[text.metric(task)]
        self.labels = torch.tensor([row["labels"] for row in self.test])
        self.first: Tensor | None = None

    @torch.inference_mode()
    def answers(self, factors: Factors) -> Json:
        """Return the score with these factors, and the fraction of rows with the answer of the first factors."""
        set_factors(self.model, factors)
        logits = []
        collate = text.collate()
        for start in range(0, len(self.test), 64):
            inputs = collate([dict(row) for row in self.test[start : start + 64]])
            inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(self.model(**inputs).logits.float())
        answers = torch.cat(logits)
        if self.first is None:
            self.first = answers
        return {
            "score": self.metric(answers.numpy(), self.labels.numpy()),
            "agreement": agreement(answers, self.first),
        }


def set_factors(model: Any, factors: Factors) -> None:
    """Replace the factors of a PEFT model's LoRA, whose adapter is named "default"."""
    for name, module in factors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = module.down.float()
        # the layer scales by what the adapter's config says
        layer.lora_B["default"].weight.data = (module.up * (module.scaling / layer.scaling["default"])).float()


def agreement(logits: Tensor, original: Tensor) -> float:
    """Return the fraction of rows with the same class."""
    return (logits.argmax(-1) == original.argmax(-1)).float().mean().item()


def nothing(factors: Factors) -> Factors:
    return {
        name: ex.LoRAFactors(module.down, torch.zeros_like(module.up), module.scaling)
        for name, module in factors.items()
    }


def projected(factors: Factors, pack: ex.Pack) -> Factors:
    """Project an adapter that was not in the fit on the pack's bases."""
    modules = {}
    for name, module in factors.items():
        bases = pack.subspace.modules[name]
        down, up = bases.down.components.double(), bases.up.components.double()
        modules[name] = ex.LoRAFactors(
            (module.down.double() @ down.mT @ down).float(), (up.mT @ (up @ module.up.double())).float(), module.scaling
        )
    return modules


def compared(original: Factors, stored: Factors, bench: Bench) -> Json:
    return {"bits": None, "delta_error": delta_error(original, stored), **bench.answers(stored)}


def delta_error(original: Factors, stored: Factors) -> float:
    """Return the relative error of the updates over all modules."""
    lost = total = 0.0
    for name, module in original.items():
        delta = module.scaling * module.up.double() @ module.down.double()
        stored_delta = stored[name].scaling * stored[name].up.double() @ stored[name].down.double()
        lost += float((delta - stored_delta).square().sum())
        total += float(delta.square().sum())
    return math.sqrt(lost / total)


def mean_of_others(config: Json, original: Factors, bench: Bench) -> Json:
    """Score the mean update of the adapters that share no texts with this one."""
    adapters = [ex.read_adapter(training.adapter_folder("text", name)).modules for name in config["left_out"]]
    modules = {}
    for name in original:
        deltas = [
            adapter[name].scaling * adapter[name].up.double() @ adapter[name].down.double() for adapter in adapters
        ]
        u, s, vh = torch.linalg.svd(torch.stack(deltas).mean(0), full_matrices=False)
        modules[name] = ex.LoRAFactors((s[:, None] * vh).float(), u.float(), 1.0)
    return {"way": "mean of others", "k": None, **compared(original, modules, bench)}


def truncated(factors: Factors, numbers: float) -> Factors:
    """Truncate the adapter by SVD to so many numbers, by the squared singular value per number that it costs."""
    decompositions, ranks = {}, dict.fromkeys(factors, 0)
    for name, module in factors.items():
        u, s, vh = torch.linalg.svd(module.scaling * module.up.double() @ module.down.double(), full_matrices=False)
        decompositions[name] = u[:, : module.spec.rank], s[: module.spec.rank], vh[: module.spec.rank]
    costs = {name: module.spec.in_features + module.spec.out_features for name, module in factors.items()}
    order = sorted(
        ((float(s) ** 2 / costs[name], name) for name, (_, values, _) in decompositions.items() for s in values),
        reverse=True,
    )
    for _, name in order:
        if costs[name] <= numbers:
            ranks[name] += 1
            numbers -= costs[name]
    return {
        name: ex.LoRAFactors(
            (s[: max(ranks[name], 1), None] * vh[: max(ranks[name], 1)]).float(),
            (u[:, : max(ranks[name], 1)] * (ranks[name] > 0)).float(),
            1.0,
        )
        for name, (u, s, vh) in decompositions.items()
    }


def rounded(factors: Factors, bits: int) -> Factors:
    """Round both factors to few bits, with one scale per block."""
    return {
        name: ex.LoRAFactors(
            losses.rounded_rows(module.down[None].double(), bits)[0].float(),
            losses.rounded_rows(module.up.mT[None].double(), bits)[0].mT.contiguous().float(),
            module.scaling,
        )
        for name, module in factors.items()
    }


def numbers(factors: Factors, pack: ex.Pack, n: int) -> Json:
    """Return the numbers that an adapter takes in a pack of n adapters, and in one of `MANY` with the same basis."""
    basis, own = pack_numbers(pack), coefficient_numbers(factors, pack)
    return {"numbers_an_adapter": basis / n + own, "numbers_at_100": basis / MANY + own}


def pack_numbers(pack: ex.Pack) -> int:
    return sum(bases.down.components.numel() + bases.up.components.numel() for bases in pack.subspace.modules.values())


def coefficient_numbers(factors: Factors, pack: ex.Pack) -> int:
    bases = pack.subspace.modules
    return sum(module.spec.rank * (bases[name].down.k + bases[name].up.k) for name, module in factors.items())
