"""Evaluation of recycled adapters on the user's rows: agreement with the originals, accuracy and perplexity."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from ..core import keys
from ..core.adapter import Adapter
from ..core.progress import Progress
from ..errors import FormatError, NonFiniteError, OptionError, RowsWarning
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..reports.task_data import Evaluation
from . import data, evaluate, examples, figures, models
from .adapter_versions import ORIGINAL, WITHOUT_UPDATE, LoadedVersions, VersionLoader
from .data import Table
from .examples import IGNORED, Collate, Example
from .options import EVALUATION_BATCH, Columns

RECYCLED = "recycled"
"""Name of the version that the pack returns."""
_MAX_FLOAT64_LOGITS = 2**24
"""Maximum number of logits that are converted to float64 at once. All logits of a batch may take gigabytes."""

LabelNames = Mapping[str, Sequence[str]] | Sequence[str]
"""Class names in the order of the head: adapter → names, or the same names for all adapters."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """Evaluation of one adapter on one file.

    Attributes:
        name: Name of the adapter in the pack.
        file: File of rows.
        classes: Number of classes of the adapter's head; None for a language model.
        labelled: Whether each row has a class. False for a language model.
        rows: Encoded rows.
    """

    name: str
    file: Path
    classes: int | None
    labelled: bool
    rows: list[Example]

    @property
    def task(self) -> str:
        """Task of the adapter: "text-classification" or "causal-lm"."""
        return "causal-lm" if self.classes is None else "text-classification"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Evaluation jobs that were checked against the base model's config and tokenizer.

    Attributes:
        base: Base model to load.
        revision: Revision of the base model.
        tokenizer: Tokenizer of the base model.
        batch_size: Rows per batch.
        jobs: One job per adapter and file.
    """

    base: str
    revision: str | None
    tokenizer: Any
    batch_size: int
    jobs: Sequence[EvaluationJob]


@dataclass(frozen=True, slots=True)
class _RowOptions:
    """Options that control how rows are read and encoded.

    Attributes:
        label_names: Class names in the order of the head, by adapter or for all adapters.
        columns: Names of the columns.
        max_length: Maximum number of tokens per row. Default: the task's.
    """

    label_names: LabelNames | None
    columns: Columns
    max_length: int | None

    def class_names(self, adapter: str) -> Sequence[str] | None:
        """Return the class names of an adapter, or None if the user passed none for it."""
        if isinstance(self.label_names, Mapping):
            return self.label_names.get(adapter)
        return self.label_names


@dataclass(frozen=True, slots=True)
class _BaseModel:
    """Base model with its config and tokenizer. Its weights are not loaded."""

    name: str
    revision: str | None
    config: Any
    tokenizer: Any


def prepare(
    pack: Pack,
    originals: Mapping[str, Adapter],
    files: Sequence[tuple[str | None, Path]],
    *,
    model: str | None = None,
    task: str | None = None,
    labels: LabelNames | None = None,
    columns: Columns | None = None,
    batch_size: int = EVALUATION_BATCH,
    max_length: int | None = None,
) -> EvaluationPlan:
    """Check all options, and encode the rows. The base model's weights are not loaded.

    Args:
        pack: Pack of the recycled adapters.
        originals: Name in the pack → original adapter.
        files: Pairs of an adapter's name and a file of rows. If the name is None, the file is for every adapter in
            `originals`.
        model: Base model. Default: the pack's.
        task: Task of all adapters. Default: the task type of each adapter; classification for an adapter that has a
            head and no task type.
        labels: Class names in the order of the head, by adapter or for all adapters.
        columns: Names of the columns. Default: `Columns()`. Rows without labels have no accuracy.
        batch_size: Rows per batch, at least 1.
        max_length: Maximum number of tokens per row, at least 2. Default: 128 for classification, 512 for language
            models.

    Returns:
        Jobs for `run`.

    Raises:
        OptionError: An option is out of range, or does not fit the adapters or the rows.
        FormatError: The rows or the base model cannot be read, or an adapter belongs to a different base model.
        AdapterNameError: The pack has no adapter of such a name, or an adapter has no head for a classification.
    """
    evaluate.check_sizes(batch_size, max_length)
    row_options = _RowOptions(labels, columns or Columns(), max_length)
    _check_label_names(labels, pack)
    adapters_by_file = [_adapters_for(pack, originals, name) for name, _ in files]
    tasks = {adapter.name: _resolve_task(adapter, task) for adapters in adapters_by_file for adapter in adapters}
    tables = [data.read(file, row_options.columns.label) for _, file in files]
    models.check_installed()
    with models.quiet():
        name, revision = models.resolve_base_model(pack, model)
        base = _BaseModel(name, revision, models.load_config(name, revision), models.load_tokenizer(name, revision))
        jobs: list[EvaluationJob] = []
        for (adapter, _), table, adapters in zip(files, tables, adapters_by_file, strict=True):
            jobs += _jobs_for_file(table, adapters, tasks, row_options, base, is_for_all=adapter is None)
        return EvaluationPlan(base.name, base.revision, base.tokenizer, batch_size, jobs)


