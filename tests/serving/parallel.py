"""A program: the engine over two tensor-parallel processes on CPUs, for test_parallel.py. It prints tokens as JSON.

python parallel.py BASE PACK SHARED RANKS PROMPTS
"""

import json
import os
import sys

from offline import ENGINE, greedy


def main() -> None:
    base, pack, shared, ranks, prompts = sys.argv[1:]
    os.environ.update(EIGENLORAX_PACK=pack, EIGENLORAX_SHARED_BASIS=shared)
    from vllm import LLM

    import eigenlorax.serving.vllm

    options = {**ENGINE, "distributed_executor_backend": "mp", "tensor_parallel_size": int(ranks)}
    llm = LLM(model=base, **options)
    adapters = eigenlorax.serving.vllm.Adapters(pack)
    found = greedy(llm, json.loads(prompts), [adapters[name] for name in adapters])
    sys.stdout.write(f"\nTOKENS {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
