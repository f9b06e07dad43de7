"""Adapters that are computed from other adapters: which can be, and the config and head of the result."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..core.adapter import Adapter, LoRAFactors, from_factors
from ..core.keys import check_name
from ..core.options import to_float, to_int
from ..core.origin import Origin
from ..errors import FormatError, OptionError
from ..formats import checks, lora_config

_OTHERS = "Only adapters of one base model can be merged. Leave the others out"


def check_adapters(adapters: Iterable[Adapter]) -> None:
    """Raise `OptionError` unless adapters are a sequence of `Adapter`s."""
    if isinstance(adapters, str | Adapter) or not isinstance(adapters, Iterable):
        raise OptionError(f"adapters must be a list of Adapters, got {type(adapters).__name__}.")
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise OptionError(
                f"adapters must be Adapters, as eigenlorax.read_adapter returns them, got {type(adapter).__name__}."
            )


def check_combinable(adapters: Sequence[Adapter], same_base: bool) -> None:
    """Raise an error unless the updates of adapters can be added.

    Args:
        adapters: The adapters.
        same_base: Whether different base models are accepted as names of one model.

    Raises:
        BaseModelError, ShapeError: The adapters do not belong to one base model.
        FormatError: An adapter has tensors that cannot be added, such as the magnitudes of DoRA.
        NonFiniteError: A tensor has NaN or Inf.
        OptionError: One of them is no `Adapter`.
    """
    check_adapters(adapters)
    for adapter in adapters:
        if adapter.carried:
            raise FormatError(
                f"adapter {adapter.name!r} has tensors that are no update of a linear or convolutional layer, such as "
                f"{min(adapter.carried)}: they cannot be merged. Leave this adapter out."
            )
    checks.check_one_base([checks.StatedBase.of(adapter) for adapter in adapters], same_base, remedy=_OTHERS)
    checks.check_one_family(adapters, remedy=f"{_OTHERS}.")
    names = {module: module for adapter in adapters for module in adapter.specs}
    checks.check_one_shape(adapters, names, remedy=f"{_OTHERS}.")
    for adapter in adapters:
        checks.scan(adapter)


def checked_weights(weights: Sequence[float], adapters: Sequence[Adapter]) -> list[float]:
    """Return the weights of adapters as floats. Raises `OptionError` unless there is a finite one for each."""
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise OptionError(f"weights must be a list of numbers, got {weights!r}.")
    numbers = [to_float("a weight", weight) for weight in weights]
    if len(numbers) != len(adapters):
        raise OptionError(f"weights has {len(numbers)} numbers for {len(adapters)} adapters: pass one for each.")
    if not all(math.isfinite(number) for number in numbers):
        raise OptionError(f"weights must be finite, got {numbers}.")
    return numbers


def checked_rank(rank: int, adapters: Sequence[Adapter]) -> int:
    """Return the rank of a result. Raises `OptionError` if no module can have it."""
    number = to_int("rank", rank)
    widest = max(min(spec.in_features, spec.out_features) for adapter in adapters for spec in adapter.specs.values())
    if not 1 <= number <= widest:
        raise OptionError(f"rank must be from 1 to {widest}, the largest rank that a module can have, got {number}.")
    return number


def derived_adapter(
    name: str, modules: Mapping[str, LoRAFactors], adapters: Sequence[Adapter], *, head: Adapter | None
) -> Adapter:
    """Return an adapter with new factors, for the base model and the task type of the adapters it comes from.

    It has the file format of the adapters, if that is one.

    Args:
        name: Name of the new adapter.
        modules: Its factors.
        adapters: The adapters it comes from. The first one that states a field is followed.
        head: The one whose head it has; None for no head.

    Raises:
        AdapterNameError: `name` is no valid name.
        OptionError: `name` is no text.
    """
    base_model = next((adapter.base_model for adapter in adapters if adapter.base_model), None)
    revision = next((adapter.revision for adapter in adapters if adapter.base_model == base_model), None)
    if not isinstance(name, str):
        raise OptionError(f"name must be a text, got {name!r}.")
    made = from_factors(check_name(name), modules, base_model=base_model, revision=revision)
    fields = json.loads(lora_config.make(made))
    # the head decides on the task
    stating = [head, *adapters] if head is not None else adapters
    for key in ("task_type", "fan_in_fan_out"):
        fields[key] = next((adapter.config[key] for adapter in stating if adapter.config.get(key)), fields.get(key))
    if head is not None and head.config.get("modules_to_save"):
        fields["modules_to_save"] = head.config["modules_to_save"]
    if head is not None and head.config.get("bias"):
        # trained biases are among the tensors of a head
        fields["bias"] = head.config["bias"]
    derived = from_factors(
        name,
        modules,
        base_model=base_model,
        revision=revision,
        heads=head.heads if head is not None else {},
        source_config=json.dumps({key: value for key, value in fields.items() if value is not None}, indent=2),
    )
    origins = [adapter.origin for adapter in adapters if adapter.origin is not None]
    if len(origins) == len(adapters) and len({origin.format for origin in origins}) == 1:
        # image LoRAs of one format have a result of that format; metadata of a source are not true of it
        derived = replace(derived, origin=Origin(origins[0].format, origins[0].spelling))
    return derived
