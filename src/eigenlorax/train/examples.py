"""Encoding of rows for a model: token ids, attention masks and labels."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FormatError, OptionError, RowsWarning
from . import data
from .data import Labels, Table
from .options import MAX_LENGTH, Columns

IGNORED = -100
"""Label of tokens that the loss ignores, in torch and transformers."""

Example = dict[str, Any]
"""One encoded row: "input_ids", other inputs of the model, and "labels"."""
Collate = Callable[[list[Example]], Any]
"""Function that makes a padded batch of examples."""


def max_tokens(task: str, max_length: int | None, tokenizer: Any, model_config: Any) -> int:
    """Return the maximum number of tokens per row, for a tokenizer that belongs to the model.

    Args:
        task: Key of `options.MAX_LENGTH`.
        max_length: Maximum that the user passed. Default: the task's default, or the model's limit if that is lower.
        tokenizer: Tokenizer of the model.
        model_config: Config of the model.

    Raises:
        OptionError: `max_length` exceeds the model's limit.
        FormatError: The tokenizer has more tokens than the model has embeddings.
    """
    _check_vocabulary(tokenizer, model_config)
    limits = [tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None)]
    model_limit = min(limit for limit in limits if limit)
    if max_length is not None and max_length > model_limit:
        raise OptionError(f"max_length {max_length} is more than the {model_limit} tokens that the model supports.")
    return max_length or min(MAX_LENGTH[task], model_limit)


def _check_vocabulary(tokenizer: Any, model_config: Any) -> None:
    n_embeddings = getattr(model_config, "vocab_size", None)
    # without added tokens, which some tokenizers have and never use
    if n_embeddings and tokenizer.vocab_size > n_embeddings:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and the model {n_embeddings:,} embeddings. Save the "
            "model's own tokenizer in its folder."
        )


def prepare_tokenizer(tokenizer: Any) -> None:
    """Set the tokenizer to pad on the right, with the end-of-text token if it has no padding token.

    Raises:
        OptionError: The tokenizer has neither of the two tokens.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise OptionError("the model's tokenizer has neither a padding token nor an end-of-text token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token


def encode_classification(
    table: Table, labels: Labels, columns: Columns, tokenizer: Any, max_length: int
) -> list[Example]:
    """Return one example per row, with its class number as the label. Warns with `RowsWarning` if rows are truncated.

    Args:
        table: Rows.
        labels: Classes.
        columns: Names of the columns.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens per row.

    Raises:
        OptionError: The table has no such column.
        FormatError: A row has no text, or a label that is not one of the classes.
    """
    numbers = labels.encode(table, columns)
    return with_labels(encode_texts(table, columns, tokenizer, max_length), numbers)


def with_labels(rows: list[Example], numbers: Sequence[int]) -> list[Example]:
    """Return the examples with class numbers as labels."""
    return [{**row, "labels": number} for row, number in zip(rows, numbers, strict=True)]


def encode_texts(table: Table, columns: Columns, tokenizer: Any, max_length: int) -> list[Example]:
    """Return one example per row, without labels. Warns with `RowsWarning` if rows are truncated.

    Args:
        table: Rows.
        columns: Names of the columns.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens per row.

    Raises:
        OptionError: The table has no such column.
        FormatError: A row has no text.
    """
    texts = data.column_texts(table, columns.text, "Columns.text (--text-column)")
    pairs = data.column_texts(table, columns.pair, "Columns.pair (--pair-column)") if columns.pair else None
    untruncated = tokenizer(texts, pairs)["input_ids"]
    _warn_truncated(table, sum(len(ids) > max_length for ids in untruncated), max_length)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return [{name: encoded[name][index] for name in encoded} for index in range(len(texts))]


def encode_language_model(table: Table, columns: Columns, tokenizer: Any, max_length: int) -> list[Example]:
    """Return one example per row for a language model. Each text is followed by the end-of-text token.

    If rows have a prompt and a completion, the loss ignores the prompt. Rows without a token to predict are skipped.
    Warns with `RowsWarning` about skipped and truncated rows.

    Args:
        table: Rows.
        columns: Names of the columns.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens per row.

    Raises:
        OptionError: The table has no such column.
        FormatError: A row has no text, or all rows are skipped.
    """
    if not data.has_columns(table, columns.text) and data.has_columns(table, "prompt", "completion"):
        prompts, texts = data.column_texts(table, "prompt"), data.column_texts(table, "completion")
    else:
        prompts, texts = [], data.column_texts(table, columns.text, "Columns.text (--text-column)")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # special tokens at the start belong before the prompt, if there is one
    bodies = [_without_end(ids, end) for ids in tokenizer(texts, add_special_tokens=not prompts)["input_ids"]]
    heads = [_without_end(ids, end) for ids in tokenizer(prompts)["input_ids"]] if prompts else [[] for _ in texts]
    examples, truncated = [], 0
    for head, body in zip(heads, bodies, strict=True):
        ids = [*head, *body, *end]
        truncated += len(ids) > max_length
        # the first token cannot be predicted, and the Trainer's mean losses must not count it
        unpredicted = max(len(head), 1)
        labels = ([IGNORED] * unpredicted + ids[unpredicted:])[:max_length]
        ids = ids[:max_length]
        if any(label != IGNORED for label in labels):
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    skipped = len(bodies) - len(examples)
    if not examples:
        raise FormatError(f"{table.path}: no row has a token to predict within {max_length} tokens.")
    _warn_truncated(table, truncated, max_length)
    if skipped:
        warnings.warn(
            f"{skipped} of {len(bodies)} rows of {table.path} have no token to predict within {max_length} tokens, "
            "and were left out.",
            RowsWarning,
            stacklevel=2,
        )
    return examples


def warn_about_duplicates(
    train: Table, test: Table, train_rows: Sequence[Example], test_rows: Sequence[Example]
) -> None:
    """Warn with `RowsWarning` if encoded test rows are among the encoded training rows.

    Args:
        train: Training rows.
        test: Test rows.
        train_rows: Training rows, encoded.
        test_rows: Test rows, encoded.
    """
    train_texts = {tuple(row["input_ids"]) for row in train_rows}
    duplicates = sum(tuple(row["input_ids"]) in train_texts for row in test_rows)
    if duplicates:
        warnings.warn(
            f"{duplicates} of {len(test_rows)} rows of {test.path} are in {train.path} too: scores include memorised "
            "rows. Remove them from one of the files.",
            RowsWarning,
            stacklevel=4,
        )


def _without_end(ids: Sequence[int], end: list[int]) -> list[int]:
    return list(ids[:-1]) if end and ids and ids[-1] == end[0] else list(ids)


def _warn_truncated(table: Table, truncated: int, max_length: int) -> None:
    if truncated:
        warnings.warn(
            f"{truncated} of {len(table.rows)} rows of {table.path} were cut after {max_length} tokens. Pass a larger "
            "max_length= (--max-length) to use more.",
            RowsWarning,
            stacklevel=3,
        )


def collator(task: str, tokenizer: Any) -> Collate:
    """Return a function that makes a padded batch of examples for a task."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if task == "causal-lm":
        # despite its name, this collator also works for decoders: it pads the labels too
        pad_with_labels: Collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        return pad_with_labels
    pad: Collate = DataCollatorWithPadding(tokenizer)
    return pad
