"""The check of `eigenlorax serve-check`: the adapters of a pack that vLLM can serve, and the flags and memory for it.

Nothing here imports vLLM, so that a server can be planned on a machine without it.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

import torch

from ...core import keys, module_names
from ...core.options import check_choice, to_int
from ...errors import WARN_ABOVE, ModuleNameError, OptionError, ShapeError
from ...formats import checks
from ...pack import basis_adapters, loss_warnings
from ...pack.basis_adapters import check_has_basis, check_within
from ...pack.manifest import SubspaceInfo
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from . import lora_support, servable
from . import plan as plans
from .commands import ServeCommand
from .plan import Choices, CoreSize, Layer, Plan, ServedAdapters, Shapes
from .version_notes import version_notes

DTYPES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per entry of the dtypes that vLLM runs models in; `auto` is half precision."""
MOST_IN_MEMORY = 100
"""Maximum of the default for `max_cpu_loras`."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of a server that a user chooses.

    Attributes:
        max_loras: vLLM's `--max-loras`.
        max_cpu_loras: vLLM's `--max-cpu-loras`; None for the number of adapters in the pack, up to 100.
        dtype: vLLM's `--dtype`.
        tensor_parallel_size: vLLM's `--tensor-parallel-size`.
        adapters: Number of adapters that memory is extrapolated to.
        serve_within: Largest error of an adapter that the basis of an entropy-coded pack serves; None for the default
            of `Pack.on_basis`.
    """

    max_loras: int = 8
    max_cpu_loras: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    adapters: int = 1000
    serve_within: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_loras", "tensor_parallel_size", "adapters"):
            if to_int(name, getattr(self, name)) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_cpu_loras is not None and to_int("max_cpu_loras", self.max_cpu_loras) < self.max_loras:
            raise OptionError(
                f"max_cpu_loras must be at least max_loras, {self.max_loras}, got {self.max_cpu_loras}: "
                "adapters in GPU slots also occupy CPU memory."
            )
        check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, slots=True)
