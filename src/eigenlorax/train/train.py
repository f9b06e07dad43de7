"""Training on a user's rows: saves the adapter in a folder, and adds it to the pack."""

import errno
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..core import atomic_files, keys
from ..core.progress import Progress
from ..errors import BaselineWarning, EigenloraxError, NonFiniteError, OptionError, PackExistsError, reason
from ..pack import writer
from . import baselines, data, evaluate, examples, metrics, models, starts, trainer, training_record
from .data import Labels, Table
from .figures import Figures
from .metrics import NamedMetric
from .options import GRADIENT_BATCHES, Training
from .starts import Start
from .training_record import RECORD, TrainingResult

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in the folder of a training."""
# torch raises a RuntimeError if a file cannot be written; its message contains one of these
_WRITE_FAILURES = ("iostream error", "PytorchStreamWriter", "inline_container")


def train(
    pack: Path | None,
    training: Training,
    output: Path,
    *,
    name: str | None = None,
    add: bool = True,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train coefficients in a pack's subspace or a LoRA from a reference, save them for PEFT, and add them to the pack.

    A LoRA from a version of the pack is appended to the history of that version, with the version as its reference.

    Args:
        pack: Folder of the pack; None to train from a reference in a folder.
        training: Task, rows and hyperparameters.
        output: Folder for the adapter and its checkpoints.
        name: Name of the adapter in the pack. Default: the name of the folder `output`.
        add: Add the adapter to the pack if it is better than its baseline: the most frequent class, or the perplexity
            of the base model, or the figures of the reference. Otherwise warn with `BaselineWarning`.
        force: Add the adapter even if it is not better than its baseline.
        resume: Continue from the last checkpoint in `output`. If the training is finished, only add the adapter.
        progress: Function that is called with (stage, done, total).

    Returns:
        Result of the training. Its field `added` is False if the adapter was not added.

    Raises:
        OptionError: Options contradict each other, or the device has not enough memory.
        FormatError: The rows or the base model cannot be read.
        AdapterNameError: The name is invalid, or the pack has an adapter of this name.
        PackExistsError: `output` is not empty, and `resume` is False.
        NonFiniteError: The training diverges.
    """
    started, report = time.perf_counter(), progress or (lambda stage, done, total: None)
    start = starts.open_start(pack, training)
    name = name if name is not None else output.absolute().name
    keys.check_name(name)
    if add and pack is not None:
        start.check_name(name)
    _check_output(output, resume)
    train_table = data.read(training.train, training.columns.label)
    evaluation_table = data.read(training.evaluation, training.columns.label) if training.evaluation else None
    models.check_installed()
    with models.quiet(), models.preserved_random_state():
        run = _prepare(start, training, output, train_table, evaluation_table)
        result = _finished_result(output, run) if resume else None
        result = result or _train_and_record(training, output, run, resume, report)
        if not result.baseline.better:
            warnings.warn(result.baseline.sentence(training.reference), BaselineWarning, stacklevel=2)
        stored = None
        if add and pack is not None and (result.baseline.better or force):
            with _mention_adapter_folder(output):
                stored = start.store(output, name)
    in_pack = {"name": name, "delta_error": None, "rounding_error": None, **(asdict(stored) if stored else {})}
    result = replace(result, **in_pack, added=stored is not None, seconds=time.perf_counter() - started)
    training_record.write(output, run.settings, run.labels, result)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    """A training whose options were checked and whose rows are encoded.

    Attributes:
        model: Base model to load.
        revision: Revision of the base model.
        labels: Classes of the head; None for a language model.
        tokenizer: Tokenizer of the base model.
        start: Adapter that the training starts from.
        arguments: `TrainingArguments` of the Trainer.
        rows: Encoded training rows.
        evaluation: Encoded evaluation rows; None without evaluation rows.
        collate: Function that makes a padded batch of rows.
        metric: Metric that decides; without effect on a language model.
        settings: Everything that the training depends on, as JSON.
    """

    model: str
    revision: str | None
    labels: Labels | None
    tokenizer: Any
    start: Start
    arguments: Any
    rows: list[examples.Example]
    evaluation: list[examples.Example] | None
    collate: examples.Collate
    metric: NamedMetric
    settings: dict[str, Any]

    @property
    def compared_rows(self) -> Sequence[examples.Example]:
        """Rows for the comparison with the baseline: the evaluation rows, else a sample of the training rows."""
        return baselines.sample(self.rows) if self.evaluation is None else self.evaluation


