"""Greedy tokens of vLLM's engine, run as a script: `greedy.py REQUEST ANSWER`, both of them files of JSON.

One engine a process: what a pack changes in vLLM is changed for good. REQUEST has `model`, a folder; `max_rank`;
`tokens`, how many are wanted; and `rows`, a prompt and an adapter's folder each, which are one batch. ANSWER has a list
of tokens for each row.
"""

import json
import sys
from pathlib import Path


def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    prompts, folders = zip(*asked["rows"], strict=True)
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders), start=1)}
    engine = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(numbers),
        max_lora_rank=asked["max_rank"],
        max_model_len=128,
        max_num_seqs=len(prompts),
        distributed_executor_backend="uni",
    )
    loras = {folder: LoRARequest(f"lora{number}", number, folder) for folder, number in numbers.items()}
    for lora in loras.values():
        engine.llm_engine.add_lora(lora)
    greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    found = engine.generate(list(prompts), greedy, lora_request=[loras[folder] for folder in folders])
    Path(sys.argv[2]).write_text(json.dumps([list(one.outputs[0].token_ids) for one in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
