"""The demo on less of everything, for tests of what it prints and writes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from eigenlorax.train import demo, demo_history, demo_subspaces, new_task

ADAPTERS = (*demo.HELD_OUT, "clinc-home", "sms-spam-a")
STEPS = (demo_history.READ_STEP, 4000)


def shrink(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Leave the demo five adapters, two checkpoints, four planted adapters, and one pass over a fifth of the rows.

    folder: where the checkpoints are copied to.
    """
    shipped, run, task = demo.shipped(), demo.checkpoints(), new_task.read()
    for name in ("README.md", "LICENSE", *(f"checkpoint-{step}" for step in STEPS)):
        copy = shutil.copytree if (run / name).is_dir() else shutil.copy
        (folder / run.name).mkdir(exist_ok=True)
        copy(run / name, folder / run.name / name)
    patch.setattr(demo, "shipped", lambda: {name: shipped[name] for name in ADAPTERS})
    patch.setattr(demo, "checkpoints", lambda: folder / run.name)
    patch.setattr(demo_subspaces, "PLANTED_ADAPTERS", 4)
    patch.setattr(new_task, "read", lambda: replace(task, train=task.train[::5], test=task.test[::5]))
    patch.setattr(new_task, "EPOCHS", 1)
    patch.setattr(new_task, "MAX_LENGTH", 12)
