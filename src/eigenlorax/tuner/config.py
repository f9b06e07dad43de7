"""`EigenLoraxConfig`, the configuration of an adapter and the content of its `adapter_config.json`."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..core import keys
from ..core.options import to_float, to_int
from ..errors import OptionError
from ..pack.pack import Pack
from .peft_type import peft_type


@dataclass
class EigenLoraxConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`EigenLoraxModel`].

    Coefficients are trained over a frozen subspace. Paper: https://huggingface.co/papers/2502.04700.

    Args:
        subspace (`str`, `os.PathLike` or [`Pack`], *optional*):
            The pack whose subspace is used: a folder, a repository on the Hub, or a `Pack` in memory. If an
            entropy-coded pack has a basis, the basis is used. If it is not specified, the subspace is found by its
            fingerprint among the packs that are open in this process, or loaded with the adapter if it is embedded in
            the adapter's file.
        subspace_revision (`str`, *optional*):
            Branch, tag or commit of a pack on the Hub.
        subspace_fingerprint (`str`, *optional*):
            The sha256 of the subspace. It is taken from the pack if it is not specified; a pack with another subspace
            raises `OptionError`.
        embed_subspace (`bool`):
            Whether to save the subspace in the adapter's own file, so that loading it needs no pack. This increases the
            size of the checkpoint. Defaults to `False`.
        r (`int`):
            Rank of the update (the "rank" of LoRA). Ranks above the number of components have no effect. Defaults to
            `8`.
        lora_alpha (`int` or `float`):
            The alpha parameter for scaling: the update is multiplied by `lora_alpha / r`. Defaults to `16`.
        lora_dropout (`float`):
            The dropout probability for the layer's input. Defaults to `0.0`.
        use_rslora (`bool`):
            When set to True, the scaling factor is `lora_alpha / math.sqrt(r)`. Defaults to `False`.
        core (`bool`):
            Train one matrix (k_up, k_down) per module instead of two factors of rank `r`; `r` then sets the scaling
            only. Defaults to `False`.
        start (`str`):
            How to initialize the coefficients. Passing `'zero'` (default) starts from the base model. Passing `'mean'`
            starts from the mean update of the pack's adapters. Passing `'uniform'` draws both factors uniformly from
            (-0.5, 0.5), as in the paper. Passing the name of an adapter of the pack, or the path of a LoRA, starts from
            that adapter, projected on the subspace.
        n_extra (`int`):
            Number of random orthonormal components that are added to both sides of every module, for small data sets
            (§3.3 of the paper). Defaults to `0`.
        extra_seed (`int`):
            The seed of the added components. Defaults to `0`.
        n_gradient (`int`):
            Number of components that `initialize_gradient_components` adds to both sides of every module: the leading
            directions of the first gradients outside the subspace. A module that the subspace lacks has these
            components only. They are frozen, and saved with the adapter in 8 bits. Defaults to `0`.
        target_modules (`Union[List[str], str]`, *optional*):
            The names of the modules to apply the adapter to, as in [`LoraConfig`]. If this is not specified, every
            module of the subspace is adapted.
        exclude_modules (`Union[List[str], str]`, *optional*):
            The names of the modules to not apply the adapter, as in [`LoraConfig`].
        fan_in_fan_out (`bool`):
            Set this to True if the layer to replace stores weight like (fan_in, fan_out). It is corrected, with a
            warning, for layers of a known type.
        bias (`str`):
            Biases to train. Can be 'none', 'all' or 'eigenlorax_only'. Defaults to `'none'`.
        modules_to_save (`List[str]`, *optional*):
            List of modules apart from adapter layers to be set as trainable and saved in the final checkpoint, such as
            a task head.
        init_weights (`bool`):
            Setting this to False leads to random coefficients of which none is zero. This setting is intended for
            debugging purposes. Defaults to `True`.
        layers_to_transform (`Union[List[int], int]`, *optional*):
            The layer indices to transform, as in [`LoraConfig`].
        layers_pattern (`Union[List[str], str]`, *optional*):
            The layer pattern name, used only if `layers_to_transform` is different from `None`.
        rank_pattern (`dict`):
            The mapping from layer names or regexp expression to ranks which are different from the default rank
            specified by `r`.
        alpha_pattern (`dict`):
            The mapping from layer names or regexp expression to alphas which are different from the default alpha
            specified by `lora_alpha`.
        subspace_modules (`dict`):
            Written by packs: the mapping from module names of the model to module names of the subspace, where they
            differ.
        kernels (`dict`):
            Written on saving: the kernel size of each convolution.
        rests (`dict`):
            Written on saving: the sides, "down" or "up", on which each module has a residual.
        residual_sides (`str`):
            Written by entropy-coded packs in place of `rests`: a digit for each module, in the order of their sorted
            names. It is 1 for a residual on the "down" side, 2 for "up", 3 for both, and 0 for none.
        coefficient_dtype (`str`, *optional*):
            Written by packs: the storage of coefficients in the file, such as "int8", if they are not floats.
        source_dtype (`str`, *optional*):
            Written by packs: the dtype that the factors of the LoRA had, in which it is exported.
        parent (`dict`):
            Written by packs: the name of the adapter of the pack whose codes are those of this one, and their sha256.
        extra_check (`dict`):
            Written on saving: checksums of the added components of each module.
        embedded_shapes (`dict`):
            Written on saving: the number of components (down, up) of each embedded module.
        carried (`bool`):
            Written by packs: whether the adapter has tensors that coefficients cannot express.

    Raises:
        OptionError: A field is out of range, or two fields contradict each other.

    Example:
        >>> import eigenlorax, peft
        >>> config = eigenlorax.EigenLoraxConfig(subspace="lm-pack/", r=4)
        >>> peft_model = peft.get_peft_model(model, config)
    """

    # the order matters: transformers' argument parser uses the second type of a union
    subspace: os.PathLike[str] | str | Pack | None = field(
        default=None, metadata={"help": "The pack whose subspace is used: a folder, or a repository on the Hub."}
    )
    subspace_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a pack on the Hub."}
    )
    subspace_fingerprint: str | None = field(
        default=None, metadata={"help": "The sha256 of the subspace; a pack with another subspace raises an error."}
    )
    embed_subspace: bool = field(default=False, metadata={"help": "Save the subspace with the adapter."})
    r: int = field(default=8, metadata={"help": "Rank of the update."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the layer's input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    core: bool = field(
        default=False, metadata={"help": "Train one (k_up, k_down) matrix per module instead of two factors."}
    )
    start: str = field(
        default="zero",
        metadata={"help": "Initial coefficients: zero, mean, uniform, an adapter of the pack, or the path of a LoRA."},
    )
    n_extra: int = field(
        default=0, metadata={"help": "Number of random orthonormal components added to both sides of every module."}
    )
    extra_seed: int = field(default=0, metadata={"help": "The seed of the added components."})
    n_gradient: int = field(
        default=0, metadata={"help": "Number of components per side that the first gradients of the task add."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt, as in LoRA; by default every module of the subspace."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to not adapt."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "True if the layer stores its weight as (in, out), as Conv1D does."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or eigenlorax_only."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from adapter layers to train and save, such as a task head."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False starts with random coefficients, for debugging."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; by default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The layer pattern name, used only with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks that differ from r, by module name or regular expression."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alphas that differ from lora_alpha, by name or regular expression."}
    )
    subspace_modules: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Names of modules in the subspace, where they differ."}
    )
    kernels: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Written on saving: the kernel of each convolution."}
    )
    rests: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={"help": "Written on saving: the sides on which each module has a residual."},
    )
    residual_sides: str = field(
        default="",
        metadata={"help": "Written by packs: the sides with a residual, as a digit for each module in sorted order."},
    )
    coefficient_dtype: str | None = field(
        default=None,
        metadata={"help": "Written by packs: the storage of coefficients in the file, such as int8, if not floats."},
    )
    source_dtype: str | None = field(
        default=None,
        metadata={"help": "Written by packs: the dtype that the factors of the LoRA had, in which it is exported."},
    )
    parent: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Written by packs: the adapter whose codes are those of this one, and their sha256."},
    )
    extra_check: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Written on saving: checksums of the added components of each module."},
    )
    embedded_shapes: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Written on saving: components (down, up) of each embedded module."}
    )
    carried: bool = field(
        default=False,
        metadata={"help": "Written by packs: whether the adapter has tensors that coefficients cannot express."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.use_subspace(self.subspace)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        self._check()

    def _check(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise OptionError("`layers_pattern` requires `layers_to_transform`. Pass both, or neither.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise OptionError(
                "`layers_to_transform` and `layers_pattern` cannot be used when `target_modules` is a str: "
                "select the layers in the regular expression."
            )
        if self.core and self.rank_pattern:
            raise OptionError("rank_pattern has no meaning with core=True, which trains whole (k_up, k_down) matrices.")
        for name, smallest in (("r", 1), ("n_extra", 0), ("n_gradient", 0)):
            if to_int(name, getattr(self, name)) < smallest:
                raise OptionError(f"{name} must be an integer of at least {smallest}, got {getattr(self, name)!r}.")
        for module, rank in self.rank_pattern.items():
            if to_int(f"rank_pattern[{module!r}]", rank) < 1:
                raise OptionError(f"rank_pattern[{module!r}] must be an integer of at least 1, got {rank!r}.")
        for name, value in (("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()):
            to_float(name, value)
        if not 0 <= to_float("lora_dropout", self.lora_dropout) < 1:
            raise OptionError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}.")
        if not isinstance(self.start, str):
            raise OptionError(f"start must be 'zero', 'mean', 'uniform', a name or a path, got {self.start!r}.")

    def check_saving(self, adapter_name: str) -> None:
        """Raise `OptionError` if the adapter cannot be saved from the model. Here it can; subclasses override this."""

    def use_subspace(self, subspace: os.PathLike[str] | str | Pack | None) -> None:
        """Set the subspace to the subspace of a pack: a folder, a repository on the Hub, or a `Pack`.

        Example:
            >>> config = eigenlorax.EigenLoraxConfig(r=4)
            >>> config.use_subspace(pack)
            >>> config.subspace_fingerprint == pack.info.fingerprint
            True
        """
        if isinstance(subspace, Pack):
            subspace.remember()
            self.subspace_fingerprint = subspace.training_pack.info.fingerprint
            self.subspace = None
        else:
            self.subspace = None if subspace is None else os.fspath(subspace)

    def _use_for_saved_coefficients(self, subspace: os.PathLike[str] | str | Pack) -> None:
        """Set the subspace of a saved adapter; raise `OptionError` if its coefficients belong to another one."""
        saved = self.subspace_fingerprint
        if isinstance(subspace, Pack) and saved is not None and subspace.with_subspace(saved) is None:
            raise OptionError(
                f"the adapter belongs to the subspace {str(saved)[:12]}…, but {subspace!r} has "
                f"{subspace.info.fingerprint[:12]}…: its coefficients would mean something else there. Pass its own "
                "pack as subspace=."
            )
        self.use_subspace(subspace)
        self.subspace_fingerprint = saved or self.subspace_fingerprint

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Save the configuration to `adapter_config.json`. Local paths are replaced by the fingerprint of the subspace;
        the name of a repository on the Hub is kept. `start` is reset, because it describes the training that has ended.

        Args:
            save_directory (`str`):
                The directory to save to.
            kwargs:
                Passed to [`PeftConfig.save_pretrained`].

        Example:
            >>> eigenlorax.EigenLoraxConfig(subspace="lm-pack/", r=4).save_pretrained("trained/")
            >>> eigenlorax.EigenLoraxConfig.from_pretrained("trained/").r
            4
        """
        saved = copy.copy(self)
        saved.start = "zero"
        assert isinstance(saved.subspace, str | None)
        if saved.subspace is not None and (saved.subspace == keys.INSIDE_PACK or Path(saved.subspace).exists()):
            saved.subspace = None
        PeftConfig.save_pretrained(saved, save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "EigenLoraxConfig":
        """
        Load the configuration of an adapter. For an adapter inside a pack, the subspace is set to that pack.

        Args:
            pretrained_model_name_or_path (`str`):
                The folder or the repository of the adapter.
            subfolder (`str`, *optional*):
                The folder of the adapter inside of the folder or repository.
            subspace (`str`, `os.PathLike` or [`Pack`], *optional*):
                The pack of the adapter, if it is not the pack in its configuration.
            kwargs:
                Passed to [`PeftConfig.from_pretrained`].

        Raises:
            OptionError: The adapter belongs to another subspace than that of the pack in `subspace`.

        Example:
            >>> config = eigenlorax.EigenLoraxConfig.from_pretrained("lm-pack/adapters/a0")
            >>> config.subspace
            'lm-pack'
        """
        subspace = kwargs.pop("subspace", None)
        config: EigenLoraxConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if subspace is not None:
            config._use_for_saved_coefficients(subspace)
        elif getattr(config, "subspace", None) == keys.INSIDE_PACK:
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            if folder.is_dir():
                config.subspace = str(folder.parent.parent)
            else:
                config.subspace, config.subspace_revision = pretrained_model_name_or_path, kwargs.get("revision")
        return config
