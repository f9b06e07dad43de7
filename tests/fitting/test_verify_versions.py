"""`verify` measures versions of histories against their originals, beside adapters."""

from dataclasses import replace

import pytest

import eigenlorax as ex
from adapters import make_adapters
from eigenlorax.errors import FormatError
from runs import make_run


@pytest.fixture
def pack(tmp_path):
    pack = ex.fit(make_adapters(tmp_path / "in", "a b"), max_error=0.2)
    for number, checkpoint in enumerate(make_run(tmp_path / "run", (1, 2, 3))):
        pack.append(checkpoint, lossless=number == 1)
    return ex.Pack.open(pack.save(tmp_path / "pack"))


def test_every_version_is_within_its_bound(pack, tmp_path):
    checkpoints = sorted((tmp_path / "run").iterdir())
    verification = ex.verify(
        pack, {**{f"c{i}": path for i, path in enumerate(checkpoints)}, "a": tmp_path / "in" / "a"}
    )
    assert list(verification.adapters) == ["a", "run@1", "run@2", "run@3"]
    assert verification.unknown == ["b"]
    assert verification.holds
    for record in pack.histories["run"]:
        found = verification.adapters[f"run@{record.version}"]
        assert (found.bound, found.recorded) == (record.max_error, record.delta_error)
        assert found.delta_error == pytest.approx(record.delta_error, rel=1e-5, abs=1e-12)
        assert found.head_error == pytest.approx(record.tensor_error, rel=1e-5)
    assert verification.adapters["run@2"].delta_error < 1e-12


def test_a_version_that_exceeds_its_record_is_noticed(pack, tmp_path):
    checkpoints = sorted((tmp_path / "run").iterdir())
    history = pack.histories["run"]
    wrong = replace(history.latest, delta_error=0.01)
    pack.history_store.histories["run"] = replace(history, versions=(*history.versions[:-1], wrong))
    verification = ex.verify(pack, checkpoints)
    assert not verification.holds
    assert [name for name, found in verification.adapters.items() if not found.holds] == ["run@3"]


def test_other_adapters_are_none_of_them(pack, tmp_path):
    (other,) = make_run(tmp_path / "other", (1,), seed=9)
    with pytest.warns(match="left out"), pytest.raises(FormatError, match="none of the adapters that were passed"):
        ex.verify(pack, other)
