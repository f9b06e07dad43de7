"""The layers of a pipeline that the modules of a pack belong to.

A module name in a pack is the name of a model in the pipeline and the name of a layer in that model, such as
`unet.mid_block…`. Full names are compared, because both text encoders of a pipeline have the same layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ModuleNameError, OptionError

TEXT_MODEL = "text_model."
"""Prefix of the layers of CLIP's text models up to transformers 5. Files have it; models may have it or not."""
STANDALONE = ""
"""Name of a model that is not part of a pipeline."""
_MODEL_NAMES = ("unet", "transformer", "text_encoder")


@dataclass(frozen=True, slots=True)
class PipelineModel:
    """A model that takes adapters.

    Args:
        name: Its name in the pipeline.
        model: The model.
        layers: Its modules by name; of adapted layers the outermost module.
    """

    name: str
    model: nn.Module
    layers: Mapping[str, nn.Module]

    def find(self, layer: str) -> str | None:
        """Return the model's own name of a layer, with or without `TEXT_MODEL`; None if it has no such layer."""
        short = layer.removeprefix(TEXT_MODEL)
        return next((name for name in (layer, short, TEXT_MODEL + short) if name in self.layers), None)


@dataclass(frozen=True, slots=True)
class PipelineLayer:
    """A layer of a model of a pipeline."""

    owner: PipelineModel
    layer: str

    @property
    def module(self) -> nn.Module:
        return self.owner.layers[self.layer]

    @property
    def name(self) -> str:
        return f"{self.owner.name}.{self.layer}"


@dataclass(frozen=True, slots=True)
class LayerMatch:
    """The layers of a pipeline for the modules of a pack.

    Args:
        layers: The layer of each module that the pipeline has.
        missing: Modules of models that the pipeline has, without a layer there.
        absent: Modules of models that this kind of pipeline takes, and that it was made without.
    """

    layers: dict[str, PipelineLayer] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(self, module: str, owner: PipelineModel | None, layer: str) -> None:
        """Add a module of the pack, given the model that it belongs to and its name there."""
        name = owner.find(layer) if owner is not None else None
        if owner is None or name is None:
            self.missing.append(module)
        else:
            self.layers[module] = PipelineLayer(owner, name)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the model that was passed to `torch.compile`, or the model itself if it was not compiled like that."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


def models_of(pipeline: object) -> dict[str, nn.Module | None]:
    """Return the models of a pipeline that take adapters, by name; None for one that it was made without.

    A model instead of a pipeline is returned under the name `STANDALONE`. Raises `OptionError` for any other object.
    """
    if isinstance(pipeline, nn.Module):
        return {STANDALONE: unwrap_compiled(pipeline)}
    names = getattr(pipeline, "_lora_loadable_modules", None)
    if not names:
        raise OptionError(
            f"{type(pipeline).__name__} is neither a pipeline of diffusers that takes LoRA adapters nor a model. Pass "
            "a pipeline such as StableDiffusionPipeline, or the model itself: load_into(pipe.unet, pack)."
        )
    models = {name: getattr(pipeline, name, None) for name in names}
    return {name: unwrap_compiled(model) if isinstance(model, nn.Module) else None for name, model in models.items()}


def match_layers(modules: Iterable[str], pipeline: object) -> LayerMatch:
    """Match modules of a pack, by their names in it, to the layers of a pipeline or a model."""
    models = models_of(pipeline)
    if STANDALONE in models:
        return _match_model(sorted(modules), models[STANDALONE])
    owners = {name: _pipeline_model(name, model) for name, model in models.items() if model is not None}
    # files of the denoiser alone may lack its name
    denoiser = next(iter(models))
    match = LayerMatch()
    for module in sorted(modules):
        name, _, layer = module.partition(".")
        if name not in models and not is_model_name(name):
            name, layer = denoiser, module
        if name in models and models[name] is None:
            match.absent.append(module)
        else:
            match.add(module, owners.get(name), layer)
    return match


def _match_model(modules: list[str], model: nn.Module | None) -> LayerMatch:
    """Match modules to a model that was passed without its pipeline, so that its name there is unknown.

    The name is that of the pack's only model with one of its layers; `ModuleNameError` if there are several.
    """
    assert model is not None
    layers_by_name: dict[str, dict[str, str]] = {}
    for module in modules:
        name, _, layer = module.partition(".")
        has_name = is_model_name(name)
        layers = layers_by_name.setdefault(name if has_name else type(model).__name__, {})
        layers[module] = layer if has_name else module
    owners = {name: _pipeline_model(name, model) for name in layers_by_name}
    candidates = [name for name, layers in layers_by_name.items() if any(map(owners[name].find, layers.values()))]
    if len(candidates) > 1:
        raise ModuleNameError(
            f"the model could be the {candidates[0]} or the {candidates[1]} of the pack, whose layers have the same "
            "names. Pass the pipeline, which says which one it is: load_into(pipe, pack)."
        )
    match = LayerMatch()
    for name, layers in layers_by_name.items():
        for module, layer in layers.items():
            if candidates and name not in candidates:
                match.absent.append(module)
            else:
                match.add(module, owners[name], layer)
    return match


def _pipeline_model(name: str, model: nn.Module) -> PipelineModel:
    return PipelineModel(name, model, dict(_named_layers(model)))


def is_model_name(name: str) -> bool:
    """Return whether a name is that of a model in a pipeline: `unet`, `transformer`, `text_encoder_2`."""
    stem, _, number = name.rpartition("_")
    return name in _MODEL_NAMES or (stem in _MODEL_NAMES and number.isdecimal())


def _named_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, without those inside of adapted layers."""
    for name, module in model.named_children():
        yield prefix + name, module
        if not isinstance(module, BaseTunerLayer):
            yield from _named_layers(module, f"{prefix}{name}.")
