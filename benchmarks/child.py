"""One measurement in a process of its own, which `run.py` starts: a case as JSON in, its figures as JSON on stdout.

Every measurement reports the peak resident memory of its process, and that before it began: after all imports and a
small fit. Memory is read before anything is done that only checks a result.
"""

import contextlib
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from collection import Shape, Source, copies_in_float32, delta_error, make_up, read
from methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]

WARM_UP = Shape(adapters=3, rank=4, dimension=64, modules=1)
ENOUGH = 3.0
"""Seconds after which a call is not repeated once more."""
WORKERS = 2
LARGE_THREADS = 2
CHECKED = ("q_proj.down", "k_proj.up", "v_proj.up")
"""Sides of the first layer whose exact spectra are found."""


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """The largest resident memory of this process so far, or of the largest of its children that have ended."""
    # Linux counts KiB, macOS bytes
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fit(folder: Path, adapters: int, method: str, k: int, repetitions: int, errors: bool) -> Json:
    """Seconds and memory of a fit, and what it loses of each adapter. Memory is that of the first repetition."""
    folders = _folders(folder, adapters)
    _warm_up(method)
    before = peak_bytes()
    seconds: list[Mapping[str, float]] = []
    started = time.perf_counter()
    peak = 0
    while len(seconds) < repetitions and (not seconds or time.perf_counter() - started < ENOUGH):
        fitted: Any = None
        gc.collect()
        fitted = METHODS[method](folders, k)
        seconds.append({**fitted.parts, **{f"own {name}": value for name, value in (fitted.stages or {}).items()}})
        peak = peak or peak_bytes()
    found: Json = {
        "seconds": {part: statistics.median(each[part] for each in seconds) for part in seconds[0]},
        "all_seconds": [each["total"] for each in seconds],
        "baseline_bytes": before,
        "peak_bytes": peak,
        "input_bytes": sum((path / "adapter_model.safetensors").stat().st_size for path in folders.values()),
    }
    if errors:
        lost = [delta_error(read(path), fitted.reconstruct(name)) for name, path in folders.items()]
        found["delta_error"] = {
            "mean": statistics.fmean(lost),
            "mean_square": statistics.fmean(error**2 for error in lost),
            "worst": max(lost),
        }
    return found


def use(folder: Path, adapters: int, method: str, k: int, repetitions: int) -> Json:
    """Seconds to project one adapter that was not in the fit, and to write one as a PEFT LoRA."""
    folders = _folders(folder, adapters)
    name, left_out = folders.popitem()
    _warm_up(method)
    fitted = METHODS[method](folders, k)
    before = peak_bytes()
    projecting, exporting = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(repetitions):
            projecting.append(_seconds(lambda turn=turn: fitted.add(f"{name}-{turn}", left_out)))
            target = Path(scratch) / str(turn)
            exporting.append(_seconds(lambda target=target: fitted.export(next(iter(folders)), target)))
    # the first of each also makes what is made once
    return {
        "project_seconds": statistics.median(projecting[1:]),
        "export_seconds": statistics.median(exporting[1:]),
        "baseline_bytes": before,
        "peak_bytes": peak_bytes(),
    }


def serving(part: str, adapters: int = 0, rounds: int = 0) -> Json:
    """Loading, switching and mixing adapters of a bank beside PEFT's LoRA, by `bank.py`."""
    import transformers

    import bank

    transformers.logging.set_verbosity_error()
    measures: dict[str, Callable[[], Json]] = {
        "loading": lambda: bank.measure_loading(adapters),
        "decode": lambda: bank.measure_decode(rounds),
        "encoder": lambda: bank.measure_encoder(rounds),
        "prefill": lambda: bank.measure_prefill(rounds),
    }
    before = peak_bytes()
    with bank.one_thread():
        found = measures[part]()
    return {"found": found, "baseline_bytes": before, "peak_bytes": peak_bytes()}


def activations() -> Json:
    """What a layer keeps for backward, and what is trained, beside PEFT's LoRA and VeRA, by `tuner.py`."""
    import tuner

    before = peak_bytes()
    layer = {"width": tuner.WIDTH, "rows": tuner.ROWS, "k": tuner.K}
    return {**layer, "found": tuner.measure_bytes(), "baseline_bytes": before, "peak_bytes": peak_bytes()}


def pack_bytes(adapters: int, dimension: int, modules: int, k: int, rank: int) -> Json:
    """Bytes of a pack of random adapters for square modules: by its formula, and in its files."""
    from torch import nn

    import bank

    bank.K, bank.RANK = k, rank
    model = nn.ModuleDict({f"{index}_proj": nn.Linear(dimension, dimension, bias=False) for index in range(modules)})
    numbers = 2 * modules * (k * (dimension + 1) + adapters * k * rank)
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        path = bank.made_pack(model, ("_proj",), adapters).save(Path(scratch) / "pack")
        files = [file for file in path.rglob("*") if file.is_file()]
        tensors = [file for file in files if file.suffix == ".safetensors"]
        return {
            "lora_bytes": 4 * adapters * rank * modules * 2 * dimension,
            # of each side: k components and as many singular values; of each adapter: k × rank
            "formula_bytes": 4 * numbers,
            "tensor_file_bytes": sum(file.stat().st_size for file in tensors),
            "file_bytes": sum(file.stat().st_size for file in files),
            "baseline_bytes": before,
            "peak_bytes": peak_bytes(),
        }


