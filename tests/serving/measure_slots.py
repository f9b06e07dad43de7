"""Starts vLLM in this process, and prints as JSON what LoRAs take in it: python measure_slots.py MODEL PACK OPTIONS.

OPTIONS: JSON with `flags` for the engine, `shared` (whether the model gets the pack's basis) and `adapter`, the name of
the one that is loaded.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from vllm import LLM
from vllm.lora.request import LoRARequest

import eigenlorax as ex
from eigenlorax.formats import write_adapter
from eigenlorax.vllm import plugin
from eigenlorax.vllm.cores import on_cores


def nbytes(tensors):
    return sum(one.nbytes for one in ([tensors] if isinstance(tensors, Tensor) else tensors) if one is not None)


model, pack, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
# as vLLM does by itself where the package is installed
plugin.register()
opened = ex.Pack.open(pack)
llm = LLM(
    model=model,
    enable_lora=True,
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=64,
    max_num_seqs=2,
    max_num_batched_tokens=64,
    distributed_executor_backend="uni",
    **options["flags"],
)
runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
loras = runner.lora_manager._adapter_manager
with TemporaryDirectory() as place:
    name = options["adapter"]
    found = on_cores(opened.packed(name), opened.info) if options["shared"] else opened.adapter(name)
    write_adapter(found, Path(place) / name)
    assert llm.llm_engine.add_lora(LoRARequest(name, 1, str(Path(place) / name)))
    (adapter,) = (loras.get_adapter(number) for number in loras.list_adapters())
buffers = dict(runner.model.named_buffers())
found = {
    "slots": sum(nbytes(one.lora_a_stacked) + nbytes(one.lora_b_stacked) for one in loras.modules.values()),
    "basis": sum(one.nbytes for path, one in buffers.items() if path.rpartition(".")[2].startswith("eigen_")),
    "adapter": sum(nbytes(one.lora_a) + nbytes(one.lora_b) for one in adapter.loras.values()),
}
sys.stdout.write(json.dumps(found) + "\n")
