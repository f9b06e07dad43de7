"""Training of coefficients for a new task: rows in, an adapter folder out, and the adapter added to its pack."""

import errno
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError

from ..core import atomic_files, json_dataclasses, keys
from ..core.progress import Progress
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
from ..pack import writer
from ..pack.pack import Pack
from ..version import __version__
from . import baselines, data, evaluate, examples, models, trainer
from .baselines import Baseline
from .data import Labels, Table
from .evaluate import ClassificationFigures, Figures, LanguageModelFigures
from .options import TASKS, Training
from .trainer import RECORD

CHECKPOINTS = "checkpoints"
# parts of torch's messages if a file cannot be written
_WRITE_FAILURES = ("iostream error", "PytorchStreamWriter", "inline_container")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a training; the field names are those of the record and of `--json`.

    rows: number of training rows. modules: modules with coefficients. numbers: trained coefficients. head_numbers:
    other trained parameters. figures: of the trained model on the evaluation rows, None without these. baseline:
    comparison with a baseline that needs no training. history: losses and accuracies during training. added: whether
    the adapter is in the pack. delta_error, rounding_error: errors that adding caused, None if it was not added.
    seconds: of this call.
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
) -> TrainingResult:
    """Train coefficients in a pack's subspace, save them as a PEFT adapter, and add that to the pack.

    Args:
        pack: Folder of the pack.
        training: Task, rows and hyperparameters.
        output: Folder for the adapter and its checkpoints.
        name: Name of the adapter in the pack. Default: that of the folder.
        add: Add the adapter to the pack if it is better than its baseline: the most frequent class, or the perplexity
            of the base model. If it is not, a `BaselineWarning` is given, and `added` of the result is False.
        force: Add it even if it is not better.
        resume: Continue from the last checkpoint in `output`. A finished training is only added.
        progress: Called with (stage, done, total).

    Raises `OptionError`, `FormatError`, `AdapterNameError` or `PackExistsError` before the training if something does
    not fit, and `NonFiniteError` if it diverges.
    """
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    opened = Pack.open(pack)
    name = _free_name(opened, name if name is not None else output.absolute().name, add)
    if add and training.n_extra:
        raise OptionError(
            f"the pack cannot store an update on n_extra={training.n_extra} additional components. Train on a pack "
            f"that has them: `eigenlorax augment {pack} --n-extra {training.n_extra} --seed {training.extra_seed} "
            "-o PACK2`. Or pass add=False (--no-add)."
        )
    _check_output(output, resume)
    table = data.read(training.train, training.columns.label)
    held_out = data.read(training.evaluation, training.columns.label) if training.evaluation else None
    models.check_installed()
    with models.quiet(), models.preserved_random_state():
        run = _prepare(opened, pack, training, output, table, held_out)
        result = _finished_result(output, run) if resume else None
        if result is None:
            result = _train_and_save(opened, training, output, run, resume, report)
            # written before adding, so that a failure to add can be resumed without training again
            _write_record(output, run, result)
            if not training.keeps_checkpoints:
                atomic_files.remove(output / CHECKPOINTS)
        if not result.baseline.better:
            warnings.warn(result.baseline.sentence, BaselineWarning, stacklevel=2)
        record = None
        if add and (result.baseline.better or force):
            with _mention_adapter_folder(pack, name, output), Pack.edit(pack) as edited:
                record = edited.add(output, name=name)
    result = replace(
        result,
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
    """A training, checked and ready to run. settings: all that it depends on, as JSON."""

    model: str
    revision: str | None
    labels: Labels | None
    tokenizer: Any
    config: Any
    arguments: Any
    rows: list[examples.Example]
    evaluation: list[examples.Example] | None
    collate: examples.Collate
    settings: dict[str, Any]


def _free_name(pack: Pack, name: str, add: bool) -> str:
    keys.check_name(name)
    if add and name.lower() in {packed.lower() for packed in pack.names}:
        raise AdapterNameError(
            f"the pack already has an adapter named {name!r}. Pass another name as name= (--name), or remove the old "
            "one first."
        )
    return name


def _check_output(output: Path, resume: bool) -> None:
    writer.check_outside(output)
    atomic_files.check_is_folder(output)
    if resume and not (output / RECORD).is_file():
        raise OptionError(
            f"{output} has no {RECORD}, so that there is no training to resume. Remove resume=True (--resume)."
        )
    if not resume and output.exists() and any(output.iterdir()):
        raise PackExistsError(
            f"{output} exists and is not empty. Choose another folder, or continue with resume=True (--resume)."
        )


def _prepare(opened: Pack, pack: Path, training: Training, output: Path, table: Table, held_out: Table | None) -> _Run:
    """Check everything and encode the rows. Nothing is written."""
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
    # check the Trainer's options before loading a model; the number of rows may still change
    trainer.arguments(training, output / CHECKPOINTS, len(table.rows))
    model, revision = models.base_model_of(opened, training.model)
    tokenizer = models.load_tokenizer(model, revision)
    max_length = examples.max_tokens(training.task, training.max_length, tokenizer, models.load_config(model, revision))
    labels, columns = None, training.columns
    tables = [table, *([held_out] if held_out else [])]
    if training.task == "text-classification":
        labels = data.infer_labels(table, columns)
        rows = [examples.encode_classification(file, labels, columns, tokenizer, max_length) for file in tables]
    else:
        rows = [examples.encode_language_model(file, columns, tokenizer, max_length) for file in tables]
    settings = {
        **json.loads(json.dumps(asdict(training), default=str)),
        "train": data.rows_sha256(table),
        "evaluation": data.rows_sha256(held_out) if held_out else None,
        "model": model,
        "subspace": opened.info.fingerprint,
    }
    # a secret, which must not be written to the record
    settings["trainer_options"].pop("hub_token", None)
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
        settings=settings,
    )


