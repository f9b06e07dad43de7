"""Coefficients for a new task: rows in, an adapter folder out, and the adapter in the pack it was trained on."""

import errno
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError

from ..core import atomic_files, json_dataclasses, keys
from ..errors import (
    AdapterNameError,
    BaselineWarning,
    EigenloraxError,
    FormatError,
    NonFiniteError,
    OptionError,
    PackExistsError,
    reason,
)
from ..fitting.fit import Progress
from ..pack import folder
from ..pack.pack import Pack
from ..version import __version__
from . import baselines, data, evaluate, examples, models, trainer
from .baselines import Baseline
from .data import Labels, Table
from .evaluate import Classified, Figures, Modelled
from .options import TASKS, Training
from .trainer import RECORD

CHECKPOINTS = "checkpoints"
# what torch says where a file cannot be written
_NOT_WRITTEN = ("iostream error", "PytorchStreamWriter", "inline_container")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to.

    numbers: trained coefficients; head_numbers: what else was trained. loss: the mean of the Trainer's over its last
    epoch or so. figures: of the trained model on the rows for evaluation. baseline: the same beside what needs no
    training. added: whether the adapter is in the pack; delta_error, rounding_error: what adding it lost (None where it
    was not added). history: losses and accuracies on the way. seconds: of this run.
    """

    name: str
    task: str
    model: str
    labels: list[str] | None
    rows: int
    modules: int
    numbers: int
    head_numbers: int
    steps: int
    epochs: float
    figures: Figures | None
    baseline: Baseline
    history: list[dict[str, float]]
    folder: Path
    added: bool
    delta_error: float | None
    rounding_error: float | None
    seconds: float


def train(
    pack: Path,
    training: Training,
    output: Path,
    *,
    name: str | None = None,
    add: bool = True,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train coefficients over the pack's subspace, with a head where the task is classification; save them to `output`
    as a PEFT adapter, and add that to the pack.

    An adapter that is no better than its baseline (the most frequent class; the perplexity of the base model) is saved
    with a `BaselineWarning`, and not added: `added` of the result says so.

    name: the adapter's in the pack, by default that of the folder. force: add it even so. resume: go on from the last
    checkpoint in `output`; a training that has ended is only added. What can be found wrong before the training is.
    """
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    opened = Pack.open(pack)
    name = _free_name(opened, name if name is not None else output.absolute().name, add)
    if add and training.n_extra:
        raise OptionError(
            f"the pack has no room for the update on n_extra={training.n_extra} further directions. Make a pack that "
            f"has them, `eigenlorax augment {pack} --n-extra {training.n_extra} --seed {training.extra_seed} -o PACK2`,"
            " and train on that one; or leave the adapter out of the pack with add=False (--no-add)."
        )
    _check_output(output, resume)
    table = data.read(training.train, training.columns.label)
    held_out = data.read(training.evaluation, training.columns.label) if training.evaluation else None
    models.check_installed()
    with models.quiet(), models.own_random_numbers():
        run = _prepare(opened, pack, training, output, table, held_out)
        found = _ended(output, run) if resume else None
        if found is None:
            found = _trained(opened, training, output, run, resume, report)
            # from here on the adapter's folder is all that is needed
            _write_record(output, run, found)
            if not training.keeps_checkpoints:
                atomic_files.remove(output / CHECKPOINTS)
        if not found.baseline.better:
            warnings.warn(found.baseline.sentence, BaselineWarning, stacklevel=2)
        record = None
        if add and (found.baseline.better or force):
            with _with_hint(pack, name, output), Pack.edit(pack) as edited:
                record = edited.add(output, name=name)
    result = replace(
        found,
        name=name,
        added=record is not None,
        delta_error=record.delta_error if record else None,
        rounding_error=record.rounding_error if record else None,
        seconds=time.perf_counter() - started,
    )
    _write_record(output, run, result)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    """All that a training needs, checked. `asked`: what it depends on, as JSON."""

    model: str
    revision: str | None
    labels: Labels | None
    tokenizer: Any
    config: Any
    arguments: Any
    rows: list[examples.Example]
    evaluation: list[examples.Example] | None
    collate: examples.Collate
    asked: dict[str, Any]


def _free_name(pack: Pack, name: str, add: bool) -> str:
    keys.check_name(name)
    if add and name.lower() in {known.lower() for known in pack.names}:
        raise AdapterNameError(
            f"the pack already has an adapter named {name!r}. Choose another name with name= (--name), or remove the "
            "old one first."
        )
    return name


