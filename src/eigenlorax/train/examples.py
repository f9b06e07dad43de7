"""From rows to what a model is fed with: token ids, and the labels that the loss is taken on."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FormatError, OptionError, RowsWarning
from . import data
from .data import Labels, Table
from .options import MAX_LENGTH, Columns

IGNORED = -100
"""The label of a token on which no loss is taken, in torch and transformers."""

Example = dict[str, Any]
Collate = Callable[[list[Example]], Any]


def length(task: str, asked: int | None, tokenizer: Any, model_config: Any) -> int:
    """The most tokens of a row: as asked, or the default; never more than the model has positions for."""
    limits = [tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None)]
    room = min(limit for limit in limits if limit)
    if asked is not None and asked > room:
        raise OptionError(f"max_length {asked} is more than the {room} tokens that the model has positions for.")
    return asked or min(MAX_LENGTH[task], room)


def prepare_tokenizer(tokenizer: Any) -> None:
    """Let it pad on the right; with the end of a text, where it has no token to pad with."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise OptionError("the model's tokenizer has neither a padding token nor an end-of-text token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token


def classification(table: Table, labels: Labels, columns: Columns, tokenizer: Any, most: int) -> list[Example]:
    """One example a row."""
    numbers = labels.encode(table, columns)
    return labelled(unlabelled(table, columns, tokenizer, most), numbers)


def labelled(rows: list[Example], numbers: Sequence[int]) -> list[Example]:
    """The same rows with the numbers of their classes."""
    return [{**row, "labels": number} for row, number in zip(rows, numbers, strict=True)]


def unlabelled(table: Table, columns: Columns, tokenizer: Any, most: int) -> list[Example]:
    """One example a row, whatever its class is."""
    texts = data.texts(table, columns.text, "Columns.text (--text-column)")
    pairs = data.texts(table, columns.pair, "Columns.pair (--pair-column)") if columns.pair else None
    whole = tokenizer(texts, pairs)["input_ids"]
    _say_cut(table, sum(len(row) > most for row in whole), most)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=most)
    return [{name: encoded[name][index] for name in encoded} for index in range(len(texts))]


def modelling(table: Table, columns: Columns, tokenizer: Any, most: int) -> list[Example]:
    """One example a row, up to and with the end-of-text token. Of a prompt and a completion, the loss is taken on the
    latter. Rows without a token to predict are left out, and said."""
    if not data.has_columns(table, columns.text) and data.has_columns(table, "prompt", "completion"):
        prompts, texts = data.texts(table, "prompt"), data.texts(table, "completion")
    else:
        prompts, texts = [], data.texts(table, columns.text, "Columns.text (--text-column)")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # what a tokenizer puts around a text stands before the prompt where there is one
    bodies = [_without_end(ids, end) for ids in tokenizer(texts, add_special_tokens=not prompts)["input_ids"]]
    heads = [_without_end(ids, end) for ids in tokenizer(prompts)["input_ids"]] if prompts else [[] for _ in texts]
    examples, cut = [], 0
    for head, body in zip(heads, bodies, strict=True):
        ids = [*head, *body, *end]
        cut += len(ids) > most
        # the first token has nothing before it that it could be predicted from; the Trainer would count it as if it had
        unpredicted = max(len(head), 1)
        labels = [IGNORED] * unpredicted + ids[unpredicted:]
        if any(label != IGNORED for label in labels[:most]):
            examples.append({"input_ids": ids[:most], "attention_mask": [1] * len(ids[:most]), "labels": labels[:most]})
    left_out = len(bodies) - len(examples)
    if not examples:
        raise FormatError(f"{table.where}: no row has a token to predict within {most} tokens.")
    _say_cut(table, cut, most)
    if left_out:
        warnings.warn(
            f"{left_out} of {len(bodies)} rows of {table.where} have no token to predict within {most} tokens, and "
            "were left out.",
            RowsWarning,
            stacklevel=2,
        )
    return examples


def _without_end(ids: Sequence[int], end: list[int]) -> list[int]:
    return list(ids[:-1]) if end and ids and ids[-1] == end[0] else list(ids)


def _say_cut(table: Table, cut: int, most: int) -> None:
    if cut:
        warnings.warn(
            f"{cut} of {len(table.rows)} rows of {table.where} were cut after {most} tokens; max_length= "
            "(--max-length) says how many are taken.",
            RowsWarning,
            stacklevel=3,
        )


def collator(task: str, tokenizer: Any) -> Collate:
    """From examples to a padded batch."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if task == "causal-lm":
        # named after the models that it was made for; it pads labels
        modelling: Collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        return modelling
    padding: Collate = DataCollatorWithPadding(tokenizer)
    return padding
