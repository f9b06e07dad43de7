"""Time to find an adapter among 10,000: by words, and by the similarity of updates.

    nice python benchmarks/find.py           # about ten minutes on one thread, most of it to write the pack
    nice python benchmarks/find.py --quick   # half a minute: 300 adapters, to see that it works
    nice python benchmarks/find.py --pack P  # with the pack in P, which is written there if it is missing

Adapters are made up: each belongs to one of 100 families, whose updates are a common part and one of their own, and its
name says its task, domain and language. Every query has a known answer: the adapters that are named so, and those with
the largest cosines of the planted updates. find_tables.py makes the table.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.pack import folder
from eigenlorax.search import cache

RESULTS = Path(__file__).with_name("results") / "find.json"
SEED = 20261202
ADAPTERS, QUICK_ADAPTERS = 10_000, 300
FAMILIES = 100
QUERIES = 30
RANK, COMPONENTS, MODULES = 4, 16, 6
SHAPE = (96, 64)
"""(out, in) of each module."""
COMMON = 0.8
"""Weight of the part that a family shares; two of its adapters have a cosine of about its square."""

Json = dict[str, Any]

TASKS = ("classification", "summarization", "translation", "extraction", "generation", "ranking", "tagging", "parsing")
DOMAINS = ("legal", "medical", "finance", "news", "code", "chat", "science", "sports", "travel", "music")
LANGUAGES = ("english", "german", "french", "spanish", "polish", "korean", "hindi", "swahili")


def names(n: int) -> Iterator[str]:
    """Yield n names, such as `legal-classification-german-3`."""
    kinds = list(itertools.product(DOMAINS, TASKS, LANGUAGES))
    for index in range(n):
        yield f"{'-'.join(kinds[index % len(kinds)])}-{index // len(kinds)}"


@dataclass(frozen=True, slots=True)
class Planted:
    """Made-up adapters as cores over common orthonormal bases.

    Attributes:
        names: Their names.
        bases: Orthonormal columns (in × k, out × k) by module.
        common: Cores of each family by module, as their two factors.
    """

    names: list[str]
    bases: dict[str, tuple[Tensor, Tensor]]
    common: list[dict[str, tuple[Tensor, Tensor]]]

    @classmethod
    def of(cls, n: int) -> "Planted":
        (n_out, n_in), generator = SHAPE, torch.Generator().manual_seed(SEED)

        def basis(dimension: int) -> Tensor:
            return torch.linalg.qr(torch.randn(dimension, COMPONENTS, generator=generator))[0]

        modules = [f"model.layers.{index}.q_proj" for index in range(MODULES)]
        bases = {module: (basis(n_in), basis(n_out)) for module in modules}
        down, up = (RANK, COMPONENTS), (COMPONENTS, RANK)
        common = [
            {m: (torch.randn(down, generator=generator), torch.randn(up, generator=generator)) for m in modules}
            for _ in range(FAMILIES)
        ]
        return cls(list(names(n)), bases, common)

    def core(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors of an adapter's core by module: a family has one `down`, and each adapter its own `up`."""
        generator = torch.Generator().manual_seed(SEED + 1 + index)
        own = (1 - COMMON**2) ** 0.5 / COMMON
        return {
            module: (down, up + own * torch.randn(up.shape, generator=generator))
            for module, (down, up) in self.common[index % FAMILIES].items()
        }

    def adapter(self, index: int) -> ex.Adapter:
        """Return an adapter."""
        factors = {
            module: ex.LoRAFactors(down @ self.bases[module][0].mT, self.bases[module][1] @ up, 1.0)
            for module, (down, up) in self.core(index).items()
        }
        return ex.from_factors(self.names[index], factors, base_model="org/base")

    def cosines(self, indices: Sequence[int]) -> Tensor:
        """Return the exact cosines of some adapters with all."""
        cores = [
            torch.cat([(up @ down).flatten() for down, up in self.core(index).values()])
            for index in range(len(self.names))
        ]
        unit = torch.nn.functional.normalize(torch.stack(cores).double(), dim=1)
        return unit[list(indices)] @ unit.mT


def timed(call: Callable[[], Any]) -> tuple[Json, Any]:
    """Return the wall-clock and processor seconds of a call, and its result."""
    started, processor = time.perf_counter(), time.process_time()
    result = call()
    return {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}, result