def _check_output(output: Path, resume: bool) -> None:
    folder.check_outside(output)
    atomic_files.check_is_folder(output)
    if resume and not (output / RECORD).is_file():
        raise OptionError(f"{output} has no {RECORD}, so that there is no training to resume.")
    if not resume and output.exists() and any(output.iterdir()):
        raise PackExistsError(
            f"{output} exists and is not empty. Choose another folder, or go on with resume=True (--resume)."
        )


def _prepare(opened: Pack, pack: Path, training: Training, output: Path, table: Table, held_out: Table | None) -> _Run:
    """Everything that can be wrong is found here, before anything is written."""
    from ..tuner import EigenLoraxConfig

    alpha = 2 * training.rank if training.alpha is None else training.alpha
    config = EigenLoraxConfig(
        subspace=str(pack),
        subspace_fingerprint=opened.info.fingerprint,
        r=training.rank,
        lora_alpha=alpha,
        core=training.core,
        start=training.start,
        n_extra=training.n_extra,
        extra_seed=training.extra_seed,
        task_type=TASKS[training.task],
    )
    # what the Trainer does not take is said before a model is asked for
    trainer.arguments(training, output / CHECKPOINTS, len(table.rows))
    model, revision = models.of_pack(opened, training.model)
    tokenizer = models.tokenizer_of(model, revision)
    most = examples.length(training.task, training.max_length, tokenizer, models.config_of(model, revision))
    labels, columns = None, training.columns
    tables = [table, *([held_out] if held_out else [])]
    if training.task == "text-classification":
        labels = data.labels_of(table, columns)
        rows = [examples.classification(one, labels, columns, tokenizer, most) for one in tables]
    else:
        rows = [examples.modelling(one, columns, tokenizer, most) for one in tables]
    asked = {
        **json.loads(json.dumps(asdict(training), default=str)),
        "train": data.digest(table),
        "evaluation": data.digest(held_out) if held_out else None,
        "model": model,
        "subspace": opened.info.fingerprint,
    }
    # it is nobody's business but the Hub's
    asked["trainer_options"].pop("hub_token", None)
    return _Run(
        model=model,
        revision=revision,
        labels=labels,
        tokenizer=tokenizer,
        config=config,
        arguments=trainer.arguments(training, output / CHECKPOINTS, len(rows[0])),
        rows=rows[0],
        evaluation=rows[1] if held_out else None,
        collate=examples.collator(training.task, tokenizer),
        asked=asked,
    )


def _model(run: _Run) -> Any:
    """The base model with coefficients, and with a head where there are classes."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(run.arguments.seed)
    model = get_peft_model(models.load(run.model, run.revision, run.labels, run.tokenizer), run.config)
    # where it has a name, PEFT asks the Hub about it at every checkpoint; `_save` gives it one
    model.peft_config["default"].base_model_name_or_path = ""
    if run.arguments.gradient_checkpointing or getattr(run.arguments, "activation_checkpointing", False):
        # the embeddings are frozen: without it no gradient would reach the first checkpoint
        model.enable_input_require_grads()
    return model


def _trained(opened: Pack, training: Training, output: Path, run: _Run, resume: bool, report: Progress) -> Trained:
    """Train, measure, and save the adapter."""
    model = _model(run)
    # nothing is left behind of what cannot begin
    with atomic_files.ensure_folder(output / CHECKPOINTS):
        fitter = trainer.make(model, training, run.arguments, run.rows, run.evaluation, run.collate, report)
        if not resume:
            _write_record(output, run, None)
    with _said_plainly(output):
        found = _fit(model, fitter, resume)
    size = run.arguments.per_device_eval_batch_size
    figures = None
    if run.evaluation is not None:
        figures = evaluate.measure(model, run.evaluation, run.collate, run.labels, size, report)
    baseline = baselines.of_trained(
        model, run.rows, figures, run.evaluation, run.collate, run.labels, size, progress=report
    )
    with _said_plainly(output):
        _save(model, opened, output, run.model)
    return Trained(
        name="",
        task=training.task,
        model=run.model,
        labels=list(run.labels.names) if run.labels else None,
        rows=len(run.rows),
        figures=figures,
        baseline=baseline,
        folder=output,
        added=False,
        delta_error=None,
        rounding_error=None,
        seconds=0.0,
        **found,
    )


def _fit(model: Any, fitter: Any, resume: bool) -> dict[str, Any]:
    """Train, and tell of it."""
    from ..tuner.layer import EigenLoraxLayer

    trained = {key: parameter.numel() for key, parameter in model.named_parameters() if parameter.requires_grad}
    numbers = sum(size for key, size in trained.items() if "eigenlorax_" in key)
    checkpoint = trainer.last_checkpoint(Path(fitter.args.output_dir)) if resume else None
    fitter.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise NonFiniteError(
            "the training has diverged: trained numbers are NaN or Inf. A lower learning_rate= (--learning-rate) may "
            "help; nothing was added to the pack."
        )
    return {
        "modules": sum(isinstance(module, EigenLoraxLayer) for module in model.modules()),
        "numbers": numbers,
        "head_numbers": sum(trained.values()) - numbers,
        "steps": fitter.state.global_step,
        "epochs": float(fitter.state.epoch),
        "history": trainer.history(fitter.state.log_history),
    }


def _save(model: Any, pack: Pack, output: Path, base: str) -> None:
    config = model.peft_config["default"]
    # the name that others know it by, not where it is on this machine
    config.base_model_name_or_path = pack.base_model or base
    config.revision = pack.revision
    model.save_pretrained(output, save_embedding_layers=False)
    atomic_files.copy_permissions(output, output / RECORD)


@contextmanager
def _said_plainly(output: Path) -> Iterator[None]:
    """Memory that is used up, and a disk that is full, in our words, whatever torch and safetensors make of them."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            "the device has no memory left. A smaller batch_size= (--batch-size) or max_length= (--max-length) needs "
            "less. Steps of several small batches are gradient_accumulation_steps among the Trainer's options."
        ) from error
    except OSError as error:
        error.filename = error.filename or str(output)
        raise
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or any(sign in str(error) for sign in _NOT_WRITTEN):
            raise OSError(errno.EIO, f"a file could not be written ({reason(error)})", str(output)) from error
        raise


