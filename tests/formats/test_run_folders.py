"""Checkpoints of a run: complete ones in order with their metrics, and reasons for all others."""

import json
import math
import os
import shutil
import time

import pytest

from adapters import make_adapter
from eigenlorax.errors import AdapterNameError, FormatError, OptionError
from eigenlorax.formats.run_folders import (
    COPIED_SECONDS,
    SETTLED_SECONDS,
    TRAINER_STATE,
    TRAINING_ARGUMENTS,
    read_run,
    trainer_state,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LOG = [
    {"step": 5, "epoch": 0.5, "loss": 2.5, "learning_rate": 0.1, "grad_norm": 3.0},
    {"step": 10, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.05, "reward": 0.25, "rewards/margins": 0.5},
    {"step": 10, "epoch": 1.0, "eval_loss": 1.25, "eval_runtime": 4.0, "eval_steps_per_second": 9.0},
    {"step": 15, "epoch": 1.5, "loss": math.nan, "learning_rate": "0.02", "kl": 0.125},
    {"step": 20, "epoch": 2.0, "eval_loss": 1.0, "eval_accuracy": True},
]


def make_run(folder, steps=(5, 10, 20), state=True):
    """A run whose checkpoints have the log up to their steps."""
    for step in steps:
        make_adapter(folder / f"checkpoint-{step}", seed=step)
        if state:
            log = [record for record in LOG if record["step"] <= step]
            document = {"global_step": step, "max_steps": 20, "log_history": log}
            (folder / f"checkpoint-{step}" / TRAINER_STATE).write_text(json.dumps(document))
    return folder


def make_old(folder):
    past = time.time() - 2 * SETTLED_SECONDS
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (past, past))


def steps(run):
    return [checkpoint.step for checkpoint in run.checkpoints]


def test_checkpoints_come_in_order_with_their_metrics(tmp_path):
    run = read_run(make_run(tmp_path, steps=(20, 10, 5)))
    assert steps(run) == [5, 10, 20]
    assert [checkpoint.folder.name for checkpoint in run.checkpoints] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-20",
    ]
    assert run.unfinished == {}
    assert [checkpoint.metrics for checkpoint in run.checkpoints] == [
        {"epoch": 0.5, "learning_rate": 0.1, "loss": 2.5},
        {"epoch": 1.0, "eval_loss": 1.25, "learning_rate": 0.05, "loss": 1.5, "reward": 0.25, "rewards/margins": 0.5},
        # the loss of step 15 is not finite, and the evaluation is that of step 20
        {
            "epoch": 2.0,
            "eval_loss": 1.0,
            "kl": 0.125,
            "learning_rate": 0.05,
            "loss": 1.5,
            "reward": 0.25,
            "rewards/margins": 0.5,
        },
    ]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    path = make_run(tmp_path, steps=(20,)) / "checkpoint-20" / TRAINER_STATE
    path.write_text(
        '{"log_history": [{"step": 20, "loss": 1e999, "eval_loss": NaN, "eval_a": 1' + 400 * "0" + ', "eval_b": true, '
        '"eval_c": "1", "eval_d": 2}, {"step": true, "loss": 1}, {"step": "20", "loss": 1}, 3], "max_steps": NaN, '
        '"save_steps": 1' + 400 * "0" + "}"
    )
    (checkpoint,) = read_run(tmp_path).checkpoints
    assert (checkpoint.metrics, checkpoint.settings) == ({"eval_d": 2.0}, {})


