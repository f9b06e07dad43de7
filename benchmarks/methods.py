"""The packages measured, behind one face: from PEFT folders to shared bases and every adapter's coefficients in memory.

Each is called as its own documentation shows, on one device, all adapters at once. What a method needs is imported when
it is asked for: a process that measures one of them holds no other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

from collection import PREFIX, Pair, read

Folders = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a method made of a collection.

    reconstruct(name): factors by module, as the method gives them back, float32. save(folder): by its own writer.
    add(name, folder): one more adapter, projected on the bases as they are. export(name, folder): one adapter as a
    PEFT LoRA, by its own writer. parts: seconds in all ("total"), and those of reading ("read"), of finding the bases
    ("fit"), of all else ("rest"). own_errors: the method's own figures of delta_error, where it has some. stages:
    seconds as the method itself counts them, where it does.
    """

    reconstruct: Callable[[str], Mapping[str, Pair]]
    parts: Mapping[str, float]
    save: Callable[[Path], Any] | None = None
    add: Callable[[str, Path], Any] | None = None
    export: Callable[[str, Path], Any] | None = None
    own_errors: Mapping[str, float] | None = None
    stages: Mapping[str, float] | None = None


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


def fit_ours(folders: Folders, n_components: int, weighting: str) -> Fitted:
    """`eigenlorax.fit`. "read" holds hashing and a search for NaN too; "rest" holds the error of every adapter.

    No advice is sought on adapters that lose much (`warn_above=1`): it would be the time of another fit.
    """
    import eigenlorax as ex

    clock = Clock()
    pack = ex.fit(
        {name: str(path) for name, path in folders.items()},
        n_components=n_components,
        weighting=weighting,
        dtype="float32",
        warn_above=1,
    )
    # the next module is read while one is fitted: only what the fit waited for counts
    clock.spent["read"] = pack.seconds["scanning"] + pack.seconds["waiting"]
    clock.spent["fit"] = pack.seconds["solving"]
    parts = clock.parts()

    def reconstruct(name: str) -> dict[str, Pair]:
        modules = pack.adapter(name).modules
        return {module: (modules[module].down, modules[module].up) for module in modules}

    return Fitted(
        reconstruct,
        parts,
        save=pack.save,
        add=lambda name, folder: pack.add(folder, name=name, warn_above=1),
        export=lambda name, folder: pack.export(folder, [name]),
        own_errors={name: record.delta_error for name, record in pack.records.items()},
        stages=dict(pack.seconds),
    )


def fit_lorashare(folders: Folders, n_components: int) -> Fitted:
    """`SHAREModel.from_adapters`, given names, for without them it reads every file twice."""
    import lorashare.model

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
        reconstruct,
        parts,
        save=model.save_pretrained,
        # any share of variance will do: by default it fits all adapters again where the new one lies outside
        add=lambda name, folder: model.add_adapter(str(folder), name=name, variance_threshold=0.0),
        export=lambda name, folder: model.reconstruct(name, output_dir=folder),
    )


def fit_vlora(folders: Folders, n_components: int) -> Fitted:
    """`SharedSubspace.from_adapters`; `num_components` holds for both sides of all layers."""
    import vlora.subspace
    from vlora.io import load_adapter, save_adapter

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
        reconstruct,
        parts,
        save=space.save,
        add=lambda name, folder: space.add_task(space.project(load_adapter(folder), name)),
        export=lambda name, folder: save_adapter(space.reconstruct(name), folder),
    )


def fit_authors(folders: Folders, n_components: int) -> Fitted:
    """The algorithm of `authors.py`, on the factors as they are, without any scaling."""
    import authors
    import torch

    clock = Clock()
    with clock.part("read"):
        adapters = {name: read(path) for name, path in folders.items()}
    directions: dict[str, dict[str, Any]] = {}
    loadings: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in folders}
    for module in next(iter(adapters.values())).modules:
        pairs = {name: adapter.modules[module] for name, adapter in adapters.items()}
        tall = {"down": [down.mT.numpy() for down, _ in pairs.values()], "up": [up.numpy() for _, up in pairs.values()]}
        with clock.part("fit"):
            sides = {side: authors.fit_side(factors, n_components) for side, factors in tall.items()}
        directions[module] = {side: found for side, (found, _) in sides.items()}
        for index, name in enumerate(pairs):
            loadings[name][module] = {side: of_all[index] for side, (_, of_all) in sides.items()}
    parts = clock.parts()

    def reconstruct(name: str) -> dict[str, Pair]:
        factors = {module: authors.rebuilt(directions[module], loadings[name][module]) for module in directions}
        return {
            module: (torch.from_numpy(sides["down"]).mT, torch.from_numpy(sides["up"]))
            for module, sides in factors.items()
        }

    return Fitted(reconstruct, parts)


METHODS: dict[str, Callable[[Folders, int], Fitted]] = {
    "delta": lambda folders, k: fit_ours(folders, k, "delta"),
    "factors": lambda folders, k: fit_ours(folders, k, "factors"),
    "lorashare": fit_lorashare,
    "vlora": fit_vlora,
    "authors": fit_authors,
}
NEEDS = {"lorashare": "lorashare", "vlora": "vlora", "peft": "peft"}
"""The package of a method that may not be installed."""
DISTRIBUTIONS = (
    "eigenlorax",
    "lorashare",
    "vlora-dev",
    "peft",
    "transformers",
    "numpy",
    "safetensors",
    "torch",
)


def is_here(method: str) -> bool:
    """Whether what the method needs is installed."""
    return method not in NEEDS or util.find_spec(NEEDS[method]) is not None


def versions() -> dict[str, str]:
    """Of the packages measured and of what they all stand on, as far as they are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
