"""Runs that are tracked while their files change, and histories that others write to."""

import json
import shutil

import pytest

import eigenlorax as ex
from adapters import change_tensors, make_adapter
from eigenlorax.errors import AdapterNameError, FormatError, PackBusyError, PackDamagedError
from eigenlorax.pack import track as tracking
from outcomes import contents
from runs import WEIGHTS, make_run, write_states

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path):
    write_states(make_run(tmp_path / "run", STEPS), max_steps=30)
    return tmp_path / "run"


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(run, tmp_path):
    def remove(stage, done, total):
        if done == 1:
            shutil.rmtree(run / "checkpoint-20")

    tracked = ex.track(run, tmp_path / "history", progress=remove)
    assert [record.step for record in tracked.appended] == [10, 30]
    assert tracked.unfinished == {run / "checkpoint-20": "it has been removed"}


def test_a_checkpoint_that_is_damaged_meanwhile_is_an_error(run, tmp_path):
    def damage(stage, done, total):
        if done == 1:
            (run / "checkpoint-20" / WEIGHTS).write_bytes(b"damaged")

    with pytest.raises(FormatError, match="checkpoint-20"):
        ex.track(run, tmp_path / "history", progress=damage)
    # the version before it is in the history
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["10"]


def test_a_checkpoint_that_is_not_finite_is_left_out(run, tmp_path):
    change_tensors(run / "checkpoint-20", lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    tracked = ex.track(run, tmp_path / "history")
    assert list(tracked.not_finite) == [run / "checkpoint-20"]
    assert "NaN or Inf" in tracked.not_finite[run / "checkpoint-20"]
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["10", "30"]


def test_lossless_versions_do_not_pass_for_others(run, tmp_path):
    ex.track(run, tmp_path / "history")
    with pytest.raises(AdapterNameError, match="has step 10 within an error bound, and it was to be stored lossless"):
        ex.track(run, tmp_path / "history", lossless=True)
    ex.track(run, tmp_path / "history", lossless=True, overwrite=True)
    assert [record.lossless for record in ex.Pack.open(tmp_path / "history").histories["run"]] == [True] * 3
    # a lossless version is within any bound
    assert ex.track(run, tmp_path / "history").appended == ()


def make_repeated(folder, steps):
    """The same run again, with other numbers and other losses."""
    checkpoints = make_run(folder / "again" / "run", steps, seed=2)
    write_states(checkpoints, max_steps=30)
    for checkpoint in checkpoints:
        state = checkpoint / "trainer_state.json"
        document = json.loads(state.read_text())
        for record in document["log_history"]:
            record |= {"loss": 20 / record["step"]} if "loss" in record else {}
        state.write_text(json.dumps(document))
    return folder / "again" / "run"


def test_a_repeated_run_is_recognised_by_its_log(run, tmp_path):
    """Its steps lie between those of the first one, and before its last."""
    ex.track(run, tmp_path / "history")
    again = make_repeated(tmp_path, (5, 15, 25))
    before = contents(tmp_path / "history")
    with pytest.raises(AdapterNameError, match=r"Step 5 was trained twice: the history has run@10 and 2 more of anoth"):
        ex.track(again, tmp_path / "history")
    assert contents(tmp_path / "history") == before
    tracked = ex.track(again, tmp_path / "history", overwrite=True)
    assert (tracked.earlier_steps, len(tracked.appended)) == ((), 3)
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["5", "15", "25"]


def test_a_step_that_was_removed_is_not_taken_for_a_repeated_one(run, tmp_path):
    ex.track(run, tmp_path / "history")
    with ex.Pack.edit(tmp_path / "history") as pack:
        pack.remove("run@20")
        # metrics of the user's own are no part of the log
        pack.append(run / "checkpoint-30", "31", name="run", step=31, metrics={"score": 0.5})
    tracked = ex.track(run, tmp_path / "history")
    assert (tracked.earlier_steps, tracked.appended) == ((20,), ())


def test_watching_goes_on_when_another_process_holds_the_pack(run, tmp_path, monkeypatch):
    calls = []

    def track(*arguments, **options):
        calls.append(options)
        if len(calls) == 1:
            raise PackBusyError("held")
        return ex.track(*arguments, **options)

    monkeypatch.setattr(tracking, "track", track)
    (tracked,) = tracking.watch(run, tmp_path / "history", interval=0.001)
    assert (len(calls), len(tracked.appended)) == (2, 3)


def test_a_pack_that_another_process_creates_meanwhile_is_kept(run, tmp_path):
    def create(stage, done, total):
        if done == 0:
            other = ex.Pack.empty()
            other.append(run / "checkpoint-10", name="other")
            other.save(tmp_path / "history")

    with pytest.raises(PackBusyError, match="was created by another process in the meantime. Repeat the call"):
        ex.track(run, tmp_path / "history", progress=create)
    ex.track(run, tmp_path / "history")
    assert list(ex.Pack.open(tmp_path / "history").histories) == ["other", "run"]


def test_a_pack_with_adapters_gets_a_history_beside_them(run, tmp_path):
    make_adapter(tmp_path / "in/a", seed=3)
    make_adapter(tmp_path / "in/run", seed=4)
    ex.fit(tmp_path / "in/a", n_components=3).save(tmp_path / "pack")
    ex.track(run, tmp_path / "pack")
    pack = ex.Pack.open(tmp_path / "pack")
    assert (pack.names, pack.histories["run"].labels) == (["a"], ["10", "20", "30"])
    ex.fit(tmp_path / "in", n_components=3).save(tmp_path / "other")
    before = contents(tmp_path / "other")
    with pytest.raises(AdapterNameError, match="already has an adapter named 'run'"):
        ex.track(run, tmp_path / "other")
    assert contents(tmp_path / "other") == before


def test_the_name_is_that_of_the_folder_if_it_is_valid(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    assert ex.track(".", tmp_path / "history").name == "run"
    odd = run.rename(tmp_path / "my run")
    assert ex.track(odd, tmp_path / "history").name == "adapter"


@pytest.mark.parametrize("lossless", [False, True])
def test_a_version_that_was_damaged_is_an_error_until_it_is_replaced(run, tmp_path, lossless):
    history = tmp_path / "history"
    ex.track(run, history, lossless=lossless)
    intact = contents(history)
    record = ex.Pack.open(history).histories["run"]["20"]
    (history / record.file).write_bytes((history / record.file).read_bytes()[:-1] + b"x")
    with pytest.raises(PackDamagedError, match=r"was changed after it was written.*overwrite=True"):
        ex.track(run, history, lossless=lossless)
    tracked = ex.track(run, history, lossless=lossless, overwrite=True)
    assert [version.step for version in tracked.appended] == [20, 30]
    assert contents(history) == intact


def test_what_was_tracked_is_one_line(run, tmp_path):
    tracked = ex.track(run, tmp_path / "history")
    assert str(tracked) == "history 'run': 3 appended; the run is finished"
    with ex.Pack.edit(tmp_path / "history") as pack:
        pack.remove("run@10")
    again = ex.track(run, tmp_path / "history")
    assert str(again) == "history 'run': 0 appended, 1 earlier; the run is finished"
