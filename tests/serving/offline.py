"""vLLM's engine in this process, one at a time, and the answers of transformers and PEFT that it has to give."""

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from eigenlorax.serving.vllm import plugin, settings

T = TypeVar("T")
NEW = 20
SECONDS = 400
ENGINE: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 8,
    "max_cpu_loras": 8,
    "max_lora_rank": 8,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "distributed_executor_backend": "uni",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def with_engine(
    use: Callable[[Any], T], base: Path, pack: Path | None = None, *, shared: bool = False, **options: Any
) -> T:
    """What `use` makes of vLLM's engine, which has the plugin's environment as it would be set for a server.

    A function, and no context manager: an engine that a variable still holds ends the next one when it goes.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    asked = {settings.PACK: str(pack), settings.SHARED_BASIS: str(int(shared))} if pack is not None else {}
    before = dict(os.environ)
    os.environ.update(asked)
    try:
        # vLLM itself does it once a process, whatever the environment is then
        plugin.register()
        return use(_engine(base, options))
    except BaseException as error:
        # or a test that fails holds its engine by the variables in the traceback
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
        gc.collect()
        cleanup_dist_env_and_memory()


def _engine(base: Path, options: Mapping[str, Any]) -> Any:
    from vllm import LLM

    return LLM(model=str(base), **{**ENGINE, **options})


def printed_by(*words: str | Path, cwd: Path | None = None) -> str:
    """What a Python program prints, in which vLLM may start processes; it imports what is beside these tests."""
    here = Path(__file__).parent
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    ran = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **several},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def greedy(llm: Any, prompts: Sequence[Sequence[int]], requests: Sequence[Any]) -> list[list[int]]:
    """The tokens that follow each prompt, all in one batch; requests: the adapter of each, or None."""
    from vllm import SamplingParams

    answers = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True),
        lora_request=list(requests),
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


def peft_greedy(base: Path, prompts: Sequence[Sequence[int]], adapters: Sequence[Path | None]) -> list[list[int]]:
    """The same by transformers and PEFT, one prompt at a time; adapters: the LoRA folder of each, or None."""
    answers = []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        model = AutoModelForCausalLM.from_pretrained(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        found = model.eval().generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(found[0, len(prompt) :].tolist())
    return answers


def in_worker(llm: Any) -> Any:
    """The model runner of an engine that is in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def slots(llm: Any) -> Mapping[str, Any]:
    """vLLM's LoRA layers by name: each has its slots."""
    return in_worker(llm).lora_manager._adapter_manager.modules
