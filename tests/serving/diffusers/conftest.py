"""Pipelines and packs that the tests of `load_into` share."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusers]'")
pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")

import eigenlorax as ex
import tinypipes

KINDS = {"sd": tinypipes.make_sd, "sdxl": tinypipes.make_sdxl, "flux": tinypipes.make_flux}


@pytest.fixture
def make(tmp_path_factory):
    """A new pipeline of a kind, with the same weights each time."""
    return lambda kind, **fields: KINDS[kind](tmp_path_factory.mktemp(kind), **fields)


def styles(pipe):
    """Three that differ in rank, scaling and in what they are on."""
    denoiser = pipe._lora_loadable_modules[0]
    return [
        tinypipes.style(pipe, "toy", 1, convolutions=True),
        tinypipes.style(pipe, "ink.v2", 2, rank=2, scaling=0.5, parts=[denoiser]),
        tinypipes.style(pipe, "clay", 3, rank=4, scaling=0.8),
    ]


@pytest.fixture(scope="session")
def packs(tmp_path_factory):
    """By kind: a pack on disk that lost nothing of its three styles, and these."""
    found = {}
    for kind, maker in KINDS.items():
        adapters = styles(maker(tmp_path_factory.mktemp(kind)))
        found[kind] = ex.fit(adapters, energy=1.0).save(tmp_path_factory.mktemp("packs") / kind), adapters
    return found
