"""The table of coded heads: error bound, bytes and answers."""

import json
from collections.abc import Callable
from pathlib import Path

from . import record
from .pages import table


def blocks() -> dict[str, Callable[[], str]]:
    """Return the block by name."""
    return {"coded-heads": _heads}


def _heads() -> str:
    measured = json.loads(Path(record.RESULTS / "heads.json").read_text("utf-8"))
    rows = [
        [
            f"{point['head_error']:g}",
            f"{point['head_bytes_in_16_bits'] / point['head_bytes']:.1f}",
            f"{100 * point['same_answers']:.2f} %",
            f"{100 * point['accuracy_change']:+.2f}",
            f"{100 * point['worst_accuracy_change']:+.2f}",
        ]
        for point in measured["points"]
    ]
    header = ["`--head-error`", "times smaller than in 16 bits", "same answers", "accuracy, mean", "accuracy, worst"]
    caption = (
        f"{measured['adapters']} adapters of the demo, {measured['rows_per_adapter']} rows of each task's training "
        f"split; changes in points against exact heads. `{measured['command']}`"
    )
    return f"{table(header, rows)}\n\n{caption}"
