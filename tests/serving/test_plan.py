"""Bytes of slots, bases and adapters, beside sums that are written out by hand."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from eigenlorax.errors import OptionError
from eigenlorax.serving.vllm import plan as plans
from eigenlorax.serving.vllm.plan import COLUMN, EMBEDDING, HEAD, ROW, Choices, CoreSize, Layer, ServedAdapters, Shapes
from eigenlorax.train.shapes import from_config

HIDDEN, FFN, KV, VOCABULARY, DEPTH = 4096, 14336, 1024, 128256, 32
# out + in of every linear layer of a block: q, k, v, o, gate, up, down
SIDES = [2 * HIDDEN, KV + HIDDEN, KV + HIDDEN, 2 * HIDDEN, FFN + HIDDEN, FFN + HIDDEN, HIDDEN + FFN]


@pytest.fixture(scope="module")
def llama():
    """The shapes of Llama-3-8B, from its config."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=DEPTH,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    return from_config(config, "llama")


def linear(shapes):
    return {name: layer for name, layer in shapes.layers.items() if layer.kind == plans.LINEAR}


def planned(shapes, *, rank=16, k=64, max_loras=8, gpus=1, n=1000):
    """Every linear layer has a LoRA of `rank`, and k components a side."""
    layers = linear(shapes)
    cores = {name: CoreSize(k, k) for name in layers}
    numbers = rank * sum(layer.out + layer.input for layer in layers.values())
    return plans.plan(
        shapes.layers,
        cores,
        plans.target_modules(layers),
        Choices(max_loras=max_loras, max_cpu_loras=100, many=n, itemsize=2, gpus=gpus),
        expanded=ServedAdapters(10, rank, 10 * numbers),
        shared=ServedAdapters(10, rank, 10 * rank * 2 * k * len(layers)),
    )


