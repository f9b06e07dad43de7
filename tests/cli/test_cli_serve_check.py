"""`eigenlorax serve-check`: what vLLM will serve of a pack, what it takes, and packs and models that do not fit."""

import json
import re
import shlex
import sys

import pytest
import torch

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from children import needs_fork
from eigenlorax.errors import ServingError
from eigenlorax.serving.vllm.adapter_folders import AdapterFolders
from eigenlorax.serving.vllm.settings import Settings
from outcomes import assert_refused, assert_usage_error, json_of, succeeded

pytestmark = pytest.mark.slow

QALORA = {"use_qalora": True}
LAYERS, HIDDEN, KV, FFN, VOCABULARY = 2, 24, 12, 40, 53
BLOCK = {"q_proj": (24, 24), "v_proj": (12, 24)}
RANK, K = 3, 4


def modules(shapes=BLOCK, layers=LAYERS):
    return {f"model.layers.{i}.self_attn.{name}": shape for i in range(layers) for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path):
    """A folder with the config of a Llama, and nothing else."""
    return make_config(tmp_path / "llama")


def make_config(folder, **fields):
    from transformers import LlamaConfig

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **fields,
    }
    LlamaConfig(**config).save_pretrained(folder)
    return folder


def make_pack(place, names="a b c", *, shapes=None, n_components=K, base=None, **options):
    make_adapters(place / "in", names, modules=modules() if shapes is None else shapes, rank=RANK, base=base, **options)
    ex.fit(place / "in", n_components=n_components).save(place / "pack")
    return place / "pack"


@pytest.fixture
def fitting(tmp_path):
    """A pack of adapters for queries and values of that Llama."""
    return make_pack(tmp_path)


