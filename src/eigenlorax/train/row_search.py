"""Search by loss: every adapter of a pack that fits a file of rows is evaluated on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..core.progress import Progress
from ..errors import AdapterNameError, FormatError, NonFiniteError, OptionError
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from ..search.match import TOP, Match, check_top
from . import data, evaluate, examples, models
from .adapter_versions import ORIGINAL, WITHOUT_UPDATE, LoadedVersions, VersionLoader
from .data import Labels, Table
from .examples import Example
from .figures import ClassificationFigures
from .options import EVALUATION_BATCH, Columns, check_task


@dataclass(frozen=True, slots=True)
class RowSearch:
    """Result of a search by loss.

    Attributes:
        matches: The adapters with the smallest losses, the best first.
        skipped: Reason for each adapter that does not fit the rows, by name.
        task: "text-classification" or "causal-lm".
        model: Base model that was loaded.
        rows: Number of rows.
    """

    matches: list[Match]
    skipped: dict[str, str]
    task: str
    model: str
    rows: int


@dataclass(frozen=True, slots=True)
class _RowPlan:
    """Adapters to evaluate, and what is loaded for them.

    Attributes:
        base: Base model.
        revision: Revision of the base model.
        tokenizer: Its tokenizer.
        task: "text-classification" or "causal-lm".
        batch_size: Rows per batch.
        heads: Classes of each adapter's head, by name; None for a language model.
        encoded: Encoded rows by the classes of the head.
    """

    base: str
    revision: str | None
    tokenizer: Any
    task: str
    batch_size: int
    heads: Mapping[str, Labels | None]
    encoded: Mapping[Labels | None, list[Example]]


def rank_by_loss(
    pack: Pack,
    rows: str | Path,
    *,
    model: str | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    columns: Columns | None = None,
    batch_size: int = EVALUATION_BATCH,
    max_length: int | None = None,
    top: int = TOP,
    progress: Progress | None = None,
) -> RowSearch:
    """Evaluate all adapters of a pack on a file of rows, and return those with the smallest mean loss.

    An adapter whose head, labels or task does not fit the rows is skipped. Histories are not searched. Each adapter
    takes two passes over the rows, with and without its update.

    Args:
        pack: The pack.
        rows: File of rows: JSON lines, CSV, or a folder saved by `datasets`.
        model: Base model. Default: the pack's.
        task: "text-classification" or "causal-lm". Default: the task type of the adapters, if they have one in common.
        labels: Class names in the order of the heads. Needed if the file's labels are texts.
        columns: Names of the columns. Default: `Columns()`.
        batch_size: Rows per batch, at least 1.
        max_length: Maximum number of tokens per row, as in `evaluate`.
        top: Maximum number of results, at least 1.
        progress: Callback with the arguments (stage, done, total).

    Raises:
        OptionError: An option is out of range, no adapter fits the rows, or the adapters have several tasks.
        FormatError: The rows or the base model cannot be read.
        MissingExtraError: A package of the extra `train` is not installed.

    Example:
        >>> from pathlib import Path
        >>> size = Path("rows.jsonl").write_text('{"text": "a b c"}\\n{"text": "b c d"}\\n')
        >>> lm_pack = eigenlorax.Pack.open("lm-pack/")
        >>> found = eigenlorax.rank_by_loss(lm_pack, "rows.jsonl", task="causal-lm", top=1)
        >>> found.matches[0].score > 0, found.skipped
        (True, {})
    """
    top, columns = check_top(top), columns or Columns()
    evaluate.check_sizes(batch_size, max_length)
    if labels is not None:
        evaluate.check_label_names(labels)
    if task is not None:
        check_task(task)
    table = data.read(Path(rows), columns.label)
    task, skipped = _common_task(pack, task)
    models.check_installed()
    with models.quiet():
        base, revision = models.resolve_base_model(pack, model)
        config, tokenizer = models.load_config(base, revision), models.load_tokenizer(base, revision)
        limit = examples.max_tokens(task, max_length, tokenizer, config)
        heads = _heads(pack, config, _LabelReader(task, table, columns, labels), skipped)
        encode = examples.encode_texts if task == "text-classification" else examples.encode_language_model
        encoded = encode(table, columns, tokenizer, limit)
        by_head = {head: _with_labels(encoded, head, table, columns) for head in set(heads.values())}
        plan = _RowPlan(base, revision, tokenizer, task, batch_size, heads, by_head)
        matches = _evaluate_all(pack, plan, skipped, progress or (lambda stage, done, total: None))
    matches.sort(key=lambda match: (match.score, match.name))
    return RowSearch(matches[:top], dict(sorted(skipped.items())), task, base, len(table.rows))


def _common_task(pack: Pack, task: str | None) -> tuple[str, dict[str, str]]:
    """Return the task of the adapters, and the reason for each adapter that is for none or another one.

    Raises:
        OptionError: The adapters have several tasks, or none.
    """
    tasks, skipped = set(), {}
    for name in pack.names:
        try:
            tasks.add(evaluate.resolve_task(pack.packed(name), task))
        except OptionError as error:
            skipped[name] = str(error)
    if len(tasks) > 1:
        raise OptionError(
            f"the pack has adapters for {' and '.join(sorted(tasks))}, whose losses cannot be compared. Pass one of "
            "them as task= (--task)."
        )
    if not tasks:
        raise _none_fits(skipped)
    return tasks.pop(), skipped


def _none_fits(skipped: Mapping[str, str]) -> OptionError:
    """Return the error for rows that no adapter fits."""
    if not skipped:
        return OptionError("the pack has no adapters. Versions of histories are not searched by loss.")
    # the last one came furthest
    name, why = list(skipped.items())[-1]
    more = f" {len(skipped) - 1} more were skipped." if len(skipped) > 1 else ""
    return OptionError(f"no adapter of the pack can be evaluated on these rows. {name}: {why}{more}")


@dataclass(frozen=True, slots=True)
class _LabelReader:
    """The file's labels as classes of a head.

    Attributes:
        task: "text-classification" or "causal-lm".
        table: Rows.
        columns: Names of the columns.
        names: Class names in the order of the head; None if the user passed none.
    """

    task: str
    table: Table
    columns: Columns
    names: Sequence[str] | None

    def head(self, adapter: PackedAdapter, config: Any) -> Labels | None:
        """Return the classes of an adapter's head; `OptionError` or `FormatError` if it does not fit the rows."""
        if self.task != "text-classification":
            evaluate.check_language_model(adapter, config)
            return None
        n = evaluate.count_head_classes(adapter, config)
        head = evaluate.label_names(n, self.names, self.table, self.columns)
        head.encode(self.table, self.columns)
        return head


