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
from . import data, evaluate, examples, models
from .adapter_versions import ORIGINAL, WITHOUT_UPDATE, LoadedVersions, VersionLoader
from .data import Table
from .examples import IGNORED, Collate, Example
from .options import EVALUATION_BATCH, Columns

RECYCLED = "recycled"
_MAX_FLOAT64_LOGITS = 2**24
"""Logits that are converted to float64 at once: those of all tokens of a batch may take gigabytes."""

LabelNames = Mapping[str, Sequence[str]] | Sequence[str]
"""Class names in the order of the head: by adapter, or the same for all."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """One adapter on one file of rows.

    classes: number of classes of the adapter's head, None for a language model. labelled: whether the file has a class
    for each row.
    """

    name: str
    file: Path
    classes: int | None
    labelled: bool
    rows: list[Example]

    @property
    def task(self) -> str:
        return "causal-lm" if self.classes is None else "text-classification"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Jobs that were checked against the base model's config and tokenizer. The base model is not loaded yet."""

    base: str
    revision: str | None
    tokenizer: Any
    batch_size: int
    jobs: Sequence[EvaluationJob]


@dataclass(frozen=True, slots=True)
class _RowOptions:
    """Options that say how rows are read. label_names: as in `prepare`. max_length: None for the default."""

    label_names: LabelNames | None
    columns: Columns
    max_length: int | None

    def class_names(self, adapter: str) -> Sequence[str] | None:
        if isinstance(self.label_names, Mapping):
            return self.label_names.get(adapter)
        return self.label_names


@dataclass(frozen=True, slots=True)
class _BaseModel:
    """A base model by name, with its config and tokenizer; its weights are not loaded."""

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
    """Check all options, and encode the rows. Only errors that need the base model's weights come later.

    Args:
        originals: Original adapters by their names in the pack.
        files: Pairs of an adapter's name and a file of rows. None for the name: every adapter whose original is given.
        model: Base model. Default: the pack's.
        task: Task of all adapters. Default: the adapter's own task type, or classification if it has none but a head.
        labels: Class names in the order of the head, by adapter or for all.
        columns: Names of columns. Rows without a label column are compared too, but have no accuracy.
        batch_size: Rows per batch, at least 1.
        max_length: Maximum number of tokens per row. Default: 128 for classification, 512 for language models.

    Raises `OptionError` or `FormatError` if options, rows and adapters do not fit together.
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
    """Return one job per adapter. Rows are encoded once per task. is_for_all: the file was given without a name."""
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
    """Return the named adapter, or all whose original is given."""
    if name is not None:
        adapter = pack.packed(name)
        if name not in originals:
            raise OptionError(f"adapter {name!r} cannot be compared without its original. Pass its LoRA folder.")
        return [adapter]
    adapters = [pack.packed(packed_name) for packed_name in pack.names if packed_name in originals]
    if not adapters:
        raise OptionError("nothing to compare: no adapter's original is given. Pass the LoRA folders.")
    return adapters


def _check_label_names(labels: LabelNames | None, pack: Pack) -> None:
    if isinstance(labels, Mapping):
        for name in labels:
            keys.check_known(name, pack.names, "the pack, though labels name it")
        for names in labels.values():
            evaluate.check_label_names(names)
    elif labels is not None:
        evaluate.check_label_names(labels)


def _resolve_task(adapter: PackedAdapter, task: str | None) -> str:
    has_no_type = json.loads(adapter.source_config).get("task_type") is None
    if not task and has_no_type and adapter.heads:
        task = "text-classification"
    return evaluate.resolve_task(adapter, task)


def _class_numbers(adapter: str, classes: int, table: Table, options: _RowOptions, *, is_for_all: bool) -> list[int]:
    """Return the class number of each row."""
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
    """Return whether the rows have labels. Raises `FormatError` if some rows have none, or a named column is missing.

    Warns if the file looks labelled, but has no column of the default name.
    """
    has_label = [columns.label in row for row in table.rows]
    if any(has_label) and not all(has_label):
        raise FormatError(
            f"{table.path}, {table.locations[has_label.index(False)]} has no {columns.label!r}, which {sum(has_label)} "
            f"of {len(has_label)} rows have. Label all rows, or none."
        )
    # a column that the user named must exist: reading it raises the error
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

    accuracy, loss (cross-entropy in nats): meaningless without labels. agreement: fraction of predictions that equal
    the original's. kl: divergence from the original's distribution, in nats.
    """

    accuracy: float
    loss: float
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class JobScores:
    """Scores of one job by version, with `ORIGINAL` and `WITHOUT_UPDATE`. n: number of rows, or of predicted tokens."""

    n: int
    scores: Mapping[str, Score]


