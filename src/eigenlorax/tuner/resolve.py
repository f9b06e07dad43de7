"""The subspace that a config refers to, and its bases for the modules of a model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core import basis, convolution, keys, module_names, registry
from ..core import subspace as spaces
from ..core.basis import Basis
from ..core.subspace import ModuleBases, Subspace
from ..errors import FormatError, ModuleNameError, OptionError, PackMissingError, ShapeError
from ..formats import checks
from ..pack.pack import Pack
from .config import EigenLoraxConfig
from .parents import Parent

# Largest difference between the checksums of one added component on two machines, which round QR decompositions
# differently.
_CHECKSUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ResolvedSubspace:
    """The subspace of an adapter, added components included.

    Attributes:
        subspace: Bases by module name.
        fingerprint: Fingerprint of `subspace`.
        pack: Pack of the subspace, if that is open or on disk. The subspace may be its basis.
        saved_subspace: State of the subspace when the adapter was saved, if it has grown since. The adapter's
            coefficients then belong to the first components of `subspace`.
    """

    subspace: Subspace
    fingerprint: str
    pack: Pack | None
    saved_subspace: Subspace | None = None

    def n_components(self, subspace_name: str | None, bases: ModuleBases) -> tuple[int, int]:
        """Return the number of components (down, up) of a module that the adapter has coefficients on."""
        saved = bases
        if self.saved_subspace is not None and subspace_name is not None:
            saved = self.saved_subspace.modules[subspace_name]
        return saved.down.k, saved.up.k

    def subspace_name(self, module: str, config: EigenLoraxConfig) -> str | None:
        """Return the name in the subspace of a module of the model; None if the subspace lacks it."""
        if module in config.subspace_modules:
            return config.subspace_modules[module]
        return module_names.resolve(module, self.subspace.modules)

    def bases(self, module: str, config: EigenLoraxConfig, in_features: int, out_features: int) -> ModuleBases:
        """Return the bases of a module of the model, without gradient components.

        They are empty for a module that the subspace lacks, if the adapter has gradient components.

        Raises:
            ModuleNameError: The subspace lacks the module, and the adapter has no gradient components.
            ShapeError: The module has another shape in the subspace.
        """
        subspace_name = self.subspace_name(module, config)
        if subspace_name is None and config.n_gradient:
            return ModuleBases(_zero_basis(0, in_features), _zero_basis(0, out_features))
        if subspace_name is None:
            names = sorted(self.subspace.modules)
            raise ModuleNameError(
                f"module {module!r} is not in the subspace, which has {len(names)} modules such as {names[0]!r}. "
                "Remove target_modules to adapt the modules that it has, or exclude this module with exclude_modules."
            )
        bases = self.subspace.modules[subspace_name]
        if bases.shape != (out_features, in_features):
            raise ShapeError(
                f"module {module}: (out, in) is {(out_features, in_features)} in the model and {bases.shape} in the "
                "subspace (in: of a convolution, channels times its kernel). It belongs to a different base model."
            )
        return bases


@dataclass(frozen=True, slots=True)
class EmbeddedSubspace:
    """A subspace that is saved in the adapter's own file: placeholders for its bases until they are loaded.

    Attributes:
        fingerprint: Fingerprint of the subspace.
        shapes: Number of components (down, up) by module name.
    """

    fingerprint: str
    shapes: Mapping[str, list[int]]
    pack: None = None

    def n_components(self, subspace_name: str | None, bases: ModuleBases) -> tuple[int, int]:
        """Return the number of components (down, up) of a module, all of which the adapter has coefficients on."""
        return bases.down.k, bases.up.k

    def subspace_name(self, module: str, config: EigenLoraxConfig) -> str | None:
        """Return the name of the adapter's bases for a module of the model; None if it has none."""
        return module_names.resolve(module, self.shapes)

    def bases(self, module: str, config: EigenLoraxConfig, in_features: int, out_features: int) -> ModuleBases:
        """Return bases of zeros of the shape that will be loaded; raise `ModuleNameError` if there are none."""
        subspace_name = self.subspace_name(module, config)
        if subspace_name is None:
            raise ModuleNameError(
                f"module {module!r} is not among the {len(self.shapes)} modules with embedded bases of the adapter, "
                f"such as {min(self.shapes)!r}. It was trained on another model."
            )
        k_down, k_up = self.shapes[subspace_name]
        return ModuleBases(_zero_basis(k_down, in_features), _zero_basis(k_up, out_features))


