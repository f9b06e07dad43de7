"""vLLM for tests: a tiny Llama with adapters in a pack, what PEFT answers with them, and a server on this machine.

Rows with and without an adapter are never mixed in a batch: vLLM 0.32 on CPUs gives the latter an adapter.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenlorax as ex

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
SECONDS_TO_START, SECONDS_TO_STOP = 240, 40
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
N_TOKENS = 12


def need_vllm() -> None:
    """Skip a module of tests where there is no vLLM, and describe this process's engines to it."""
    pytest.importorskip("vllm", reason="needs vLLM (docs/vllm.md)")
    os.environ.update(ENVIRONMENT)
    # one process an engine, so that its errors are ours
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def make_base(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A Llama of random weights, large enough that its answers vary, and a tokenizer of words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w3", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def make_loras(base: Path, parent: Path, names: Sequence[str], *, seed: int = 1, **options: Any) -> list[Path]:
    """LoRAs of that model as PEFT saves them, so strong that each answers differently. options: of `LoraConfig`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for offset, name in enumerate(names):
        options = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
        generator = torch.Generator().manual_seed(1000 * seed + offset)
        with torch.no_grad():
            for key, one in model.named_parameters():
                if "lora_" in key:
                    one.copy_(0.08 * torch.randn(one.shape, generator=generator))
        model.save_pretrained(parent / name)
        folders.append(parent / name)
    return folders


def prompts(n: int) -> list[list[int]]:
    """Token ids of different prompts, of different lengths."""
    return [[5, 6, 7 + i, *range(20 + i, 22 + i + i % 3)] for i in range(n)]


@dataclass
class Reference:
    """What transformers and PEFT answer with the adapters of a pack, exported: greedy, in float32."""

    base: Path
    exported: Path
    _models: dict[str, Any] = field(default_factory=dict)

    def tokens(self, name: str | None, prompt: Sequence[int], n: int = N_TOKENS) -> list[int]:
        """The tokens that follow; of the base model where no adapter is named."""
        from transformers import AutoModelForCausalLM

        if name not in self._models:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            if name is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, self.exported / name)
            self._models[name] = model.eval()
        ids = torch.tensor([list(prompt)])
        made = self._models[name].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return made[0, len(prompt) :].tolist()


def reference(base: Path, pack: Path, folder: Path) -> Reference:
    """The answers to compare with. folder: for the exported adapters."""
    ex.Pack.open(pack).export(folder)
    return Reference(base, folder)


def offline(base: Path, *, max_lora_rank: int = 8, **options: Any) -> Any:
    """vLLM's engine in this process, in float32."""
    from vllm import LLM

    return LLM(
        model=str(base),
        enable_lora=True,
        **{
            "max_loras": 4,
            "max_cpu_loras": 8,
            "max_lora_rank": max_lora_rank,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "distributed_executor_backend": "uni",
            **options,
        },
    )


def generate(llm: Any, asked: Sequence[Sequence[int]], requests: Sequence[Any] | None, n: int = N_TOKENS) -> list[list[int]]:
    """The greedy tokens that follow each prompt, all of them in one batch."""
    from vllm import SamplingParams

    done = llm.generate(
        [{"prompt_token_ids": list(one)} for one in asked],
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True),
        lora_request=requests,
        use_tqdm=False,
    )
    return [list(one.outputs[0].token_ids) for one in done]


@dataclass
class Server:
    """vLLM's server, answering at `url`. log: what it has written until now."""

    process: subprocess.Popen
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def lines(self, words: str) -> list[str]:
        """The lines of the log with these words."""
        return [line for line in self.log.splitlines() if words in line]

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def status(self, model: str) -> int:
        """The status of the answer to a short request."""
        return self.post("/v1/completions", {"model": model, "prompt": [5, 6, 7], "max_tokens": 1})[0]

    def tokens(self, model: str, prompt: Sequence[int], n: int = N_TOKENS) -> list[int]:
        """The greedy tokens that follow."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": n, "temperature": 0, "ignore_eos": True}
        status, answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


@cache
def command() -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


@contextmanager
def serving(
    base: Path,
    pack: Path | str,
    log_file: Path,
    *,
    shared: bool = False,
    max_lora_rank: int = 8,
    max_loras: int = 4,
    max_cpu_loras: int = 8,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """vLLM's server with a pack, once it answers. The base model is served as `base`. It ends with the block."""
    with starting(
        base,
        pack,
        log_file,
        shared=shared,
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        arguments=arguments,
        env=env,
    ) as server:
        until = time.monotonic() + SECONDS_TO_START
        while not _answers(server.url):
            assert server.process.poll() is None, server.log[-4000:]
            assert time.monotonic() < until, server.log[-4000:]
            time.sleep(0.2)
        yield server
        assert server.process.poll() is None, server.log[-4000:]


@contextmanager
def starting(
    base: Path,
    pack: Path | str,
    log_file: Path,
    *,
    shared: bool = False,
    max_lora_rank: int = 8,
    max_loras: int = 4,
    max_cpu_loras: int = 8,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """The same, not waited for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = {"EIGENLORAX_PACK": str(pack), "EIGENLORAX_SHARED_BASIS": str(int(shared))}
    switches = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                *command(),
                *("--model", str(base), "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
                *("--enable-lora", "--max-lora-rank", str(max_lora_rank), "--max-loras", str(max_loras)),
                *("--max-cpu-loras", str(max_cpu_loras), "--dtype", "float32", "--enforce-eager"),
                *("--max-model-len", "128", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
                *arguments,
            ],
            env={**os.environ, **ENVIRONMENT, **switches, **asked, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # its engine has processes of its own, which end with it or are ended below
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log_file)
    try:
        yield server
    finally:
        stop(server)


def stop(server: Server) -> None:
    """End a server as a user does, and, if it does not listen, at once."""
    if server.process.poll() is None:
        server.process.terminate()
    try:
        server.process.wait(SECONDS_TO_STOP)
    finally:
        try:
            os.killpg(server.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        server.process.wait(SECONDS_TO_STOP)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