def _check_output(output: Path, resume: bool) -> None:
    """Raise unless `output` is a new or empty folder, or with `resume` the folder of a training."""
    writer.check_outside(output)
    atomic_files.check_is_folder(output)
    if resume and not (output / RECORD).is_file():
        raise OptionError(
            f"{output} has no {RECORD}, so there is no training to resume. Remove resume=True (--resume)."
        )
    if not resume and output.exists() and any(output.iterdir()):
        raise PackExistsError(
            f"{output} exists and is not empty. Choose another folder, or continue with resume=True (--resume)."
        )


def _prepare(
    start: Start, training: Training, output: Path, train_table: Table, evaluation_table: Table | None
) -> _Run:
    """Check the options and encode the rows, without writing a file."""
    start.check_options()
    # check the Trainer's options before loading a model; the number of rows may still change
    trainer.arguments(training, output / CHECKPOINTS, len(train_table.rows))
    noun = "pack" if training.reference is None else "reference"
    model, revision = models.resolve_base_model(start, training.model, noun)
    tokenizer, model_config = models.load_tokenizer(model, revision), models.load_config(model, revision)
    max_length = examples.max_tokens(training.task, training.max_length, tokenizer, model_config)
    labels, columns = start.labels(train_table, model_config), training.columns
    tables = [train_table, *([evaluation_table] if evaluation_table else [])]
    if labels is not None:
        rows = [examples.encode_classification(table, labels, columns, tokenizer, max_length) for table in tables]
    else:
        rows = [examples.encode_language_model(table, columns, tokenizer, max_length) for table in tables]
    if evaluation_table:
        examples.warn_about_duplicates(train_table, evaluation_table, *rows)
    settings = {
        **json.loads(json.dumps(asdict(training), default=str)),
        "train": data.rows_sha256(train_table),
        "evaluation": data.rows_sha256(evaluation_table) if evaluation_table else None,
        "model": model,
        **start.fingerprint,
    }
    # the token is a secret and must not be written to the record
    settings["trainer_options"].pop("hub_token", None)
    run = _Run(
        model=model,
        revision=revision,
        labels=labels,
        tokenizer=tokenizer,
        start=start,
        arguments=trainer.arguments(training, output / CHECKPOINTS, len(rows[0])),
        rows=rows[0],
        evaluation=rows[1] if evaluation_table else None,
        collate=examples.collator(training.task, tokenizer),
        metric=metrics.ACCURACY,
        settings=settings,
    )
    if labels is None or training.metric is None:
        return run
    metric = metrics.find(training.metric, len(labels.names), [row["labels"] for row in run.compared_rows])
    return replace(run, metric=metric)


def _load_model(run: _Run) -> Any:
    """Load the base model, and add the adapter to train, and a head if the task has classes."""
    from transformers import set_seed

    set_seed(run.arguments.seed)
    model = run.start.add_to(models.load_model(run.model, run.revision, run.labels, run.tokenizer))
    # with a name, PEFT would query the Hub at every checkpoint; `_save` sets the name
    model.peft_config[starts.ADAPTER].base_model_name_or_path = ""
    if run.arguments.gradient_checkpointing or getattr(run.arguments, "activation_checkpointing", False):
        # the embeddings are frozen, so without this no gradient would reach the first checkpointed block
        model.enable_input_require_grads()
    return model


def _train_and_record(training: Training, output: Path, run: _Run, resume: bool, report: Progress) -> TrainingResult:
    """Train, save the adapter, and write the record. What failed after that can be resumed without training again."""
    result = _train_and_save(training, output, run, resume, report)
    training_record.write(output, run.settings, run.labels, result)
    if not training.keeps_checkpoints:
        atomic_files.remove(output / CHECKPOINTS)
    return result


