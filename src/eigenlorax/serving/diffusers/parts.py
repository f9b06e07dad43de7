"""Where the modules of a pack are in a pipeline: which of its models, and which layer of that.

A name in a pack is the model's name in the pipeline and the layer's name in the model, `unet.mid_block…`. Names are
compared whole, since both text encoders of one pipeline have the same layers. Nothing here is changed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ModuleNameError, OptionError

TEXT_MODEL = "text_model."
"""What CLIP's text models had around their layers up to transformers 5: files have it, models may have it or not."""
ALONE = ""
"""The name of a model that is in no pipeline."""
_KNOWN = ("unet", "transformer", "text_encoder")


@dataclass(frozen=True, slots=True)
class Part:
    """A model that takes adapters. layers: its modules by name, of adapted ones the outermost."""

    name: str
    model: nn.Module
    layers: Mapping[str, nn.Module]

    def find(self, layer: str) -> str | None:
        """The model's own name of a layer."""
        without = layer.removeprefix(TEXT_MODEL)
        return next((one for one in (layer, without, TEXT_MODEL + without) if one in self.layers), None)


@dataclass(frozen=True, slots=True)
class Place:
    """A layer of a part, where modules of a pack belong."""

    part: Part
    layer: str

    @property
    def module(self) -> nn.Module:
        return self.part.layers[self.layer]

    @property
    def name(self) -> str:
        return f"{self.part.name}.{self.layer}"


@dataclass(frozen=True, slots=True)
class Found:
    """places: of each module that the pipeline has. lacking: those that it has no layer for. absent: those of a model
    that this kind of pipeline has, and this one was made without."""

    places: dict[str, Place] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given, where this is what came back."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def models_of(pipeline: object) -> dict[str, nn.Module | None]:
    """The models of a pipeline that take adapters, by name, or the one model that is passed in its place; None for one
    that a pipeline was made without."""
    if isinstance(pipeline, nn.Module):
        return {ALONE: unwrapped(pipeline)}
    names = getattr(pipeline, "_lora_loadable_modules", None)
    if not names:
        raise OptionError(
            f"{type(pipeline).__name__} is neither a pipeline of diffusers that takes LoRA adapters nor a model. Pass "
            "a pipeline such as StableDiffusionPipeline, or the model itself: load_into(pipe.unet, pack)."
        )
    found = {name: getattr(pipeline, name, None) for name in names}
    return {name: unwrapped(model) if isinstance(model, nn.Module) else None for name, model in found.items()}


def find(modules: Iterable[str], pipeline: object) -> Found:
    """Where modules of a pack, by their names in it, are in a pipeline or a model."""
    models = models_of(pipeline)
    if ALONE in models:
        return _in_model(sorted(modules), models[ALONE])
    parts = {name: _part(name, model) for name, model in models.items() if model is not None}
    # files that are of this model alone may leave its name out
    denoiser = next(iter(models))
    found = Found()
    for module in sorted(modules):
        name, _, layer = module.partition(".")
        if name not in models and not is_part(name):
            name, layer = denoiser, module
        if name in models and models[name] is None:
            found.absent.append(module)
        else:
            _note(found, module, parts.get(name), layer)
    return found


def _in_model(modules: list[str], model: nn.Module | None) -> Found:
    """The model stands for the only one of a pipeline that has its layers."""
    assert model is not None
    by_name: dict[str, dict[str, str]] = {}
    for module in modules:
        name, _, layer = module.partition(".")
        named = is_part(name)
        by_name.setdefault(name if named else type(model).__name__, {})[module] = layer if named else module
    parts = {name: _part(name, model) for name in by_name}
    fitting = [name for name, inside in by_name.items() if any(map(parts[name].find, inside.values()))]
    if len(fitting) > 1:
        raise ModuleNameError(
            f"the model could be the {fitting[0]} or the {fitting[1]} of the pack, whose layers have the same names. "
            "Pass the pipeline, which says which one it is: load_into(pipe, pack)."
        )
    found = Found()
    for name, inside in by_name.items():
        for module, layer in inside.items():
            if fitting and name not in fitting:
                found.absent.append(module)
            else:
                _note(found, module, parts[name], layer)
    return found


def _part(name: str, model: nn.Module) -> Part:
    return Part(name, model, dict(_layers(model)))


def _note(found: Found, module: str, part: Part | None, layer: str) -> None:
    own = part.find(layer) if part is not None else None
    if part is None or own is None:
        found.lacking.append(module)
    else:
        found.places[module] = Place(part, own)


def is_part(name: str) -> bool:
    """Whether a name's first component is that of a model: `unet`, `transformer`, `text_encoder_2`."""
    stem, _, number = name.rpartition("_")
    return name in _KNOWN or (stem in _KNOWN and number.isdecimal())


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name, without what is inside of adapted ones."""
    for name, module in model.named_children():
        yield prefix + name, module
        if not isinstance(module, BaseTunerLayer):
            yield from _layers(module, f"{prefix}{name}.")
