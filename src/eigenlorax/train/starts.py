"""Adapters that a training starts from: new coefficients in a pack's subspace, or a trained LoRA, the reference."""

import statistics
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import formats
from ..core import keys
from ..core.adapter import Adapter
from ..errors import AdapterNameError, ModuleNameError, OptionError, RankWarning, reason
from ..formats import checks
from ..pack import peft_models
from ..pack.add import check_residual
from ..pack.history import History, VersionRecord
from ..pack.pack import Pack
from . import data, evaluate
from .data import Labels, Table
from .options import TASKS, Training

ADAPTER = "default"
"""Name of the trained adapter in the `PeftModel`."""

_OTHER_MODEL = "It belongs to another base model: pass the one that it was trained on as model= (--model)."


@dataclass(frozen=True, slots=True)
class Stored:
    """A trained adapter that was added to a pack.

    Attributes:
        name: Name of the adapter, or of the version.
        delta_error: Relative error of its update in the pack.
        rounding_error: Part of that error that rounding causes; None for a version.
    """

    name: str
    delta_error: float
    rounding_error: float | None


class Start(Protocol):
    """Adapter that a training starts from."""

    @property
    def base_model(self) -> str | None:
        """Name of its base model; None if it does not state one."""

    @property
    def revision(self) -> str | None:
        """Revision of the base model on the Hub; None if it does not state one."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hash of what the training depends on, by the name of the setting in the record of the training."""

    def check_name(self, name: str) -> None:
        """Raise an error unless the pack can store the trained adapter under this name."""

    def check_options(self) -> None:
        """Raise an error if the options of the training do not fit this start. Imports PEFT."""

    def labels(self, table: Table, model_config: Any) -> Labels | None:
        """Return the classes of the head; None for a language model.

        Args:
            table: Training rows.
            model_config: Config of the base model.
        """

    def add_to(self, model: Any) -> Any:
        """Add the adapter to a base model, and return the `PeftModel` to train."""

    def store(self, folder: Path, name: str) -> Stored:
        """Add the trained adapter in a folder to the pack."""


@dataclass(frozen=True, slots=True)
class SubspaceStart:
    """New coefficients in the subspace of a pack.

    Attributes:
        path: Folder of the pack.
        pack: The opened pack.
        training: Options of the training.
    """

    path: Path
    pack: Pack
    training: Training

    @property
    def base_model(self) -> str | None:
        return self.pack.base_model

    @property
    def revision(self) -> str | None:
        return self.pack.revision

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"subspace": self.pack.training_pack.info.fingerprint}

    def check_name(self, name: str) -> None:
        if name.lower() in {packed.lower() for packed in self.pack.names}:
            raise AdapterNameError(
                f"the pack already has an adapter named {name!r}. Pass another name as name= (--name), or remove the "
                "old one first."
            )
        n_extra, seed = self.training.n_extra, self.training.extra_seed
        if n_extra:
            raise OptionError(
                f"the pack cannot store an update on n_extra={n_extra} additional components. Train on a pack that has "
                f"them: `eigenlorax augment {self.path} --n-extra {n_extra} --seed {seed} -o PACK2`. Or pass add=False "
                "(--no-add)."
            )
        if self._has_residual:
            check_residual(self.pack)

    def check_options(self) -> None:
        self._config()

    def labels(self, table: Table, model_config: Any) -> Labels | None:
        return data.infer_labels(table, self.training.columns) if self.training.has_classes else None

    def add_to(self, model: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, self._config(), adapter_name=ADAPTER)

    def store(self, folder: Path, name: str) -> Stored:
        with Pack.edit(self.path) as pack:
            record = pack.add(folder, name=name, residual=self._has_residual)
        return Stored(name, record.delta_error, record.rounding_error)

    @property
    def _has_residual(self) -> bool:
        """True if the pack has to store a residual: the part of the trained adapter in gradient components."""
        return bool(self.training.n_gradient) and not self.pack.is_coded

    def _config(self) -> Any:
        from ..tuner import EigenLoraxConfig

        training = self.training
        return EigenLoraxConfig(
            subspace=str(self.path),
            subspace_fingerprint=self.pack.training_pack.info.fingerprint,
            r=training.rank,
            lora_alpha=2 * training.rank if training.alpha is None else training.alpha,
            core=training.core,
            start=training.start,
            n_extra=training.n_extra,
            extra_seed=training.extra_seed,
            n_gradient=training.n_gradient,
            task_type=TASKS[training.task],
        )


