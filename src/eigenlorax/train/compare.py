"""Original and recycled adapters on rows of the user's own: do both say the same, and is the recycled one as good?"""

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
from ..errors import FormatError, NonFiniteError, OptionError, RowsWarning
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..reports.data import Evaluation
from . import data, evaluate, examples, models
from .data import Table
from .examples import IGNORED, Collate, Example
from .options import EVALUATION_BATCH, Columns
from .sides import ORIGINAL, WITHOUT, Bench, Sides

RECYCLED = "recycled"
_NUMBERS = 2**24
"""Logits that are in float64 at a time: those of all tokens of a batch may be gigabytes."""


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter on one file. classes: how many its head tells apart, None of a language model. labelled: whether the
    file says which class a row is of."""

    name: str
    file: Path
    classes: int | None
    labelled: bool
    rows: list[Example]

    @property
    def task(self) -> str:
        return "causal-lm" if self.classes is None else "text-classification"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is to be run, checked against the base model's config and tokenizer, but not yet loaded."""

    base: str
    revision: str | None
    tokenizer: Any
    batch_size: int
    jobs: Sequence[Job]


def prepare(
    pack: Pack,
    originals: Mapping[str, Adapter],
    files: Sequence[tuple[str | None, Path]],
    *,
    model: str | None = None,
    task: str | None = None,
    labels: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    columns: Columns | None = None,
    batch_size: int = EVALUATION_BATCH,
    max_length: int | None = None,
) -> Comparison:
    """Find what is wrong with what was asked for: all of it but what only the base model's weights can tell.

    originals: by their names in the pack. files: rows, and the adapter that they are for, None for each that has its
    original here. Rows without a label column are compared all the same. task: that of every adapter; else what it says
    itself, or classification where it says nothing and has a head. labels: the names of the classes in the order of the
    head, by adapter or for all.
    """
    evaluate.check_sizes(batch_size, max_length)
    columns = columns or Columns()
    if isinstance(labels, Mapping):
        _check_known(labels, pack)
    for named in labels.values() if isinstance(labels, Mapping) else [labels] if labels is not None else []:
        evaluate.check_labels(named)
    chosen = [_adapters(pack, originals, name) for name, _ in files]
    tasks = {adapter.name: _task(adapter, task) for adapters in chosen for adapter in adapters}
    tables = [data.read(file, columns.label) for _, file in files]
    models.check_installed()
    with models.quiet():
        base, revision = models.of_pack(pack, model)
        config, tokenizer = models.config_of(base, revision), models.tokenizer_of(base, revision)
        jobs: list[Job] = []
        for (name, file), table, adapters in zip(files, tables, chosen, strict=True):
            encoded: dict[str, list[Example]] = {}
            classifying = any(tasks[adapter.name] == "text-classification" for adapter in adapters)
            labelled = classifying and _says_classes(table, columns)
            for adapter in adapters:
                what = tasks[adapter.name]
                classes = numbers = None
                if what == "text-classification":
                    classes = evaluate.classes_of_head(adapter, config)
                    names = labels.get(adapter.name) if isinstance(labels, Mapping) else labels
                    if labelled:
                        numbers = _numbers(adapter.name, classes, names, table, columns, bare=name is None)
                else:
                    evaluate.check_modelled(adapter, config)
                if what not in encoded:
                    encode = examples.modelling if classes is None else examples.unlabelled
                    most = examples.length(what, max_length, tokenizer, config)
                    encoded[what] = encode(table, columns, tokenizer, most)
                rows = encoded[what]
                if classes is not None:
                    rows = examples.labelled(rows, numbers or [IGNORED] * len(rows))
                jobs.append(Job(adapter.name, file, classes, numbers is not None, rows))
        return Comparison(base, revision, tokenizer, batch_size, jobs)


