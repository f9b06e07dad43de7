"""`eigenlorax serve-check`: check which adapters of a pack vLLM can serve, with which flags and how much memory."""

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.printable import first_names
from . import arguments, console, spelling, verbs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..serving.vllm.checking import Check, ServingMode
    from ..serving.vllm.plan import MemoryUse, Plan

EXAMPLES = """
eigenlorax serve-check pack/ --model demo/model
eigenlorax serve-check pack/ --model demo/model --max-loras 32 --json
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, serve_check, EXAMPLES)


def serve_check(
    pack: arguments.PackSource,
    model: arguments.Model = None,
    max_loras: Annotated[
        int, typer.Option(metavar="N", help="vLLM's --max-loras: maximum number of adapters in one batch.")
    ] = 8,
    max_cpu_loras: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="vLLM's --max-cpu-loras: adapters in the CPU memory of each worker (default: all of the pack, up to "
            "100).",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Dtype of the model: auto, bfloat16, float16 or float32.")
    ] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(metavar="N", help="Number of GPUs that share the model.")] = 1,
    serve_within: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of an entropy-coded pack with a basis: largest error of an adapter that the basis serves, 0 < X < 1 "
            "(default: 0.1, or twice the error bound of the pack).",
        ),
    ] = None,
    adapters: Annotated[int, typer.Option(metavar="N", help="Collection size used to extrapolate memory.")] = 1000,
    revision: arguments.PackRevision = None,
    json: arguments.Json = False,
) -> None:
    """Check which adapters of a pack vLLM can serve, with which flags and how much memory. Does not need vLLM."""
    from ..pack.pack import Pack
    from ..serving.vllm.checking import ServerOptions, check
    from ..train import models, shapes

    settings = ServerOptions(max_loras, max_cpu_loras, dtype, tensor_parallel_size, adapters, serve_within)
    with console.working() as progress:
        opened = Pack.from_pretrained(pack, revision=revision)
        base, base_revision = models.resolve_base_model(opened, model)
        source = f"{pack}@{revision}" if revision else pack
        checked = check(
            opened, source, shapes.load_shapes(base, base_revision), settings, revision=base_revision, progress=progress
        )
    if json:
        console.print_json(asdict(checked))
    else:
        _print(checked)


def _print(checked: "Check") -> None:
    for note in checked.notes:
        console.note(note)
    rows = [
        ("model", f"{checked.model}, in {checked.dtype}"),
        ("served on demand", f"{checked.expanded.served} of {checked.adapters}"),
        *_largest_error(checked.expanded),
        ("served with a shared basis", f"{checked.shared.served} of {checked.adapters}"),
        *_largest_error(checked.shared),
    ]
    if checked.within is not None:
        rows.append(("  error in the basis, at most", _basis_errors(checked)))
    console.print_rows(f"pack {checked.pack}", rows)
    # reasons are long: in the table they would widen every row
    modes = (("on demand", checked.expanded), ("with a shared basis", checked.shared))
    for title, mode in modes:
        for line in _group_by_reason(mode.refused):
            console.say(f"Not served {title}: {line}")
    if checked.plan.expanded is not None or checked.plan.shared is not None:
        _print_plan(checked.plan)
    for title, mode in modes:
        if mode.command is not None:
            for line in ("", f"{title.capitalize()}:", ""):
                console.say(line)
            console.print_command(f"  {mode.command}")


def _largest_error(mode: "ServingMode") -> list[tuple[str, str]]:
    """Return the row of the largest error of an adapter that is served; none if no adapter is."""
    if mode.largest_error is None:
        return []
    return [("  largest error", f"{console.format_error(mode.largest_error)} ({mode.worst_adapter})")]


def _basis_errors(checked: "Check") -> str:
    """Return the range of the errors in the pack's basis, and the largest one that is served."""
    errors = sorted(checked.basis_errors.values())
    measured = f"{errors[0]:.3f} to {errors[-1]:.3f}, median {median(errors):.3f}; " if errors else ""
    return f"{measured}served up to {checked.within:g}"


def _group_by_reason(refused: "Mapping[str, str]") -> list[str]:
    """Return one sentence per reason, sorted by the number of adapters, largest first."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names_by_reason.setdefault(spelling.on_command_line(reason), []).append(name)
    return [
        f"{f'each of {len(names):,} adapters' if len(names) > 1 else '1 adapter'} ({first_names(names, 3)}): {reason}."
        for reason, names in sorted(names_by_reason.items(), key=lambda group: -len(group[1]))
    ]


def _print_plan(plan: "Plan") -> None:
    choices = plan.choices
    rows = [
        ("one slot", "slot_bytes"),
        (f"{choices.max_loras:,} slots", "slots_bytes"),
        ("the bases, once", "basis_bytes"),
        (f"{choices.max_loras:,} slots and the bases", "gpu_bytes"),
        (f"{choices.many:,} slots and the bases", "many_slots_bytes"),
        ("an adapter in memory", "adapter_bytes"),
        (f"{choices.max_cpu_loras:,} adapters in memory", "host_bytes"),
        (f"{choices.many:,} adapters in memory", "many_host_bytes"),
        (f"{choices.many:,} adapters in the cache", "many_cached_bytes"),
    ]
    table = [
        (label, _bytes(plan.expanded, name), _bytes(plan.shared, name), _times(plan, name)) for label, name in rows
    ]
    console.print_table("", ("bytes", "on demand", "shared basis", "times less"), table, numbers=(1, 2, 3))
    for sentence in _plan_sentences(plan):
        console.say(sentence)


def _bytes(tier: "MemoryUse | None", name: str) -> str:
    return f"{getattr(tier, name):,}" if tier is not None else "–"


def _times(plan: "Plan", name: str) -> str:
    """Return the bytes on demand divided by shared-basis bytes, or "" if either is missing."""
    if plan.expanded is None or plan.shared is None or name == "basis_bytes":
        return ""
    shared = getattr(plan.shared, name)
    return f"{getattr(plan.expanded, name) / shared:,.2f}" if shared else ""


def _plan_sentences(plan: "Plan") -> list[str]:
    """Return sentences that explain the table."""
    sentences = [
        "Slots and bases are on each GPU, adapters in memory in each worker, those in the cache once. Bases are in the "
        "dtype of the model, without spectra."
    ]
    unrestricted = plan.unrestricted_slot_bytes or 0
    if plan.expanded is not None and unrestricted > plan.expanded.slot_bytes:
        sentences.append(f"Without --lora-target-modules a slot on demand would take {unrestricted:,} bytes or more.")
    if plan.expanded is not None and plan.shared is not None:
        sentences.append(_compare(plan, plan.expanded.gpu_bytes, plan.shared.gpu_bytes))
    return sentences


def _compare(plan: "Plan", expanded: int, shared: int) -> str:
    """Return a sentence that compares the GPU memory of both modes, and gives the break-even number of slots."""
    n = plan.choices.max_loras
    slots = f"{n:,} slot{'s' * (n > 1)}"
    if plan.from_slots is None:
        return (
            "However many slots there are, adapters on demand take less of a GPU: the subspace has too many components."
        )
    if n >= plan.from_slots:
        less = f"With {slots} the shared basis takes {expanded / shared:,.1f} times less of a GPU"
        return less + (f"; with fewer than {plan.from_slots:,} it would take more." if plan.from_slots > 1 else ".")
    less = f"adapters on demand take {shared / expanded:,.1f} times less of a GPU"
    return (
        f"With {slots} the bases cost more than they save: {less}. From {plan.from_slots:,} on, the shared basis does."
    )