def queries(calls: Sequence[Callable[[], list[ex.Match]]]) -> tuple[Json, list[list[ex.Match]]]:
    """Return median and largest milliseconds of calls, after a first one that is not counted, and their results."""
    calls[0]()
    times, results = zip(*(timed(call) for call in calls), strict=True)
    wall, processor = ([1000 * each[key] for each in times] for key in ("seconds", "processor_seconds"))
    return {
        "queries": len(calls),
        "median_ms": statistics.median(wall),
        "max_ms": max(wall),
        "median_processor_ms": statistics.median(processor),
    }, list(results)


def recall(found: Sequence[Sequence[ex.Match]], exact: Sequence[Sequence[str]]) -> float:
    """Return the mean share of the ten best that was found."""
    return statistics.mean(
        len({match.name for match in each} & set(best)) / len(best) for each, best in zip(found, exact, strict=True)
    )


def measure(pack_folder: Path, planted: Planted) -> Json:
    """Build the indexes of a pack, and ask them."""
    chosen = range(0, len(planted.names), max(1, len(planted.names) // QUERIES))
    opening, opened = timed(lambda: folder.open_pack(pack_folder))
    text_build, texts = timed(lambda: cache.text_index(opened))
    text_load, _ = timed(lambda: cache.text_index(opened))
    words = [" ".join(planted.names[index].split("-")[:3]) for index in chosen]
    text_query, by_words = queries([partial(texts.find, each) for each in words])
    # several adapters have all three words, and score alike
    are_named = [
        all(m.name.startswith(each.replace(" ", "-")) for m in found)
        for each, found in zip(words, by_words, strict=True)
    ]
    pack = ex.Pack.open(pack_folder)
    build, index = timed(lambda: cache.similarity_index(pack, opened))
    load, _ = timed(lambda: cache.similarity_index(pack, opened))
    like_name, by_name = queries([partial(index.find, planted.names[each]) for each in chosen])
    outside = [planted.adapter(each) for each in chosen]
    like_outside, by_adapter = queries([partial(index.find, adapter) for adapter in outside])
    cosines = planted.cosines(chosen)
    ten = [[planted.names[i] for i in row.topk(10).indices.tolist()] for row in cosines]
    others = [[planted.names[i] for i in row.topk(11).indices[1:].tolist()] for row in cosines]
    return {
        "open_manifest": opening,
        "words": {
            "build": text_build,
            "from_cache": text_load,
            "query": text_query,
            "all_named": statistics.mean(are_named),
        },
        "similarity": {
            "build": build,
            "from_cache": load,
            "query_in_pack": like_name,
            "query_outside": like_outside,
            "recall_in_pack": recall(by_name, others),
            "recall_outside": recall(by_adapter, ten),
            "itself_first": statistics.mean(
                each[0].name == adapter.name for each, adapter in zip(by_adapter, outside, strict=True)
            ),
        },
        "command": {
            "words": command(str(pack_folder), words[0]),
            "similarity": command(str(pack_folder), "--like", planted.names[0]),
        },
    }


def command(*arguments: str) -> Json:
    """Return the seconds of a whole call of the command line, whose indexes are in the cache."""
    line = [sys.executable, "-m", "eigenlorax", "find", *arguments]
    wall, _ = timed(lambda: subprocess.run(line, check=True, capture_output=True))
    return {"seconds": wall["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ADAPTERS} adapters; print the result alone")
    parser.add_argument("--pack", type=Path, help="folder of the pack (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    planted = Planted.of(QUICK_ADAPTERS if arguments.quick else ADAPTERS)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        path = arguments.pack or Path(temporary) / "pack"
        if not path.is_dir():
            adapters = [planted.adapter(index) for index in range(len(planted.names))]
            ex.fit(adapters, n_components=COMPONENTS, dtype="float32", warn_above=1).save(path)
        sizes = {"adapters": len(planted.names), "modules": MODULES, "shape": SHAPE, "rank": RANK, "k": COMPONENTS}
        result = {"environment": collect(), "load_at_start": os.getloadavg()[0], **sizes, **measure(path, planted)}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.quick:
        print(text)
    else:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
