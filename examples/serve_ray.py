"""Serve a pack behind Ray Serve: one base model, and concurrent requests for different adapters in one batch.

    pip install ".[ray-serve]"
    python examples/serve_ray.py                                          # starts a server, tests it, and stops it
    serve run examples.serve_ray:app model=my/model pack=my/pack          # a server at http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -H "content-type: application/json" \
         -d '{"model": "poet", "prompt": "to be", "max_tokens": 16}'

The API is a small part of OpenAI's: `model` is the name of an adapter, or that of the base model. Without a model and a
pack, it serves a tiny Llama with random weights, offline.
"""

import asyncio
import json
import os
import socket
import string
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eigenlorax as ex

BASE = "base"
api = FastAPI()


@api.exception_handler(Exception)
async def failed(_, error):
    """Tell the client of an unexpected error. Its traceback is in the log of the replica."""
    return JSONResponse({"detail": f"the server failed: {type(error).__name__}: {error}"}, 500)


class Asked(BaseModel):
    model: str
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1, le=256)


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(api)
class Completions:
    def __init__(self, model, pack):
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.bank = ex.AdapterBank(AutoModelForCausalLM.from_pretrained(model).eval(), pack)

    @api.get("/v1/models")
    def models(self):
        return {"object": "list", "data": [{"object": "model", "id": name} for name in [BASE, *self.bank.names]]}

    @api.post("/v1/completions")
    async def completions(self, asked: Asked):
        if asked.model != BASE and asked.model not in self.bank:
            raise HTTPException(404, f"there is no model {asked.model!r}: GET /v1/models lists them")
        # not in the batch, where an error of one client would fail the requests of the others
        tokens = self.tokenizer(asked.prompt)["input_ids"]
        if not tokens:
            raise HTTPException(422, f"the prompt {asked.prompt!r} has no tokens: send some text")
        choice, together = await self.batched(asked, tokens)
        return {"object": "text_completion", "model": asked.model, "choices": [choice], "requests_in_batch": together}

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.02)
    async def batched(self, asked, tokens):
        # in a thread, so that the replica accepts further requests meanwhile
        return await asyncio.to_thread(self.generate, asked, tokens)

    def generate(self, asked, tokens):
        """Generate in one batch, each row with the adapter of its request; return each answer and their number."""
        padded = self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        rows = self.bank.generate(
            **padded,
            adapter_names=["__base__" if one.model == BASE else one.model for one in asked],
            max_new_tokens=max(one.max_tokens for one in asked),
            do_sample=False,
        )
        new = rows[:, padded["input_ids"].shape[1] :]
        return [(self.choice(row[: one.max_tokens]), len(asked)) for row, one in zip(new, asked, strict=True)]

    def choice(self, row):
        ended = self.tokenizer.eos_token_id in row.tolist()
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        return {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}


def app(arguments):
    """Return the deployment of a model and a pack, for `serve run`."""
    if "model" not in arguments:
        folder = Path(tempfile.mkdtemp())
        make_tiny(folder)
        arguments = {"model": str(folder / "model"), "pack": str(folder / "pack")}
    return Completions.bind(arguments["model"], arguments["pack"])


def make_tiny(folder):
    """Write a Llama with random weights, whose tokens are characters, and a pack of random adapters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["_", *string.ascii_lowercase, " "])}, "_"))
    characters.normalizer = normalizers.Strip()
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="_", pad_token="_")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=160,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("poet", "lawyer", "coder", "nurse"):
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        get_peft_model(model, lora).save_pretrained(folder / "loras" / name)
    ex.fit(folder / "loras", n_components=12, warn_above=1.0).save(folder / "pack")


# --- run as a script: start a server, test it, and stop it ---------------------------------------------------------


def ask(url, **body):
    """Send a request, and return its status and answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def alone(folder, name, prompt, max_tokens):
    """Return the text of an adapter of the pack as an ordinary LoRA in PEFT, in a batch of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    if name != BASE:
        model = PeftModel.from_pretrained(model, folder / "exported" / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = tokenizer(prompt, return_tensors="pt")
    row = model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False)[0]
    return tokenizer.decode(row[tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/completions"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny(folder)
        ray.init(include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"model": str(folder / "model"), "pack": str(folder / "pack")}))

        names = ["poet", "lawyer", BASE, "coder", "nurse"]
        prompts = ["to be", "whereas the party", "once", "def", "take two of these and"]
        bodies = [
            {"model": names[i % 5], "prompt": prompts[(i // 5 + i) % 5], "max_tokens": 8 + i % 3} for i in range(20)
        ]
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = list(clients.map(lambda body: ask(url, **body), bodies))
        unknown = ask(url, model="nobody", prompt="to be")
        blank = ask(url, model="poet", prompt="   ")
        serve.shutdown()
        ray.shutdown()

        ex.Pack.open(folder / "pack").export(folder / "exported")
        same = 0
        for body, (status, answer) in zip(bodies, answers, strict=True):
            assert status == 200, answer
            text = answer["choices"][0]["text"]
            print(f"{body['model']:8s} {body['prompt']:24s} {text}")
            same += text == alone(folder, body["model"], body["prompt"], body["max_tokens"])
    print(f"{same} of {len(bodies)} answers are what the adapter says alone")
    print(f"requests in the largest batch: {max(answer['requests_in_batch'] for _, answer in answers)}")
    print(f"an unknown name: {unknown[0]}, {unknown[1]['detail']}")
    print(f"a prompt of blanks: {blank[0]}, {blank[1]['detail']}")


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
