"""The libraries that PEFT users train with: TRL, Accelerate, diffusers, bitsandbytes. A test skips where its own is not
installed; scripts/test-extras installs all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import eigenlorax as ex
from eigenlorax.tuner.layer import EigenLoraxLayer
from tiny import BERT, make_bert, make_gpt2, make_pack, shake

pytestmark = pytest.mark.slow


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 53)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_trl_s_sft_trainer_takes_the_config(gpt2_pack, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    rows = datasets.Dataset.from_dict({"text": ["w5 w6 w7 w8 w9", "w9 w8 w7 w6 w5"] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        max_length=16,
        disable_tqdm=True,
        save_strategy="no",
    )
    config = ex.EigenLoraxConfig(subspace=gpt2_pack, r=4, fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=make_gpt2(), args=arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if "eigenlorax_" in n}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "EIGENLORAX"


LAUNCHED = """
import os
import sys
sys.path.insert(0, sys.argv[3])
import torch
from accelerate import Accelerator
from peft import get_peft_model
import eigenlorax
from tiny import make_bert

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
torch.manual_seed(0)
model = get_peft_model(make_bert(), eigenlorax.EigenLoraxConfig(subspace=sys.argv[1], r=4))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
model, optimizer = accelerator.prepare(model, optimizer)
generator = torch.Generator().manual_seed(accelerator.process_index)
for _ in range(3):
    ids = torch.randint(3, 53, (4, 9), generator=generator)
    labels = torch.randint(0, 3, (4,), generator=generator)
    accelerator.backward(model(input_ids=ids, labels=labels).loss)
    optimizer.step()
    optimizer.zero_grad()
mine = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "eigenlorax_" in n])
both = accelerator.gather(mine[None])
assert torch.equal(both[0], both[1])
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(sys.argv[2])
accelerator.wait_for_everyone()
accelerator.end_training()
# a thread of gloo that still runs would abort the process at its regular exit
os._exit(0)
"""


def test_accelerate_launches_two_processes(bert_pack, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    (tmp_path / "script.py").write_text(LAUNCHED)
    # with --cpu it would ask for MPI; the launcher of GPUs starts what Accelerator(cpu=True) makes CPU processes
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = [tmp_path / "script.py", bert_pack, tmp_path / "out", Path(__file__).resolve().parents[1]]
    done = subprocess.run(
        [*launch, *options, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


class TestDiffusers:
    @pytest.fixture
    def unet(self):
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return diffusers.UNet2DConditionModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=12,
                norm_num_groups=4,
            ).eval()

    @pytest.fixture
    def pack(self, unet):
        modules = {n: (m.out_features, m.in_features) for n, m in unet.named_modules() if n.endswith(("to_q", "to_v"))}
        pack, _ = make_pack(modules, n_components=6)
        return pack

    def outputs(self, unet):
        generator = torch.Generator().manual_seed(1)
        sample, states = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 12)))
        with torch.inference_mode():
            return unet(sample, 3, states).sample

    def test_add_switch_weigh_and_fuse(self, unet, pack):
        base = self.outputs(unet)
        unet.add_adapter(ex.EigenLoraxConfig(subspace=pack, r=4), adapter_name="one")
        assert torch.equal(self.outputs(unet), base)
        shake(unet, "one")
        whole = self.outputs(unet)
        assert not torch.allclose(whole, base)
        unet.set_adapters("one", weights=0.5)
        half = self.outputs(unet)
        assert not torch.allclose(half, whole)
        unet.disable_adapters()
        assert torch.equal(self.outputs(unet), base)
        unet.enable_adapters()
        torch.testing.assert_close(self.outputs(unet), half)
        unet.set_adapters("one", weights=1.0)
        unet.fuse_lora()
        torch.testing.assert_close(self.outputs(unet), whole, atol=1e-5, rtol=1e-5)
        unet.unfuse_lora()
        torch.testing.assert_close(self.outputs(unet), whole, atol=1e-5, rtol=1e-5)
        assert any(isinstance(module, EigenLoraxLayer) for module in unet.modules())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers(bert_pack, bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    model = make_bert()
    plain = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, r=4))
    for name in BERT:
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        if bits == 8:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    quantised = shake(get_peft_model(model, ex.EigenLoraxConfig(subspace=bert_pack, r=4)))
    shake(plain)
    x = torch.randn(4, 24)
    for name in BERT:
        layer, other = (m.get_submodule(f"base_model.model.{name}") for m in (quantised, plain))
        assert layer.quantization_backend is not None
        assert "quantization_backend=" in repr(layer)
        with torch.inference_mode():
            update = layer(x) - layer.base_layer(x)
            wanted = other(x) - other.base_layer(x)
        torch.testing.assert_close(update.float(), wanted, atol=1e-4, rtol=1e-3)
    layer(x).sum().backward()
    assert layer.eigenlorax_up["default"].grad.abs().sum() > 0
