"""Adapters that come one at a time: errors of the early ones, by four methods of adding the next one.

From the first adapter on, each step adds one more, and measures every adapter so far against its original. The
methods, each with at most `k` components per side:

project   the basis of the first adapter; the others are projected on it.
extend L  `Pack.add(extend=L)`: at most L new directions a side for each, until there are k; or `without end`.
merge     Share's merge and reproject (arXiv 2602.06043): all are rebuilt from their coefficients, k components are
          fitted to those and to the new one, and coefficients are found again: `refit`, with the new one's original.
one shot  a fit of the originals of all so far, which a continual method does not have: the bound.

    python benchmarks/continual.py            # minutes; writes results/continual.json and docs/results/continual.svg
    python benchmarks/table.py --write        # the tables in docs/growing.md
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.core.adapter import Adapter, LoRAFactors, from_factors
from eigenlorax.core.linalg import product_square
from eigenlorax.errors import LossWarning
from eigenlorax.train import demo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "continual.json"
PICTURE = ROOT / "docs" / "results" / "continual.svg"
EARLY = 5
ORDERS = 3
COLOURS = {
    "project": "#8a8f98",
    "extend 2": "#2f6f9f",
    "extend 4": "#35a59b",
    "extend 4 without end": "#8fd07a",
    "merge": "#c05a1c",
    "one shot": "#1a1a1a",
}


@dataclass(frozen=True, slots=True)
class Step:
    """Delta errors after an adapter has come: of the first one, in the mean of the first five and of all so far, of the
    worst, and of the new one; and what the pack holds. recorded: the mean of what the pack's records say, which is a
    bound where it could not be measured. k: components of its widest side."""

    adapters: int
    first: float
    early: float
    mean: float
    worst: float
    new: float
    recorded: float
    k: int
    stored_bytes: int
    lora_bytes: int


def project(originals: Sequence[Adapter], k: int) -> Iterator[ex.Pack]:
    """The basis of the first one, for all."""
    pack = ex.fit(originals[0], n_components=k)
    yield pack
    for one in originals[1:]:
        pack.add(one, warn_above=1.0)
        yield pack


def extend(originals: Sequence[Adapter], k: int, directions: int, *, end: bool = True) -> Iterator[ex.Pack]:
    """The basis grows by a few directions for each, until it is as wide as it may be."""
    pack = ex.fit(originals[0], n_components=k)
    yield pack
    for one in originals[1:]:
        room = min(directions, k - widest(pack)) if end else directions
        pack.add(one, extend=room if room > 0 else None, warn_above=1.0)
        yield pack


def merge(originals: Sequence[Adapter], k: int) -> Iterator[ex.Pack]:
    """The basis is fitted again at each step, to what the pack gives back and to the new one."""
    pack = ex.fit(originals[0], n_components=k)
    yield pack
    for one in originals[1:]:
        pack.add(one, warn_above=1.0)
        pack = ex.refit(pack, one, n_components=k, warn_above=1.0).pack
        yield pack


def one_shot(originals: Sequence[Adapter], k: int) -> Iterator[ex.Pack]:
    """A fit of all originals so far, anew at each step."""
    for n in range(1, len(originals) + 1):
        yield ex.fit(originals[:n], n_components=k, warn_above=1.0)


METHODS: dict[str, Callable[[Sequence[Adapter], int], Iterator[ex.Pack]]] = {
    "project": project,
    "extend 2": lambda originals, k: extend(originals, k, 2),
    "extend 4": lambda originals, k: extend(originals, k, 4),
    "extend 4 without end": lambda originals, k: extend(originals, k, 4, end=False),
    "merge": merge,
    "one shot": one_shot,
}


def widest(pack: ex.Pack) -> int:
    return max(side.k for pair in pack.info.modules.values() for side in pair.values())


def error(original: Adapter, other: Adapter) -> float:
    """The delta error of what a pack gives back, from its factors in float64."""
    lost = total = 0.0
    for module, one in original.modules.items():
        up, down = one.scaling * one.up.double(), one.down.double()
        back = other.modules[module]
        left, right = torch.cat([up, -back.scaling * back.up.double()], dim=1), torch.cat([down, back.down.double()])
        lost += max(float(product_square(left, right)), 0.0)
        total += float(product_square(up, down))
    return (lost / total) ** 0.5


def stream(originals: Sequence[Adapter], method: str, k: int) -> list[Step]:
    """Add a sequence of adapters by one method."""
    found = []
    for n, pack in enumerate(METHODS[method](originals, k), start=1):
        errors = [error(one, pack.adapter(one.name, torch.float64)) for one in originals[:n]]
        size = pack.summary.bytes
        found.append(
            Step(
                adapters=n,
                first=errors[0],
                early=statistics.fmean(errors[:EARLY]),
                mean=statistics.fmean(errors),
                worst=max(errors),
                new=errors[-1],
                recorded=statistics.fmean(record.delta_error for record in pack.records.values()),
                k=widest(pack),
                stored_bytes=size.basis + size.coefficients,
                lora_bytes=size.lora,
            )
        )
    return found


def columns(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Each field over the steps, errors to six decimals."""
    return {field.name: [round(getattr(step, field.name), 6) for step in steps] for field in fields(Step)}


