"""Entropy-coded fits by several processes, and such fits that were interrupted."""

from dataclasses import replace
from functools import wraps

import pytest
import torch

import eigenlorax as ex
from coded_collections import COLLECTIONS, of_ranks, true_errors
from eigenlorax.codec import encoder, module_stages, stage_runner
from eigenlorax.codec.held_updates import HeldUpdates
from eigenlorax.codec.module_updates import ModuleUpdates, UpdateSource
from eigenlorax.core import limits
from eigenlorax.core.checkpoint import open_checkpoint
from eigenlorax.core.engine import run_serially
from eigenlorax.fitting import coded_checkpoint
from planted import tree

BOUND = 0.2


def groups_of_other_ranks():
    """Two groups of adapters, with bases of their own, in one of which adapters have a higher rank."""
    return [
        replace(adapter, name=f"{group}-{adapter.name}")
        for group, (rank, k) in enumerate({2: (4, 5), 9: (12, 13)}.items())
        for adapter in of_ranks([rank] * 6, noise=0.02, k=k, seed=10_000 * group)
    ]


ADAPTERS = {
    "ranks that differ, with noise": COLLECTIONS["ranks that differ, with noise"],
    "groups": groups_of_other_ranks,
}


class StoppedError(Exception):
    pass


def stop_at(stopped_stage, stopped_done):
    def progress(stage, done, _total):
        if (stage, done) == (stopped_stage, stopped_done):
            raise StoppedError

    return progress


def counted(function, names):
    """Return the function, each call of which adds its name to a list."""

    @wraps(function)
    def call(*arguments):
        names.append(function.__name__)
        return function(*arguments)

    return call


@pytest.fixture(scope="module", params=ADAPTERS)
def originals(request):
    return ADAPTERS[request.param]()


@pytest.fixture(scope="module")
def saved(originals, tmp_path_factory):
    """Return the files of a pack that was fitted in one go, in this process."""
    return tree(ex.fit(originals, max_error=BOUND).save(tmp_path_factory.mktemp("serial") / "pack"))


@pytest.mark.slow
def test_processes_make_the_same_pack(originals, saved, tmp_path):
    pack = ex.fit(originals, max_error=BOUND, engine="processes", workers=2)
    assert tree(pack.save(tmp_path / "pack")) == saved


@pytest.mark.parametrize(("stage", "first"), [(encoder.BASES, "quantise"), ("choosing bytes: codes", "encode")])
def test_an_interrupted_fit_goes_on_where_it_was(originals, saved, tmp_path, monkeypatch, stage, first):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "checkpoint": tmp_path / "kept"}
    with pytest.raises(StoppedError):
        ex.fit(originals, **options, progress=stop_at(stage, 0))
    n_kept = len(list((tmp_path / "kept").glob("*.safetensors")))
    computed = []
    for name in ("survey", "quantise", "measure", "encode"):
        monkeypatch.setattr(module_stages, name, counted(getattr(module_stages, name), computed))
    pack = ex.fit(originals, **options)
    assert "survey" not in computed
    assert computed[0] == first
    (note,) = (note for note in pack.notes if "checkpoint" in note)
    assert note.startswith(f"{n_kept} of ")
    assert tree(pack.save(tmp_path / "pack")) == saved


def test_memory_for_updates_does_not_change_the_pack(originals, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_runner, "MAX_HELD_BYTES", 0)
    assert tree(ex.fit(originals, max_error=BOUND).save(tmp_path / "pack")) == saved


