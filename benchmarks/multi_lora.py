"""vLLM with many adapters: a model that holds the subspace beside vLLM's own LoRAs, and beside the model without any.

    python benchmarks/multi_lora.py         # ten minutes; writes benchmarks/results/vllm.json

Run it with the Python of an environment that has vLLM. The model has the shape of a small Llama with random weights;
adapters are random too. Times do not depend on the numbers. Each engine is a process of its own, on one thread. All of
them are there at once, and generate in turn, round after round, each round starting with another one; ratios are
medians over rounds of the ratio within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vllm.json"
K, RANK = 64, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 20261126
# vLLM on a CPU: one thread, and no process beside the one that measures
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """The shape of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each module of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        sizes = dict.fromkeys(("q_proj", "o_proj"), (self.hidden, self.hidden))
        sizes |= dict.fromkeys(("k_proj", "v_proj"), (kv, self.hidden))
        sizes |= dict.fromkeys(("gate_proj", "up_proj"), (self.intermediate, self.hidden))
        return sizes | {"down_proj": (self.hidden, self.intermediate)}

    def numbers(self, k: int, rank: int) -> Json:
        """How many numbers a slot takes, as an ordinary LoRA and with a shared basis; and how many the basis has."""
        sides = self.layers * sum(sum(shape) for shape in self.shapes().values())
        return {"lora": rank * sides, "shared": rank * 2 * k * len(MODULES) * self.layers, "basis": k * sides}


@dataclass(frozen=True)
class Plan:
    """What is measured. adapters: how many, one measurement each; requests use them in turn."""

    model: Model
    adapters: tuple[int, ...]
    requests: int
    prompt: int
    tokens: int
    rounds: int


PLAN = Plan(Model(768, 6, 12, 4, 2048), adapters=(1, 8, 64), requests=64, prompt=16, tokens=48, rounds=9)
QUICK = Plan(Model(128, 2, 4, 2, 320), adapters=(4,), requests=8, prompt=8, tokens=4, rounds=1)
LLAMA_3_8B = Model(4096, 32, 32, 8, 14336)


# --- one engine, in a process of its own ------------------------------------------------------------------------------


def engine(asked: Json, answers: TextIO) -> None:
    """Load a model, say what its slots take, and generate as often as a line on standard input asks for it.

    asked: `model`; `loras`, a folder for each adapter, none for the model alone; `requests`, `prompt` and `tokens`.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = asked["loras"]
    lora_options = {
        "enable_lora": True,
        "max_loras": len(folders),
        "max_cpu_loras": len(folders),
        "max_lora_rank": RANK,
        "lora_target_modules": asked["targets"],
    }
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_model_len=256,
        max_num_seqs=asked["requests"],
        max_num_batched_tokens=max(256, asked["requests"] * asked["prompt"]),
        num_gpu_blocks_override=2 * asked["requests"] + 1,
        distributed_executor_backend="uni",
        **(lora_options if folders else {}),
    )
    loras = [LoRARequest(f"a{number}", number + 1, folder) for number, folder in enumerate(folders)]
    for lora in loras:
        llm.llm_engine.add_lora(lora)
    parameters = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    (held,) = llm.apply_model(held_bytes)
    tell(answers, {"bytes": held})
    for turn, _ in enumerate(sys.stdin):
        for row in range(asked["requests"]):
            prompt = {"prompt_token_ids": [5 + (row * 31 + place * 7) % 900 for place in range(asked["prompt"])]}
            lora = loras[row % len(loras)] if loras else None
            llm.llm_engine.add_request(f"{turn}-{row}", prompt, parameters, lora_request=lora)
        tell(answers, measured(llm.llm_engine, asked["requests"]))


def measured(running: Any, requests: int) -> Json:
    """Seconds until every request has its first token, and of all steps after that; and what was generated."""
    seconds, tokens = [], {}
    while running.has_unfinished_requests():
        begun = time.perf_counter()
        outputs = running.step()
        seconds.append(time.perf_counter() - begun)
        tokens |= {int(one.request_id.rpartition("-")[2]): list(one.outputs[0].token_ids) for one in outputs}
    generated = sum(map(len, tokens.values()))
    # all prompts fit in the first step
    assert generated == requests * len(seconds)
    return {
        "first_seconds": seconds[0],
        "decode_seconds": sum(seconds[1:]),
        "tokens_per_second": (generated - requests) / sum(seconds[1:]),
        "tokens": [tokens[row] for row in range(requests)],
    }


def held_bytes(model: Any) -> Json:
    """Bytes of all slots that vLLM has laid out for LoRAs, and of the bases in the model."""

    def total(tensors: Any) -> int:
        return sum({one.data_ptr(): one.nbytes for one in tensors}.values())

    stacks = [
        one
        for module in model.modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for one in getattr(module, name, ())
    ]
    bases = [buffer for name, buffer in model.named_buffers() if name.endswith((".eigen_down", ".eigen_up"))]
    return {"slots": total(stacks), "basis": total(bases)}


def tell(answers: TextIO, found: Json) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


class Engine:
    """A process that runs an engine."""

    def __init__(self, asked: Json, environment: Mapping[str, str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("EIGENLORAX_")}
        # a pipe that nobody reads would stop it when it is full
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--engine", json.dumps(asked)],
            env={**own, **ENVIRONMENT, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.bytes = self.answer()["bytes"]

    def run(self) -> Json:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Json:
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise SystemExit(f"an engine ended:\n{self.said.read().decode(errors='replace')[-4000:]}")
        return json.loads(line)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(plan: Plan) -> Json:
    """Every engine, interleaved."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folder = Path(scratch)
        names = make(plan, folder)
        shared = {"EIGENLORAX_PACK": str(folder / "pack"), "EIGENLORAX_SHARED_BASIS": "1"}
        asked = {
            "model": str(folder / "base"),
            "requests": plan.requests,
            "prompt": plan.prompt,
            "tokens": plan.tokens,
            "targets": list(MODULES),
        }
        engines = {"base": running.enter_context(Engine({**asked, "loras": []}, {}))}
        for n in plan.adapters:
            loras = {way: [str(folder / way / name) for name in names[:n]] for way in ("loras", "cores")}
            ordinary = Engine({**asked, "loras": loras["loras"]}, {})
            engines[f"lora {n}"] = running.enter_context(ordinary)
            lora_on_cores = Engine({**asked, "loras": loras["cores"], "targets": None}, shared)
            engines[f"shared {n}"] = running.enter_context(lora_on_cores)
            say(f"engines for {n} adapters are there")
        runs = in_turn(engines, plan.rounds)
        held = {name: one.bytes for name, one in engines.items()}
    return {
        "plan": asdict(plan),
        "k": K,
        "r": RANK,
        "throughput": {name: summary(name, runs) for name in runs},
        "same_tokens": {
            n: statistics.fmean(
                one == other
                for one, other in zip(runs[f"lora {n}"][0]["tokens"], runs[f"shared {n}"][0]["tokens"], strict=True)
            )
            for n in plan.adapters
        },
        "bytes": held,
        "numbers": plan.model.numbers(K, RANK),
        "llama_3_8b": LLAMA_3_8B.numbers(K, RANK),
    }