def planted(
    n: int = 16, *, width: int = 96, modules: int = 4, rank: int = 8, shared: int = 24, own: float = 0.1
) -> list[Adapter]:
    """Adapters that share `shared` directions a side; `own`: how large what each factor has beside them is."""
    common = torch.Generator().manual_seed(0)
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(modules)]
    bases = {name: [torch.randn(shared, width, generator=common) / width**0.5 for _ in range(2)] for name in names}
    found = []
    for index in range(n):
        generator = torch.Generator().manual_seed(1 + index)

        def rows(basis: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            beside = torch.randn(rank, width, generator=generator) / width**0.5
            return torch.randn(rank, shared, generator=generator) @ basis / shared**0.5 + own * beside

        factors = {name: LoRAFactors(rows(down), rows(up).mT.contiguous(), 2.0) for name, (down, up) in bases.items()}
        found.append(from_factors(f"planted-{index:02}", factors, base_model="made/up"))
    return found


def real() -> list[Adapter]:
    """The demo's adapters."""
    folders = sorted(path.parent for path in (demo.data() / "adapters").glob("*/adapter_config.json"))
    return [ex.read_adapter(folder) for folder in folders]


def ordered(adapters: Sequence[Adapter], order: int) -> list[Adapter]:
    places = torch.randperm(len(adapters), generator=torch.Generator().manual_seed(order)).tolist()
    return [adapters[place] for place in places]


def picture(result: dict[str, Any], path: Path) -> None:
    """The mean error of all so far, and that of the first, over the number of adapters; means over the orders."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    collections = list(result["collections"])
    shown = {"mean": "mean of all so far", "first": "the first adapter"}
    with mpl.rc_context({"svg.hashsalt": "eigenlorax", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(
            2, len(collections), figsize=(4.2 * len(collections), 5.6), sharex=True, squeeze=False
        )
        for column, name in enumerate(collections):
            one = result["collections"][name]
            for row, (field, label) in enumerate(shown.items()):
                axis = axes[row][column]
                for method, runs in one["methods"].items():
                    values = [statistics.fmean(one) for one in zip(*(run[field] for run in runs), strict=True)]
                    style = "--" if method == "one shot" else "-"
                    axis.plot(
                        range(1, len(values) + 1), values, style, color=COLOURS[method], label=method, linewidth=1.6
                    )
                axis.set_ylim(0, 1)
                axis.set_title(f"{name.partition(' ')[0]}, k = {one['k']}: {label}", fontsize=9)
                axis.grid(alpha=0.25)
        axes[1][0].legend(frameon=False, fontsize=8)
        for axis in axes[1]:
            axis.set_xlabel("adapters so far")
        for row in axes:
            row[0].set_ylabel("delta error")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=ORDERS, help="how many sequences of the same adapters")
    parser.add_argument("--picture", action="store_true", help="draw the picture of the result that is there")
    options = parser.parse_args()
    if not options.picture:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", LossWarning)
        kinds = {"demo 32": (real(), 32), "demo 64": (real(), 64), "planted 24": (planted(), 24)}
        found: dict[str, Any] = {
            "command": "python benchmarks/continual.py",
            "environment": collect(),
            "orders": options.orders,
            "collections": {},
        }
        for name, (adapters, k) in kinds.items():
            methods = {
                method: [columns(stream(ordered(adapters, order), method, k)) for order in range(options.orders)]
                for method in METHODS
            }
            found["collections"][name] = {"k": k, "adapters": len(adapters), "methods": methods}
        RESULTS.write_text(json.dumps(found) + "\n", encoding="utf-8")
    picture(json.loads(RESULTS.read_text("utf-8")), PICTURE)


if __name__ == "__main__":
    main()
