"""The collections of `bytes.py`, as PEFT folders: the demo's adapters, strangers' from a folder, and planted ones.

Planted adapters are float16, r directions of falling strength in each module, of one of six kinds:

shared     all in 3r directions a side, the same for all
noisy      the same, and a tenth of each factor is its own
unshared   nothing in common
clustered  four groups, each in 2r directions of its own
outlier    as noisy, but one that has nothing in common with the others
variants   all are one adapter, and a fifth of each factor is its own
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from collection import PREFIX
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "eigenlorax" / "train" / "demo_data" / "adapters"
KINDS = ("shared", "noisy", "unshared", "clustered", "outlier", "variants")
COUNTS = (2, 10, 100, 1000)
FALLING = 0.8
"""Strength of a direction beside that of the one before."""
NOISE = 0.1
VARIATION = 0.2
GROUPS = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a planted collection: rank, and (out, in) of its modules."""

    rank: int
    modules: Mapping[str, tuple[int, int]]


SHAPES = {
    "narrow": Shape(8, {"layers.0.q_proj": (256, 192), "layers.0.up_proj": (320, 256)}),
    "wide": Shape(16, {"layers.0.q_proj": (640, 512)}),
}
QUICK = {"tiny": Shape(4, {"layers.0.q_proj": (48, 32)})}

Folders = dict[str, Path]
"""Of each adapter."""


@dataclass(frozen=True, slots=True)
class Collection:
    """name: its key in the result. folders(scratch): its adapters, made there where they have to be; none where what it
    is made of is not on this machine, and absent says what."""

    name: str
    folders: Callable[[Path], Folders]
    absent: str = ""


def collections(zoo: Path | None, others: list[Path], quick: bool) -> Iterator[Collection]:
    """All there are. zoo: a folder of folders of strangers' adapters, by base model; others: folders of adapters."""
    if not quick:
        yield Collection("demo", lambda _: below(DEMO))
        for base in ("gpt2", "distilbert-base-uncased"):
            folder = zoo / base if zoo is not None else None
            there = folder is not None and folder.is_dir()
            yield Collection(
                f"strangers, {base}",
                lambda _, folder=folder: below(folder) if folder is not None and folder.is_dir() else {},
                "" if there else f"no folder of strangers' adapters of {base} (--zoo)",
            )
        for folder in others:
            yield Collection(folder.name, lambda _, folder=folder: below(folder))
    for label, shape in (QUICK if quick else SHAPES).items():
        for n in (2, 10) if quick else COUNTS:
            for kind in KINDS:
                yield Collection(
                    f"planted, {kind}, {label}, {n}",
                    lambda scratch, kind=kind, label=label, shape=shape, n=n: planted(
                        kind, shape, n, scratch / f"{kind}-{label}-{n}"
                    ),
                )


def below(folder: Path) -> Folders:
    """Each adapter one folder down."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}


def planted(kind: str, shape: Shape, n: int, target: Path) -> Folders:
    """Written where they are not yet; the same each time."""
    names = [f"adapter-{index:04d}" for index in range(n)]
    if not (target / names[-1] / "adapter_config.json").exists():
        for index, name in enumerate(names):
            write(target / name, factors(kind, shape, index), shape.rank)
    return {name: target / name for name in names}


def factors(kind: str, shape: Shape, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """`down` and `up` of each module of one adapter."""
    generator = torch.Generator().manual_seed(1_000_003 * (1 + index))
    strengths = FALLING ** (torch.arange(shape.rank) / 2)
    found = {}
    for place, (module, (n_out, n_in)) in enumerate(shape.modules.items()):
        down, up = (
            strengths[:, None] * rows(kind, shape.rank, d, index, 2 * place + side, generator)
            for side, d in enumerate((n_in, n_out))
        )
        found[module] = down, up.mT
    return found


def rows(kind: str, rank: int, d: int, index: int, side: int, generator: torch.Generator) -> Tensor:
    """Of length about 1, (r, d)."""
    own = torch.randn(rank, d, generator=generator) / d**0.5
    if kind == "unshared" or (kind == "outlier" and index == 0):
        return own
    if kind == "variants":
        one = torch.randn(rank, d, generator=torch.Generator().manual_seed(side)) / d**0.5
        return (1 - VARIATION**2) ** 0.5 * one + VARIATION * own
    group, k = (index % GROUPS, 2 * rank) if kind == "clustered" else (0, 3 * rank)
    of_all = torch.Generator().manual_seed(100 * group + side)
    basis = torch.linalg.qr(torch.randn(d, min(k, d), generator=of_all))[0].mT
    inside = torch.randn(rank, len(basis), generator=generator) @ basis / len(basis) ** 0.5
    return inside if kind in ("shared", "clustered") else (1 - NOISE**2) ** 0.5 * inside + NOISE * own


def write(folder: Path, modules: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (down, up) in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down.half().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.half().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "made-up", "r": rank, "lora_alpha": 2 * rank}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets, "task_type": None}))