def _jobs_for_file(
    table: Table,
    adapters: Sequence[PackedAdapter],
    tasks: Mapping[str, str],
    options: _RowOptions,
    base: _BaseModel,
    *,
    is_for_all: bool,
) -> list[EvaluationJob]:
    """Return one job per adapter. Rows are encoded once per task.

    Args:
        table: Rows of the file.
        adapters: Adapters to evaluate on the file.
        tasks: Adapter's name → its task.
        options: Options for reading and encoding the rows.
        base: Base model.
        is_for_all: Whether the user passed the file without an adapter's name.
    """
    has_classifiers = any(tasks[adapter.name] == "text-classification" for adapter in adapters)
    labelled = has_classifiers and _has_labels(table, options.columns)
    encoded: dict[str, list[Example]] = {}
    jobs = []
    for adapter in adapters:
        task = tasks[adapter.name]
        if task not in encoded:
            encode = examples.encode_texts if task == "text-classification" else examples.encode_language_model
            max_length = examples.max_tokens(task, options.max_length, base.tokenizer, base.config)
            encoded[task] = encode(table, options.columns, base.tokenizer, max_length)
        rows, classes = encoded[task], None
        if task == "text-classification":
            classes = evaluate.count_head_classes(adapter, base.config)
            numbers = [IGNORED] * len(rows)
            if labelled:
                numbers = _class_numbers(adapter.name, classes, table, options, is_for_all=is_for_all)
            rows = examples.with_labels(rows, numbers)
        else:
            evaluate.check_language_model(adapter, base.config)
        jobs.append(EvaluationJob(adapter.name, table.path, classes, labelled and classes is not None, rows))
    return jobs


def _adapters_for(pack: Pack, originals: Mapping[str, Adapter], name: str | None) -> list[PackedAdapter]:
    """Return the named adapter; if the name is None, all adapters with an original."""
    if name is not None:
        adapter = pack.packed(name)
        if name not in originals:
            raise OptionError(f"adapter {name!r} cannot be compared without its original. Pass its LoRA folder.")
        return [adapter]
    adapters = [pack.packed(packed_name) for packed_name in pack.names if packed_name in originals]
    if not adapters:
        raise OptionError("there is nothing to compare: no original adapter was passed. Pass the LoRA folders.")
    return adapters


def _check_label_names(labels: LabelNames | None, pack: Pack) -> None:
    """Raise unless class names are valid and belong to adapters of the pack."""
    if isinstance(labels, Mapping):
        for name in labels:
            keys.check_known(name, pack.names, "the pack, though labels name it")
        for names in labels.values():
            evaluate.check_label_names(names)
    elif labels is not None:
        evaluate.check_label_names(labels)


def _resolve_task(adapter: PackedAdapter, task: str | None) -> str:
    """Return the task of an adapter, with classification for adapters that have a head and no task type."""
    has_no_type = json.loads(adapter.source_config).get("task_type") is None
    if not task and has_no_type and adapter.heads:
        task = "text-classification"
    return evaluate.resolve_task(adapter, task)


def _class_numbers(adapter: str, classes: int, table: Table, options: _RowOptions, *, is_for_all: bool) -> list[int]:
    """Return the class number of each row. classes: number of classes of the adapter's head."""
    try:
        labels = evaluate.label_names(classes, options.class_names(adapter), table, options.columns)
        return labels.encode(table, options.columns)
    except (FormatError, OptionError) as error:
        if not is_for_all:
            raise
        raise OptionError(
            f"the labels of {table.path} do not fit adapter {adapter!r}: {error} If the file is for some adapters "
            f"only, name each: NAME={table.path}."
        ) from error


