"""`eigenlorax merge`: merge adapters into one LoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterNameError, OptionError
from . import arguments, console, verbs

if TYPE_CHECKING:
    from ..merging.merge import MergedAdapter
    from ..pack.pack import Pack
    from ..pack.record import Record

EXAMPLES = """
eigenlorax merge pack/ clinc-home clinc-work -o merged/
eigenlorax merge pack/ clinc-home clinc-work --method ties --rank 4 -o ties/
eigenlorax merge demo/adapters/clinc-home demo/adapters/clinc-work -o sum/
"""

MAX_PAIRS = 10
"""Number of pairs of adapters that are printed, those with the largest cosines."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, merge, EXAMPLES)


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A pack and names of its adapters or versions; or adapter folders, LoRA files, URLs, Hub ids, or "
            "NAME=PATH.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="PEFT folder to write the merged LoRA to; or NAME.safetensors for image LoRAs of one file format.",
            parser=arguments.path,
        ),
    ],
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help="Method: mean, task-arithmetic, ties, dare, knots, tsv or iso-c."),
    ] = "mean",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="A weight for each adapter, in their order (default: 1 each). mean divides them by their sum.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="Rank of the merged LoRA (default: the largest rank of an adapter)."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of entries that ties, dare and knots keep, above 0 and at most 1 (default: 0.2; dare: 0.5).",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Seed of the entries that dare keeps, and of the random adapters in the table."),
    ] = 0,
    head: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Adapter whose task head the merged LoRA has (default: none)."),
    ] = None,
    add: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add the merged LoRA to the pack as well, under this name."),
    ] = None,
    same_base: arguments.SameBase = False,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Merge adapters into one LoRA, and show what it keeps of each."""
    from ..core import atomic_files, keys
    from ..pack import hub
    from ..pack.pack import Pack

    pack = sources[0] if hub.is_pack(sources[0]) else None
    if add is not None and pack is None:
        raise OptionError("--add adds the merged LoRA to a pack: pass a pack as the first argument.")
    merging: dict[str, Any] = {
        "method": method,
        "weights": None if weights is None else _numbers(weights),
        "rank": rank,
        "density": density,
        "seed": seed,
        "head": head,
        "name": "merged" if add is None else add,
        "same_base": same_base,
    }
    if add is not None and not Path(sources[0]).is_dir():
        raise OptionError(f"--add changes a pack on this machine, and {pack} is not. Download it: eigenlorax pull.")
    if output.suffix == keys.LORA_SUFFIX:
        atomic_files.check_file_free(output, overwrite)
    else:
        atomic_files.check_free(output, overwrite)
    with console.working("The merge") as progress:
        if pack is not None:
            opened = Pack.from_pretrained(pack, revision=revision)
            _check_names(opened, sources[1:], add)
            merged = opened.merge(sources[1:], progress=progress, **merging)
        else:
            arguments.check_adapters(sources)
            reading = {"allow_pickle": allow_pickle, "base_config": base_config, "revision": revision}
            merged = _merge_files(sources, merging, progress, **reading)
        # the result is written last, so that nothing is left behind where it cannot be added
        record = None if add is None or pack is None else _add(pack, add, merged)
        merged.save(output, overwrite=overwrite)
    if json:
        added = {} if record is None else {"added": {add: asdict(record)}}
        console.print_json({"written": str(output), **_as_json(merged), **added})
    else:
        _print_merge(output, merged)
        if record is not None:
            console.print_rows(
                "", [(f"added to {pack}", f"{add}, delta error {console.format_error(record.delta_error)}")]
            )


def _check_names(pack: "Pack", names: Sequence[str], new_name: str | None) -> None:
    """Raise an error unless two adapters of a pack are named, and the merged one can be added under its name."""
    from ..core import keys

    if len(names) < 2:
        known = ", ".join(pack.names[:10]) + (" …" if len(pack.names) > 10 else "")
        raise OptionError(f"name two or more adapters of the pack after it. It has: {known or 'no adapters'}.")
    if new_name is None:
        return
    keys.check_name(new_name)
    if new_name in (*pack.names, *pack.histories):
        raise AdapterNameError(f"the pack already has an adapter or history {new_name!r}. Pass another name as --add.")
    if not pack.info.modules:
        raise OptionError("--add needs a pack with bases, and this one has histories alone. Leave --add out.")


def _numbers(text: str) -> list[float]:
    """Parse the weights, numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--weights {text!r}: expected a number for each adapter, such as 1,0.5,0.25.") from error


