"""From a config to the subspace it means, and from a model's modules to those of the subspace."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core import basis, convolution, keys, module_names, registry
from ..core import subspace as spaces
from ..core.basis import Basis
from ..core.subspace import ModuleBases, Subspace
from ..errors import ModuleNameError, OptionError, PackMissingError, ShapeError
from ..formats import checks
from ..pack.pack import Pack
from .config import EigenLoraxConfig


@dataclass(frozen=True, slots=True)
class Reference:
    """The subspace of an adapter, extra directions included, and the pack it is from where there is one at hand.

    before: what the subspace was when the adapter was saved, if it has grown since: its coefficients are on the first
        components of what it is now.
    """

    subspace: Subspace
    fingerprint: str
    pack: Pack | None
    before: Subspace | None = None

    def sizes(self, place: str, bases: ModuleBases) -> tuple[int, int]:
        """On how many components (down, up) of a module the adapter has coefficients."""
        own = self.before.modules[place] if self.before is not None else bases
        return own.down.k, own.up.k

    def place(self, module: str, config: EigenLoraxConfig) -> str | None:
        """The name in the subspace of a module of the model; None where the subspace lacks it."""
        if module in config.subspace_modules:
            return config.subspace_modules[module]
        return module_names.resolve(module, self.subspace.modules)

    def bases(self, module: str, config: EigenLoraxConfig, in_features: int, out_features: int) -> ModuleBases:
        """The bases of a module of the model, which must be in the subspace and of this shape."""
        place = self.place(module, config)
        if place is None:
            names = sorted(self.subspace.modules)
            raise ModuleNameError(
                f"module {module!r} is not in the subspace, which has {len(names)} modules such as {names[0]!r}. Leave "
                "target_modules away to take those it has, or keep this one out with exclude_modules."
            )
        found = self.subspace.modules[place]
        if found.shape != (out_features, in_features):
            raise ShapeError(
                f"module {module}: (out, in) is {(out_features, in_features)} in the model and {found.shape} in the "
                "subspace (in: of a convolution, channels times its kernel). It belongs to a different base model."
            )
        return found


@dataclass(frozen=True, slots=True)
class Embedded:
    """A subspace that comes with the adapter's weights: room for it, until they are loaded."""

    fingerprint: str
    shapes: Mapping[str, list[int]]
    pack: None = None

    def sizes(self, place: str, bases: ModuleBases) -> tuple[int, int]:
        """On how many components (down, up) of a module the adapter has coefficients: on all."""
        return bases.down.k, bases.up.k

    def place(self, module: str, config: EigenLoraxConfig) -> str | None:
        """The name under which the adapter has bases for a module of the model; None where it has none."""
        return module_names.resolve(module, self.shapes)

    def bases(self, module: str, config: EigenLoraxConfig, in_features: int, out_features: int) -> ModuleBases:
        """Bases of zeros, of the shape that will be loaded."""
        place = self.place(module, config)
        if place is None:
            raise ModuleNameError(
                f"module {module!r} is not among the {len(self.shapes)} that the adapter has embedded bases for, such "
                f"as {min(self.shapes)!r}. It was trained on another model."
            )
        k_down, k_up = self.shapes[place]
        return ModuleBases(_room(k_down, in_features), _room(k_up, out_features))


def _room(k: int, dimension: int) -> Basis:
    return Basis(torch.zeros(k, dimension), torch.zeros(0), energy=1.0)


