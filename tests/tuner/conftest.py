"""Tiny models and their packs: what the tests of the tuner share."""

import jaxtyping
import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[peft]'")

from eigenlorax.core import registry
from tiny import BERT, GPT2, IN, make_bert, make_gpt2, make_pack


@pytest.fixture(autouse=True)
def unchecked_shapes(monkeypatch):
    """Check no shapes here: Dynamo cannot trace jaxtyping's checks. The tests of core and codec make them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


@pytest.fixture
def bert():
    return make_bert()


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, 53, (5, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def bert_pack(tmp_path_factory):
    """A pack on disk for the query and value of the tiny BERT."""
    pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
    return pack.save(tmp_path_factory.mktemp("packs") / "bert")


@pytest.fixture(scope="session")
def gpt2_pack(tmp_path_factory):
    pack, _ = make_pack(GPT2)
    return pack.save(tmp_path_factory.mktemp("packs") / "gpt2")


@pytest.fixture
def forgotten(monkeypatch):
    """As in a new process: no subspace is known."""
    monkeypatch.setattr(registry, "_pack_openers", {})
    monkeypatch.setattr(registry, "_alive", type(registry._alive)())


@pytest.fixture
def saved_base(tmp_path):
    make_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"