@pytest.mark.parametrize(
    ("record", "left_out"),
    [
        ({"loss": 0.7, "rewards/chosen": 0.1, "rewards/margins": 0.2}, {"logps/chosen": -1.0, "grad_norm": math.nan}),
        ({"reward": 0.5, "reward_std": 0.1, "kl": 0.01, "rewards/length/mean": 0.5}, {"completions/mean_length": 8.0}),
        ({"objective/kl": 3.0, "objective/scores": 0.5, "lr": 1e-5}, {"eps": 3, "loss/policy_avg": 0.1, "episode": 64}),
        ({"loss": 0.7, "mean_token_accuracy": 0.8}, {"num_tokens": 1000.0, "entropy": 1.5}),
        ({"loss": 0.7, "accuracy": 0.8, "margin": 0.1, "mean_reward": 0.2}, {"min_reward": -1.0}),
    ],
    ids=["DPO", "GRPO", "PPO", "SFT", "RewardTrainer"],
)
def test_metrics_of_the_trainers_of_trl(tmp_path, record, left_out):
    path = make_run(tmp_path, steps=(20,)) / "checkpoint-20" / TRAINER_STATE
    # PPO's state has a field of its own
    state = {"log_history": [{"step": 20, **record, **left_out}], "max_steps": 20, "episode": 64}
    path.write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert run.checkpoints[0].metrics == record
    assert run.is_finished


def test_known_steps_are_left_out(tmp_path):
    assert steps(read_run(make_run(tmp_path), known_steps={5, 20})) == [10]


def test_a_run_is_finished_once_its_last_step_is_saved(tmp_path):
    assert not read_run(make_run(tmp_path, steps=(5, 10))).is_finished
    make_run(tmp_path, steps=(20,))
    assert read_run(tmp_path).is_finished
    newest = tmp_path / "checkpoint-20" / TRAINER_STATE
    newest.write_text(newest.read_text()[:-1])
    assert not read_run(tmp_path).is_finished


