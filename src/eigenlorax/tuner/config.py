"""`EigenLoraxConfig`: what is trained, where the subspace is, and what goes into `adapter_config.json`."""

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
    Configuration of EigenLoRAx (arXiv 2502.04700): coefficients are trained, over a subspace that is frozen.

    Args:
        subspace (`str`, `os.PathLike` or [`Pack`], *optional*):
            The pack whose subspace is used: a folder, a repository on the Hub, or a `Pack` in memory. Where it is not
            given, the subspace has to be known by its fingerprint: a pack that is open in this process, or a subspace
            embedded in the adapter.
        subspace_revision (`str`, *optional*):
            Branch, tag or commit of a pack on the Hub.
        subspace_fingerprint (`str`, *optional*):
            sha256 of the subspace; found in the pack where it is not given. Another subspace is refused.
        embed_subspace (`bool`):
            Save the subspace with the adapter, which then needs nothing else.
        r (`int`):
            Rank of the update. At most the number of components counts.
        lora_alpha (`int` or `float`):
            The update is scaled by `lora_alpha / r`.
        lora_dropout (`float`):
            Dropout on the layer's input.
        use_rslora (`bool`):
            Scale by `lora_alpha / sqrt(r)`.
        core (`bool`):
            Train one (k_up, k_down) matrix a module instead of two factors of rank `r`, which then sets the scale only.
        start (`str`):
            Where training starts: "zero" (no update), "mean" (the mean update of the pack's adapters), "uniform" (both
            factors uniform in (-0.5, 0.5), as in the paper), the name of an adapter of the pack, or the path of a LoRA,
            which is projected.
        n_extra (`int`), extra_seed (`int`):
            Further orthonormal directions on every side, from this seed, for little data (§3.3 of the paper).
        target_modules (`list` or `str`, *optional*):
            As in LoRA. By default every module of the subspace.
        exclude_modules (`list` or `str`, *optional*), fan_in_fan_out (`bool`), bias (`str`), modules_to_save (`list`),
        layers_to_transform (`int` or `list`), layers_pattern (`str` or `list`), rank_pattern (`dict`),
        alpha_pattern (`dict`):
            As in LoRA; bias is "none", "all" or "eigenlorax_only".
        init_weights (`bool`):
            False starts with random factors of which neither is zero: for tests.
        subspace_modules (`dict`), kernels (`dict`), rests (`dict`), carried (`bool`), extra_check (`dict`),
        embedded_shapes (`dict`):
            Written when an adapter is saved, by packs or by PEFT; not for users.
    """

    # transformers' argument parser takes the second of these types
    subspace: os.PathLike[str] | str | Pack | None = field(
        default=None, metadata={"help": "The pack whose subspace is used: a folder, or a repository on the Hub."}
    )
    subspace_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a pack on the Hub."}
    )
    subspace_fingerprint: str | None = field(
        default=None, metadata={"help": "sha256 of the subspace; another one is refused."}
    )
    embed_subspace: bool = field(default=False, metadata={"help": "Save the subspace with the adapter."})
    r: int = field(default=8, metadata={"help": "Rank of the update."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the layer's input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    core: bool = field(
        default=False, metadata={"help": "Train one (k_up, k_down) matrix a module instead of two factors."}
    )
    start: str = field(
        default="zero", metadata={"help": "zero, mean, uniform, the name of an adapter of the pack, or a LoRA's path."}
    )
    n_extra: int = field(default=0, metadata={"help": "Further orthonormal directions on every side."})
    extra_seed: int = field(default=0, metadata={"help": "The seed that gives those directions."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt, as in LoRA; by default every module of the subspace."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "True if the layer stores its weight as (in, out), as Conv1D does."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or eigenlorax_only."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, such as a task head."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False starts with random factors: for tests."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; by default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layers' list, where it is not a common one."}
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
        metadata={"help": "Written on saving: the sides of each module that have a rest beside their coefficients."},
    )
    coefficient_dtype: str | None = field(
        default=None,
        metadata={"help": "Written by packs: how the file has coefficients, such as int8, if not as floats."},
    )
    extra_check: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Written on saving: what extra directions are compared with."},
    )
    embedded_shapes: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Written on saving: components (down, up) of each embedded module."}
    )
    carried: bool = field(
        default=False, metadata={"help": "Whether a pack's adapter has tensors that coefficients cannot express."}
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
            raise OptionError("when `layers_pattern` is given, `layers_to_transform` has to be given too.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise OptionError(
                "`layers_to_transform` and `layers_pattern` cannot be used when `target_modules` is a str: "
                "put the layers into the regular expression."
            )
        if self.core and self.rank_pattern:
            raise OptionError("rank_pattern has no meaning with core=True, which trains whole (k_up, k_down) matrices.")
        for name, smallest in (("r", 1), ("n_extra", 0)):
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
        """Refuse to save an adapter that is not the model's own to save: none, where PEFT loaded or made it."""

    def use_subspace(self, subspace: os.PathLike[str] | str | Pack | None) -> None:
        """Take this subspace from now on: the folder or repository of a pack, or a `Pack`."""
        if isinstance(subspace, Pack):
            subspace.remember()
            self.subspace_fingerprint = subspace.info.fingerprint
            self.subspace = None
        else:
            self.subspace = None if subspace is None else os.fspath(subspace)

    def _use_for_what_is_saved(self, subspace: os.PathLike[str] | str | Pack) -> None:
        """Take this subspace, in which coefficients that were saved have to mean what they meant."""
        saved = self.subspace_fingerprint
        if isinstance(subspace, Pack) and saved not in (None, *subspace.info.lineage):
            raise OptionError(
                f"the adapter belongs to the subspace {str(saved)[:12]}…, but {subspace!r} holds "
                f"{subspace.info.fingerprint[:12]}…: its coefficients would mean something else there. Pass subspace= "
                "its own pack."
            )
        self.use_subspace(subspace)
        self.subspace_fingerprint = saved or self.subspace_fingerprint

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Save the configuration. Paths of this machine are not written: the fingerprint stands for the subspace, and a
        repository's name where it came from the Hub. Nor is where training started, since it has ended somewhere else.
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
        Load the configuration of an adapter. `subspace=` says where its subspace is, if it is not where the adapter
        says; an adapter in a pack finds that pack by itself.
        """
        subspace = kwargs.pop("subspace", None)
        config: EigenLoraxConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if subspace is not None:
            config._use_for_what_is_saved(subspace)
        elif getattr(config, "subspace", None) == keys.INSIDE_PACK:
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            if folder.is_dir():
                config.subspace = str(folder.parent.parent)
            else:
                config.subspace, config.subspace_revision = pretrained_model_name_or_path, kwargs.get("revision")
        return config