def resolve(config: EigenLoraxConfig) -> Reference | Embedded:
    """The subspace that a config means: its own if it is embedded, the pack it names, or one that is known in this
    process by its fingerprint.

    The config learns the fingerprint. An error says what was looked for, and the ways to give it.
    """
    if config.embed_subspace and config.embedded_shapes:
        return Embedded(config.subspace_fingerprint or "embedded", config.embedded_shapes)
    pack = _pack(config)
    if pack is None and config.subspace_fingerprint is not None:
        holder = registry.find_holder(config.subspace_fingerprint)
        pack = holder if isinstance(holder, Pack) and config.subspace_fingerprint in holder.info.lineage else None
    before = None
    if pack is not None:
        fingerprint = pack.info.fingerprint
        if config.subspace_fingerprint is not None and config.subspace_fingerprint not in pack.info.lineage:
            raise OptionError(
                f"the adapter belongs to the subspace {config.subspace_fingerprint[:12]}…, but {config.subspace} holds "
                f"{fingerprint[:12]}…: its coefficients would mean something else there. Pass subspace= its own pack."
            )
        subspace = registry.find(fingerprint) or registry.intern(pack.subspace)
        if config.subspace_fingerprint not in (None, fingerprint):
            before = subspace.at(config.subspace_fingerprint)
        else:
            config.subspace_fingerprint = fingerprint
        if before is not None and config.n_extra:
            # its own extra directions are orthogonal to what was there then, not to what came since
            subspace, before = registry.intern(before), None
    else:
        if config.subspace_fingerprint is None:
            raise OptionError(
                "no subspace was given. EigenLoraxConfig(subspace='pack/') takes a pack's folder, a repository on the "
                "Hub, or a Pack; `eigenlorax fit adapters/ -o pack/` makes one."
            )
        found = registry.find(config.subspace_fingerprint)
        if found is None:
            raise PackMissingError(
                f"the subspace {config.subspace_fingerprint[:12]}… of this adapter is not at hand. Open its pack in "
                "this process (eigenlorax.Pack.open('pack/')), or pass subspace='pack/' where it is loaded, or save "
                "the adapter with embed_subspace=True."
            )
        subspace = found
    if config.n_extra:
        subspace = registry.intern(spaces.augment(subspace, config.n_extra, config.extra_seed))
    return Reference(subspace, subspace.fingerprint, pack, before)


def _pack(config: EigenLoraxConfig) -> Pack | None:
    if config.subspace is None or config.subspace == keys.INSIDE_PACK:
        return None
    assert isinstance(config.subspace, str)
    if Path(config.subspace).exists():
        return Pack.open(config.subspace)
    # adapters are fetched only for a start that is made of them
    adapters: list[str] | None = [] if config.start in ("zero", "uniform") else None
    return Pack.from_pretrained(config.subspace, adapters=adapters, revision=config.subspace_revision)


def check_extra(config: EigenLoraxConfig, reference: Reference | Embedded) -> None:
    """Whether this machine has rebuilt the extra directions of a config as the one that saved it; a new config notes
    what it has."""
    if not config.n_extra or isinstance(reference, Embedded):
        return
    sums = {
        place: sum(
            float(basis.augmentation_checksums(bases.side(side))[-config.n_extra :].sum()) for side in keys.SIDES
        )
        for place, bases in reference.subspace.modules.items()
    }
    wanted = config.extra_check or sums
    worst = max(sums, key=lambda place: abs(sums[place] - wanted.get(place, sums[place])))
    if abs(sums[worst] - wanted.get(worst, sums[worst])) > 1e-3 * config.n_extra:
        raise OptionError(
            f"this machine rebuilds the extra directions of {worst} from seed {config.extra_seed} differently from the "
            "one that saved the adapter, so that its coefficients would mean something else. Save it there with "
            "embed_subspace=True; and please report it with the output of `eigenlorax env`."
        )
    config.extra_check = wanted


def note_kernels(config: EigenLoraxConfig, kernels: Mapping[str, tuple[int, ...]]) -> None:
    """Let a config know the kernels of the model's modules that it adapts; an error where it has been of others."""
    for name, module in module_names.resolve_all(config.kernels, kernels).items():
        if module is not None and not convolution.kernels_match(tuple(config.kernels[name]), kernels[module]):
            raise ShapeError(
                f"module {module}: the adapter is for a kernel of {tuple(config.kernels[name])}, and that of the model "
                f"is {kernels[module] or 'none: it is a linear layer'}. It belongs to a different base model."
            )
    config.kernels = {module: list(kernel) for module, kernel in kernels.items() if kernel}


def note_rests(config: EigenLoraxConfig, modules: Collection[str]) -> None:
    """Let a config name the modules whose rest will be loaded as the model does."""
    places = module_names.resolve_all(config.rests, modules)
    for name, place in places.items():
        if place is None:
            raise ModuleNameError(
                f"the adapter has a rest beside its coefficients in {name!r}, which is not among the {len(modules)} "
                "modules that it is put on. Its target_modules, or the model, are not those that it was saved with."
            )
    config.rests = {place: config.rests[name] for name, place in places.items() if place is not None}


def check_base_model(reference: Reference | Embedded, model: object) -> None:
    """Warn where the pack names another base model than the one that it is put on."""
    if reference.pack is not None:
        checks.warn_of_other_model(reference.pack.base_model, model)


def check_whole(config: EigenLoraxConfig) -> None:
    """Refuse an adapter of a pack that is more than coefficients."""
    if config.carried:
        raise OptionError(
            "this adapter has tensors that coefficients cannot express (carried.safetensors: DoRA magnitudes, "
            "embeddings, modules that the subspace lacks). `eigenlorax export` gives all of it as an ordinary LoRA."
        )