def _train_and_save(training: Training, output: Path, run: _Run, resume: bool, report: Progress) -> TrainingResult:
    """Train, evaluate and save the adapter. The name in the result and its fields about adding are not set yet."""
    model = _load_model(run)
    # the folder is removed again if the training cannot start
    with atomic_files.ensure_folder(output / CHECKPOINTS):
        hf_trainer = trainer.make(
            model, training, run.arguments, trainer.Rows(run.rows, run.evaluation, run.collate, run.metric), report
        )
        if training.n_gradient:
            _initialize_gradient_components(model, run)
        if not resume:
            training_record.write(output, run.settings, run.labels, None)

    def measure(network: Any, rows: Sequence[examples.Example]) -> Figures:
        batch_size = run.arguments.per_device_eval_batch_size
        return evaluate.measure(network, rows, run.collate, run.labels, batch_size, report, metric=run.metric)

    trained_on = run.evaluation is None
    compared_rows = run.compared_rows
    reference = measure(model, compared_rows) if training.reference is not None else None
    with _clear_errors(output):
        training_fields = _run_trainer(model, hf_trainer, run.metric, resume)
    figures = measure(model, compared_rows)
    if reference is not None:
        baseline = baselines.compare_with_reference(figures, reference, trained_on=trained_on)
    else:
        baseline = baselines.compare_with_baseline(model, compared_rows, figures, measure, trained_on=trained_on)
    with _clear_errors(output):
        _save(model, run.start, output, run.model)
    return TrainingResult(
        name="",
        task=training.task,
        model=run.model,
        labels=list(run.labels.names) if run.labels else None,
        rows=len(run.rows),
        figures=None if trained_on else figures,
        baseline=baseline,
        folder=output,
        added=False,
        delta_error=None,
        rounding_error=None,
        seconds=0.0,
        **training_fields,
    )


def _initialize_gradient_components(model: Any, run: _Run) -> None:
    """Compute the gradient components of a new adapter from a few batches of training rows."""
    from ..tuner import initialize_gradient_components

    size, seed = run.arguments.per_device_train_batch_size, run.arguments.seed
    order = torch.randperm(len(run.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [run.rows[index] for index in order[: GRADIENT_BATCHES * size]]
    batches = [run.collate(rows[first : first + size]) for first in range(0, len(rows), size)]
    initialize_gradient_components(model, batches, starts.ADAPTER, seed=seed)


def _run_trainer(model: Any, hf_trainer: Any, metric: NamedMetric, resume: bool) -> dict[str, Any]:
    """Train the model, and return the fields of `TrainingResult` from `modules` to `history`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = {key: parameter.numel() for key, parameter in model.named_parameters() if parameter.requires_grad}
    numbers = sum(size for key, size in trained.items() if trainer.is_update(key))
    checkpoint = trainer.last_checkpoint(Path(hf_trainer.args.output_dir)) if resume else None
    hf_trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise NonFiniteError(
            "the training diverged: trained parameters are NaN or Inf. Nothing was added to the pack. Try a lower "
            "learning_rate= (--learning-rate)."
        )
    return {
        "modules": sum(isinstance(module, BaseTunerLayer) for module in model.modules()),
        "numbers": numbers,
        "head_numbers": sum(trained.values()) - numbers,
        "steps": hf_trainer.state.global_step,
        "epochs": float(hf_trainer.state.epoch),
        "history": trainer.history(hf_trainer.state.log_history, metric),
    }


def _save(model: Any, start: Start, output: Path, base: str) -> None:
    """Save the adapter as a PEFT folder. base: the base model's name, for a start that does not state one."""
    config = model.peft_config[starts.ADAPTER]
    # prefer the id on the Hub to a path on this machine
    config.base_model_name_or_path = start.base_model or base
    config.revision = start.revision
    model.save_pretrained(output, save_embedding_layers=False)
    atomic_files.copy_permissions(output, output / RECORD)


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Replace errors of torch and safetensors by `OptionError` (out of memory) or `OSError` (file not written)."""
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
def _mention_adapter_folder(output: Path) -> Iterator[None]:
    """Extend messages of errors in the block: name the folder of the trained adapter, and how to add it."""
    try:
        yield
    except EigenloraxError as error:
        hint = (
            f"The trained adapter is in {output}. To add it without training again, pass resume=True (--resume), and "
            "another name= (--name) if the name is taken."
        )
        raise type(error)(f"{error} {hint}") from error


def _finished_result(output: Path, run: _Run) -> TrainingResult | None:
    """Return the result of the training in `output`, or None if it has to be continued.

    Raises:
        OptionError: It has other settings, or checkpoints that cannot be resumed.
    """
    result = training_record.finished_result(output, run.settings)
    if result is None and run.arguments.save_only_model:
        raise OptionError(
            "checkpoints written with save_only_model lack the optimizer's state, so they cannot be resumed. "
            "Remove resume=True (--resume), and choose another folder."
        )
    return result
