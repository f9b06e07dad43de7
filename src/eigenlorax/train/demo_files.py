"""The demo's adapters, base model and rows as files, for the examples of the README and of `--help`."""

import csv
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core import atomic_files
from . import demo, new_task


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Paths of the demo's files.

    Attributes:
        adapters: Folder of LoRA adapters, one folder each.
        new: Folder of the adapters that the demo leaves out of its fit.
        run: Folder of the checkpoints of one training run.
        model: Folder of the base model, with its tokenizer.
        train: CSV file of the new task's training rows.
        test: CSV file of the new task's test rows.
        spam: CSV file of rows for the adapters `sms-spam-a` and `sms-spam-b`, with the classes ham and spam.
    """

    adapters: Path
    new: Path
    run: Path
    model: Path
    train: Path
    test: Path
    spam: Path


def write(directory: Path, *, overwrite: bool = False) -> DemoFiles:
    """Write the demo's files.

    Args:
        directory: Folder to write to.
        overwrite: Write into a folder that is not empty, and replace files of the same names.

    Returns:
        The paths, all of them in `directory`.

    Raises:
        MissingExtraError: The base model is not installed.
        PackExistsError: The folder is not empty.
    """
    model = demo.model_folder()
    atomic_files.check_free(directory, overwrite)
    files = DemoFiles(
        *(directory / name for name in ("adapters", "new", "run", "model")),
        *(directory / f"{name}.csv" for name in ("train", "test", "spam")),
    )
    for name, folder in demo.shipped().items():
        parent = files.new if name in demo.HELD_OUT else files.adapters
        shutil.copytree(folder, parent / name, dirs_exist_ok=True)
    shutil.copytree(demo.checkpoints(), files.run, dirs_exist_ok=True)
    shutil.copytree(model, files.model, dirs_exist_ok=True)
    task = new_task.read()
    _write_rows(files.train, ((text, task.labels[label]) for text, label in task.train))
    _write_rows(files.test, ((text, task.labels[label]) for text, label in task.test))
    classes = demo.descriptions()["sms-spam-a"]["labels"]
    _write_rows(files.spam, ((sentence.text, classes[sentence.label]) for sentence in demo.sentences("sms_spam")))
    return files


def _write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write rows (text, class name) as CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