class ServingMode:
    """The result for one serving mode: expanded adapters, or a shared basis.

    Attributes:
        served: Number of adapters that can be served.
        refused: The reason why each other adapter cannot be served, by name.
        command: The command that starts the server; None if no adapter can be served.
        largest_error: Largest error of an adapter that is served, against the original; None if there is none.
        worst_adapter: The adapter that has it.
    """

    served: int
    refused: dict[str, str]
    command: str | None
    largest_error: float | None
    worst_adapter: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check. `serve-check --json` prints these fields.

    Attributes:
        pack: The pack.
        model: The base model.
        dtype: Dtype of the model.
        adapters: Number of adapters in the pack.
        expanded: The result for expanded adapters.
        shared: The result for a shared basis.
        within: Largest error of an adapter that the pack's basis serves; None if the pack has no basis.
        basis_errors: Upper bound of the error of each adapter in the pack's basis, against the original; empty if the
            pack has no basis.
        not_held: Modules of the subspace that are not linear layers in vLLM. If there are any, no adapter can be served
            with a shared basis.
        target_modules: `--lora-target-modules` for expanded adapters.
        plan: The memory of both modes.
        notes: Further sentences for the user.
    """

    pack: str
    model: str
    dtype: str
    adapters: int
    expanded: ServingMode
    shared: ServingMode
    within: float | None
    basis_errors: dict[str, float]
    not_held: list[str]
    target_modules: list[str]
    plan: Plan
    notes: list[str]


def check(
    pack: Pack,
    source: str,
    shapes: Shapes,
    options: ServerOptions | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Check:
    """Check which adapters of a pack vLLM can serve on a model, and compute the memory that they need.

    Everything that a server would read is read, so that a damaged pack is noticed.

    Args:
        pack: The pack.
        source: The folder or repository where the server will find the pack.
        shapes: The layers of the model.
        options: The options of the server.
        revision: Revision of the model.
        progress: Function that is called with a stage, the number of steps that are done, and their total.

    Raises:
        PackDamagedError: The pack is damaged.
        ModuleNameError: The model lacks a module of the pack.
        ShapeError: A module has another shape in the model.
    """
    options = options or ServerOptions()
    plans.check_gpus(shapes, options.tensor_parallel_size)
    checks.warn_of_other_model(pack.base_model, shapes.model)
    match = _match_modules(pack, shapes)
    within = check_within(options.serve_within, pack) if pack.basis is not None else None
    if within is None and options.serve_within is not None:
        check_has_basis(pack)
    totals = _read_adapters(pack, match, within, progress or (lambda stage, done, total: None))
    targets = plans.target_modules([*match.cores, *totals.carried] if totals.expanded.ranks else [])
    plan = plans.plan(
        match.layers,
        match.cores,
        targets,
        _choices(options, len(pack)),
        expanded=totals.expanded.adapters,
        shared=totals.shared.adapters,
    )
    model_impl = lora_support.model_impl(shapes.architecture)
    command = ServeCommand(source, shapes.model, revision, options.dtype, plan.choices, within, model_impl)
    return Check(
        pack=source,
        model=shapes.model,
        dtype=shapes.dtype if options.dtype == "auto" else options.dtype,
        adapters=len(pack),
        expanded=totals.expanded.mode(command.expanded(plan.expanded, targets)),
        shared=totals.shared.mode(command.shared(plan.shared)),
        within=within,
        basis_errors=totals.basis_errors,
        not_held=match.not_held,
        target_modules=list(targets),
        plan=plan,
        notes=[
            *_name_notes(pack, shapes, match),
            *_loss_notes(pack),
            *_notes(shapes, match, totals, options, has_histories=bool(pack.histories)),
            *version_notes(pack, lambda modules: _model_names(modules, shapes, pack.base_model), match.no_lora),
        ],
    )


@dataclass(frozen=True, slots=True)
class _ModuleMatch:
    """The modules of a pack in a model.

    Attributes:
        layers: The layers of the model by name, and experts that only the pack has.
        cores: The number of components of each module of the pack, by the same names.
        not_held: Modules of the pack that only expanded adapters can serve.
        no_lora: The reason why vLLM has no LoRA for the model; None if it has.
    """

    layers: dict[str, Layer]
    cores: dict[str, CoreSize]
    not_held: list[str]
    no_lora: str | None


def _match_modules(pack: Pack, shapes: Shapes) -> _ModuleMatch:
    layers, cores, not_held = dict(shapes.layers), {}, []
    # sizes are in the manifest too, but a server reads the bases, and does not start if they are damaged
    modules = pack.training_pack.subspace.modules
    names = _model_names({name: bases.shape for name, bases in modules.items()}, shapes, pack.base_model)
    for name, layer_name in names.items():
        bases = modules[name]
        if layer_name is None:
            layer_name = name
            layers[name] = Layer(*bases.shape)
        layer = layers[layer_name]
        if layer.kind != plans.LINEAR or plans.in_experts(layer_name):
            not_held.append(name)
        cores[layer_name] = CoreSize(bases.down.k, bases.up.k)
    return _ModuleMatch(layers, cores, not_held, lora_support.refusal_reason(shapes.architecture))


def _model_names(
    modules: Mapping[str, tuple[int, int]], shapes: Shapes, base_model: str | None
) -> dict[str, str | None]:
    """Return the name in the model of each module; None for those of experts, whose weights are one tensor.

    Args:
        modules: Shape (out, in) of each module of a pack, or of a version.
        shapes: The layers of the model.
        base_model: Base model that the pack states.

    Raises:
        ModuleNameError: The model lacks a module.
        ShapeError: A module has another shape in the model.
    """
    names = module_names.resolve_all(modules, shapes.layers)
    missing = [name for name, layer in names.items() if layer is None and not _is_expert(name, shapes)]
    remedy = "Pass the base model of the pack's adapters: model= (--model)" + (
        f"; the pack states {base_model!r}." if base_model else "."
    )
    if missing:
        raise ModuleNameError(
            f"{shapes.model} lacks {len(missing)} of the {len(names)} modules of the pack, such as {missing[0]!r}. "
            f"{remedy}"
        )
    for name, layer_name in names.items():
        layer = shapes.layers[layer_name] if layer_name is not None else None
        if layer is not None and (layer.out, layer.input) != modules[name]:
            raise ShapeError(
                f"module {name} of the pack has a weight of {modules[name][0]} × {modules[name][1]}, in "
                f"{shapes.model} it is {layer.out} × {layer.input}. {remedy}"
            )
    return names


def _is_expert(name: str, shapes: Shapes) -> bool:
    """Return whether a module can belong to experts, whose weights are one tensor in transformers."""
    return bool(shapes.experts) and plans.in_experts(name)


@dataclass(slots=True)
class _ModeTotals:
    """Sums over the adapters that are served in one mode.

    Attributes:
        file_itemsize: Bytes per entry in the files that vLLM reads.
        ranks: Rank of each adapter.
        refused: The reason why each other adapter cannot be served.
        errors: Error of each adapter against the original, or an upper bound of it.
        numbers: Number of entries of all adapters together.
    """

    file_itemsize: int
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    numbers: int = 0

    @property
    def adapters(self) -> ServedAdapters:
        """Number, largest rank and size of the adapters."""
        return ServedAdapters(len(self.ranks), max(self.ranks.values(), default=0), self.numbers, self.file_itemsize)

    def mode(self, command: str | None) -> ServingMode:
        """Return the result for the mode, given the command that starts the server."""
        worst = max(self.errors, key=lambda name: self.errors[name], default=None)
        return ServingMode(
            len(self.ranks), self.refused, command, self.errors[worst] if worst is not None else None, worst
        )


@dataclass(slots=True)
class _Totals:
    """Sums over the adapters of both modes.

    Attributes:
        expanded: Sums of expanded adapters.
        shared: Sums of adapters with a shared basis.
        carried: Modules of the model for which adapters have LoRAs outside the subspace.
        basis_errors: Upper bounds of errors in the pack's basis, by adapter.
    """

    expanded: _ModeTotals
    shared: _ModeTotals
    carried: set[str] = field(default_factory=set)
    basis_errors: dict[str, float] = field(default_factory=dict)


def _read_adapters(
    pack: Pack, match: _ModuleMatch, within: float | None, progress: Callable[[str, int, int], None]
) -> _Totals:
    # the dtypes of `Pack.adapter` and `lora_on_cores`
    widest = torch.promote_types(torch.promote_types(pack.dtype, pack.coefficient_dtype), torch.float32)
    totals = _Totals(_ModeTotals(widest.itemsize), _ModeTotals(torch.float32.itemsize))
    for done, name in enumerate(pack.names):
        progress("reading adapters", done, len(pack))
        packed = pack.packed(name)
        carried = module_names.resolve_all(
            sorted({keys.parse_peft_key(key).module for key in packed.carried}), match.layers
        )
        _add_expanded(totals, packed, carried, match.no_lora)
        inexact = None
        if within is not None:
            packed = basis_adapters.project(pack, name)
            totals.basis_errors[name] = packed.record.delta_error
            inexact = basis_adapters.refusal_reason(packed, within)
        _add_shared(totals.shared, packed, pack.training_pack.info, match, inexact)
    return totals


def _add_expanded(
    totals: _Totals, packed: PackedAdapter, carried: Mapping[str, str | None], no_lora: str | None
) -> None:
    """Add an adapter to the sums of expanded adapters, or to the refused ones.

    Args:
        totals: The sums, which are changed.
        packed: The adapter.
        carried: Name in the model of each module for which the adapter has a LoRA outside the subspace.
        no_lora: The reason why vLLM has no LoRA for the model; None if it has.
    """
    reason = no_lora or servable.refusal_reason(packed, shared=False)
    missing = [module for module, layer_name in carried.items() if layer_name is None]
    if reason is None and missing:
        reason = f"the model lacks its module {missing[0]!r}"
    if reason is not None:
        totals.expanded.refused[packed.name] = reason
        return
    totals.expanded.ranks[packed.name] = servable.expanded_rank(packed)
    totals.expanded.errors[packed.name] = packed.record.delta_error
    totals.expanded.numbers += packed.record.lora_numbers + sum(tensor.numel() for tensor in packed.carried.values())
    totals.carried.update(layer_name for layer_name in carried.values() if layer_name is not None)


def _add_shared(
    shared: _ModeTotals, packed: PackedAdapter, info: SubspaceInfo, match: _ModuleMatch, inexact: str | None
) -> None:
    """Add an adapter to the sums with a shared basis, or to the refused ones.

    Args:
        shared: The sums, which are changed.
        packed: The adapter.
        info: The subspace that the model contains.
        match: Modules of the pack in the model.
        inexact: Why the basis does not represent the adapter well enough; None if it does.
    """
    # the reasons of the model and of the adapter come first, because fitting the pack again would not help then
    reason = match.no_lora or servable.refusal_reason(packed, shared=True) or _shared_basis_reason(match) or inexact
    if reason is not None:
        shared.refused[packed.name] = reason
        return
    shared.ranks[packed.name] = servable.shared_rank(packed)
    shared.errors[packed.name] = packed.record.delta_error
    for module, coefficients in packed.coefficients.items():
        k_down, k_up = (info.modules[packed.subspace_names[module]][side].k for side in keys.SIDES)
        shared.numbers += min(coefficients.rank, k_down, k_up) * (k_down + k_up)


def _shared_basis_reason(match: _ModuleMatch) -> str | None:
    """Return why a server with a shared basis would not start, with a remedy; None if it would."""
    if not match.not_held:
        return None
    # one pattern for all experts, of which there are thousands
    patterns = sorted({"*experts.*" if plans.in_experts(name) else name for name in match.not_held})
    options = shlex.join(word for pattern in patterns for word in ("--exclude-module", pattern))
    return (
        f"the model has no linear layer, as bases need it, for {len(match.not_held)} of the "
        f"{len(match.cores)} modules of the subspace, such as {match.not_held[0]!r}; exclude them when fitting "
        f"(eigenlorax fit … --for serving {options}), and adapters that have no LoRA there will be served"
    )


def _choices(options: ServerOptions, adapters: int) -> Choices:
    return Choices(
        max_loras=options.max_loras,
        max_cpu_loras=options.max_cpu_loras or max(options.max_loras, min(adapters, MOST_IN_MEMORY)),
        many=options.adapters,
        itemsize=DTYPES[options.dtype],
        gpus=options.tensor_parallel_size,
    )


def _name_notes(pack: Pack, shapes: Shapes, match: _ModuleMatch) -> list[str]:
    """Return a note if names differ from the model's. Suffixes are compared here, but vLLM needs full names."""
    renamed = [name for name in pack.info.modules if name not in match.cores]
    if not renamed:
        return []
    return [
        f"{renamed[0]!r} and {len(renamed) - 1} more modules of the pack have other names in {shapes.model}. vLLM's "
        "own tables rename the modules of some models; for other models the server does not start."
    ]