def _adapters(pack: Pack, originals: Mapping[str, Adapter], name: str | None) -> list[PackedAdapter]:
    """Those that a file is for."""
    found = [pack.packed(name)] if name is not None else [pack.packed(one) for one in pack.names if one in originals]
    if name is not None and name not in originals:
        raise OptionError(f"adapter {name!r} cannot be compared: its original is not at hand.")
    if not found:
        raise OptionError("there is nothing to compare: of no adapter of the pack the original is at hand.")
    return found


def _check_known(labels: Mapping[str, Sequence[str]], pack: Pack) -> None:
    for name in labels:
        keys.check_known(name, pack.names, "the pack, though labels name it")


def _task(adapter: PackedAdapter, asked: str | None) -> str:
    says_nothing = json.loads(adapter.source_config).get("task_type") is None
    return evaluate.task_of(adapter, "text-classification" if not asked and says_nothing and adapter.heads else asked)


def _numbers(
    adapter: str, n: int, names: Sequence[str] | None, table: Table, columns: Columns, *, bare: bool
) -> list[int]:
    """The classes of the rows. `bare`: no adapter was named for the file."""
    try:
        return evaluate.classes_of(n, names, table, columns).encode(table, columns)
    except (FormatError, OptionError) as error:
        if not bare:
            raise
        raise OptionError(
            f"the labels of {table.where} do not fit adapter {adapter!r}: {error} If the file is for some adapters "
            f"only, name each: NAME={table.where}."
        ) from error


def _says_classes(table: Table, columns: Columns) -> bool:
    """Whether the rows say of which class they are, or should: all of them or none."""
    rows = [columns.label in row for row in table.rows]
    if any(rows) and not all(rows):
        raise FormatError(
            f"{table.where}, {table.places[rows.index(False)]} has no {columns.label!r}, which {sum(rows)} of "
            f"{len(rows)} rows have. Label all of them, or none."
        )
    # a column that was named has to be there
    if all(rows) or columns.label != Columns().label:
        return True
    if columns.text in table.columns and set(table.columns) - {columns.text, columns.pair}:
        warnings.warn(
            f"{table.where} has no column {columns.label!r}: agreement is counted, and no accuracy. It has: "
            f"{', '.join(table.columns)}. Columns(label=...) (--label-column) names another one.",
            RowsWarning,
            stacklevel=4,
        )
    return False


@dataclass(frozen=True, slots=True)
class Score:
    """Means over rows, or over predicted tokens, of one version. loss: cross-entropy, in nats, of no meaning where rows
    have no labels, as accuracy is. agreement: with the original; kl: from it, in nats."""

    accuracy: float
    loss: float
    agreement: float
    kl: float


@dataclass(frozen=True, slots=True)
class Scored:
    """What a job came to. n: rows, or predicted tokens. scores: by version, `sides.ORIGINAL` and `sides.WITHOUT` among
    them."""

    n: int
    scores: Mapping[str, Score]


Versions = Mapping[str, Callable[[str], Adapter]]
"""What is compared with the originals, by what it is called: an adapter by its name in the pack."""


def run(
    pack: Pack, originals: Mapping[str, Adapter], asked: Comparison, progress: Progress | None = None
) -> list[Evaluation]:
    """Run adapters as they were, as they come back, and without their updates, in the order of the files."""
    found = scored(originals, {RECYCLED: pack.adapter}, asked, progress)
    return [evaluation(job, one) for job, one in zip(asked.jobs, found, strict=True)]