def test_results_of_other_arguments_are_not_taken(originals, tmp_path, monkeypatch):
    """Measured errors are kept, and bases, which are computed again, come out a little different."""
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "checkpoint": tmp_path / "kept"}
    with monkeypatch.context() as patched:
        patched.setattr(coded_checkpoint, "StageResult", module_stages.MeasuredModule)
        with pytest.raises(StoppedError):
            ex.fit(originals, **options, progress=stop_at("choosing bytes: steps", len(originals[0].modules)))
    assert list((tmp_path / "kept").glob("*.safetensors"))
    quantise = module_stages.quantise

    @wraps(quantise)
    def rounded_otherwise(*arguments):
        module, held, _, _, step_sizes, _ = arguments
        quantised = quantise(*arguments)
        for basis in quantised.bases:
            basis.codes[:1, :1] += 1
        encoded = module_stages.encode(module, held, quantised.bases, step_sizes, range(len(module.sources)))
        return replace(quantised, squared_errors=encoded.squared_errors)

    monkeypatch.setattr(module_stages, "quantise", rounded_otherwise)
    pack = ex.fit(originals, **options)
    assert not any("checkpoint" in note for note in pack.notes)
    assert max(true_errors(pack, originals).values()) <= BOUND


def test_a_fit_with_a_basis_goes_on_too(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "basis": 3, "checkpoint": tmp_path / "kept"}
    with pytest.raises(StoppedError):
        ex.fit(originals, **options, progress=stop_at("choosing bytes: steps", 0))
    pack = ex.fit(originals, **options)
    assert any("results were read from the checkpoint" in note for note in pack.notes)


def test_another_bound_finds_nothing(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    options = {"max_error": BOUND, "checkpoint": tmp_path / "kept"}
    with pytest.raises(StoppedError):
        ex.fit(originals, **options, progress=stop_at(encoder.BASES, 0))
    assert list((tmp_path / "kept").glob("*.safetensors"))
    other = ex.fit(originals, **{**options, "max_error": 2 * BOUND})
    assert not any("checkpoint" in note for note in other.notes)


def test_results_of_short_calls_are_not_kept(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 60.0)
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
    module, held = ModuleUpdates(name, shape, sources), HeldUpdates()
    norms = held.svd_batch(module).s.square().sum(1).sqrt()
    survey = module_stages.survey(module, held, norms, [0.01, 0.05, 0.2])
    candidates = [survey.estimates[0].k]
    quantised = module_stages.quantise(module, held, survey.sides, norms, 0.05 * norms, candidates)
    assert quantised.bases[0].k
    arguments = module, held, quantised.bases, 0.05 * norms, range(len(factors))
    return survey, quantised, module_stages.measure(*arguments), module_stages.encode(*arguments)


def test_results_that_memory_does_not_hold_are_computed_again(results, tmp_path, monkeypatch):
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
    computed = []

    def call():
        computed.append(results[1])
        return results[1]

    needed = coded_checkpoint.PART_COPIES * len(coded_checkpoint.to_bytes(results[1], "0" * 64))
    for memory, total in ((needed - 1, 1), (needed, 2), (needed, 2), (needed - 1, 3)):
        monkeypatch.setattr(limits, "machine_memory", lambda memory=memory: memory)
        with open_checkpoint(tmp_path / "kept", {"fit": 1}) as checkpoint:
            list(coded_checkpoint.ResumableCalls(run_serially, checkpoint).run([call]))
        assert len(computed) == total


class TestBytes:
    def test_results_come_back_as_they_were(self, results):
        for result in results:
            restored = coded_checkpoint.from_bytes(coded_checkpoint.to_bytes(result, "a"), "a")
            assert type(restored) is type(result)
            assert coded_checkpoint.to_bytes(restored, "a") == coded_checkpoint.to_bytes(result, "a")
        _, quantised, _, encoded = (
            coded_checkpoint.from_bytes(coded_checkpoint.to_bytes(result, "a"), "a") for result in results
        )
        torch.testing.assert_close(quantised.bases[0].rows, results[1].bases[0].rows, rtol=0, atol=0)
        original = results[3].codes.codes(0)
        assert encoded.codes.codes(0).down.residuals.tolist() == original.down.residuals.tolist()

    def test_anything_else_is_nothing(self, results):
        data = coded_checkpoint.to_bytes(results[1], "a")
        assert coded_checkpoint.from_bytes(data, "b") is None
        for damaged in (b"", data[:-9], data[200:], data.replace(b"QuantisedModule", b"QuantisedModulf")):
            assert coded_checkpoint.from_bytes(damaged, "a") is None