def _merge_files(adapters: Sequence[str], merging: Mapping[str, Any], progress: Any, **reading: Any) -> "MergedAdapter":
    from ..merging.merge import merge

    return merge(list(adapters), progress=progress, **merging, **reading)


def _add(pack: str, name: str, merged: "MergedAdapter") -> "Record":
    """Add a merged LoRA to a pack, whole or within the error bound of the pack, and return its record."""
    from ..pack.pack import Pack

    with Pack.edit(Path(pack)) as opened:
        return opened.add(merged.adapter, name=name, residual=not opened.is_coded)


def _as_json(merged: "MergedAdapter") -> dict[str, Any]:
    return {
        "method": merged.method,
        "weights": dict(merged.weights),
        "density": merged.density,
        "coordinates": merged.coordinates,
        "rank": max(merged.adapter.ranks),
        "full_rank": merged.full_rank,
        "cut_error": merged.cut_error,
        "heads": {name: sorted(tensors) for name, tensors in merged.heads.items()},
        **asdict(merged.comparison),
    }


def _print_merge(output: Path, merged: "MergedAdapter") -> None:
    comparison, rank = merged.comparison, max(merged.adapter.ranks)
    console.print_rows(
        f"written to {output}",
        [
            ("method", merged.method if merged.density is None else f"{merged.method}, density {merged.density:g}"),
            ("rank", f"{rank}, cut from {merged.full_rank}" if merged.full_rank > rank else str(rank)),
            ("error of the cut", console.format_error(merged.cut_error)),
            ("norm", f"{comparison.norm:.4g} (mean of the adapters: {comparison.mean_norm:.4g})"),
            *([] if merged.coordinates is None else [("coordinates", merged.coordinates)]),
        ],
    )
    console.print_table(
        "share kept of each adapter",
        ("adapter", "weight", "kept", "by the mean", "among random", "sign agreement"),
        [
            (
                source.name,
                f"{merged.weights[source.name]:g}",
                *(
                    _share(share)
                    for share in (source.kept, source.kept_by_mean, source.kept_among_random, source.sign_agreement)
                ),
            )
            for source in comparison.sources
        ],
        numbers=(1, 2, 3, 4, 5),
    )
    console.print_table(
        "overlap of adapters",
        ("adapter", "and", "cosine", "inputs", "outputs"),
        [
            (pair.first, pair.second, *map(_share, (pair.cosine, pair.input_overlap, pair.output_overlap)))
            for pair in sorted(comparison.pairs, key=lambda pair: -abs(pair.cosine or 0.0))[:MAX_PAIRS]
        ],
        numbers=(2, 3, 4),
    )
    for note in _notes(merged):
        console.note(note)


def _notes(merged: "MergedAdapter") -> list[str]:
    """Return what a user must know of a merge."""
    comparison = merged.comparison
    sampled = ""
    if comparison.random_modules < comparison.modules:
        sampled = f" It was computed on {comparison.random_modules} of {comparison.modules} modules."
    notes = [
        "'kept' is ⟨merge, update⟩ / ‖update‖², and 'among random' what the method keeps of an adapter if random "
        f"adapters of equal norm take the place of the others.{sampled} A merge that keeps no more than that has found "
        "nothing in common. What it is worth on a task, only data can tell: `eigenlorax evaluate`, beside the mean."
    ]
    equal = [pair for pair in comparison.pairs if pair.cosine is not None and pair.cosine > 1 - 1e-9]
    if equal:
        notes.append(f"{equal[0].first} and {equal[0].second} have the same update, up to its size.")
    untrained = [source.name for source in comparison.sources if source.kept is None]
    if untrained:
        notes.append(f"untrained (every update is zero): {', '.join(untrained)}.")
    if merged.heads:
        names = ", ".join(merged.heads)
        notes.append(
            f"heads cannot be merged. Those of {names} are in head.NAME.safetensors"
            + (", and the merged LoRA has none (`--head NAME` chooses one)." if not merged.adapter.heads else ".")
        )
    return notes


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"
