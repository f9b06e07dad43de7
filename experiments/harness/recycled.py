"""Source adapters after projection: what they still answer, seen and left out, and what else the same bytes would do.

Every way to keep an adapter ends in a LoRA's two factors; those are put into one PEFT model, with the adapter's head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.reports.analysis import losses

from . import text
from .jobs import Job
from .metrics import METRICS

MANY = 100

Json = dict[str, Any]
Factors = Mapping[str, ex.LoRAFactors]


def jobs(config: Json) -> Iterator[Job]:
    """One job an adapter: all ways to keep it, on the same rows."""
    yield from ways(config, "recycled", {"k": config["recycled"]["k"]})


def sized(config: Json) -> Iterator[Job]:
    """The same in bases that were asked for an error, and not for a number of components."""
    yield from ways(config, "sized", {"k": [], "max_error": config["recycled"]["max_error"]})


def ways(config: Json, stage: str, sizes: Json) -> Iterator[Job]:
    asked = config["recycled"]
    everyone = text.source_names(config, config["pack"]["sets"])
    for task in config["sources"]["tasks"]:
        name = f"{task}-{asked['evaluated']}"
        job = {
            "name": name,
            "task": task,
            "sources": everyone,
            "left_out": strangers(config, task),
            **sizes,
            "test_rows": asked["test_rows"],
            "weighting": config["pack"]["weighting"],
            "recipe": config["recipe"],
        }
        yield Job(f"text/{stage}/{name}", job, recycle)


def strangers(config: Json, task: str) -> list[str]:
    """The adapters that a task is left out of: those of other groups of tasks, so that a few fits do for all.

    Tasks that share texts are in one group.
    """
    return [
        f"{other}-{one}"
        for one in config["pack"]["sets"]
        for other in config["sources"]["tasks"]
        if group(config, other) != group(config, task)
    ]


def group(config: Json, task: str) -> int:
    """clinc's tasks share texts; the others are dealt out to three groups."""
    if task.startswith("clinc"):
        return 0
    others = [one for one in config["sources"]["tasks"] if not one.startswith("clinc")]
    return 1 + others.index(task) % 3


def recycle(config: Json) -> Json:
    """Accuracy and delta error of an adapter, kept in every way."""
    name, task, recipe = config["name"], config["task"], config["recipe"]
    test = text.encoded(text.test_rows(task, config["test_rows"]), recipe["max_length"])
    adapter = ex.read_adapter(text.adapter_folder(name))
    original = dict(adapter.modules)
    bench = Bench(name, task, test, recipe)
    rows = [{"way": "original", "k": None, "bits": None, "delta_error": 0.0, **bench.answers(original)}]
    rows += [{"way": "base", "k": None, "bits": None, "delta_error": 1.0, **bench.answers(nothing(original))}]
    rows.append(mean_of_others(config, original, bench))
    n = len(config["sources"])
    for k in config["k"]:
        for way, sources in (("seen", config["sources"]), ("left out", config["left_out"])):
            pack = text.pack_of({"sources": sources, "k": k, "weighting": config["weighting"]})
            found = pack.adapter(name).modules if way == "seen" else projected(original, pack)
            rows.append({"way": way, "k": k, **compared(original, found, bench)})
            if way == "seen":
                rows[-1] |= numbers(original, pack, n)
                cut = truncated(original, rows[-1]["numbers_an_adapter"])
                rows.append({"way": "truncated", "k": k, **compared(original, cut, bench)})
    for error in config.get("max_error", ()):
        pack = text.pack_of({"sources": config["sources"], "max_error": error, "weighting": config["weighting"]})
        row = {"way": "seen", "k": None, "max_error": error}
        rows.append({**row, **compared(original, pack.adapter(name).modules, bench), **numbers(original, pack, n)})
    for bits in (8, 4):
        rows.append({"way": "rounded", "k": None, **compared(original, rounded(original, bits), bench)})
        rows[-1]["bits"] = bits
        rows[-1]["bytes"] = sum(
            losses.rounded_bytes(one.spec.rank, one.spec.out_features, one.spec.in_features, bits)
            for one in original.values()
        )
    full = sum(one.spec.numbers for one in original.values())
    return {"test": {"metric": text.metric(task), "rows": len(test), "numbers": full, "ways": rows}}