def _zero_basis(k: int, dimension: int) -> Basis:
    return Basis(torch.zeros(k, dimension), torch.zeros(0), energy=1.0)


def resolve_subspace(config: EigenLoraxConfig) -> ResolvedSubspace | EmbeddedSubspace:
    """Find the subspace of a config: embedded, in the pack that it names, or in an open pack by its fingerprint.

    The fingerprint of a config that has none is set. Without a pack, an adapter with gradient components has an empty
    subspace.

    Raises:
        OptionError: The config names no subspace, or its pack has another one.
        PackMissingError: No open pack has the subspace.
    """
    if config.embed_subspace and config.embedded_shapes:
        return EmbeddedSubspace(config.subspace_fingerprint or "embedded", config.embedded_shapes)
    pack = _find_pack(config)
    saved_subspace = None
    if pack is not None:
        holder = pack.training_pack
        if config.subspace_fingerprint is not None:
            holder = _pack_with_subspace(pack, config.subspace_fingerprint, config.subspace)
        fingerprint = holder.info.fingerprint
        subspace = registry.find(fingerprint) or registry.intern(holder.subspace)
        if config.subspace_fingerprint not in (None, fingerprint):
            saved_subspace = subspace.at(config.subspace_fingerprint)
        else:
            config.subspace_fingerprint = fingerprint
        if saved_subspace is not None and (config.n_extra or config.n_gradient):
            # components that the config adds are orthogonal to the saved subspace, not to its later components
            subspace, saved_subspace = registry.intern(saved_subspace), None
    else:
        subspace = _find_by_fingerprint(config)
    if config.n_extra:
        subspace = registry.intern(spaces.augment(subspace, config.n_extra, config.extra_seed))
    return ResolvedSubspace(subspace, subspace.fingerprint, pack, saved_subspace)


def _pack_with_subspace(pack: Pack, fingerprint: str, source: object) -> Pack:
    """Return the pack or its basis, the one with a subspace; `OptionError` if neither has it."""
    holder = pack.with_subspace(fingerprint)
    if holder is None:
        raise OptionError(
            f"the adapter belongs to the subspace {fingerprint[:12]}…, but {source} has "
            f"{pack.info.fingerprint[:12]}…: its coefficients would mean something else there. Pass its own pack as "
            "subspace=."
        )
    return holder


def _find_by_fingerprint(config: EigenLoraxConfig) -> Subspace:
    if config.subspace_fingerprint is None and config.n_gradient and not config.n_extra:
        return Subspace({})
    if config.subspace_fingerprint is None:
        raise OptionError(
            "no subspace was passed. Pass a pack's folder, a repository on the Hub, or a Pack: "
            "EigenLoraxConfig(subspace='pack/'). `eigenlorax fit adapters/ -o pack/ --for training` fits one."
        )
    subspace = registry.find(config.subspace_fingerprint)
    if subspace is None:
        raise PackMissingError(
            f"the subspace {config.subspace_fingerprint[:12]}… of this adapter is not loaded. Open its pack in "
            "this process (eigenlorax.Pack.open('pack/')), or pass subspace='pack/' when loading, or save "
            "the adapter with embed_subspace=True."
        )
    return subspace


def _find_pack(config: EigenLoraxConfig) -> Pack | None:
    """Open the pack of a config; if the config names none, return an open pack with its subspace, or None."""
    if config.subspace is None or config.subspace == keys.INSIDE_PACK:
        if config.subspace_fingerprint is None:
            return None
        open_pack = registry.find_pack(config.subspace_fingerprint)
        has_subspace = isinstance(open_pack, Pack) and config.subspace_fingerprint in open_pack.info.lineage
        return open_pack if has_subspace else None
    assert isinstance(config.subspace, str)
    if Path(config.subspace).exists():
        return Pack.open(config.subspace)
    # adapters are downloaded only if coefficients come from them
    parent = Parent.of(config)
    adapters: list[str] | None = [parent.name] if parent is not None else []
    if config.start not in ("zero", "uniform"):
        adapters = None
    return Pack.from_pretrained(config.subspace, adapters=adapters, revision=config.subspace_revision)


