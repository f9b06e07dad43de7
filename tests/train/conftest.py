"""Tiny models with tokenizers, their packs, and rows: what the tests of training and evaluation share."""

import os

import pytest
import torch

for package in ("peft", "transformers", "accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[train]'")

import trainable  # noqa: E402


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    return trainable.make_all(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(_made, tmp_path):
    """A folder with what `trainable.make_all` makes; the models are not copied."""
    trainable.copy_all(_made, tmp_path)
    return tmp_path