def _loss_notes(pack: Pack) -> list[str]:
    """Return a note that names the adapters of which the pack holds little."""
    losses = loss_warnings.describe_losses(pack.records, WARN_ABOVE)
    return [f"{losses} An update of zeros has an error of 1."] if losses else []


def _notes(
    shapes: Shapes, match: _ModuleMatch, totals: _Totals, options: ServerOptions, *, has_histories: bool
) -> list[str]:
    """Return notes about adapters, division among GPUs, experts and large ranks."""
    notes = []
    if not totals.expanded.ranks and not totals.shared.ranks and (totals.expanded.refused or not has_histories):
        notes.append("no adapter of the pack can be served.")
    if shapes.whole and options.tensor_parallel_size > 1:
        notes.append(
            f"the config of {shapes.model} does not say how its layers are divided among GPUs: each is counted "
            "in full on each GPU, which is an upper bound."
        )
    note = lora_support.model_impl_note(shapes.architecture)
    notes += [note] if note else []
    if shapes.experts and match.no_lora is None:
        notes.append(lora_support.experts_note(shapes.model))
    if any(plans.in_experts(name) for name in match.cores):
        notes.append(
            "only experts that the pack has are counted; vLLM allocates all experts of a layer, so that a slot "
            "can be larger."
        )
    for mode, sums in (("on demand", totals.expanded), ("with a shared basis", totals.shared)):
        note = _rank_note(mode, sums.ranks)
        notes += [note] if note else []
    return notes


def _rank_note(mode: str, ranks: Mapping[str, int]) -> str | None:
    """Return a note if few adapters of a large rank make all slots larger."""
    if not ranks:
        return None
    typical = plans.max_lora_rank(median_low(ranks.values()))
    large = [name for name, rank in ranks.items() if plans.max_lora_rank(rank) > typical]
    if not large:
        return None
    more = f" and {len(large) - 1} more" if len(large) > 1 else ""
    return (
        f"{mode}, slots are as large as {max(ranks, key=lambda name: ranks[name])!r} needs, of rank "
        f"{max(ranks.values())}; without {large[0]!r}{more}, --max-lora-rank {typical} is enough."
    )