def make(plan: Plan, folder: Path) -> Sequence[str]:
    """The model, and its adapters as ordinary LoRAs, in a pack and as LoRAs of the cores; the adapters' names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import bank
    from eigenlorax.formats import peft
    from eigenlorax.serving.vllm.cores import lora_on_cores

    bank.K, bank.RANK = K, RANK
    model = plan.model
    config = LlamaConfig(
        # a small vocabulary, as in bank.py
        vocab_size=1000,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.intermediate,
        max_position_embeddings=512,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    pack = bank.made_pack(base, MODULES, max(plan.adapters))
    pack.save(folder / "pack")
    pack.export(folder / "loras")
    for name in pack.names:
        peft.write(lora_on_cores(pack.packed(name), pack.info), folder / "cores" / name)
    return pack.names


def in_turn(engines: Mapping[str, Engine], rounds: int) -> dict[str, list[Json]]:
    """What each found in each round; a first run, which is not kept, before them."""
    names = list(engines)
    runs: dict[str, list[Json]] = {name: [] for name in names}
    for name in names:
        engines[name].run()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(engines[name].run())
        line = ", ".join(f"{name} {each[-1]['tokens_per_second']:.0f}" for name, each in runs.items())
        say(f"round {turn + 1} of {rounds}, tokens a second: {line}")
    return runs


def summary(name: str, runs: Mapping[str, list[Json]]) -> Json:
    """Of one engine: medians over rounds, and of ratios to others in the same round."""
    found: Json = {"rounds": [one["tokens_per_second"] for one in runs[name]]}
    found["tokens_per_second"] = statistics.median(found["rounds"])
    found["first_seconds"] = statistics.median(one["first_seconds"] for one in runs[name])
    others = {"base": "to_base", name.replace("shared", "lora"): "to_lora"}
    for other, field in others.items():
        if other != name:
            for what, key in (("tokens_per_second", field), ("first_seconds", f"first_{field}")):
                pairs = zip(runs[name], runs[other], strict=True)
                found[key] = statistics.median(one[what] / that[what] for one, that in pairs)
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; the result goes to standard output")
    parser.add_argument("--rounds", type=int, help="how often each engine is measured")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine is not None:
        # vLLM prints: what was standard output is for answers alone
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
            os.dup2(2, 1)
            engine(given.engine, answers)
        return
    try:
        vllm = version("vllm-cpu")
    except PackageNotFoundError:
        vllm = version("vllm")
    from eigenlorax.cli import env

    plan = QUICK if given.quick else PLAN
    result = {
        "command": "python benchmarks/multi_lora.py",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {**env.collect(), "vllm": vllm},
        "seed": SEED,
        "load_at_start": os.getloadavg()[0],
        **measure(replace(plan, rounds=given.rounds) if given.rounds else plan),
    }
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    if given.quick:
        sys.stdout.write(text)
    else:
        RESULT.write_text(text, encoding="utf-8")
        say(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