def _load_model(run: _Run) -> Any:
    """Return the base model with coefficients, and with a head if the task has classes."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(run.arguments.seed)
    model = get_peft_model(models.load_model(run.model, run.revision, run.labels, run.tokenizer), run.config)
    # with a name, PEFT would query the Hub at every checkpoint; `_save` sets it
    model.peft_config["default"].base_model_name_or_path = ""
    if run.arguments.gradient_checkpointing or getattr(run.arguments, "activation_checkpointing", False):
        # the embeddings are frozen, so without this no gradient would reach the first checkpointed block
        model.enable_input_require_grads()
    return model


def _train_and_save(
    opened: Pack, training: Training, output: Path, run: _Run, resume: bool, report: Progress
) -> TrainingResult:
    """Train, evaluate, and save the adapter."""
    model = _load_model(run)
    # the folder is removed again if the training cannot start
    with atomic_files.ensure_folder(output / CHECKPOINTS):
        hf_trainer = trainer.make(
            model, training, run.arguments, trainer.Rows(run.rows, run.evaluation, run.collate), report
        )
        if not resume:
            _write_record(output, run, None)
    with _clear_errors(output):
        fit = _fit(model, hf_trainer, resume)

    def measure(network: Any, rows: Sequence[examples.Example]) -> Figures:
        batch_size = run.arguments.per_device_eval_batch_size
        return evaluate.measure(network, rows, run.collate, run.labels, batch_size, report)

    figures = None
    if run.evaluation is not None:
        figures = measure(model, run.evaluation)
    trained_on = run.evaluation is None
    compared_rows = run.rows if run.evaluation is None else run.evaluation
    baseline = baselines.compare_with_baseline(model, compared_rows, figures, measure, trained_on=trained_on)
    with _clear_errors(output):
        _save(model, opened, output, run.model)
    return TrainingResult(
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
        **fit,
    )


def _fit(model: Any, hf_trainer: Any, resume: bool) -> dict[str, Any]:
    """Train the model, and return the fields of `TrainingResult` that the training gives."""
    from ..tuner.layer import EigenLoraxLayer

    trained = {key: parameter.numel() for key, parameter in model.named_parameters() if parameter.requires_grad}
    numbers = sum(size for key, size in trained.items() if "eigenlorax_" in key)
    checkpoint = trainer.last_checkpoint(Path(hf_trainer.args.output_dir)) if resume else None
    hf_trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise NonFiniteError(
            "the training diverged: trained parameters are NaN or Inf. Nothing was added to the pack. Try a lower "
            "learning_rate= (--learning-rate)."
        )
    return {
        "modules": sum(isinstance(module, EigenLoraxLayer) for module in model.modules()),
        "numbers": numbers,
        "head_numbers": sum(trained.values()) - numbers,
        "steps": hf_trainer.state.global_step,
        "epochs": float(hf_trainer.state.epoch),
        "history": trainer.history(hf_trainer.state.log_history),
    }


def _save(model: Any, pack: Pack, output: Path, base: str) -> None:
    config = model.peft_config["default"]
    # the id on the Hub, not the path on this machine
    config.base_model_name_or_path = pack.base_model or base
    config.revision = pack.revision
    model.save_pretrained(output, save_embedding_layers=False)
    atomic_files.copy_permissions(output, output / RECORD)


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Replace the various errors of torch and safetensors for full memory and a full disk by ours."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            "the device has no memory left. Pass a smaller batch_size= (--batch-size) or max_length= (--max-length). "
            "gradient_accumulation_steps, among the Trainer's options, sums up several batches per step."
        ) from error
    except OSError as error:
        error.filename = error.filename or str(output)
        raise
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or any(sign in str(error) for sign in _WRITE_FAILURES):
            raise OSError(errno.EIO, f"a file could not be written ({reason(error)})", str(output)) from error
        raise


@contextmanager
def _mention_adapter_folder(pack: Path, name: str, output: Path) -> Iterator[None]:
    """Add to errors of the block that the adapter was trained and saved."""
    try:
        yield
    except EigenloraxError as error:
        hint = f"The trained adapter is in {output}. To add it: `eigenlorax add {pack} {name}={output}`."
        raise type(error)(f"{error} {hint}") from error


def _finished_result(output: Path, run: _Run) -> TrainingResult | None:
    """Return the result of the training in `output`, or None if it is not finished.

    Raises `OptionError` if it has other settings, or cannot be resumed.
    """
    record, settings = read_record(output), run.settings
    stored = record.get("asked", {})
    differing = sorted(option for option in settings if stored.get(option) != settings[option])
    if differing:
        first = differing[0]
        raise OptionError(
            f"{output} was begun with another {first}: {stored.get(first)!r} there, {settings[first]!r} now. "
            "resume=True (--resume) continues the same training. Choose another folder for another training."
        )
    if record.get("result") is not None and (output / keys.ADAPTER_WEIGHTS).is_file():
        return _parse_result(output, record["result"])
    if run.arguments.save_only_model:
        raise OptionError(
            "checkpoints written with save_only_model lack the optimizer's state, so that they cannot be resumed. "
            "Remove resume=True (--resume), and choose another folder."
        )
    return None


def _parse_result(output: Path, document: Any) -> TrainingResult:
    """Return the result in a record. Raises `FormatError` if a field is missing or has another type."""
    is_classification = isinstance(document, dict) and document.get("labels") is not None
    figures = ClassificationFigures if is_classification else LanguageModelFigures
    # the folder is not stored, because it may have been moved
    types = {**get_type_hints(TrainingResult), "figures": figures | None, "folder": NoneType}
    try:
        fields = json_dataclasses.from_json(dict, document, "result")
        parsed = {
            name: json_dataclasses.from_json(type_, fields.get(name, ...), f"result.{name}")
            for name, type_ in types.items()
        }
    except json_dataclasses.JsonTypeError as error:
        raise FormatError(f"{output / RECORD} is not a record of `eigenlorax train`: {error}") from error
    return TrainingResult(**{**parsed, "folder": output})


def _write_record(output: Path, run: _Run, result: TrainingResult | None) -> None:
    """Write the settings, which a resumed training must equal, and the result of a finished training."""
    record = {
        "eigenlorax": __version__,
        "asked": run.settings,
        "labels": list(run.labels.names) if run.labels else None,
        "result": {**asdict(result), "folder": None} if result else None,
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    atomic_files.write_file(output / RECORD, text.encode("utf-8", errors="surrogatepass"))


def read_record(output: Path) -> dict[str, Any]:
    """Return the record of a training; `labels` are its class names in the order of the head, or None.

    Raises `FormatError` if the folder was not written by `eigenlorax train`.
    """
    path = output / RECORD
    if not path.is_file():
        raise FormatError(f"{output} has no {RECORD}: it was not written by `eigenlorax train`.")
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("labels"), list | None):
        raise FormatError(f"{path} is not a record of `eigenlorax train`.")
    return record
