"""Matching of the modules of a pack to the layers of a pipeline.

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
    """A model that can have adapters.

    Attributes:
        name: Name of the model in the pipeline.
        model: The model.
        layers: Modules of the model by name; for adapted layers the outermost module.
    """

    name: str
    model: nn.Module
    layers: Mapping[str, nn.Module]

    def find(self, layer: str) -> str | None:
        """Return the name of a layer in the model, with or without `TEXT_MODEL`; None if there is no such layer."""
        short = layer.removeprefix(TEXT_MODEL)
        return next((name for name in (layer, short, TEXT_MODEL + short) if name in self.layers), None)


@dataclass(frozen=True, slots=True)
class PipelineLayer:
    """A layer of a model in a pipeline.

    Attributes:
        owner: The model.
        layer: Name of the layer in the model.
    """

    owner: PipelineModel
    layer: str

    @property
    def module(self) -> nn.Module:
        """The layer; if it is adapted, the outermost module."""
        return self.owner.layers[self.layer]

    @property
    def name(self) -> str:
        """Name of the layer in the pipeline."""
        return f"{self.owner.name}.{self.layer}"


@dataclass(frozen=True, slots=True)
class LayerMatch:
    """The layers of a pipeline for the modules of a pack.

    Attributes:
        layers: Layer of each module that the pipeline has.
        missing: Modules without a layer, in models that the pipeline has.
        absent: Modules of models that pipelines of this class can have, but this pipeline was created without.
    """

    layers: dict[str, PipelineLayer] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(self, module: str, owner: PipelineModel | None, layer: str) -> None:
        """Add a module of the pack, given its model and its name in the model."""
        name = owner.find(layer) if owner is not None else None
        if owner is None or name is None:
            self.missing.append(module)
        else:
            self.layers[module] = PipelineLayer(owner, name)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """Return the model that was passed to `torch.compile`, or the model itself if it was not compiled like that."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


def adaptable_models(pipeline: object) -> dict[str, nn.Module | None]:
    """Return the models of a pipeline that can have adapters, by name.

    Args:
        pipeline: A pipeline of diffusers, or a model.

    Returns:
        Models by name; None for a model that the pipeline was created without. A model that is passed instead of a
        pipeline has the name `STANDALONE`.

    Raises:
        OptionError: `pipeline` is neither a pipeline with LoRA support nor a model.
    """
    if isinstance(pipeline, nn.Module):
        return {STANDALONE: unwrap_compiled(pipeline)}
    names = getattr(pipeline, "_lora_loadable_modules", None)
    if not names:
        raise OptionError(
            f"{type(pipeline).__name__} is neither a pipeline of diffusers with LoRA support nor a model. Pass "
            "a pipeline such as StableDiffusionPipeline, or the model itself: load_into(pipe.unet, pack)."
        )
    models = {name: getattr(pipeline, name, None) for name in names}
    return {name: unwrap_compiled(model) if isinstance(model, nn.Module) else None for name, model in models.items()}


def match_layers(modules: Iterable[str], pipeline: object) -> LayerMatch:
    """Match modules of a pack to the layers of a pipeline or a model.

    Args:
        modules: Names of modules in the pack.
        pipeline: A pipeline of diffusers, or a model.

    Returns:
        The layer of each module, and the modules without a layer.

    Raises:
        OptionError: `pipeline` is neither a pipeline with LoRA support nor a model.
        ModuleNameError: A model that was passed without its pipeline matches several models of the pack.
    """
    models = adaptable_models(pipeline)
    if STANDALONE in models:
        return _match_model(sorted(modules), models[STANDALONE])
    owners = {name: _pipeline_model(name, model) for name, model in models.items() if model is not None}
    # modules of the denoiser may lack its name
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
    """Match modules to a model that was passed without its pipeline, so that its name in the pipeline is unknown.

    It is the name of the only model in the pack with one of the layers.

    Raises:
        ModuleNameError: Several models in the pack have such layers.
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
    """Return whether a model in a pipeline can have the name: `unet`, `transformer`, `text_encoder_2`."""
    stem, _, number = name.rpartition("_")
    return name in _MODEL_NAMES or (stem in _MODEL_NAMES and number.isdecimal())


def _named_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, without the modules inside of adapted layers."""
    for name, module in model.named_children():
        yield prefix + name, module
        if not isinstance(module, BaseTunerLayer):
            yield from _named_layers(module, f"{prefix}{name}.")
