"""`eigenlorax serve-check`: what vLLM will serve of a pack, with which flags, and what that takes."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..serving.vllm.checking import Check
    from ..serving.vllm.plan import Plan, Tier

EPILOG = """Examples:

  eigenlorax serve-check pack/ --model meta-llama/Meta-Llama-3-8B

  eigenlorax serve-check pack/ --max-loras 32 --tensor-parallel-size 2

  eigenlorax serve-check org/pack --json"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(serve_check)


def serve_check(
    pack: console.PackSource,
    model: console.Model = None,
    max_loras: Annotated[int, typer.Option(metavar="N", help="Slots: adapters that one batch may have.")] = 8,
    max_cpu_loras: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Adapters in the memory of each worker (default: all of the pack, 100 at most)."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="That of the model: auto, bfloat16, float16 or float32.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(metavar="N", help="GPUs that share the model.")] = 1,
    adapters: Annotated[int, typer.Option(metavar="N", help="How many adapters the last figures are for.")] = 1000,
    revision: console.PackRevision = None,
    json: console.Json = False,
) -> None:
    """Say what vLLM will serve of a pack, with which flags, and what that takes; vLLM is not needed for it."""
    from ..pack.pack import Pack
    from ..serving.vllm.checking import Asked, check
    from ..train import models, shapes

    asked = Asked(max_loras, max_cpu_loras, dtype, tensor_parallel_size, adapters)
    with console.working() as progress:
        opened = Pack.from_pretrained(pack, revision=revision)
        base, base_revision = models.of_pack(opened, model)
        source = f"{pack}@{revision}" if revision else pack
        found = check(
            opened, source, shapes.shapes_of(base, base_revision), asked, revision=base_revision, progress=progress
        )
    if json:
        console.print_json(asdict(found))
    else:
        _show(found)


def _show(found: "Check") -> None:
    for note in found.notes:
        console.note(note)
    rows = [
        ("model", f"{found.model}, in {found.dtype}"),
        ("served expanded", f"{found.expanded.served} of {found.adapters}"),
        ("served with a shared basis", f"{found.shared.served} of {found.adapters}"),
    ]
    console.print_rows(f"pack {found.pack}", rows)
    # below the table, which is as wide as its longest row
    for title, way in (("Not served expanded", found.expanded), ("Not served with a shared basis", found.shared)):
        for line in _by_reason(way.refused):
            console.say(f"{title}: {line}")
    if found.plan.expanded is not None or found.plan.shared is not None:
        _show_plan(found.plan)
    for title, way in (("Expanded", found.expanded), ("With a shared basis", found.shared)):
        if way.command is not None:
            for line in ("", f"{title}:", ""):
                console.say(line)
            console.print_command(f"  {way.command}")


def _by_reason(refused: "Mapping[str, str]") -> list[str]:
    """A sentence for each reason, that of the most adapters first."""
    found: dict[str, list[str]] = {}
    for name, why in refused.items():
        found.setdefault(why, []).append(name)
    return [
        f"{len(names):,} adapter{'s' * (len(names) > 1)} ({_some(names)}): {why}."
        for why, names in sorted(found.items(), key=lambda one: -len(one[1]))
    ]


def _some(names: "Sequence[str]") -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _show_plan(plan: "Plan") -> None:
    asked = plan.choices
    rows = [
        ("one slot", "slot_bytes"),
        (f"{asked.max_loras:,} slots", "slots_bytes"),
        ("the bases, once", "basis_bytes"),
        (f"{asked.max_loras:,} slots and the bases", "gpu_bytes"),
        (f"{asked.many:,} slots and the bases", "many_slots_bytes"),
        ("an adapter in memory", "adapter_bytes"),
        (f"{asked.max_cpu_loras:,} adapters in memory", "host_bytes"),
        (f"{asked.many:,} adapters in memory", "many_host_bytes"),
        (f"{asked.many:,} adapters in the cache", "many_cached_bytes"),
    ]
    table = [
        (label, _bytes(plan.expanded, name), _bytes(plan.shared, name), _times(plan, name)) for label, name in rows
    ]
    console.print_table("", ("bytes", "expanded", "shared basis", "times less"), table, numbers=(1, 2, 3))
    for sentence in _said(plan):
        console.say(sentence)


def _bytes(tier: "Tier | None", name: str) -> str:
    return f"{getattr(tier, name):,}" if tier is not None else "–"


def _times(plan: "Plan", name: str) -> str:
    """How many times less the shared basis takes: below one where it takes more."""
    if plan.expanded is None or plan.shared is None or name == "basis_bytes":
        return ""
    shared = getattr(plan.shared, name)
    return f"{getattr(plan.expanded, name) / shared:,.2f}" if shared else ""


def _said(plan: "Plan") -> list[str]:
    """What the table means, in sentences."""
    said = ["Slots and bases are on each GPU, adapters in memory in each worker, those in the cache once."]
    unrestricted = plan.unrestricted_slot_bytes or 0
    if plan.expanded is not None and unrestricted > plan.expanded.slot_bytes:
        said.append(f"Without --lora-target-modules an expanded slot would take {unrestricted:,} bytes or more.")
    if plan.expanded is not None and plan.shared is not None:
        said.append(_compared(plan, plan.expanded.gpu_bytes, plan.shared.gpu_bytes))
    return said


def _compared(plan: "Plan", expanded: int, shared: int) -> str:
    n = plan.choices.max_loras
    slots = f"{n:,} slot{'s' * (n > 1)}"
    if plan.from_slots is None:
        return (
            "However many slots there are, expanded adapters take less of a GPU: the subspace has too many components."
        )
    if n >= plan.from_slots:
        less = f"With {slots} the shared basis takes {expanded / shared:,.1f} times less of a GPU"
        return less + (f"; with fewer than {plan.from_slots:,} it would take more." if plan.from_slots > 1 else ".")
    less = f"expanded adapters take {shared / expanded:,.1f} times less of a GPU"
    return (
        f"With {slots} the bases cost more than they save: {less}. From {plan.from_slots:,} on, the shared basis does."
    )