def _heads(pack: Pack, config: Any, reader: _LabelReader, skipped: dict[str, str]) -> dict[str, Labels | None]:
    """Return the classes of each adapter that fits the rows, and enter the others in `skipped`."""
    heads: dict[str, Labels | None] = {}
    for name in pack.names:
        if name in skipped:
            continue
        try:
            heads[name] = reader.head(pack.packed(name), config)
        except (AdapterNameError, FormatError, OptionError) as error:
            skipped[name] = str(error)
    if not heads:
        raise _none_fits(skipped)
    return heads


def _with_labels(encoded: list[Example], head: Labels | None, table: Table, columns: Columns) -> list[Example]:
    return encoded if head is None else examples.with_labels(encoded, head.encode(table, columns))


def _evaluate_all(pack: Pack, plan: _RowPlan, skipped: dict[str, str], progress: Progress) -> list[Match]:
    """Return a match for each adapter, and enter those that cannot be loaded in `skipped`."""
    matches: list[Match] = []
    # adapters with one number of classes share a base model with such a head
    ordered = sorted(plan.heads, key=lambda name: (len(head.names) if (head := plan.heads[name]) else 0, name))
    for head, names in groupby(ordered, key=lambda name: plan.heads[name]):
        loader = VersionLoader(partial(models.load_model, plan.base, plan.revision, head, plan.tokenizer))
        for name in names:
            progress("evaluating adapters", len(matches), len(ordered))
            try:
                (loaded,) = loader.load(name, {ORIGINAL: pack.adapter(name)})
                matches.append(_measure(name, loaded, head, plan))
            except (FormatError, NonFiniteError) as error:
                skipped[name] = str(error)
    if not matches:
        raise _none_fits(skipped)
    return matches


def _measure(name: str, loaded: LoadedVersions, head: Labels | None, plan: _RowPlan) -> Match:
    """Evaluate an adapter with and without its update."""
    collate = examples.collator(plan.task, plan.tokenizer)
    figures = {
        version: evaluate.measure(model, plan.encoded[head], collate, head, plan.batch_size)
        for version, model in loaded.activate_each()
    }
    own, base = figures[ORIGINAL], figures[WITHOUT_UPDATE]
    if isinstance(own, ClassificationFigures):
        reason = f"Mean loss per row {own.loss:.4f}, accuracy {own.accuracy:.4f}; {base.loss:.4f} without its update."
    else:
        reason = f"Mean loss per token {own.loss:.4f}; {base.loss:.4f} without its update, as the base model."
    return Match(name, own.loss, reason)
