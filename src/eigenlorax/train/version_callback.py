"""`VersionCallback`: a callback of the Trainer that appends the adapter in training to a history."""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.adapter import Adapter
from ..core.options import to_int
from ..errors import MissingExtraError, NonFiniteError, OptionError, PackBusyError, SkippedVersionWarning
from ..formats import files, in_memory, run_folders
from ..formats.sources import AdapterSource
from ..pack import append, track, writer
from ..pack.pack import Pack

try:
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        f"VersionCallback needs {error.name}, which is not installed: pip install 'eigenlorax[train]'."
    ) from error


class VersionCallback(TrainerCallback):  # type: ignore[misc]
    """Callback of the Trainer of transformers or TRL that appends versions of the adapter in training to a history.

    Versions are taken from the model in memory, with the step and the metrics of the Trainer's log. In a distributed
    training, the main process writes. Models whose parameters are sharded (FSDP, DeepSpeed ZeRO-3) are an error: use
    `eigenlorax track` on their checkpoints.

    A training that is resumed from an earlier checkpoint repeats steps. A version that is equal to that of the history
    is skipped, and another one is an error, unless `overwrite` is set.

    A version with NaN or Inf, and one that cannot be written because the disk is full or another process holds the
    pack, gives a `SkippedVersionWarning`, and the training goes on.

    Args:
        history: Folder of the pack with the history, which is created with the first version.
        name: Name of the history. Default: the name of the folder `output_dir`.
        max_error: Bound of the relative error of each update, above 0 and below 1. Default: 0.05.
        head_error: Bound of the relative error of task heads. Default: `max_error`, at least 0.1 and at most 0.3.
        lossless: Store every tensor bit for bit.
        every: Number of steps between versions. Default: a version whenever the Trainer saves a checkpoint.
        adapter: Name of the adapter in the model. Default: the active one.
        overwrite: Replace the versions of steps that are trained again, and all later ones.

    Raises:
        OptionError: An option is invalid.
        AdapterNameError: The name is invalid.

    Example:
        >>> callback = eigenlorax.VersionCallback("history/", every=50)
    """

    def __init__(
        self,
        history: str | PathLike[str],
        name: str | None = None,
        *,
        max_error: float | None = None,
        head_error: float | None = None,
        lossless: bool = False,
        every: int | None = None,
        adapter: str | None = None,
        overwrite: bool = False,
    ) -> None:
        append.check_error_bounds(max_error, head_error, lossless=lossless)
        if every is not None and to_int("every", every) < 1:
            raise OptionError(f"every={every}: expected a number of steps of at least 1, or None.")
        self.history = Path(history)
        self.name = keys.check_name(name, kind="history") if name is not None else None
        self.every = every
        self._adapter = adapter
        self._overwrite = overwrite
        self._bounds: dict[str, Any] = {"max_error": max_error, "head_error": head_error, "lossless": lossless}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check that versions can be taken from the model and appended to the history.

        Raises:
            OptionError: The model has no LoRA or AdaLoRA of PEFT, several active ones, or sharded parameters.
            PackError: The folder of the history is not a pack that can be read, and has other files.
        """
        _check_not_sharded(args)
        self._adapter_name(_unwrapped(model))
        if (self.history / keys.MANIFEST).is_file():
            Pack.open(self.history)
        else:
            writer.check_free(self.history)
        if self.every is None and args.save_strategy == "no":
            warnings.warn(
                "save_strategy='no' saves no checkpoints, so that no version is appended. Pass every= to "
                "VersionCallback, or another save_strategy to the trainer.",
                SkippedVersionWarning,
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Append a version after the Trainer has saved a checkpoint, unless `every` is set."""
        if self.every is None:
            self._append(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Append a version every `every` steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self._append(args, state, model)

    def _append(self, args: Any, state: Any, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        step = state.global_step
        name = self.name or track.run_name(Path(args.output_dir))
        source = self._snapshot(_unwrapped(model), name)
        metrics = run_folders.metrics_at(step, state.log_history)
        if self._bounds["lossless"]:
            metrics |= run_folders.settings(vars(state))
        options = {"metrics": metrics, **self._bounds}
        try:
            with track.opened_for_appending(self.history) as pack:
                track.append_new(pack, AdapterSource(name, source), step, options, overwrite=self._overwrite)
                track.save_appended(pack, self.history)
        except (NonFiniteError, PackBusyError, OSError) as error:
            # these concern one version, and a training may have run for days
            warnings.warn(
                f"step {step} was not appended to the history {name!r} in {self.history}: {error}",
                SkippedVersionWarning,
                stacklevel=2,
            )

    def _snapshot(self, model: PeftModel, name: str) -> Adapter:
        """Return the adapter in training, with copies of its tensors."""
        adapter = self._adapter_name(model)
        state_dict = {
            key: tensor.detach().to("cpu", copy=True)
            for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
        }
        return in_memory.from_state_dict(state_dict, _saved_config(model, adapter), name)

    def _adapter_name(self, model: Any) -> str:
        """Return the name of the adapter in the model; raise `OptionError` if it is not a LoRA or AdaLoRA of PEFT."""
        if not isinstance(model, PeftModel):
            raise OptionError(
                f"VersionCallback takes versions of an adapter of PEFT, and the model is a {type(model).__name__}. "
                "Wrap it with peft.get_peft_model, or pass peft_config to TRL's trainer."
            )
        active = [self._adapter] if self._adapter is not None else list(model.active_adapters)
        if len(active) != 1 or active[0] not in model.peft_config:
            raise OptionError(
                f"adapter={self._adapter!r} does not name one adapter of the model, which has "
                f"{', '.join(model.peft_config)}. Pass adapter= with one of these names."
            )
        peft_type = str(getattr(model.peft_config[active[0]].peft_type, "value", ""))
        if peft_type not in (files.LORA, keys.ADALORA_PEFT_TYPE):
            raise OptionError(
                f"adapter {active[0]!r} has peft_type {peft_type}. VersionCallback takes versions of LoRA and AdaLoRA."
            )
        if peft_type == keys.ADALORA_PEFT_TYPE and self._bounds["lossless"]:
            raise OptionError(
                f"adapter {active[0]!r} is an AdaLoRA, which is converted to a LoRA, so that its training cannot be "
                "resumed from a history. Remove lossless=True."
            )
        return str(active[0])


def _saved_config(model: PeftModel, adapter: str) -> dict[str, Any]:
    """Return the fields of the `adapter_config.json` that `save_pretrained` writes."""
    base = model.get_base_model()
    fields = {**model.peft_config[adapter].to_dict(), "inference_mode": True}
    fields["base_model_name_or_path"] = fields["base_model_name_or_path"] or getattr(base, "name_or_path", None) or None
    if fields["task_type"] is None:
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return fields


def _unwrapped(model: Any) -> Any:
    """Return the model without the wrappers of torch.compile and of distributed training."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _check_not_sharded(args: Any) -> None:
    """Raise `OptionError` if no process has the whole parameters."""
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    is_zero3 = deepspeed is not None and deepspeed.is_zero3()
    if is_zero3 or getattr(args, "fsdp", None):
        raise OptionError(
            f"VersionCallback needs whole parameters, and {'DeepSpeed ZeRO-3' if is_zero3 else 'FSDP'} shards them. "
            "Remove the callback, and run `eigenlorax track OUTPUT_DIR -o HISTORY --watch` beside the training."
        )
