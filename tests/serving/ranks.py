"""A program: what LoRAs take in each of two tensor-parallel processes on CPUs, for test_slots.py, printed as JSON.

python ranks.py BASE PACK SHARED FLAGS
"""

import json
import os
import sys

from offline import ENGINE


def taken(worker):
    """Bytes of slots and of bases, in a worker."""
    runner = worker.model_runner
    loras = runner.lora_manager._adapter_manager.modules.values()
    buffers = runner.model.named_buffers()
    return {
        "slots": sum(one.nbytes for lora in loras for one in (*lora.lora_a_stacked, *lora.lora_b_stacked)),
        "basis": sum(one.nbytes for path, one in buffers if path.rpartition(".")[2].startswith("eigen_")),
    }


def main():
    base, pack, shared, flags = sys.argv[1:]
    os.environ.update(EIGENLORAX_PACK=pack, EIGENLORAX_SHARED_BASIS=shared, VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    from vllm import LLM

    import ranks

    options = {**ENGINE, "distributed_executor_backend": "mp", "tensor_parallel_size": 2, **json.loads(flags)}
    # of the module, by whose name the workers find it
    found = LLM(model=base, **options).collective_rpc(ranks.taken)
    sys.stdout.write(f"\nTAKEN {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
