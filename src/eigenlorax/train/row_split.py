"""Split of a comparison's rows for training, for choosing learning rates, and for testing."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError, RowsWarning
from . import examples
from .data import Labels, Table
from .examples import Example
from .search_space import ComparisonOptions

SEARCH_SEED = 2**31 - 1
"""Seed of the split and of the runs that choose a learning rate. Other runs have the seeds 0, 1, 2, …"""
MAX_VALIDATION_ROWS = 500
"""Maximum number of test rows that are scored during training."""
_HELD_OUT_DIVISOR = 5
"""One of this number of rows of each class is held out."""
_FEW_ROWS = 100
"""Number of rows held out below which a warning is given."""


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Encoded rows of a comparison. The split does not depend on the seed of a run.

    Attributes:
        train: All training rows.
        search_train: Training rows of the runs that choose a learning rate.
        held_out: Other training rows, on which these runs are scored.
        test: All test rows.
        validation: Test rows that are also scored during training, at most `MAX_VALIDATION_ROWS`.
    """

    train: list[Example]
    search_train: list[Example]
    held_out: list[Example]
    test: list[Example]
    validation: list[Example]


def split_rows(
    options: ComparisonOptions, train: Table, test: Table, labels: Labels, tokenizer: Any, max_length: int
) -> RowSplit:
    """Encode and split the rows. A fifth of each class is held out from the training rows.

    Warns with `RowsWarning` if test rows are among the training rows, or few rows are held out.

    Args:
        options: Options of the comparison.
        train: Training rows.
        test: Test rows.
        labels: Classes.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens per row.

    Raises:
        FormatError: A learning rate must be chosen, and the rows held out have fewer than two classes.
    """
    train_rows, test_rows = (
        examples.encode_classification(table, labels, options.columns, tokenizer, max_length) for table in (train, test)
    )
    examples.warn_about_duplicates(train, test, train_rows, test_rows)
    held_out = _held_out_indices([row["labels"] for row in train_rows])
    if any(options.searches(method) for method in options.methods):
        if len({train_rows[index]["labels"] for index in held_out}) < 2:
            raise FormatError(
                f"{train.path} has fewer than two classes with two rows or more. Learning rates are chosen on rows "
                "held out, which need two classes. Add rows, or pass one rate per method (rates=, --learning-rates "
                "METHOD=A)."
            )
        if len(held_out) < _FEW_ROWS:
            warnings.warn(
                f"learning rates are chosen on {len(held_out)} rows held out of {len(train_rows)}: with so few, "
                "chance plays a part in the choice.",
                RowsWarning,
                stacklevel=3,
            )
    validation = test_rows
    if len(test_rows) > MAX_VALIDATION_ROWS:
        validation = random.Random(SEARCH_SEED).sample(test_rows, MAX_VALIDATION_ROWS)  # noqa: S311
    return RowSplit(
        train=train_rows,
        search_train=[row for index, row in enumerate(train_rows) if index not in held_out],
        held_out=[row for index, row in enumerate(train_rows) if index in held_out],
        test=test_rows,
        validation=validation,
    )


def _held_out_indices(classes: Sequence[int]) -> set[int]:
    """Return the indices of rows held out: at least one of every class that has two rows or more."""
    generator = random.Random(SEARCH_SEED)  # noqa: S311
    held_out: set[int] = set()
    for class_number in sorted(set(classes)):
        indices = [index for index, row_class in enumerate(classes) if row_class == class_number]
        count = max(1, len(indices) // _HELD_OUT_DIVISOR) if len(indices) > 1 else 0
        held_out.update(generator.sample(indices, count))
    return held_out