class TestLlama3:
    def test_slots_and_bases_by_hand(self, llama):
        plan = planned(llama)
        assert plan.expanded.slot_numbers == DEPTH * 16 * sum(SIDES) == 41_943_040
        assert plan.expanded.slot_bytes == 83_886_080
        assert plan.expanded.basis_bytes == 0
        assert plan.expanded.gpu_bytes == 8 * 83_886_080
        assert plan.shared.slot_numbers == DEPTH * 7 * 16 * (64 + 64) == 458_752
        assert plan.shared.basis_bytes == 2 * DEPTH * 64 * sum(SIDES) == 335_544_320
        assert plan.shared.gpu_bytes == 8 * 917_504 + 335_544_320
        assert plan.shared.many_slots_bytes == 1000 * 917_504 + 335_544_320

    def test_a_thousand_take_at_least_18_times_less_with_the_basis_counted(self, llama):
        plan = planned(llama)
        assert plan.expanded.many_slots_bytes / plan.shared.many_slots_bytes >= 18
        assert plan.expanded.many_host_bytes / plan.shared.many_host_bytes >= 18
        assert plan.expanded.slot_bytes / plan.shared.slot_bytes >= 18

    def test_memory_and_cache(self, llama):
        plan = planned(llama)
        assert plan.expanded.adapter_bytes == 83_886_080
        assert plan.expanded.host_bytes == 100 * 83_886_080
        assert plan.expanded.many_cached_bytes == 1000 * 2 * 83_886_080
        assert plan.shared.many_host_bytes == 1000 * 917_504

    def test_from_how_many_slots_the_basis_pays(self, llama):
        plan = planned(llama)
        # 335,544,320 / (83,886,080 − 917,504) = 4.04
        assert plan.from_slots == 5
        four, five = (planned(llama, max_loras=n) for n in (4, 5))
        assert four.expanded.gpu_bytes < four.shared.gpu_bytes
        assert five.expanded.gpu_bytes > five.shared.gpu_bytes

    def test_never_where_cores_are_as_large_as_layers(self, llama):
        assert planned(llama, k=5852).from_slots is None

    def test_a_rank_between_two_takes_the_larger_slot(self, llama):
        plan = planned(llama, rank=9)
        assert plan.expanded.max_lora_rank == plan.shared.max_lora_rank == 16
        assert plan.expanded.slot_bytes == 83_886_080
        # in memory an adapter is as large as it is
        assert plan.expanded.adapter_bytes == 83_886_080 * 9 // 16

    def test_embeddings_and_the_head(self, llama):
        assert llama.layers["lm_head"] == Layer(VOCABULARY, HIDDEN, HEAD)
        assert llama.layers["model.embed_tokens"] == Layer(HIDDEN, VOCABULARY, EMBEDDING)
        room = plans.layers_in_slot(llama.layers, ["lm_head", "embed_tokens"])
        assert plans.expanded_slot(room, 16, 4) == 2 * 16 * (VOCABULARY + HIDDEN)

    def test_two_gpus_share_what_vllm_cuts(self, llama):
        plan = planned(llama, gpus=2)
        # A of a layer that is cut by its output is whole on each, and B of one that is cut by its input
        column = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, FFN), (HIDDEN, FFN)]
        row = [(HIDDEN, HIDDEN), (FFN, HIDDEN)]
        sides = sum(n_in + out // 2 for n_in, out in column) + sum(n_in // 2 + out for n_in, out in row)
        assert plan.expanded.slot_numbers == DEPTH * 16 * sides
        assert plan.shared.basis_bytes == 2 * DEPTH * 64 * sides
        assert plan.shared.slot_numbers == 458_752
        assert plan.expanded.adapter_bytes == 83_886_080

    def test_keys_and_values_are_repeated_where_there_are_more_gpus_than_heads(self, llama):
        keys = llama.layers["model.layers.0.self_attn.k_proj"]
        assert [keys.share(gpus) for gpus in (1, 8, 16, 32)] == [(KV, HIDDEN), *[(KV // 8, HIDDEN)] * 3]

    def test_a_number_of_gpus_that_does_not_divide_the_heads(self, llama):
        with pytest.raises(OptionError, match="llama has 32 attention heads, which cannot be divided among 3 GPUs"):
            plans.check_gpus(llama, 3)

    def test_a_number_of_gpus_that_does_not_divide_a_layer(self):
        shapes = Shapes("m", "float16", {"a.down_proj": Layer(8, 30, split=ROW)})
        plans.check_gpus(shapes, 3)
        with pytest.raises(
            OptionError, match="a.down_proj of m has a dimension of 30, which cannot be divided among 4 GPUs"
        ):
            plans.check_gpus(shapes, 4)


class TestWhatHasRoom:
    def test_projections_that_are_fused_have_room_together(self, llama):
        room = plans.layers_in_slot(llama.layers, ["v_proj", "down_proj"])
        assert {name.rpartition(".")[2] for name in room} == {"q_proj", "k_proj", "v_proj", "down_proj"}
        assert len(room) == 4 * DEPTH

    def test_modules_are_named_by_their_last_part(self):
        names = ["model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj", "lm_head"]
        assert plans.target_modules(names) == ("lm_head", "q_proj")

    def test_experts_are_one_layer(self):
        names = ["model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts.0.down_proj", "a.q_proj"]
        assert plans.target_modules(names) == ("experts", "q_proj")
        layers = {name: Layer(2, 3) for name in names} | {"a.mlp.gate_proj": Layer(5, 7)}
        assert set(plans.layers_in_slot(layers, ["experts"])) == set(names[:2])

    def test_without_a_restriction_every_linear_layer_has_room(self, llama):
        layers = linear(llama)
        few = [name for name in layers if name.endswith("o_proj")]
        plan = plans.plan(
            llama.layers,
            {},
            plans.target_modules(few),
            Choices(1, 1, 1, 2),
            expanded=ServedAdapters(1, 16, 1),
            shared=ServedAdapters(0, 0, 0),
        )
        assert plan.expanded.slot_numbers == DEPTH * 16 * 2 * HIDDEN
        assert plan.unrestricted_slot_bytes == 83_886_080
        assert (plan.shared, plan.from_slots) == (None, None)


class TestRanks:
    @pytest.mark.parametrize(
        ("rank", "flag"), [(0, 1), (1, 1), (2, 8), (8, 8), (9, 16), (129, 256), (257, 320), (512, 512)]
    )
    def test_the_smallest_that_is_enough(self, rank, flag):
        assert plans.max_lora_rank(rank) == flag

    def test_the_largest(self):
        with pytest.raises(OptionError, match="up to rank 512, not 513"):
            plans.max_lora_rank(513)


def test_components_may_differ_by_module_and_side():
    layers = {"a.x": Layer(7, 5), "a.y": Layer(13, 11)}
    cores = {"a.x": CoreSize(2, 3), "a.y": CoreSize(4, 6)}
    assert plans.shared_slot(cores.values(), 8) == 8 * (2 + 3 + 4 + 6)
    assert plans.basis(layers, cores, 1) == 2 * 5 + 7 * 3 + 4 * 11 + 13 * 6
    cut = {"a.x": replace(layers["a.x"], out=8, split=COLUMN), "a.y": replace(layers["a.y"], input=12, split=ROW)}
    assert plans.basis(cut, cores, 4) == 2 * 5 + 2 * 3 + 4 * 3 + 13 * 6
