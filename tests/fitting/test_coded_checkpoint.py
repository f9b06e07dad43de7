"""Entropy-coded fits by several processes, and such fits that were interrupted."""

import pytest
import torch

import eigenlorax as ex
from coded_collections import COLLECTIONS
from eigenlorax.codec import encoder, module_stages
from eigenlorax.codec.held_updates import HeldUpdates
from eigenlorax.codec.module_updates import ModuleUpdates, UpdateSource
from eigenlorax.fitting import coded_checkpoint
from planted import tree

NAMES = ("ranks that differ, with noise", "three groups")
BOUND = 0.2


class StoppedError(Exception):
    pass


def stop_at(stopped_stage, stopped_done):
    def progress(stage, done, _total):
        if (stage, done) == (stopped_stage, stopped_done):
            raise StoppedError

    return progress


@pytest.fixture(scope="module", params=NAMES)
def originals(request):
    return COLLECTIONS[request.param]()


@pytest.fixture(scope="module")
def saved(originals, tmp_path_factory):
    """Return the files of a pack that was fitted in one go, in this process."""
    return tree(ex.fit(originals, max_error=BOUND).save(tmp_path_factory.mktemp("serial") / "pack"))


@pytest.mark.slow
def test_processes_make_the_same_pack(originals, saved, tmp_path):
    pack = ex.fit(originals, max_error=BOUND, engine="processes", workers=2)
    assert tree(pack.save(tmp_path / "pack")) == saved


@pytest.mark.parametrize(("stage", "first"), [(encoder.BASES, "quantise"), ("choosing bytes: steps", "encode")])
def test_an_interrupted_fit_goes_on_where_it_was(originals, saved, tmp_path, monkeypatch, stage, first):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "checkpoint": tmp_path / "kept"}
    with pytest.raises(StoppedError):
        ex.fit(originals, **options, progress=stop_at(stage, 0))
    n_kept = len(list((tmp_path / "kept").glob("*.safetensors")))
    computed = []
    for name in ("survey", "quantise", "encode"):
        function = getattr(module_stages, name)
        monkeypatch.setattr(
            module_stages,
            name,
            lambda *arguments, name=name, function=function: computed.append(name) or function(*arguments),
        )
    pack = ex.fit(originals, **options)
    assert "survey" not in computed
    assert computed[0] == first
    (note,) = (note for note in pack.notes if "checkpoint" in note)
    assert note.startswith(f"{n_kept} of ")
    assert tree(pack.save(tmp_path / "pack")) == saved


def test_another_bound_finds_nothing(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "checkpoint": tmp_path / "kept"}
    with pytest.raises(StoppedError):
        ex.fit(originals, **options, progress=stop_at(encoder.BASES, 0))
    assert list((tmp_path / "kept").glob("*.safetensors"))
    other = ex.fit(originals, **{**options, "max_error": 2 * BOUND})
    assert not any("checkpoint" in note for note in other.notes)


def test_results_of_short_calls_are_not_kept(originals, tmp_path):
    with pytest.raises(StoppedError):
        ex.fit(originals, max_error=BOUND, checkpoint=tmp_path / "kept", progress=stop_at("choosing bytes: steps", 0))
    assert not (tmp_path / "kept").exists()


@pytest.fixture(scope="module")
def results():
    originals = COLLECTIONS["shared"]()
    (name, *_) = originals[0].modules
    factors = [original.modules[name] for original in originals]
    sources = tuple(UpdateSource(index, lambda index=index: factors[index]) for index in range(len(factors)))
    shape = factors[0].up.shape[0], factors[0].down.shape[1]
    module, held = ModuleUpdates(name, shape, sources, 1), HeldUpdates()
    norms = held.svd_batch(module).s.square().sum(1).sqrt()
    survey = module_stages.survey(module, held, norms, [0.01, 0.05, 0.2], 0.1)
    candidates = [survey.estimates[0].k]
    quantised = module_stages.quantise(module, held, survey.sides, norms, 0.05 * norms, candidates)
    assert quantised.bases[0].k
    encoded = module_stages.encode(module, held, quantised.bases, 0.05 * norms, range(len(factors)))
    return survey, quantised, encoded


class TestBytes:
    def test_results_come_back_as_they_were(self, results):
        for result in results:
            restored = coded_checkpoint.from_bytes(coded_checkpoint.to_bytes(result))
            assert type(restored) is type(result)
            assert coded_checkpoint.to_bytes(restored) == coded_checkpoint.to_bytes(result)
        _, quantised, encoded = (coded_checkpoint.from_bytes(coded_checkpoint.to_bytes(result)) for result in results)
        torch.testing.assert_close(quantised.bases[0].rows, results[1].bases[0].rows, rtol=0, atol=0)
        original = results[2].codes.codes(0)
        assert encoded.codes.codes(0).down.residuals.tolist() == original.down.residuals.tolist()

    def test_anything_else_is_nothing(self, results):
        data = coded_checkpoint.to_bytes(results[1])
        for damaged in (b"", data[:-9], data[200:], data.replace(b"QuantisedModule", b"QuantisedModulf")):
            assert coded_checkpoint.from_bytes(damaged) is None
