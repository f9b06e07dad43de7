"""What `serve-check` says that vLLM takes, beside what a real engine has allocated."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from eigenlorax.formats import write_adapter
from eigenlorax.serving.vllm import plan as plans
from eigenlorax.serving.vllm.checking import ServerOptions, check
from eigenlorax.serving.vllm.cores import lora_on_cores
from eigenlorax.train.shapes import load_shapes
from offline import in_worker, printed_by, slots, with_engine
from planted import random_factors

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LAYERS, SLOTS, RANK = 2, 3, 5
SHAPES = {"q_proj": (128, 48), "v_proj": (64, 48), "o_proj": (48, 128), "down_proj": (48, 88)}
ASKED = ServerOptions(max_loras=SLOTS, max_cpu_loras=4, dtype="float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("slots")
    make(place, kv_heads=2)
    return place


def make(place, *, kv_heads):
    """A Llama, and a pack for some of its modules, of which no two keep as many components."""
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        intermediate_size=88,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(place / "model")
    names = {
        f"model.layers.{i}.{'mlp' if kind == 'down_proj' else 'self_attn'}.{kind}": shape
        for i in range(LAYERS)
        for kind, shape in (SHAPES | {"v_proj": (32 * kv_heads, 48)}).items()
    }
    adapters = [
        from_factors(
            f"a{n}",
            {name: random_factors(RANK, *shape, seed=31 * n + i) for i, (name, shape) in enumerate(names.items())},
            base_model=None,
        )
        for n in range(3)
    ]
    pack = ex.fit(adapters, energy=0.8, dtype="float32")
    assert len({(side["down"].k, side["up"].k) for side in pack.info.modules.values()}) > 1
    pack.save(place / "pack")


def nbytes(tensors):
    return sum(one.nbytes for one in ([tensors] if isinstance(tensors, Tensor) else tensors) if one is not None)


def measured(made, *, shared, **flags):
    """Bytes that an engine has in slots, in bases, and of one adapter in its memory."""
    from vllm.lora.request import LoRARequest

    pack = ex.Pack.open(made / "pack")
    given = lora_on_cores(pack.packed("a1"), pack.info) if shared else pack.adapter("a1")
    folder = write_adapter(given, made / f"a1-{shared}", overwrite=True)

    def measure(llm):
        assert llm.llm_engine.add_lora(LoRARequest("a1", 1, str(folder)))
        loras = in_worker(llm).lora_manager._adapter_manager
        (adapter,) = (loras.get_adapter(number) for number in loras.list_adapters())
        buffers = in_worker(llm).model.named_buffers()
        return {
            "slots": sum(nbytes(one.lora_a_stacked) + nbytes(one.lora_b_stacked) for one in slots(llm).values()),
            "basis": sum(one.nbytes for path, one in buffers if path.rpartition(".")[2].startswith("eigen_")),
            "adapter": sum(nbytes(one.lora_a) + nbytes(one.lora_b) for one in adapter.loras.values()),
        }

    options = {"max_loras": SLOTS, "max_cpu_loras": 4, "skip_tokenizer_init": True, **flags}
    return with_engine(measure, made / "model", made / "pack", shared=shared, **options)


@pytest.fixture(scope="module")
def checked(made):
    return check(ex.Pack.open(made / "pack"), str(made / "pack"), load_shapes(str(made / "model")), ASKED)


def test_slots_and_adapters_of_expanded_ones(vllm, made, checked):
    tier = checked.plan.expanded
    found = measured(made, shared=False, max_lora_rank=tier.max_lora_rank, lora_target_modules=checked.target_modules)
    assert found == {"slots": tier.slots_bytes, "basis": 0, "adapter": tier.adapter_bytes}


def test_slots_where_modules_are_not_restricted(vllm, made, checked):
    layers = load_shapes(str(made / "model")).layers
    found = measured(made, shared=False, max_lora_rank=checked.plan.expanded.max_lora_rank)
    everything = plans.layers_in_slot(layers, plans.target_modules(layers))
    assert found["slots"] == 4 * SLOTS * plans.expanded_slot(everything, checked.plan.expanded.max_lora_rank, 1)
    # Llama's models have embeddings and a head for LoRAs beside the linear layers
    assert found["slots"] > SLOTS * checked.plan.unrestricted_slot_bytes


def test_slots_adapters_and_bases_where_the_model_holds_them(vllm, made, checked):
    tier = checked.plan.shared
    found = measured(made, shared=True, max_lora_rank=tier.max_lora_rank)
    assert found == {"slots": tier.slots_bytes, "basis": tier.basis_bytes, "adapter": tier.adapter_bytes}


@pytest.mark.parametrize("shared", [False, True])
def test_each_of_two_processes_has_its_part(vllm, tmp_path, shared):
    # one head of keys, which both have
    make(tmp_path, kv_heads=1)
    asked = replace(ASKED, tensor_parallel_size=2)
    found = check(ex.Pack.open(tmp_path / "pack"), "pack", load_shapes(str(tmp_path / "model")), asked)
    tier = found.plan.shared if shared else found.plan.expanded
    flags = {"max_loras": SLOTS, "max_cpu_loras": 4, "skip_tokenizer_init": True, "max_lora_rank": tier.max_lora_rank}
    if not shared:
        flags["lora_target_modules"] = found.target_modules
    words = [str(tmp_path / "model"), str(tmp_path / "pack"), str(int(shared)), json.dumps(flags)]
    said = printed_by(HERE / "ranks.py", *words)
    (line,) = [line for line in said.splitlines() if line.startswith("TAKEN ")]
    assert json.loads(line.removeprefix("TAKEN ")) == [{"slots": tier.slots_bytes, "basis": tier.basis_bytes}] * 2


def test_ranks_that_vllm_takes(vllm):
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == plans.RANKS


def test_vllm_reads_the_commands(vllm, made):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = ServerOptions(max_loras=2, max_cpu_loras=5, dtype="float32", tensor_parallel_size=2)
    shapes = load_shapes(str(made / "model"))
    found = check(ex.Pack.open(made / "pack"), str(made / "pack"), shapes, asked, revision="abc")
    for way, named in ((found.expanded, found.target_modules), (found.shared, None)):
        words = shlex.split(way.command)
        read = make_arg_parser(FlexibleArgumentParser()).parse_args(words[words.index("serve") + 1 :])
        assert (read.model_tag, read.revision, read.dtype) == (str(made / "model"), "abc", "float32")
        assert (read.enable_lora, read.max_loras, read.max_cpu_loras, read.max_lora_rank) == (True, 2, 5, 8)
        assert (read.tensor_parallel_size, read.lora_target_modules) == (2, named)
