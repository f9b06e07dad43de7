"""What each method loses of real adapters: at equal k, at equal stored bytes, and of their scaling on the way out."""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collection import Source, delta_error, head_keys, saved_tensor_bytes, scaling_of
from methods import METHODS

# Below this, an error is the rounding of float32 and says nothing of a method: such pairs count as equal.
ROUNDING = 1e-5

Json = dict[str, Any]


def describe(sources: Sequence[Source], folder: Path) -> Json:
    first = sources[0]
    return {
        "folder": str(folder),
        "adapters": [source.name for source in sources],
        "modules": len(first.modules),
        "ranks": sorted({down.shape[0] for source in sources for down, _ in source.modules.values()}),
        "shapes": sorted({f"{up.shape[0]} × {down.shape[1]}" for down, up in first.modules.values()}),
        "scalings": sorted({source.scaling for source in sources}),
        "lora_bytes": sum(source.lora_bytes for source in sources),
    }


def measure_equal_k(sources: Sequence[Source], components: Sequence[int], scratch: Path) -> list[Json]:
    """Errors and bytes of the methods that keep k directions on each side of each module."""
    rows = []
    for k in components:
        figures = {name: measure(name, sources, k, scratch) for name in ("delta", "factors", "lorashare")}
        holds = {other: compare(figures["delta"], figures[other]) for other in ("factors", "lorashare")}
        rows.append({"k": k, "methods": figures, "delta_no_higher_than": holds})
        say(f"k = {k}: " + ", ".join(f"{name} {each['mean']:.4f}" for name, each in figures.items()))
    return rows


def measure_equal_bytes(sources: Sequence[Source], scratch: Path, limit: int | None) -> list[Json]:
    """vlora at each k, and ours at the most components that are stored in no more bytes.

    limit: the largest k; by default one less than there are adapters, where vlora loses nothing. Rows above half of
    the LoRAs' own bytes are outside the claim, and say so.
    """
    lora_bytes = sum(source.lora_bytes for source in sources)
    rows = []
    for k in range(1, limit + 1 if limit else len(sources)):
        theirs = measure("vlora", sources, k, scratch)
        n_components = most_components(sources, theirs["stored_bytes"])
        ours = measure("delta", sources, n_components, scratch)
        assert ours["stored_bytes"] <= theirs["stored_bytes"], f"vlora k={k}: ours is larger at {n_components=}"
        share = theirs["stored_bytes"] / lora_bytes
        rows.append(
            {
                "k": k,
                "n_components": n_components,
                "share_of_lora_bytes": share,
                "within_half": share <= 0.5,
                "methods": {"delta": ours, "vlora": theirs},
                "delta_no_higher_than": {"vlora": compare(ours, theirs)},
            }
        )
        say(f"vlora k = {k}: {theirs['mean']:.4f}, delta n_components = {n_components}: {ours['mean']:.4f}")
    return rows


def measure(method: str, sources: Sequence[Source], k: int, scratch: Path) -> Json:
    """Fit, save, and compare each adapter that comes back with its source, under the source's own scaling."""
    fitted = METHODS[method]({source.name: source.path for source in sources}, k)
    assert fitted.save is not None
    errors = {source.name: delta_error(source, fitted.reconstruct(source.name)) for source in sources}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        fitted.save(Path(folder) / "saved")
        stored = saved_tensor_bytes(Path(folder), head_keys(sources[0]))
    figures: Json = {**summary(errors), "errors": errors, "stored_bytes": stored}
    if fitted.own_errors:
        figures["largest_difference_to_own_figure"] = max(
            abs(errors[name] - fitted.own_errors[name]) for name in errors
        )
    return figures


def summary(errors: Mapping[str, float]) -> Json:
    return {
        "mean": statistics.fmean(errors.values()),
        "mean_square": statistics.fmean(error**2 for error in errors.values()),
        "worst": max(errors.values()),
        "worst_adapter": max(errors, key=lambda name: errors[name]),
    }


def compare(ours: Json, theirs: Json) -> dict[str, bool]:
    """Whether ours is no higher, figure by figure; errors of mere rounding count as equal."""
    both_exact = max(ours["worst"], theirs["worst"]) < ROUNDING
    return {figure: both_exact or ours[figure] <= theirs[figure] for figure in ("mean", "mean_square", "worst")}


def most_components(sources: Sequence[Source], budget: int) -> int:
    """The largest n_components whose bases, spectra and coefficients take at most `budget` bytes."""
    largest = max(max(shape) for shape in module_shapes(sources))
    return max(n for n in range(1, largest + 1) if our_bytes(sources, n) <= budget)


def module_shapes(sources: Sequence[Source]) -> list[tuple[int, int]]:
    return [(up.shape[0], down.shape[1]) for down, up in sources[0].modules.values()]


def our_bytes(sources: Sequence[Source], n: int) -> int:
    """Float32 bytes of a pack of `n` components a side: an upper bound, reached where every stack has full rank."""
    numbers = 0
    for module, (out_features, in_features) in zip(sources[0].modules, module_shapes(sources), strict=True):
        rows = sum(source.modules[module][0].shape[0] for source in sources)
        for dimension in (out_features, in_features):
            most = min(rows, dimension)
            numbers += min(n, most) * (dimension + rows) + most
    return 4 * numbers


def measure_scaling(sources: Sequence[Source], folder: Path) -> Json:
    """The scaling of an adapter that each package writes as a PEFT LoRA again, and the error of it as it is written.

    Of the adapter whose scaling is farthest from 1, at so many components that little else is lost.
    """
    source = max(sources, key=lambda one: abs(one.scaling - 1))
    widths = [width for shape in module_shapes(sources) for width in shape]
    rows = [sum(one.modules[module][0].shape[0] for one in sources) for module in source.modules]
    full = {"delta": min(*widths, *rows), "lorashare": min(*widths, *rows), "vlora": len(sources) - 1}
    found: Json = {}
    for name, k in full.items():
        fitted = METHODS[name]({one.name: one.path for one in sources}, k)
        assert fitted.export is not None
        fitted.export(source.name, folder / name)
        (path,) = (folder / name).rglob("adapter_config.json")
        scaling = scaling_of(json.loads(path.read_text()), path)
        modules = fitted.reconstruct(source.name)
        found[name] = {
            "k": k,
            "exported_scaling": scaling,
            "error_with_source_scaling": delta_error(source, modules),
            "error_as_exported": delta_error(source, modules, scaling),
            "kept": scaling == source.scaling,
        }
    return {"adapter": source.name, "source_scaling": source.scaling, "methods": found}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
