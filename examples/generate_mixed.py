"""Generate text with transformers and PEFT in one batch whose rows use different adapters of a pack.

    pip install ".[peft]"
    python examples/generate_mixed.py

It runs offline, on a tiny Llama with random weights; put your own model, adapters and prompts in its place.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import eigenlorax as ex

CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=160,
    initializer_range=0.1,
)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

torch.manual_seed(0)
# "__base__" is the model without any adapter
names = ["poet", "lawyer", "__base__", "coder", "poet", "nurse"]
prompts = torch.randint(5, 500, (len(names), 7))

with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    LlamaForCausalLM(CONFIG).save_pretrained(root / "base")

    def base():
        return LlamaForCausalLM.from_pretrained(root / "base").eval()

    for name in ("poet", "lawyer", "coder", "nurse"):
        get_peft_model(base(), LORA).save_pretrained(root / "loras" / name)
    pack = ex.fit(root / "loras", n_components=12, warn_above=1.0).save(root / "pack")

    # the text of each adapter alone: an ordinary LoRA, in a batch of its own
    loras = ex.Pack.open(pack).export(root / "exported")
    wanted = []
    for name, prompt in zip(names, prompts, strict=True):
        model = base() if name == "__base__" else PeftModel.from_pretrained(base(), loras[name])
        wanted.append(model.generate(input_ids=prompt[None], **GREEDY)[0].tolist())

    # EigenLoRAx in PEFT: each adapter in a pack is a folder that PEFT loads
    model = PeftModel.from_pretrained(base(), pack / "adapters" / "poet", adapter_name="poet")
    for name in ("lawyer", "coder", "nurse"):
        model.load_adapter(pack / "adapters" / name, adapter_name=name)
    by_peft = model.generate(input_ids=prompts, adapter_names=names, **GREEDY).tolist()

    # the bank: any number of adapters on a model, which can be added and removed while it serves
    bank = ex.AdapterBank(base(), pack)
    by_bank = bank.generate(input_ids=prompts, adapter_names=names, **GREEDY).tolist()

for name, row in zip(names, by_bank, strict=True):
    print(f"{name:10s} {row[prompts.shape[1] :]}")
for who, rows in {"PeftModel.generate": by_peft, "AdapterBank.generate": by_bank}.items():
    same = sum(got == alone for got, alone in zip(rows, wanted, strict=True))
    print(f"{who}: {same} of {len(names)} rows equal the text of their adapter alone")
