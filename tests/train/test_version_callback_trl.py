"""Versions from inside the trainers of TRL, which make the model and its frozen reference themselves."""

import json
import warnings

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")
peft = pytest.importorskip("peft", reason="the peft extra is not installed")

import eigenlorax as ex  # noqa: E402
import trainable  # noqa: E402
from eigenlorax.core.update_changes import compare  # noqa: E402

pytestmark = pytest.mark.slow

OPTIONS = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
CONFIG = {"r": 3, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}


def train(trainer_class, arguments, folder, rows, **more):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from transformers import AutoTokenizer

    model = str(trainable.save_gpt2(folder / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=peft.LoraConfig(**CONFIG),
            callbacks=[ex.VersionCallback(folder / "history")],
            **more,
        )
        trainer.train()
    return trainer


def assert_versions_are_the_checkpoints(folder):
    pack = ex.Pack.open(folder / "history")
    assert pack.histories["run"].labels == ["2", "4"]
    for record in pack.histories["run"]:
        source = ex.read_adapter(folder / "run" / f"checkpoint-{record.version}")
        assert compare(source, pack[f"run@{record.version}"]).total.change <= 0.05
        state = json.loads((folder / "run" / f"checkpoint-{record.version}" / "trainer_state.json").read_text())
        assert record.metrics["loss"] == [log["loss"] for log in state["log_history"] if "loss" in log][-1]
    return pack.histories["run"]


def test_dpo(tmp_path):
    rows = [{"prompt": "the cat", "chosen": " is good", "rejected": " is bad"}] * 8
    train(trl.DPOTrainer, trl.DPOConfig(str(tmp_path / "run"), max_length=16, **OPTIONS), tmp_path, rows)
    history = assert_versions_are_the_checkpoints(tmp_path)
    assert "rewards/margins" in history.latest.metrics
    # what track makes of the checkpoints is what the callback has appended
    assert ex.track(tmp_path / "run", tmp_path / "history").appended == ()


def test_grpo(tmp_path):
    rows = [{"prompt": "the cat"}] * 8
    arguments = trl.GRPOConfig(str(tmp_path / "run"), num_generations=2, max_completion_length=4, beta=0.1, **OPTIONS)

    def reward(completions, **_):
        return [float(len(set(completion))) + torch.rand(()).item() for completion in completions]

    train(trl.GRPOTrainer, arguments, tmp_path, rows, reward_funcs=reward)
    history = assert_versions_are_the_checkpoints(tmp_path)
    assert {"kl", "reward", "reward_std"} <= set(history.latest.metrics)