def _has_labels(table: Table, columns: Columns) -> bool:
    """Return whether the rows have labels. Warns with `RowsWarning` if another column may have the labels.

    Raises:
        FormatError: Some rows have a label, and others have none.
    """
    has_label = [columns.label in row for row in table.rows]
    if any(has_label) and not all(has_label):
        raise FormatError(
            f"{table.path}, {table.locations[has_label.index(False)]} has no {columns.label!r}, which {sum(has_label)} "
            f"of {len(has_label)} rows have. Label all rows, or none."
        )
    # if the user named the column, it must exist; reading it raises the error
    if all(has_label) or columns.label != Columns().label:
        return True
    if columns.text in table.columns and set(table.columns) - {columns.text, columns.pair}:
        warnings.warn(
            f"{table.path} has no column {columns.label!r}: agreement is measured, but no accuracy. It has: "
            f"{', '.join(table.columns)}. Name the column with Columns(label=...) (--label-column).",
            RowsWarning,
            stacklevel=5,
        )
    return False


@dataclass(frozen=True, slots=True)
class Score:
    """Means over the rows of a classification, or over the predicted tokens of a language model.

    Attributes:
        accuracy: Fraction of predictions that equal the label; meaningless without labels.
        loss: Cross-entropy, in nats; meaningless without labels.
        agreement: Fraction of predictions that equal the original adapter's.
        kl: Kullback–Leibler divergence from the original adapter's distribution, in nats.
    """

    accuracy: float
    loss: float
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class JobScores:
    """Scores of one job.

    Attributes:
        n: Number of rows of a classification, or of predicted tokens of a language model.
        scores: Version → score, with `ORIGINAL` and `WITHOUT_UPDATE`.
    """

    n: int
    scores: Mapping[str, Score]


Versions = Mapping[str, Callable[[str], Adapter]]
"""Version → function that returns an adapter by its name in the pack."""


def run(
    pack: Pack, originals: Mapping[str, Adapter], plan: EvaluationPlan, progress: Progress | None = None
) -> list[Evaluation]:
    """Evaluate the original adapters, the recycled adapters, and the heads alone.

    Args:
        pack: Pack of the recycled adapters.
        originals: Name in the pack → original adapter.
        plan: Result of `prepare`.
        progress: Function that is called with (stage, done, total).

    Returns:
        One evaluation per job, in the order of the jobs.

    Raises:
        FormatError: PEFT cannot load an adapter on the base model.
        NonFiniteError: Predictions are NaN or Inf.
    """
    job_scores = score_versions(originals, {RECYCLED: pack.adapter}, plan, progress)
    return [evaluation(job, scores) for job, scores in zip(plan.jobs, job_scores, strict=True)]


def score_versions(
    originals: Mapping[str, Adapter], versions: Versions, plan: EvaluationPlan, progress: Progress | None = None
) -> list[JobScores]:
    """Score the original adapters, every version, and the heads alone.

    Jobs are grouped by base model and adapter, so that each is loaded once. The original's predictions are computed
    once for all versions that share a base model with it.

    Args:
        originals: Name in the pack → original adapter.
        versions: Version → function that returns an adapter by its name.
        plan: Result of `prepare`.
        progress: Function that is called with (stage, done, total).

    Returns:
        Scores of each job, in the order of the jobs.

    Raises:
        FormatError: PEFT cannot load an adapter on the base model.
        NonFiniteError: Predictions are NaN or Inf.
    """
    jobs = plan.jobs
    scores: list[dict[str, Score]] = [{} for _ in jobs]
    counts = [0 for _ in jobs]
    total, done = len(versions) * sum(len(job.rows) for job in jobs), 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress("comparing predictions", done, total)

    order = sorted(range(len(jobs)), key=lambda index: (jobs[index].classes or 0, jobs[index].name))
    with models.quiet():
        for classes, same_head in groupby(order, key=lambda index: jobs[index].classes):
            loader = VersionLoader(partial(_load_base, plan, classes))
            for name, same_adapter in groupby(same_head, key=lambda index: jobs[index].name):
                indices = list(same_adapter)
                adapters = {
                    ORIGINAL: originals[name],
                    **{version: load_adapter(name) for version, load_adapter in versions.items()},
                }
                for loaded in loader.load(name, adapters):
                    for index in indices:
                        collate = examples.collator(jobs[index].task, plan.tokenizer)
                        counts[index], job_scores = _score(jobs[index], loaded, collate, plan.batch_size, advance)
                        scores[index] |= job_scores
    return [JobScores(n, job_scores) for n, job_scores in zip(counts, scores, strict=True)]