def test_other_folders_are_no_checkpoints(tmp_path):
    make_run(tmp_path)
    for name in ("checkpoint-x", "tmp-checkpoint-25", "checkpoint-30.old", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    assert steps(read_run(tmp_path)) == [5, 10, 20]


@pytest.mark.parametrize("part", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("size", [0, 7, 100, None])
def test_a_checkpoint_that_is_being_written_is_taken_once_it_is_complete(tmp_path, part, size):
    """The Trainer writes the adapter first and `trainer_state.json` last."""
    newest = make_run(tmp_path) / "checkpoint-20"
    whole = {name: (newest / name).read_bytes() for name in (part, TRAINER_STATE)}
    (newest / TRAINER_STATE).unlink()
    if size is None:
        (newest / part).unlink()
    else:
        (newest / part).write_bytes(whole[part][:size])
    for is_old in (False, True):
        if is_old:
            make_old(newest)
        run = read_run(tmp_path)
        assert steps(run) == [5, 10]
        assert list(run.unfinished) == [newest]
    for name, data in whole.items():
        (newest / name).write_bytes(data)
    assert steps(read_run(tmp_path)) == [5, 10, 20]


def test_a_state_is_waited_for_while_the_checkpoint_is_new(tmp_path):
    newest = make_run(tmp_path) / "checkpoint-20"
    (newest / TRAINER_STATE).unlink()
    assert read_run(tmp_path).unfinished == {newest: "it has no trainer_state.json yet, and changed 0 s ago"}
    make_old(newest)
    run = read_run(tmp_path)
    assert (steps(run), run.checkpoints[-1].metrics) == ([5, 10, 20], {})


def test_a_missing_state_is_replaced_by_a_later_one(tmp_path):
    make_run(tmp_path)
    expected = read_run(tmp_path).checkpoints[1]
    (tmp_path / "checkpoint-10" / TRAINER_STATE).unlink()
    make_old(tmp_path / "checkpoint-10")
    assert read_run(tmp_path).checkpoints[1] == expected


@pytest.mark.parametrize("text", ['{"log_history": [', "[]", '{"log_history": 3}'])
def test_a_state_that_is_half_written_is_waited_for(tmp_path, text):
    newest = make_run(tmp_path) / "checkpoint-20"
    (newest / TRAINER_STATE).write_text(text)
    make_old(newest)
    run = read_run(tmp_path)
    assert (steps(run), run.unfinished) == ([5, 10], {newest: "its trainer_state.json is not complete"})


def test_adapters_in_subfolders(tmp_path):
    """TRL adds a frozen reference. PEFT saves adapters that are not called "default" in subfolders."""
    make_run(tmp_path)
    for checkpoint in tmp_path.iterdir():
        make_adapter(checkpoint / "ref", seed=1)
    assert {checkpoint.folder.name for checkpoint in read_run(tmp_path).checkpoints} == {
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-20",
    }
    for checkpoint in tmp_path.iterdir():
        (checkpoint / "policy").mkdir()
        for name in (WEIGHTS, CONFIG):
            shutil.move(checkpoint / name, checkpoint / "policy" / name)
    assert {checkpoint.folder.name for checkpoint in read_run(tmp_path).checkpoints} == {"policy"}
    assert {checkpoint.folder.name for checkpoint in read_run(tmp_path, "ref").checkpoints} == {"ref"}
    for checkpoint in tmp_path.iterdir():
        make_adapter(checkpoint / "value", seed=2)
    with pytest.raises(OptionError, match=r"several adapters: policy, value\. Choose one with adapter='policy'"):
        read_run(tmp_path)
    with pytest.raises(AdapterNameError, match=r"no adapter 'polcy' in a subfolder. Did you mean 'policy'\?"):
        read_run(tmp_path, "polcy")


def test_folders_that_are_no_runs(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(FormatError, match="does not exist. Pass the output_dir of a Trainer"):
        read_run(tmp_path / "rum")
    with pytest.raises(FormatError, match="is not a folder. Pass the output_dir"):
        read_run(tmp_path / "run/checkpoint-5" / CONFIG)
    with pytest.raises(FormatError, match=r"has no folder checkpoint-STEP. Pass the output_dir"):
        read_run(tmp_path)
    with pytest.raises(FormatError, match=r"It is one checkpoint: pass its parent, \S+/run\."):
        read_run(tmp_path / "run/checkpoint-5")
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "run/checkpoint-10" / name).unlink()
    with pytest.raises(FormatError, match=r"checkpoint-10 has no adapter \(adapter_config.json\)"):
        read_run(tmp_path / "run")


def test_a_run_of_the_hub(shared):
    run = read_run(shared / "zoo/lineages/roberta-portuguese")
    assert steps(run) == [*range(500, 8501, 500), 8610]
    assert run.checkpoints[3].metrics["eval_loss"] == 0.9621644020080566
    assert run.checkpoints[3].metrics["loss"] == 1.0408
    # no evaluation was made at the end of the run
    assert sorted(run.checkpoints[-1].metrics) == ["epoch", "learning_rate", "loss"]


def test_a_state_that_resumes_a_training_has_the_settings_of_the_run(tmp_path):
    run = make_run(tmp_path)
    fields = {"eval_steps": None, "logging_steps": 5, "max_steps": 20, "save_steps": 10, "train_batch_size": 4}
    for step in (5, 10, 20):
        path = run / f"checkpoint-{step}" / TRAINER_STATE
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    checkpoints = read_run(run).checkpoints[:2]
    versions = [(each.step, {**each.metrics, **each.settings}) for each in checkpoints]
    state = json.loads(trainer_state(10, versions))
    assert {name: state[name] for name in fields if name != "eval_steps"} == {
        name: number for name, number in fields.items() if number is not None
    }
    assert "eval_steps" not in state
    assert (state["global_step"], state["epoch"]) == (10, 1.0)
    assert state["log_history"] == [{"step": each.step, **each.metrics} for each in checkpoints]
    assert trainer_state(10, [(10, checkpoints[1].metrics)]) is None


def test_adapters_without_a_trainer_are_not_waited_for(tmp_path):
    make_run(tmp_path, state=False)
    past = time.time() - 2 * COPIED_SECONDS
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.utime(path, (past, past))
    assert steps(read_run(tmp_path)) == [5, 10, 20]
    # the first checkpoint of a Trainer, before its state is written
    (tmp_path / "checkpoint-20" / TRAINING_ARGUMENTS).touch()
    assert steps(read_run(tmp_path)) == []
