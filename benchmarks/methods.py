"""The packages measured, behind one face: from PEFT folders to shared bases and every adapter's coefficients in memory.

Each is called as its own documentation shows, on one device, all adapters at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import lorashare.model
import vlora.subspace
from collection import PREFIX, Pair
from vlora.io import load_adapter, save_adapter

import eigenlorax as ex
from eigenlorax import subspace as spaces

DISTRIBUTIONS = ("eigenlorax", "lorashare", "vlora-dev")
Folders = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a method made of a collection.

    reconstruct(name): factors by module, as the method gives them back, float32. save(folder): by its own writer.
    export(name, folder): one adapter as a PEFT LoRA, by its own writer.
    parts: seconds of reading, of finding the bases ("fit"), of all else ("rest").
    own_errors: the method's own figures of delta_error, where it has some.
    """

    reconstruct: Callable[[str], Mapping[str, Pair]]
    save: Callable[[Path], Any]
    export: Callable[[str, Path], Any]
    parts: Mapping[str, float]
    own_errors: Mapping[str, float]


class Clock:
    """Seconds since it was made, and those that went into parts."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.spent: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + perf_counter() - before

    @contextmanager
    def calls_of(self, owner: Any, function: str, part: str) -> Iterator[None]:
        """Count the time of each call of `owner.function` as that of `part`."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return original(*args, **kwargs)

        with mock.patch.object(owner, function, timed):
            yield

    def parts(self) -> dict[str, float]:
        total = perf_counter() - self.start
        return {**self.spent, "rest": total - sum(self.spent.values()), "total": total}


def fit_ours(folders: Folders, n_components: int, weighting: str, sweeps: int = 2) -> Fitted:
    """`eigenlorax.fit`. What it does besides is in "rest": projecting, measuring every adapter's error, hashing."""
    clock = Clock()
    events: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        events.setdefault(stage, perf_counter() - clock.start)

    with clock.calls_of(spaces, "fit_module", "fit"):
        pack = ex.fit(
            {name: str(path) for name, path in folders.items()},
            n_components=n_components,
            weighting=weighting,
            sweeps=sweeps,
            dtype="float32",
            progress=progress,
        )
    clock.spent["read"] = events["fitting modules"]
    parts = clock.parts()

    def reconstruct(name: str) -> dict[str, Pair]:
        modules = pack.adapter(name).modules
        return {module: (modules[module].down, modules[module].up) for module in modules}

    return Fitted(
        reconstruct,
        pack.save,
        lambda name, folder: ex.write_adapter(pack.adapter(name), folder),
        parts,
        {name: record.delta_error for name, record in pack.records.items()},
    )


def fit_lorashare(folders: Folders, n_components: int) -> Fitted:
    """`SHAREModel.from_adapters`, given names, for without them it reads every file twice."""
    clock = Clock()
    with (
        clock.calls_of(lorashare.model, "load_peft_adapter", "read"),
        clock.calls_of(lorashare.model, "compute_shared_components", "fit"),
    ):
        model = lorashare.model.SHAREModel.from_adapters(
            {name: str(path) for name, path in folders.items()}, num_components=n_components, device="cpu"
        )
    parts = clock.parts()

    def reconstruct(name: str) -> dict[str, Pair]:
        tensors = model.reconstruct(name)
        downs = [key for key in tensors if key.endswith(".lora_A.weight")]
        return {
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (
                tensors[key],
                tensors[key.replace("lora_A", "lora_B")],
            )
            for key in downs
        }

    return Fitted(
        reconstruct, model.save_pretrained, lambda name, folder: model.reconstruct(name, output_dir=folder), parts, {}
    )


def fit_vlora(folders: Folders, n_components: int) -> Fitted:
    """`SharedSubspace.from_adapters`; `num_components` holds for both sides of all layers."""
    clock = Clock()
    with clock.part("read"):
        adapters = [load_adapter(path) for path in folders.values()]
    with clock.calls_of(vlora.subspace, "compute_svd", "fit"):
        space = vlora.subspace.SharedSubspace.from_adapters(
            adapters, task_ids=list(folders), num_components=n_components
        )
    parts = clock.parts()

    def reconstruct(name: str) -> dict[str, Pair]:
        weights = space.reconstruct(name)
        return {layer: (weights.lora_a[layer], weights.lora_b[layer]) for layer in weights.layer_names}

    return Fitted(
        reconstruct, space.save, lambda name, folder: save_adapter(space.reconstruct(name), folder), parts, {}
    )


METHODS: dict[str, Callable[[Folders, int], Fitted]] = {
    "delta": lambda folders, k: fit_ours(folders, k, "delta"),
    "factors": lambda folders, k: fit_ours(folders, k, "factors"),
    "lorashare": fit_lorashare,
    "vlora": fit_vlora,
}


def fit_module_seconds(folders: Folders, n_components: int, weighting: str, sweeps: int) -> float:
    """Seconds of `fit_module` alone over all modules, the factors being in memory and every weight 1."""
    adapters = [ex.read_adapter(path) for path in folders.values()]
    options = spaces.FitOptions(n_components, None, weighting, sweeps)
    seconds = 0.0
    for module in adapters[0].modules:
        factors = [adapter.modules[module] for adapter in adapters]
        before = perf_counter()
        spaces.fit_module(factors, [1.0] * len(factors), options)
        seconds += perf_counter() - before
    return seconds


def versions() -> dict[str, str]:
    """Of the packages measured and of what they all stand on."""
    return {name: metadata.version(name) for name in (*DISTRIBUTIONS, "numpy", "safetensors", "torch")}