def scored(
    originals: Mapping[str, Adapter], versions: Versions, asked: Comparison, progress: Progress | None = None
) -> list[Scored]:
    """Run adapters as they were, in every version, and without their updates; in the order of the jobs.

    One base model after the other, on each its adapters, and each adapter on all of its files. What an original
    predicts is found once for all versions, where these fit beside it on one base model.
    """
    jobs = asked.jobs
    found: list[dict[str, Score]] = [{} for _ in jobs]
    counts = [0 for _ in jobs]
    total, done = len(versions) * sum(len(job.rows) for job in jobs), 0

    def tick(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress("comparing predictions", done, total)

    order = sorted(range(len(jobs)), key=lambda at: (jobs[at].classes or 0, jobs[at].name))
    with models.quiet():
        for classes, of_size in groupby(order, key=lambda at: jobs[at].classes):
            bench = Bench(partial(_load, asked, classes))
            for name, of_adapter in groupby(of_size, key=lambda at: jobs[at].name):
                places = list(of_adapter)
                several = {ORIGINAL: originals[name], **{side: made(name) for side, made in versions.items()}}
                for sides in bench.sides(name, several):
                    for at in places:
                        collate = examples.collator(jobs[at].task, asked.tokenizer)
                        counts[at], scores = _scored(jobs[at], sides, collate, asked.batch_size, tick)
                        found[at] |= scores
    return [Scored(n, scores) for n, scores in zip(counts, found, strict=True)]


def _load(asked: Comparison, classes: int | None) -> Any:
    names = None if classes is None else data.numbered(classes)
    return models.load(asked.base, asked.revision, names, asked.tokenizer)


def _scored(
    job: Job, sides: Sides, collate: Collate, batch_size: int, tick: Callable[[int], None]
) -> tuple[int, dict[str, Score]]:
    """Counted batch by batch: the logits of a whole file may be too many to keep."""
    sums, n = torch.zeros(len(sides.names), 4, dtype=torch.float64), 0
    network, _ = sides.models[ORIGINAL]
    tick(0)
    for inputs, labels in evaluate.batches(network, job.rows, collate, batch_size):
        first, wanted = None, labels
        for place, (side, network) in enumerate(sides.each()):
            with torch.inference_mode():
                logits = network(**inputs).logits
            if job.classes is None:
                logits, wanted = evaluate.predicted(logits, labels)
            if not bool(logits.isfinite().all()):
                raise NonFiniteError(
                    f"what adapter {job.name!r} ({side}) predicts on {job.file} is not a number: its weights are "
                    "damaged, or diverged."
                )
            # no more than the original's are kept: those of a language model may be gigabytes
            first = logits if first is None else first
            step = max(1, _NUMBERS // logits.shape[-1])
            for start in range(0, len(wanted), step):
                part = slice(start, start + step)
                sums[place] += _scores(evaluate.exact(first[part]), evaluate.exact(logits[part]), wanted[part])
        n += len(wanted)
        # the original and the bare head are there to compare with
        tick((len(sides.names) - 2) * len(labels))
    means = (sums / n).tolist()
    return n, {
        side: Score(right, loss, agreement, max(kl, 0.0))
        for side, (right, loss, agreement, kl) in zip(sides.names, means, strict=True)
    }


def evaluation(job: Job, found: Scored) -> Evaluation:
    """What became of an adapter, in a report's terms."""
    original, recycled, without = (found.scores[side] for side in (ORIGINAL, RECYCLED, WITHOUT))
    sides, modelled = (original, recycled, without), job.classes is None
    accuracy = [one.accuracy if job.labelled else None for one in sides]
    perplexity = [evaluate.perplexity(one.loss) if modelled else None for one in sides]
    return Evaluation(
        name=job.name,
        data=str(job.file),
        task=job.task,
        rows=len(job.rows),
        tokens=found.n if modelled else None,
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


def _scores(original: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """Sums over rows of logits: right answers, loss, answers that the original gives too, divergence from it."""
    wanted = wanted.to(logits.device)
    before, log = original.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    answer = log.argmax(dim=-1)
    found = (
        (answer == wanted).sum(),
        nll_loss(log, wanted, ignore_index=IGNORED, reduction="sum"),
        (answer == before.argmax(dim=-1)).sum(),
        kl_div(log, before, reduction="sum", log_target=True),
    )
    return torch.tensor([float(one) for one in found], dtype=torch.float64)