def check_added_components(config: EigenLoraxConfig, resolved: ResolvedSubspace | EmbeddedSubspace) -> None:
    """Check that this machine computes the added components of a config like the machine that saved it.

    The checksums of a new config are set.

    Raises:
        OptionError: The checksums differ.
    """
    if not config.n_extra or isinstance(resolved, EmbeddedSubspace):
        return
    checksums = {
        name: sum(float(basis.augmentation_checksums(bases.side(side))[-config.n_extra :].sum()) for side in keys.SIDES)
        for name, bases in resolved.subspace.modules.items()
    }
    saved = config.extra_check or checksums
    differences = {name: abs(checksum - saved.get(name, checksum)) for name, checksum in checksums.items()}
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > _CHECKSUM_TOLERANCE * config.n_extra:
        raise OptionError(
            f"this machine computes the added components of {worst} from seed {config.extra_seed} differently from the "
            "one that saved the adapter, so that its coefficients would mean something else. Save it there with "
            "embed_subspace=True; and please report it with the output of `eigenlorax env`."
        )
    config.extra_check = saved


def record_kernels(config: EigenLoraxConfig, kernels: Mapping[str, tuple[int, ...]]) -> None:
    """Set the kernels of a config to the kernels of the model's modules.

    Args:
        config: The config, which is changed.
        kernels: Kernel size of each adapted module; () for a linear layer.

    Raises:
        ShapeError: The config was saved with other kernels.
    """
    for name, module in module_names.resolve_all(config.kernels, kernels).items():
        if module is not None and not convolution.kernels_match(tuple(config.kernels[name]), kernels[module]):
            raise ShapeError(
                f"module {module}: the adapter has the kernel {tuple(config.kernels[name])}, and the model "
                f"has {kernels[module] or 'none: it is a linear layer'}. It belongs to a different base model."
            )
    config.kernels = {module: list(kernel) for module, kernel in kernels.items() if kernel}


def expand_residual_sides(config: EigenLoraxConfig, resolved: ResolvedSubspace | EmbeddedSubspace) -> None:
    """Set `rests` of a config that has `residual_sides` in place of it; `FormatError` if the digits are wrong."""
    if not config.residual_sides:
        return
    names = config.target_modules
    if names is None and isinstance(resolved, ResolvedSubspace):
        names = list(resolved.subspace.modules)
    digits = str(config.residual_sides)
    if names is None or isinstance(names, str) or len(digits) != len(names) or not set(digits) <= set("0123"):
        raise FormatError(
            f"the adapter's config: residual_sides is {digits[:40]!r}; it should have a digit from 0 to 3 for each of "
            "the adapter's modules. Load it with the target_modules that it was saved with."
        )
    config.rests = {
        name: [side for bit, side in enumerate(keys.SIDES) if int(digit) >> bit & 1]
        for name, digit in zip(sorted(names), digits, strict=True)
        if digit != "0"
    }
    config.residual_sides = ""


def rename_residuals(config: EigenLoraxConfig, modules: Collection[str]) -> None:
    """Rename the modules for which a config has residuals to their names in the model."""
    model_names = module_names.resolve_all(config.rests, modules)
    for name, module in model_names.items():
        if module is None:
            raise ModuleNameError(
                f"the adapter has a residual in {name!r}, which is not among its {len(modules)} modules in the model. "
                "Load it with its own target_modules, on the model that it was saved with."
            )
    config.rests = {module: config.rests[name] for name, module in model_names.items() if module is not None}


def check_base_model(resolved: ResolvedSubspace | EmbeddedSubspace, model: object) -> None:
    """Warn if the pack is for another base model than the adapted model, whose name is `model`."""
    if resolved.pack is not None:
        checks.warn_of_other_model(resolved.pack.base_model, model)


def check_not_carried(config: EigenLoraxConfig) -> None:
    """Raise `OptionError` for an adapter of a pack that has tensors beside its coefficients."""
    if config.carried:
        raise OptionError(
            "this adapter has tensors that coefficients cannot express (carried.safetensors: DoRA magnitudes, "
            "embeddings, modules that the subspace lacks). Write it as an ordinary LoRA with `eigenlorax export`."
        )