@dataclass(frozen=True, slots=True)
class ReferenceStart:
    """A trained LoRA, whose factors and head the training goes on from.

    Attributes:
        adapter: The LoRA.
        content_hash: Hash of its tensors.
        training: Options of the training.
        version: Version of a pack that it is; None for a LoRA in a folder.
    """

    adapter: Adapter
    content_hash: str
    training: Training
    version: "PackVersion | None"

    @property
    def base_model(self) -> str | None:
        return self.adapter.base_model

    @property
    def revision(self) -> str | None:
        return self.adapter.revision

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"reference": self.content_hash}

    def check_name(self, name: str) -> None:
        if self.version is None:
            return
        history = self.version.history
        keys.check_label(name)
        if name.lower() in {label.lower() for label in (*history.labels, keys.LATEST)}:
            raise AdapterNameError(
                f"the history {history.name!r} already has a version {name!r}. Pass another name as name= (--name), or "
                "remove the old one first."
            )

    def check_options(self) -> None:
        evaluate.resolve_task(self.adapter, self.training.task)

    def labels(self, table: Table, model_config: Any) -> Labels | None:
        if not self.training.has_classes:
            evaluate.check_language_model(self.adapter, model_config)
            return None
        classes = evaluate.count_head_classes(self.adapter, model_config)
        return evaluate.label_names(classes, self.training.labels, table, self.training.columns)

    def add_to(self, model: Any) -> Any:
        from peft import PeftConfig, get_peft_model

        with tempfile.TemporaryDirectory() as temporary:
            folder = formats.write_adapter(self.adapter, Path(temporary) / "reference", format=formats.PEFT)
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            try:
                peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
            except ValueError as error:
                raise ModuleNameError(
                    f"the reference does not fit the model: {reason(error)} {_OTHER_MODEL}"
                ) from error
            missing = peft_models.load_folder(peft_model, ADAPTER, folder, is_trainable=True)
        if missing:
            raise ModuleNameError(
                f"the model has {len(missing)} tensors of the LoRA that the reference lacks, such as {missing[0]}. "
                f"{_OTHER_MODEL}"
            )
        _reset_zero_modules(peft_model)
        return peft_model

    def store(self, folder: Path, name: str) -> Stored:
        assert self.version is not None
        history, reference = self.version.history.name, self.version.record
        with Pack.edit(self.version.path) as pack:
            record = pack.append(folder, name, name=history, reference=reference.version, lossless=reference.lossless)
        return Stored(f"{history}{keys.VERSION_MARK}{name}", record.delta_error, None)


@dataclass(frozen=True, slots=True)
class PackVersion:
    """A version in a pack on disk.

    Attributes:
        path: Folder of the pack.
        history: History of the version.
        record: The version.
    """

    path: Path
    history: History
    record: VersionRecord


def open_start(pack: Path | None, training: Training) -> Start:
    """Return the adapter that a training starts from.

    Warns with `RankWarning` if an entropy-coded pack has fewer components than the rank.

    Args:
        pack: Folder of the pack, which has the subspace, or the reference as a version; None for a reference in a
            folder.
        training: Options of the training.

    Raises:
        OptionError: There is neither a pack nor a reference, or the reference is no name of a version.
        PackMissingError: The folder is not a pack.
        AdapterNameError: The pack has no such version.
        FormatError, NonFiniteError: The folder has no LoRA of PEFT, or one with NaN or Inf.
    """
    if training.reference is not None:
        return _reference_start(pack, training.reference, training)
    if pack is None:
        raise OptionError("there is neither a pack nor a reference to train from. Pass one of them.")
    return _subspace_start(pack, training)


def _subspace_start(path: Path, training: Training) -> SubspaceStart:
    pack = Pack.open(path)
    if few_components := _few_components(pack, training):
        warnings.warn(few_components, RankWarning, stacklevel=4)
    return SubspaceStart(path, pack, training)


def _reference_start(path: Path | None, reference: str, training: Training) -> ReferenceStart:
    """Return a trained LoRA as the start of a training.

    Args:
        path: Folder of the pack that has the LoRA as a version; None for a LoRA in a folder.
        reference: Name of the version, or the folder.
        training: Options of the training.
    """
    version = None
    if path is None:
        if (Path(reference) / keys.MANIFEST).is_file():
            raise OptionError(
                f"reference={reference!r} (--reference) is a pack. To train from a version of it, pass the pack, and "
                f"as reference the name of the version, such as members@{keys.COMMON}."
            )
        adapter = formats.read_adapter(reference, format=formats.PEFT)
    else:
        pack = Pack.open(path)
        if keys.split_version(reference) is None:
            raise OptionError(
                f"reference={reference!r} (--reference) is no name of a version in {path}, such as "
                f"members@{keys.COMMON}. To train from a LoRA in a folder, do not pass a pack."
            )
        version = PackVersion(path, *pack.history_store.find(reference))
        adapter = pack.adapter(reference, torch.float32)
        if not version.record.lossless:
            adapter = _mix_rows(adapter)
    return ReferenceStart(adapter, checks.scan(adapter).content_hash, training, version)


def _mix_rows(adapter: Adapter) -> Adapter:
    """Return a LoRA of the same updates whose rows each have a share of every singular component.

    A decoded version may have one singular component per row. What AdamW changes from there takes 1.4 times as many
    bytes as from mixed rows, at the same relative error (experiments/LOG.md).
    """
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for module in sorted(adapter.modules):
        factors = adapter.modules[module]
        rank = factors.spec.rank
        rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        down, up = rotation @ factors.down.double(), factors.up.double() @ rotation.T
        modules[module] = replace(factors, down=down.to(factors.down.dtype), up=up.to(factors.up.dtype))
    return replace(adapter, modules=modules)


def _reset_zero_modules(model: Any) -> None:
    """Give each module of the LoRA whose factors are both zero new initial values, with which its update stays zero.

    A version within an error bound has zeros on both sides where the update of its source was next to nothing. Both
    gradients are zero there, so that the module would never be trained.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        if not layer.lora_A[ADAPTER].weight.any() and not layer.lora_B[ADAPTER].weight.any():
            layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def _few_components(pack: Pack, training: Training) -> str | None:
    """Return a warning if an entropy-coded pack has fewer components to train than the rank; None otherwise.

    Without any component, the model cannot be made, and the error says so.
    """
    if not pack.is_coded or pack.basis is not None or training.n_extra or training.n_gradient:
        return None
    components = [min(sides["down"].k, sides["up"].k) for sides in pack.info.modules.values()]
    if not any(components) or statistics.median(components) >= training.rank:
        return None
    return (
        f"the pack was made for storage and has few components to train: no module has more than "
        f"{max(components)} on both sides. Fit it with basis=32 (--basis 32) for a basis beside the coded "
        "adapters, or with purpose='training' (--for training)."
    )