def large(folder: Path, k: int, engine: str, sweeps: int, adapters: int | None) -> Json:
    """A fit of a collection that is too large for whole spectra."""
    import eigenlorax as ex

    torch.set_num_threads(1 if engine == "processes" else LARGE_THREADS)
    folders = _folders(folder, adapters)
    _warm_up("delta")
    before = peak_bytes()
    started = time.perf_counter()
    pack = ex.fit(
        {name: str(path) for name, path in folders.items()},
        n_components=k,
        sweeps=sweeps,
        engine=engine,
        workers=WORKERS if engine == "processes" else None,
        warn_above=1,
    )
    total = time.perf_counter() - started
    bases = {f"{name}.{side}": one.side(side) for name, one in pack.subspace.modules.items() for side in ("down", "up")}
    first = next(iter(pack.subspace.modules)).rpartition(".")[0]
    return {
        "adapters": len(folders),
        "modules": len(pack.subspace.modules),
        "threads": torch.get_num_threads(),
        "workers": WORKERS if engine == "processes" else 1,
        "solver": pack.fit_info.solver,
        "seconds": {**pack.seconds, "total": total},
        "baseline_bytes": before,
        "peak_bytes": peak_bytes(),
        "worker_peak_bytes": peak_bytes(resource.RUSAGE_CHILDREN),
        "input_bytes": sum((path / "adapter_model.safetensors").stat().st_size for path in folders.values()),
        "basis_bytes": pack.subspace.stored_bytes,
        "coefficient_bytes": sum(record.coefficient_bytes for record in pack.records.values()),
        "delta_error_mean": statistics.fmean(record.delta_error for record in pack.records.values()),
        "worst_shortfall": max(basis.shortfall for basis in bases.values()),
        "checked": {
            side: {
                "share": float(bases[f"{first}.{side}"].singular_values[:k].double().square().sum())
                / bases[f"{first}.{side}"].square,
                "shortfall": bases[f"{first}.{side}"].shortfall,
            }
            for side in CHECKED
        },
    }


def exact(folder: Path, k: int) -> Json:
    """The share of a first fit's stack that the k best directions keep, by whole spectra in float64, of a few sides."""
    import eigenlorax as ex
    from eigenlorax.core.adapter import delta_square, factor_grams

    torch.set_num_threads(LARGE_THREADS)
    before = peak_bytes()
    read_adapters = [ex.read_adapter(path) for path in _folders(folder, None).values()]
    weights = [sum(delta_square(one.modules[m]) for m in one.modules) ** -0.5 for one in read_adapters]
    first = min(read_adapters[0].modules).rpartition(".")[0]
    shares: Json = {}
    for checked in CHECKED:
        module, _, side = checked.rpartition(".")
        factors = read_adapters[0].modules[f"{first}.{module}"]
        dimension = factors.down.shape[1] if side == "down" else factors.up.shape[0]
        total = torch.zeros(dimension, dimension, dtype=torch.float64)
        for adapter, weight in zip(read_adapters, weights, strict=True):
            factors = adapter.modules[f"{first}.{module}"]
            down_gram, up_gram = factor_grams(factors)
            rows, inner = (factors.down, up_gram) if side == "down" else (factors.up.mT, down_gram)
            rows = rows.double()
            total.addmm_(rows.mT, inner @ rows, alpha=(factors.scaling * weight) ** 2)
        values = torch.linalg.eigvalsh(total)
        shares[checked] = float(values[-k:].sum() / values.sum())
    return {"shares": shares, "baseline_bytes": before, "peak_bytes": peak_bytes()}


def collection(adapters: str) -> Json:
    """What the real adapters are on which errors are measured."""
    import fidelity

    path = Path(adapters).resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    return _on_copies(adapters, lambda sources, _: fidelity.describe(sources, shown))


def equal_k(adapters: str, components: list[int]) -> Json:
    """Errors of the methods that keep k directions of each side, at equal k."""
    import fidelity

    return _on_copies(adapters, lambda sources, scratch: fidelity.measure_equal_k(sources, components, scratch))


def equal_bytes(adapters: str, limit: int | None) -> Json:
    """Errors beside vlora-dev at equal bytes."""
    import fidelity

    return _on_copies(adapters, lambda sources, scratch: fidelity.measure_equal_bytes(sources, scratch, limit))


def scaling(adapters: str) -> Json:
    """What becomes of an adapter's scaling on the way out."""
    import fidelity

    return _on_copies(adapters, lambda sources, scratch: fidelity.measure_scaling(sources, scratch / "exported"))


MEASURES: dict[str, Callable[..., Json]] = {
    one.__name__: one
    for one in (
        fit,
        use,
        serving,
        activations,
        pack_bytes,
        large,
        exact,
        collection,
        equal_k,
        equal_bytes,
        scaling,
    )
}


def _on_copies(adapters: str, measure: Callable[[list[Source], Path], Any]) -> Json:
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(copies_in_float32(Path(adapters), Path(scratch) / "adapters"), Path(scratch))
    return {"found": found, "baseline_bytes": before, "peak_bytes": peak_bytes()}


def _folders(folder: Path, adapters: int | None) -> dict[str, Path]:
    paths = sorted(path.parent for path in Path(folder).glob("*/adapter_config.json"))
    return {path.name: path for path in paths[:adapters]}


def _warm_up(method: str) -> None:
    """Whatever is imported or made at the first call."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_up(WARM_UP, 0, Path(scratch))
        METHODS[method]({path.name: path for path in paths}, 2)


def _seconds(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def main() -> None:
    case = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    # packages print: stdout is the figures' alone
    with contextlib.redirect_stdout(sys.stderr):
        found = MEASURES[case["measure"]](**case["options"])
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