class Bench:
    """One model for all ways to keep an adapter: its head stays, its factors are put in."""

    def __init__(self, name: str, task: str, test: list[Json], recipe: Json) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(text.new_base(task, recipe), text.adapter_folder(name)).eval()
        self.test = sorted(test, key=text.length)
        self.metric = METRICS[text.metric(task)]
        self.wanted = torch.tensor([row["labels"] for row in self.test])
        self.first: Tensor | None = None

    @torch.inference_mode()
    def answers(self, factors: Factors) -> Json:
        """The score with these factors, and on how many rows the answer is that of the first ones."""
        for module, one in factors.items():
            layer = self.model.get_submodule(f"base_model.model.{module}")
            layer.lora_A["default"].weight.data = one.down.float()
            # the layer scales by what the adapter's config says
            layer.lora_B["default"].weight.data = (one.up * (one.scaling / layer.scaling["default"])).float()
        logits = []
        collate = text.collate()
        for start in range(0, len(self.test), 64):
            inputs = collate([dict(row) for row in self.test[start : start + 64]])
            inputs.pop("labels")
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(self.model(**inputs).logits.float())
        said = torch.cat(logits)
        if self.first is None:
            self.first = said
        same = (said.argmax(-1) == self.first.argmax(-1)).float().mean().item()
        return {"score": self.metric(said.numpy(), self.wanted.numpy()), "agreement": same}


def nothing(factors: Factors) -> Factors:
    return {name: ex.LoRAFactors(one.down, torch.zeros_like(one.up), one.scaling) for name, one in factors.items()}


def projected(factors: Factors, pack: ex.Pack) -> Factors:
    """An adapter that was not in the fit, as the pack would give it back."""
    found = {}
    for name, one in factors.items():
        bases = pack.subspace.modules[name]
        down, up = bases.down.components.double(), bases.up.components.double()
        found[name] = ex.LoRAFactors(
            (one.down.double() @ down.mT @ down).float(), (up.mT @ (up @ one.up.double())).float(), one.scaling
        )
    return found


def compared(original: Factors, kept: Factors, bench: Bench) -> Json:
    return {"bits": None, "delta_error": delta_error(original, kept), **bench.answers(kept)}


def delta_error(original: Factors, kept: Factors) -> float:
    lost = total = 0.0
    for name, one in original.items():
        delta = one.scaling * one.up.double() @ one.down.double()
        other = kept[name]
        lost += float((delta - other.scaling * other.up.double() @ other.down.double()).square().sum())
        total += float(delta.square().sum())
    return math.sqrt(lost / total)


def mean_of_others(config: Json, original: Factors, bench: Bench) -> Json:
    """The mean update of the adapters that share no texts with this one, in its place."""
    others = [ex.read_adapter(text.adapter_folder(name)).modules for name in config["left_out"]]
    found = {}
    for name in original:
        deltas = [other[name].scaling * other[name].up.double() @ other[name].down.double() for other in others]
        u, s, vh = torch.linalg.svd(torch.stack(deltas).mean(0), full_matrices=False)
        found[name] = ex.LoRAFactors((s[:, None] * vh).float(), u.float(), 1.0)
    return {"way": "mean of others", "k": None, **compared(original, found, bench)}


def truncated(factors: Factors, numbers: float) -> Factors:
    """The adapter cut by SVD to so many numbers: directions that keep most for a number first."""
    parts, ranks = {}, dict.fromkeys(factors, 0)
    for name, one in factors.items():
        u, s, vh = torch.linalg.svd(one.scaling * one.up.double() @ one.down.double(), full_matrices=False)
        parts[name] = u[:, : one.spec.rank], s[: one.spec.rank], vh[: one.spec.rank]
    costs = {name: one.spec.in_features + one.spec.out_features for name, one in factors.items()}
    order = sorted(
        ((float(s) ** 2 / costs[name], name) for name, (_, values, _) in parts.items() for s in values), reverse=True
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
        for name, (u, s, vh) in parts.items()
    }


def rounded(factors: Factors, bits: int) -> Factors:
    """Both factors in few bits, blocks of them with one scale."""
    return {
        name: ex.LoRAFactors(
            losses.rounded_rows(one.down[None].double(), bits)[0].float(),
            losses.rounded_rows(one.up.mT[None].double(), bits)[0].mT.contiguous().float(),
            one.scaling,
        )
        for name, one in factors.items()
    }


def numbers(factors: Factors, pack: ex.Pack, n: int) -> Json:
    """What an adapter takes in a pack of n, and of 100, which have one basis."""
    basis, own = pack_numbers(pack), coefficient_numbers(factors, pack)
    return {"numbers_an_adapter": basis / n + own, "numbers_at_100": basis / MANY + own}


def pack_numbers(pack: ex.Pack) -> int:
    return sum(one.down.components.numel() + one.up.components.numel() for one in pack.subspace.modules.values())


def coefficient_numbers(factors: Factors, pack: ex.Pack) -> int:
    bases = pack.subspace.modules
    return sum(one.spec.rank * (bases[name].down.k + bases[name].up.k) for name, one in factors.items())