def _load_base(plan: EvaluationPlan, classes: int | None) -> Any:
    """Load the base model as a classifier with this number of classes; for None, as a language model."""
    labels = None if classes is None else data.numbered_labels(classes)
    return models.load_model(plan.base, plan.revision, labels, plan.tokenizer)


def _score(
    job: EvaluationJob, loaded: LoadedVersions, collate: Collate, batch_size: int, advance: Callable[[int], None]
) -> tuple[int, dict[str, Score]]:
    """Score the versions of an adapter on the rows of one job.

    Sums are computed batch by batch, because the logits of a whole file may not fit into memory.

    Args:
        job: Adapter and rows.
        loaded: Versions of the adapter.
        collate: Function that makes a padded batch of rows.
        batch_size: Rows per batch.
        advance: Function that is called with the number of predictions made since the last call.

    Returns:
        Number of predictions per version, and version → score.
    """
    sums, n = torch.zeros(len(loaded.names), 4, dtype=torch.float64), 0
    original_model, _ = loaded.models[ORIGINAL]
    advance(0)
    for inputs, labels in evaluate.batches(original_model, job.rows, collate, batch_size):
        original_logits, targets = None, labels
        for index, (version, model) in enumerate(loaded.activate_each()):
            with torch.inference_mode():
                logits = model(**inputs).logits
            if job.classes is None:
                logits, targets = evaluate.next_token_logits(logits, labels)
            if not bool(logits.isfinite().all()):
                raise NonFiniteError(
                    f"the predictions of adapter {job.name!r} ({version}) on {job.file} are NaN or Inf: its weights "
                    "are damaged, or its training diverged."
                )
            # the original comes first; only its logits stay in memory, because a language model's take gigabytes
            original_logits = logits if original_logits is None else original_logits
            chunk = max(1, _MAX_FLOAT64_LOGITS // logits.shape[-1])
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                sums[index] += _score_sums(
                    evaluate.to_float64(original_logits[rows]), evaluate.to_float64(logits[rows]), targets[rows]
                )
        n += len(targets)
        # progress counts neither the original adapter nor the head alone
        advance((len(loaded.names) - 2) * len(labels))
    means = (sums / n).tolist()
    return n, {
        version: Score(accuracy, loss, agreement, max(kl, 0.0))
        for version, (accuracy, loss, agreement, kl) in zip(loaded.names, means, strict=True)
    }


def evaluation(job: EvaluationJob, job_scores: JobScores) -> Evaluation:
    """Return the scores of a job as a record of the report. The versions must include `RECYCLED`."""
    original, recycled, without = (job_scores.scores[version] for version in (ORIGINAL, RECYCLED, WITHOUT_UPDATE))
    is_language_model = job.classes is None
    accuracy = [score.accuracy if job.labelled else None for score in (original, recycled, without)]
    perplexity = [
        figures.perplexity(score.loss) if is_language_model else None for score in (original, recycled, without)
    ]
    return Evaluation(
        name=job.name,
        data=str(job.file),
        task=job.task,
        rows=len(job.rows),
        tokens=job_scores.n if is_language_model else None,
        labelled=job.labelled,
        original_accuracy=accuracy[0],
        recycled_accuracy=accuracy[1],
        without_accuracy=accuracy[2],
        agreement=recycled.agreement,
        without_agreement=without.agreement,
        kl=recycled.kl,
        without_kl=without.kl,
        original_perplexity=perplexity[0],
        recycled_perplexity=perplexity[1],
        without_perplexity=perplexity[2],
    )


def _score_sums(original_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return sums over predictions, (4,): correct ones, loss, equal to the original's, divergence from the original.

    Args:
        original_logits: Logits of the original adapter, (predictions, classes), float64.
        logits: Logits of the scored version, of the same shape.
        targets: Class of each prediction, or `IGNORED`, (predictions,).
    """
    targets = targets.to(logits.device)
    original_log_probs, log_probs = original_logits.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    predictions = log_probs.argmax(dim=-1)
    sums = (
        (predictions == targets).sum(),
        nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="sum"),
        (predictions == original_log_probs.argmax(dim=-1)).sum(),
        kl_div(log_probs, original_log_probs, reduction="sum", log_target=True),
    )
    return torch.tensor([float(total) for total in sums], dtype=torch.float64)
