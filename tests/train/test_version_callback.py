"""Versions that are appended from inside a training."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[train]'")
peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the peft extra is not installed")

import eigenlorax as ex  # noqa: E402
from eigenlorax.core.update_changes import compare  # noqa: E402
from eigenlorax.errors import AdapterNameError, OptionError, PackError, SkippedVersionWarning  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = 6


def base():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def model(config=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            base(), config or peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
        )


def rows():
    tokens = torch.randint(60, (16, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each.tolist(), "labels": int(each[0]) % 3} for each in tokens]


def trainer(folder, callbacks, wrapped=None, **options):
    arguments = transformers.TrainingArguments(
        folder,
        **{
            "max_steps": STEPS,
            "save_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    return transformers.Trainer(
        wrapped or model(), arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=callbacks
    )


def train(folder, callbacks, wrapped=None, resume=None, **options):
    run = trainer(folder, callbacks, wrapped, **options)
    run.train(resume_from_checkpoint=resume)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with its checkpoints, and the lossless history that the callback made of it."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "run", [ex.VersionCallback(folder / "history", lossless=True)])
    return folder


def test_each_checkpoint_is_a_version_with_its_metrics(trained):
    pack = ex.Pack.open(trained / "history")
    history = pack.histories["run"]
    assert history.labels == ["2", "4", "6"]
    state = json.loads((trained / "run/checkpoint-6/trainer_state.json").read_text())
    losses = {record["step"]: record["eval_loss"] for record in state["log_history"] if "eval_loss" in record}
    for record in history:
        assert record.metrics["eval_loss"] == losses[record.step]
        names = {name for name in record.metrics if not name.startswith("trainer_state.")}
        assert names == {"epoch", "eval_loss", "learning_rate", "loss"}


def test_the_version_is_the_adapter_that_the_trainer_saves(trained, tmp_path):
    tracked = ex.track(trained / "run", tmp_path / "tracked", lossless=True)
    pack = ex.Pack.open(trained / "history")
    for record, own in zip(tracked.appended, pack.histories["run"], strict=True):
        assert own.source_sha256 == record.source_sha256
        assert (own.metrics, own.step) == (record.metrics, record.step)
        folder = trained / "run" / f"checkpoint-{record.step}"
        assert json.loads(pack.histories["run"].config(own)) == json.loads((folder / "adapter_config.json").read_text())
    # so that both can be used on one history
    copy = tmp_path / "copy"
    shutil.copytree(trained / "history", copy)
    assert ex.track(trained / "run", copy).appended == ()


def test_every_so_many_steps(tmp_path):
    train(
        tmp_path / "run", [ex.VersionCallback(tmp_path / "history", "mine", every=3, lossless=True)], save_strategy="no"
    )
    assert ex.Pack.open(tmp_path / "history").histories["mine"].labels == ["3", "6"]


def test_a_resumed_training_skips_equal_versions_and_adds_others(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoint-{step}")
    before = (tmp_path / "history/subspace_config.json").read_bytes()
    callback = ex.VersionCallback(tmp_path / "history", lossless=True)
    train(tmp_path / "run", [callback], resume=str(tmp_path / "run/checkpoint-2"))
    assert (tmp_path / "history/subspace_config.json").read_bytes() == before
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["2", "4", "6"]
    train(tmp_path / "run", [callback], resume=str(tmp_path / "run/checkpoint-6"), max_steps=8)
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["2", "4", "6", "8"]


def test_a_step_that_is_trained_twice_with_another_outcome(trained, tmp_path):
    shutil.copytree(trained / "history", tmp_path / "history")
    options = {"learning_rate": 0.02}
    with pytest.raises(
        AdapterNameError, match=r"Step 2 was trained twice: the history has run@2 and 2 more.* overwrite=True"
    ):
        train(tmp_path / "run", [ex.VersionCallback(tmp_path / "history", lossless=True)], **options)
    callback = ex.VersionCallback(tmp_path / "history", lossless=True, overwrite=True)
    run = train(tmp_path / "run", [callback], **options)
    pack = ex.Pack.open(tmp_path / "history")
    assert pack.histories["run"].labels == ["2", "4", "6"]
    run.model.save_pretrained(tmp_path / "last")
    assert compare(pack["run@latest"], ex.read_adapter(tmp_path / "last")).total.change == 0


def test_a_training_that_goes_on_from_a_step_before_the_latest_version(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with ex.Pack.edit(tmp_path / "history") as pack:
        pack.prune("run", keep_last=1)
    options = {"resume": str(tmp_path / "run/checkpoint-2"), "save_steps": 1}
    with pytest.raises(AdapterNameError, match=r"Step 3 was trained twice: the history has run@6 of another training"):
        train(tmp_path / "other", [ex.VersionCallback(tmp_path / "history", "run", every=1, lossless=True)], **options)
    callback = ex.VersionCallback(tmp_path / "history", "run", every=1, lossless=True, overwrite=True)
    train(tmp_path / "other", [callback], **options)
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["3", "4", "5", "6"]


def test_adalora_and_saved_modules(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=1,
        total_step=STEPS,
        tinit=1,
        tfinal=1,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )

    class Allocation(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            model.base_model.update_and_allocate(state.global_step)

    with pytest.raises(OptionError, match="is an AdaLoRA, which is converted to a LoRA.*Remove lossless=True"):
        train(tmp_path / "run", [ex.VersionCallback(tmp_path / "history", lossless=True)], model(config))
    callbacks = [Allocation(), ex.VersionCallback(tmp_path / "history")]
    train(tmp_path / "run", callbacks, model(config))
    pack = ex.Pack.open(tmp_path / "history")
    for record in pack.histories["run"]:
        source = ex.read_adapter(tmp_path / "run" / f"checkpoint-{record.version}")
        assert compare(source, pack[f"run@{record.version}"]).total.change <= 0.05


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    callback = ex.VersionCallback(tmp_path / "history", lossless=True)
    run = trainer(tmp_path / "run", [callback])
    state = transformers.TrainerState(global_step=2, is_world_process_zero=False)
    callback.on_save(run.args, state, None, model=run.model)
    assert not (tmp_path / "history").exists()


def test_numbers_that_are_not_finite_do_not_end_the_training(tmp_path):
    class Divergence(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 3:
                with torch.no_grad():
                    next(each for name, each in model.named_parameters() if "lora_A" in name).fill_(torch.nan)

    callback = ex.VersionCallback(tmp_path / "history", lossless=True)
    with pytest.warns(SkippedVersionWarning) as caught:
        run = train(tmp_path / "run", [Divergence(), callback])
    messages = [str(warning.message) for warning in caught if warning.category is SkippedVersionWarning]
    assert [message[:6] for message in messages] == ["step 4", "step 6"]
    assert all("was not appended to the history 'run' in" in message for message in messages)
    assert all("NaN or Inf" in message for message in messages)
    assert run.state.global_step == STEPS
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["2"]


def test_models_without_an_adapter_to_take(tmp_path):
    callback = ex.VersionCallback(tmp_path / "history", lossless=True)
    with pytest.raises(OptionError, match="and the model is a BertForSequenceClassification. Wrap it"):
        train(tmp_path / "run", [callback], base())
    with pytest.raises(OptionError, match="adapter='other' does not name one adapter of the model, which has default"):
        train(tmp_path / "run", [ex.VersionCallback(tmp_path / "history", adapter="other")])
    vera = peft.VeraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(OptionError, match="adapter 'default' has peft_type VERA"):
        train(tmp_path / "run", [callback], model(vera))
    assert not (tmp_path / "history").exists()


def test_sharded_parameters(tmp_path):
    callback = ex.VersionCallback(tmp_path / "history")
    run = trainer(tmp_path / "run", [callback])
    run.args.fsdp = ["full_shard"]
    with pytest.raises(OptionError, match="needs whole parameters, and FSDP shards them.*`eigenlorax track"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_options_and_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(OptionError, match="every=0: expected a number of steps of at least 1"):
        ex.VersionCallback(tmp_path, every=0)
    with pytest.raises(OptionError, match="max_error has no effect on a lossless version"):
        ex.VersionCallback(tmp_path, max_error=0.1, lossless=True)
    with pytest.raises(AdapterNameError, match="history name 'a@1' is not allowed"):
        ex.VersionCallback(tmp_path, "a@1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(PackError, match="is not a pack"):
        train(tmp_path / "run", [ex.VersionCallback(tmp_path / "other")])
    with pytest.raises(PackError, match="exists and is not a folder"):
        train(tmp_path / "run", [ex.VersionCallback(tmp_path / "other/file")])
    run = trainer(tmp_path / "run", [callback := ex.VersionCallback(tmp_path / "history")])
    run.args.save_strategy = "no"
    with pytest.warns(SkippedVersionWarning, match="saves no checkpoints, so that no version is appended. Pass every"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_a_folder_that_a_killed_process_left_is_used(tmp_path):
    history = tmp_path / "history"
    (history / "versions").mkdir(parents=True)
    (history / ".lock").touch()
    callback = ex.VersionCallback(history)
    run = trainer(tmp_path / "run", [callback])
    callback.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_a_restored_version_resumes_a_training(trained, tmp_path):
    path = ex.Pack.open(trained / "history").restore("run@4", tmp_path / "checkpoint")
    run = trainer(tmp_path / "run", [ex.VersionCallback(tmp_path / "history")])
    starts = []

    class Start(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            tensors = peft.get_peft_model_state_dict(model)
            starts.append((state.global_step, {key: tensor.clone() for key, tensor in tensors.items()}))

    run.add_callback(Start())
    run.train(resume_from_checkpoint=str(path))
    assert [step for step, _ in starts] == [4, 5]
    saved = load_file(trained / "run/checkpoint-4/adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in starts[0][1].items())
    # it logs, evaluates and saves where the run did
    assert [record["step"] for record in run.state.log_history if "eval_loss" in record] == [2, 4, 6]
    assert ex.Pack.open(tmp_path / "history").histories["run"].labels == ["6"]