@contextmanager
def _with_hint(pack: Path, name: str, output: Path) -> Iterator[None]:
    """Say of an error that comes after the training that this was not for nothing."""
    try:
        yield
    except EigenloraxError as error:
        hint = f"The adapter itself is in {output}: `eigenlorax add {pack} {name}={output}` adds it."
        raise type(error)(f"{error} {hint}") from error


def _ended(output: Path, run: _Run) -> Trained | None:
    """What the training in `output` came to; None if it is to be gone on with. `OptionError` unless it is this one."""
    record, asked = read_record(output), run.asked
    before = record.get("asked", {})
    differing = sorted(option for option in asked if before.get(option) != asked[option])
    if differing:
        first = differing[0]
        raise OptionError(
            f"{output} was begun with another {first}: {before.get(first)!r} there, {asked[first]!r} now. "
            "resume=True (--resume) goes on with the same training; begin another one in another folder."
        )
    if record.get("result") is not None and (output / keys.ADAPTER_WEIGHTS).is_file():
        return _result(output, record["result"])
    if run.arguments.save_only_model:
        raise OptionError("checkpoints of save_only_model lack the optimizer's state: they cannot be resumed.")
    return None


def _result(output: Path, found: Any) -> Trained:
    """The result in a record, as it was written."""
    figures = Classified if isinstance(found, dict) and found.get("labels") is not None else Modelled
    kinds = {**get_type_hints(Trained), "figures": figures | None, "folder": NoneType}
    try:
        fields = json_dataclasses.from_json(dict, found, "result")
        parsed = {
            name: json_dataclasses.from_json(kind, fields.get(name, ...), f"result.{name}")
            for name, kind in kinds.items()
        }
    except json_dataclasses.JsonTypeError as error:
        raise FormatError(f"{output / RECORD} is not what `eigenlorax train` writes: {error}") from error
    return Trained(**{**parsed, "folder": output})


def _write_record(output: Path, run: _Run, result: Trained | None) -> None:
    """Note what is trained, so that nothing else goes on from its checkpoints; and, in the end, what it came to."""
    found = {
        "eigenlorax": __version__,
        "asked": run.asked,
        "labels": list(run.labels.names) if run.labels else None,
        "result": {**asdict(result), "folder": None} if result else None,
    }
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    atomic_files.write_file(output / RECORD, text.encode("utf-8", errors="surrogatepass"))


def read_record(output: Path) -> dict[str, Any]:
    """What a training has noted in its folder; `labels` are its classes in the head's order."""
    path = output / RECORD
    if not path.is_file():
        raise FormatError(f"{output} has no {RECORD}: it is not a folder that `eigenlorax train` has written.")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("labels"), list | None):
        raise FormatError(f"{path} is not what `eigenlorax train` writes.")
    return found