Versions = Mapping[str, Callable[[str], Adapter]]
"""Version → function that returns an adapter by its name in the pack."""


def run(
    pack: Pack, originals: Mapping[str, Adapter], plan: EvaluationPlan, progress: Progress | None = None
) -> list[Evaluation]:
    """Evaluate the originals, the recycled adapters, and the heads alone. One evaluation per job, in their order."""
    job_scores = score_versions(originals, {RECYCLED: pack.adapter}, plan, progress)
    return [evaluation(job, scores) for job, scores in zip(plan.jobs, job_scores, strict=True)]


def score_versions(
    originals: Mapping[str, Adapter], versions: Versions, plan: EvaluationPlan, progress: Progress | None = None
) -> list[JobScores]:
    """Score the originals, every version, and the heads alone, in the order of the jobs.

    Jobs are grouped by base model and adapter, so that each is loaded once. The original's predictions are computed
    once for all versions that share a base model with it.
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
                    **{version: adapter_of(name) for version, adapter_of in versions.items()},
                }
                for loaded in loader.load(name, adapters):
                    for index in indices:
                        collate = examples.collator(jobs[index].task, plan.tokenizer)
                        counts[index], job_scores = _score(jobs[index], loaded, collate, plan.batch_size, advance)
                        scores[index] |= job_scores
    return [JobScores(n, job_scores) for n, job_scores in zip(counts, scores, strict=True)]


def _load_base(plan: EvaluationPlan, classes: int | None) -> Any:
    labels = None if classes is None else data.numbered_labels(classes)
    return models.load_model(plan.base, plan.revision, labels, plan.tokenizer)


def _score(
    job: EvaluationJob, loaded: LoadedVersions, collate: Collate, batch_size: int, advance: Callable[[int], None]
) -> tuple[int, dict[str, Score]]:
    """Return the number of predictions, and the scores of each version.

    Sums are taken batch by batch, because the logits of a whole file may not fit into memory.
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
            # the original comes first; only its logits are kept, because those of a language model take gigabytes
            original_logits = logits if original_logits is None else original_logits
            chunk = max(1, _MAX_FLOAT64_LOGITS // logits.shape[-1])
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                sums[index] += _score_sums(
                    evaluate.to_float64(original_logits[rows]), evaluate.to_float64(logits[rows]), targets[rows]
                )
        n += len(targets)
        # progress counts neither the original nor the head alone
        advance((len(loaded.names) - 2) * len(labels))
    means = (sums / n).tolist()
    return n, {
        version: Score(accuracy, loss, agreement, max(kl, 0.0))
        for version, (accuracy, loss, agreement, kl) in zip(loaded.names, means, strict=True)
    }


def evaluation(job: EvaluationJob, job_scores: JobScores) -> Evaluation:
    """Return the scores of a job as the report's record."""
    original, recycled, without = (job_scores.scores[version] for version in (ORIGINAL, RECYCLED, WITHOUT_UPDATE))
    is_language_model = job.classes is None
    accuracy = [score.accuracy if job.labelled else None for score in (original, recycled, without)]
    perplexity = [
        evaluate.perplexity(score.loss) if is_language_model else None for score in (original, recycled, without)
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
    """Return sums over rows: correct predictions, loss, predictions equal to the original's, divergence from it."""
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