class TestWhatItSays:
    def test_figures_by_hand(self, cli, fitting, model):
        found = json_of(cli("serve-check", fitting, "--model", model, "--max-loras", 2, "--adapters", 50, "--json"))
        assert found["expanded"]["served"] == found["shared"]["served"] == found["adapters"] == 3
        assert found["target_modules"] == ["q_proj", "v_proj"]
        plan = found["plan"]
        # of rank 3 in slots of rank 8; keys have room since they are fused with the others; two bytes a number
        slot = 2 * 8 * LAYERS * (2 * HIDDEN + 2 * (KV + HIDDEN))
        basis = 2 * LAYERS * K * (2 * HIDDEN + KV + HIDDEN)
        assert plan["expanded"]["max_lora_rank"] == plan["shared"]["max_lora_rank"] == 8
        assert plan["expanded"]["slot_bytes"] == slot
        assert plan["expanded"]["slots_bytes"] == plan["expanded"]["gpu_bytes"] == 2 * slot
        assert plan["shared"]["slot_bytes"] == 2 * 8 * LAYERS * 2 * (K + K)
        assert plan["shared"]["basis_bytes"] == basis
        assert plan["shared"]["many_slots_bytes"] == 50 * plan["shared"]["slot_bytes"] + basis
        adapter = LAYERS * RANK * (2 * HIDDEN + KV + HIDDEN)
        assert plan["expanded"]["adapter_bytes"] == 2 * adapter
        assert plan["expanded"]["many_cached_bytes"] == 50 * 4 * adapter
        assert plan["shared"]["adapter_bytes"] == 2 * LAYERS * RANK * 2 * (K + K)
        every = 2 * 8 * LAYERS * (4 * HIDDEN + 2 * (KV + HIDDEN) + 3 * (FFN + HIDDEN))
        assert plan["unrestricted_slot_bytes"] == every

    def test_the_table_says_the_same_in_words(self, cli, fitting, model):
        run = succeeded(cli("serve-check", fitting, "--model", model, "--max-loras", 2))
        assert "served on demand            3 of 3" in run.out
        assert "served with a shared basis  3 of 3" in run.out
        errors = ex.Pack.open(fitting).summary.in_fit
        largest = re.findall(r"  largest error +(\S+) \((\w+)\)", run.out)
        assert largest == [(f"{errors.worst:.4f}", errors.worst_adapter)] * 2
        figures = json_of(cli("serve-check", fitting, "--model", model, "--max-loras", 2, "--json"))["plan"]
        for tier in (figures["expanded"], figures["shared"]):
            assert all(f" {tier[name]:,} " in run.out for name in ("slot_bytes", "gpu_bytes", "many_slots_bytes"))
        assert f"would take {figures['unrestricted_slot_bytes']:,} bytes or more" in run.out

    def test_the_commands_are_ready_to_paste(self, cli, fitting, model):
        asked = ["--max-loras", 4, "--max-cpu-loras", 9, "--dtype", "float32", "--tensor-parallel-size", 2]
        run = succeeded(cli("serve-check", fitting, "--model", model, *asked))
        expanded, shared = (line.strip() for line in run.out.splitlines() if " vllm serve " in line)
        flags = ["vllm", "serve", str(model), "--dtype", "float32", "--tensor-parallel-size", "2", "--enable-lora"]
        flags += ["--max-loras", "4", "--max-cpu-loras", "9", "--max-lora-rank", "8"]
        settings = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", f"EIGENLORAX_PACK={fitting}"]
        assert shlex.split(expanded) == [*settings, *flags, "--lora-target-modules", "q_proj", "v_proj"]
        assert shlex.split(shared) == [*settings, "EIGENLORAX_SHARED_BASIS=1", *flags]

    def test_commands_hold_wherever_they_are_pasted(self, cli, tmp_path, monkeypatch):
        place = tmp_path / "with a 'space"
        pack, model = make_pack(place), make_config(place / "llama")
        monkeypatch.chdir(place)
        found = json_of(cli("serve-check", "pack", "--model", "llama", "--json"))
        words = shlex.split(found["expanded"]["command"])
        assert f"EIGENLORAX_PACK={pack}" in words
        assert words[words.index("serve") + 1] == str(model)

    def test_the_model_is_the_one_the_pack_names(self, cli, tmp_path, model):
        pack = make_pack(tmp_path, base=str(model))
        assert json_of(cli("serve-check", pack, "--json"))["model"] == str(model)

    def test_memory_has_room_for_every_adapter_unless_another_number_is_asked_for(self, cli, fitting, model):
        def choices(*options):
            return json_of(cli("serve-check", fitting, "--model", model, "--json", *options))["plan"]["choices"]

        assert choices()["max_cpu_loras"] == 8
        assert choices("--max-loras", 2)["max_cpu_loras"] == 3
        assert choices("--max-loras", 2, "--max-cpu-loras", 7)["max_cpu_loras"] == 7

    def test_which_way_takes_less_in_honest_words(self, cli, fitting, model):
        few = succeeded(cli("serve-check", fitting, "--model", model, "--max-loras", 1)).out
        many = succeeded(cli("serve-check", fitting, "--model", model, "--max-loras", 64)).out
        assert "With 1 slot" in few
        assert "With 64 slots the shared basis takes" in many

    def test_bases_that_cost_more_than_they_save(self, cli, tmp_path, model):
        # four directions a side, for slots of rank 1
        make_adapters(tmp_path / "in", "a b c d", modules=modules(), rank=1, base=None)
        ex.fit(tmp_path / "in", n_components=4).save(tmp_path / "pack")
        out = succeeded(cli("serve-check", tmp_path / "pack", "--model", model, "--max-loras", 1)).out
        assert "With 1 slot the bases cost more than they save: adapters on demand take" in out
        assert "From 4 on, the shared basis does." in out

    def test_a_pack_whose_sides_keep_different_numbers_of_components(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b c", modules=modules(), rank=RANK, base=None)
        pack = ex.fit(tmp_path / "in", energy=0.7)
        pack.save(tmp_path / "pack")
        sizes = [(one["down"].k, one["up"].k) for one in pack.info.modules.values()]
        assert len(set(sizes)) > 1
        shared = json_of(cli("serve-check", tmp_path / "pack", "--model", model, "--json"))["plan"]["shared"]
        assert shared["slot_numbers"] == 8 * sum(map(sum, sizes))
        assert shared["basis_bytes"] == 2 * sum(
            bases.down.components.numel() + bases.up.components.numel() for bases in pack.subspace.modules.values()
        )

    def test_names_that_lack_the_prefix_of_the_model(self, cli, tmp_path, model):
        pack = make_pack(tmp_path, shapes={name.removeprefix("model."): s for name, s in modules().items()})
        assert json_of(cli("serve-check", pack, "--model", model, "--json"))["plan"]["shared"]["basis_bytes"] > 0

    def test_a_quantised_model_has_the_same_layers(self, cli, fitting, model, tmp_path):
        plain = json_of(cli("serve-check", fitting, "--model", model, "--json"))
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
        config["architectures"] = ["LlamaForCausalLM"]
        (model / "config.json").write_text(json.dumps(config))
        assert json_of(cli("serve-check", fitting, "--model", model, "--json")) == plain

    def test_no_weight_is_needed_however_large_the_model(self, cli, tmp_path):
        wide = {name: (8192 if name.endswith("q_proj") else 4096, 8192) for name in modules(layers=1)}
        pack = make_pack(tmp_path, "a b", shapes=wide, n_components=2)
        # 100 billion numbers
        model = make_config(
            tmp_path / "huge",
            hidden_size=8192,
            intermediate_size=65536,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=32,
        )
        assert json_of(cli("serve-check", pack, "--model", model, "--json"))["plan"]["expanded"]["slot_bytes"] > 10**6


class TestWhatIsNotServed:
    def test_adapters_that_vllm_refuses_are_named_with_the_reason(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        make_adapter(tmp_path / "in" / "trained-biases", seed=5, modules=modules(), base=None, config={"bias": "all"})
        pack = make_pack_of(tmp_path)
        run = succeeded(cli("serve-check", pack, "--model", model))
        assert "served on demand            2 of 3" in run.out
        said = "1 adapter (trained-biases): vLLM does not support trained biases (bias='all')."
        assert f"\nNot served on demand: {said}\nNot served with a shared basis: {said}\n" in run.out

    def test_adapters_refused_for_one_reason_are_told_together(self, cli, tmp_path, model):
        for n in range(5):
            name = tmp_path / "in" / (f"biased-{n}" + "-long" * 10)
            make_adapter(name, seed=20 + n, rank=RANK, modules=modules(), base=None, config={"bias": "all"})
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        make_adapter(tmp_path / "in" / "of-codes", seed=9, rank=RANK, modules=modules(), base=None, config=QALORA)
        pack = make_pack_of(tmp_path)
        run = succeeded(cli("serve-check", pack, "--model", model))
        names = ", ".join(f"biased-{n}" + "-long" * 10 for n in range(3))
        many, one = (line for line in run.out.splitlines() if line.startswith("Not served on demand: "))
        assert f"each of 5 adapters ({names} and 2 more): vLLM does not support trained biases" in many
        assert one == "Not served on demand: 1 adapter (of-codes): vLLM does not support QALoRA."
        refused = json_of(cli("serve-check", pack, "--model", model, "--json"))["expanded"]["refused"]
        assert len(refused) == 6
        assert refused["of-codes"] == "vLLM does not support QALoRA"

    def test_residuals_are_refused_with_the_options_that_avoid_them(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        ex.fit(tmp_path / "in", max_error=0.1).save(tmp_path / "pack")
        run = succeeded(cli("serve-check", tmp_path / "pack", "--model", model))
        (line,) = (line for line in run.out.splitlines() if line.startswith("Not served with a shared basis: "))
        assert "each of 2 adapters (a, b): it has a residual in " in line
        assert "fitted for serving (--for serving) represents it, and one with a basis of few components" in line
        assert line.endswith("(--basis 32) may.")

    def test_what_lies_outside_the_subspace_is_served_expanded_alone(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        more = modules() | modules({"o_proj": (24, 24)})
        make_adapter(tmp_path / "in" / "wider", seed=5, rank=RANK, modules=more, base=None)
        pack = make_pack_of(tmp_path, exclude_modules=["*o_proj"])
        found = json_of(cli("serve-check", pack, "--model", model, "--json"))
        assert (found["expanded"]["served"], found["shared"]["served"]) == (3, 2)
        assert "outside the subspace" in found["shared"]["refused"]["wider"]
        # without it, vLLM would leave that part of the adapter away and say nothing
        assert found["target_modules"] == ["o_proj", "q_proj", "v_proj"]

    def test_a_module_beside_the_subspace_that_the_model_lacks(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        more = modules() | {"model.other": (24, 24)}
        make_adapter(tmp_path / "in" / "wider", seed=5, rank=RANK, modules=more, base=None)
        pack = make_pack_of(tmp_path, exclude_modules=["*other"])
        found = json_of(cli("serve-check", pack, "--model", model, "--json"))
        assert "the model lacks its module 'model.other'" in found["expanded"]["refused"]["wider"]

    def test_a_head_over_the_vocabulary_cannot_have_bases(self, cli, tmp_path, model):
        pack = make_pack(tmp_path, shapes=modules() | {"lm_head": (VOCABULARY, HIDDEN)})
        found = json_of(cli("serve-check", pack, "--model", model, "--max-loras", 1, "--json"))
        assert found["not_held"] == ["lm_head"]
        assert (found["shared"]["served"], found["shared"]["command"]) == (0, None)
        assert sorted(found["shared"]["refused"]) == ["a", "b", "c"]
        assert found["plan"]["shared"] is None
        attention = 2 * HIDDEN + 2 * (KV + HIDDEN)
        assert found["plan"]["expanded"]["slot_numbers"] == 8 * (LAYERS * attention + VOCABULARY + HIDDEN)
        run = succeeded(cli("serve-check", pack, "--model", model))
        (line,) = (line for line in run.out.splitlines() if line.startswith("Not served with a shared basis: "))
        assert "each of 3 adapters (a, b, c): the model has no linear layer" in line
        assert "for 1 of the 5 modules of the subspace, such as 'lm_head'" in line
        assert "(eigenlorax fit … --for serving --exclude-module lm_head)" in line
        assert "EIGENLORAX_SHARED_BASIS" not in run.out

    def test_an_adapter_that_fitting_again_would_not_help_has_its_own_reason(self, cli, tmp_path, model):
        more = modules() | {"lm_head": (VOCABULARY, HIDDEN)}
        make_adapters(tmp_path / "in", "a b", modules=more, rank=RANK, base=None)
        make_adapter(tmp_path / "in" / "biased", seed=5, rank=RANK, modules=more, base=None, config={"bias": "all"})
        refused = json_of(cli("serve-check", make_pack_of(tmp_path), "--model", model, "--json"))["shared"]["refused"]
        assert refused["a"] == refused["b"] != refused["biased"]
        assert refused["biased"] == "vLLM does not support trained biases (bias='all')"

    def test_what_it_says_to_do_about_it_helps(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b c", modules=modules(), rank=RANK, base=None)
        more = modules() | {"lm_head": (VOCABULARY, HIDDEN)}
        make_adapter(tmp_path / "in" / "head", seed=5, rank=RANK, modules=more, base=None)
        found = json_of(cli("serve-check", make_pack_of(tmp_path), "--model", model, "--json"))
        (options,) = {re.search(r"\(eigenlorax fit … (.*)\)", why)[1] for why in found["shared"]["refused"].values()}
        succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "again", *shlex.split(options)))
        found = json_of(cli("serve-check", tmp_path / "again", "--model", model, "--json"))
        assert (found["expanded"]["served"], found["shared"]["served"]) == (4, 3)
        assert list(found["shared"]["refused"]) == ["head"]

    def test_adapters_of_embeddings_alone(self, cli, tmp_path, model):
        embedding = {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(RANK, VOCABULARY),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(HIDDEN, RANK),
        }
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        make_adapter(
            tmp_path / "words",
            seed=5,
            modules={},
            rank=RANK,
            base=None,
            tensors=embedding,
            config={"target_modules": ["embed_tokens"]},
        )
        pack = make_pack_of(tmp_path)
        succeeded(cli("add", pack, tmp_path / "words"))
        succeeded(cli("remove", pack, "a", "b"))
        found = json_of(cli("serve-check", pack, "--model", model, "--json"))
        assert (found["expanded"]["served"], found["shared"]["served"]) == (1, 0)
        assert found["plan"]["expanded"]["adapter_bytes"] == 2 * RANK * (VOCABULARY + HIDDEN)

    @needs_fork
    def test_names_without_their_first_part_beside_tensors_outside_the_subspace(self, cli, fitting, tmp_path, model):
        short = {name.removeprefix("model."): shape for name, shape in modules().items()}
        embedding = {
            "base_model.model.embed_tokens.lora_embedding_A": torch.ones(RANK, VOCABULARY),
            "base_model.model.embed_tokens.lora_embedding_B": torch.ones(HIDDEN, RANK),
        }
        make_adapter(tmp_path / "short", seed=5, rank=RANK, modules=short, tensors=embedding, base=None)
        succeeded(cli("add", fitting, tmp_path / "short"))
        found = json_of(cli("serve-check", fitting, "--model", model, "--json"))
        assert "lack the first part of the model's names" in found["expanded"]["refused"]["short"]
        with pytest.raises(ServingError, match="lack the first part of the model's names"):
            AdapterFolders(Settings(str(fitting), False, tmp_path / "cache")).request("short").result(timeout=60)

    def test_an_empty_pack(self, cli, fitting, model):
        succeeded(cli("remove", fitting, "a", "b", "c"))
        run = succeeded(cli("serve-check", fitting, "--model", model))
        assert "no adapter of the pack can be served" in run.err
        assert "vllm serve" not in run.out
        assert "0 of 0" in run.out

    def test_one_adapter_that_makes_every_slot_larger(self, cli, tmp_path, model):
        make_adapters(tmp_path / "in", "a b", modules=modules(), rank=RANK, base=None)
        make_adapter(tmp_path / "in" / "large", seed=5, rank=9, modules=modules(), base=None)
        run = succeeded(cli("serve-check", make_pack_of(tmp_path), "--model", model))
        assert "slots are as large as 'large' needs, of rank 9" in run.err
        assert "--max-lora-rank 8 is enough" in run.err


def make_pack_of(place, **options):
    ex.fit(place / "in", n_components=K, **options).save(place / "pack")
    return place / "pack"


class TestWhatIsRefused:
    def test_a_basis_of_which_a_byte_is_another(self, cli, fitting, model):
        (basis,) = fitting.glob("subspace-*.safetensors")
        data = bytearray(basis.read_bytes())
        data[-1] ^= 1
        basis.write_bytes(data)
        assert_refused(cli("serve-check", fitting, "--model", model), 4, basis.name)

    def test_a_model_that_is_not_there(self, cli, fitting):
        for model in ("no/such", "./nowhere"):
            done = cli("serve-check", fitting, "--model", model)
            assert_refused(done, 3, f"the model {model} is not a local folder", "--model")

    def test_a_folder_without_a_config(self, cli, fitting, tmp_path):
        done = cli("serve-check", fitting, "--model", tmp_path)
        assert_refused(done, 3, f"{tmp_path} is not a model that transformers can load")

    def test_a_config_that_is_none(self, cli, fitting, model):
        for text in ("{", "[]", '{"model_type": "unheard-of"}'):
            (model / "config.json").write_text(text)
            assert_refused(cli("serve-check", fitting, "--model", model), 3, str(model))

    def test_a_field_of_the_config_that_is_of_another_type(self, cli, fitting, model):
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
        done = cli("serve-check", fitting, "--model", model)
        assert_refused(done, 3, f"{model} is not a model that transformers can load", "'hidden_size' expected int")

    def test_no_model_at_all(self, cli, fitting):
        assert_refused(
            cli("serve-check", fitting), 3, "the pack does not say which base model it belongs to", "--model"
        )

    def test_a_model_of_another_width(self, cli, fitting, tmp_path):
        wider = make_config(tmp_path / "wider", hidden_size=48)
        done = cli("serve-check", fitting, "--model", wider)
        assert_refused(done, 3, "model.layers.0.self_attn.q_proj", "24 × 24", "48 × 48", "--model")

    def test_a_model_with_fewer_layers(self, cli, tmp_path):
        pack = make_pack(tmp_path, base="org/base")
        flat = make_config(tmp_path / "flat", num_hidden_layers=1)
        done = cli("serve-check", pack, "--model", flat)
        assert_refused(done, 3, "lacks 2 of the 4 modules", "model.layers.1.", "the pack states 'org/base'")

    def test_a_pack_that_is_not_there(self, cli, tmp_path, model):
        assert_refused(cli("serve-check", tmp_path / "none", "--model", model), 4, "none")

    @pytest.mark.parametrize("dtype", ["half", "float64", "int8", ""])
    def test_a_dtype_that_is_none(self, cli, fitting, model, dtype):
        done = cli("serve-check", fitting, "--model", model, "--dtype", dtype)
        assert_refused(done, 3, f"dtype must be one of auto, bfloat16, float16, float32, got {dtype!r}")

    @pytest.mark.parametrize("option", ["max-loras", "tensor-parallel-size", "adapters"])
    def test_a_number_below_one(self, cli, fitting, model, option):
        done = cli("serve-check", fitting, "--model", model, f"--{option}", 0)
        assert_refused(done, 3, f"--{option} must be at least 1, got 0")

    def test_less_memory_than_slots(self, cli, fitting, model):
        done = cli("serve-check", fitting, "--model", model, "--max-loras", 4, "--max-cpu-loras", 3)
        assert_refused(done, 3, "--max-cpu-loras must be at least --max-loras, 4, got 3")

    def test_gpus_that_cannot_share_the_model(self, cli, fitting, model):
        done = cli("serve-check", fitting, "--model", model, "--tensor-parallel-size", 3)
        assert_refused(done, 3, "has 4 attention heads", "--tensor-parallel-size must divide 4")

    def test_a_word_for_a_number(self, cli, fitting, model):
        assert_usage_error(cli("serve-check", fitting, "--model", model, "--max-loras", "many"), "max-loras")

    def test_without_transformers(self, cli, fitting, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        done = cli("serve-check", fitting, "--model", model)
        assert_refused(done, 3, "transformers", "pip install 'eigenlorax[peft]'")
