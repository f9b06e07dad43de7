"""Tiny models of three kinds, packs of awkward adapters for them, and each adapter alone as PEFT computes it."""

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[peft]'")

from served import KINDS, Served


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield
    # what one test compiles counts towards the limit of the next
    torch.compiler.reset()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`Served` by the name of its kind, made once."""
    made = {}

    def one(kind):
        if kind not in made:
            made[kind] = Served.make(KINDS[kind], tmp_path_factory.mktemp(kind))
        return made[kind]

    return one
