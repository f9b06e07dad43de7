"""LoRAs in GGUF: against files that llama.cpp's converter wrote, an oracle in float64, and gguf's own reader."""

import json
import pickle
import re
import struct
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import eigenlorax as ex
import gguf_models as models
from eigenlorax.errors import FormatError, OptionError, ShapeError
from eigenlorax.formats.gguf.architectures import ARCHITECTURES

REFERENCES = Path(__file__).parent.parent / "data" / "gguf"
"""Files of llama.cpp's `convert_lora_to_gguf.py --outtype TYPE --base BASE FOLDER`, where BASE has the config of
`gguf_models` and FOLDER, called french, is its adapter as PEFT saves it, with `base_model: org/tiny-1B` in its card.

`converted.json` has the SHA-256 of more of them, by the llama.cpp in llama_cpp_python 0.3.36; BASE also has the fields
that the converter requires: `rms_norm_eps`, and the multipliers of Granite, all 1. GPT-2 is not among them: the
converter transposes its factors, whose shapes then do not fit the weights."""
LAYERS_OF = {name: each.layers for name, each in ARCHITECTURES.items()}
Q = "model.layers.0.self_attn.q_proj"


def write(adapter, folder, *, architecture="LlamaForCausalLM", **options):
    base = models.write_config(folder / "base", architecture)
    return ex.write_adapter(adapter, folder / "french", format="gguf", base_config=base, **options)


def update(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()


def stored_updates(path):
    """The update of each weight as llama.cpp computes it: alpha over the rank of the tensor, from gguf's own reader."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    stems = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {stem: alpha / tensors[f"{stem}.lora_b"].shape[1] * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
            for stem in stems}  # fmt: skip


def rows_of_llama(n_heads, head=models.HEAD):
    """For each row of a weight in llama.cpp, the row that it is in transformers, counted one by one."""
    rows = []
    for start in range(0, n_heads * head, head):
        for i in range(head // 2):
            rows += [start + i, start + head // 2 + i]
    return rows


class TestWritten:
    @pytest.mark.parametrize(("dtype", "file", "rank"), [("float32", "f32", 4), ("q8_0", "q8_0", 32)])
    def test_is_what_llama_cpps_converter_writes(self, tmp_path, dtype, file, rank):
        path = write(models.adapter(rank=rank), tmp_path, dtype=dtype)
        assert path.name == "french.gguf"
        assert path.read_bytes() == (REFERENCES / f"llama-{file}.gguf").read_bytes()

    @pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "GPT2LMHeadModel"])
    def test_is_what_the_converter_writes_for_each_architecture_and_dtype(self, tmp_path, architecture):
        digests = json.loads((REFERENCES / "converted.json").read_text())[architecture]
        dtypes = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
        assert digests.keys() == dtypes.keys()
        for kind, dtype in dtypes.items():
            adapter = models.adapter(architecture, rank=32 if kind == "q8_0" else 4, layers=LAYERS_OF[architecture])
            path = write(adapter, tmp_path / kind, architecture=architecture, dtype=dtype)
            assert sha256(path.read_bytes()).hexdigest() == digests[kind]

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_has_every_update_of_the_adapter_under_its_name(self, tmp_path, architecture):
        known = ARCHITECTURES[architecture]
        adapter = models.adapter(architecture, layers=known.layers)
        path = write(adapter, tmp_path, architecture=architecture)
        stored = stored_updates(path)
        assert len(stored) == len(adapter.specs)
        back = ex.read_adapter(path, base_config=tmp_path / "base")
        assert back.specs == adapter.specs
        assert back.base_model == "org/tiny-1B"
        for module, factors in adapter.modules.items():
            assert torch.equal(back.modules[module].up, factors.up)
            assert torch.equal(back.modules[module].down, factors.down)

    def test_has_the_rows_of_query_and_key_in_the_order_of_llama_cpp(self, tmp_path):
        adapter = models.adapter()
        stored = stored_updates(write(adapter, tmp_path))
        for part, name, heads in (("q", "q", models.HEADS), ("k", "k", models.KV_HEADS), ("v", "v", None)):
            expected = update(adapter.modules[f"model.layers.1.self_attn.{part}_proj"]).numpy()
            rows = rows_of_llama(heads) if heads else slice(None)
            np.testing.assert_allclose(stored[f"blk.1.attn_{name}.weight"], expected[rows], rtol=1e-12)

    def test_rescales_modules_with_another_scaling(self, tmp_path):
        adapter = models.adapter(rank=4, scaling=lambda n: 4 / 2 if n % 3 else 7 / 4**0.5)
        path = write(adapter, tmp_path)
        assert gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents() == 8.0
        stored = stored_updates(path)
        for layer in range(models.LAYERS):
            expected = update(adapter.modules[f"model.layers.{layer}.mlp.up_proj"]).numpy()
            np.testing.assert_allclose(stored[f"blk.{layer}.ffn_up.weight"], expected, rtol=1e-5, atol=1e-5)

    def test_an_update_of_scaling_zero_stays_zero(self, tmp_path):
        # llama.cpp takes an alpha of 0 as a scaling of 1
        assert not any(update.any() for update in stored_updates(write(models.adapter(scaling=0.0), tmp_path)).values())

    @pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 1e-2)])
    def test_rounds_to_the_dtype_once(self, tmp_path, dtype, bound):
        adapter = models.adapter(rank=32)
        back = ex.read_adapter(write(adapter, tmp_path, dtype=dtype), base_config=tmp_path / "base")
        for module, factors in adapter.modules.items():
            exact = update(factors)
            assert torch.linalg.norm(update(back.modules[module]) - exact) <= bound * torch.linalg.norm(exact)

    def test_has_the_lora_of_the_token_embedding(self, tmp_path):
        embedding = "base_model.model.model.embed_tokens.lora_embedding_"
        down, up = models.numbers(4, models.VOCABULARY), models.numbers(models.HIDDEN, 4, start=9)
        adapter = models.adapter()
        text = ex.read_adapter(ex.write_adapter(adapter, tmp_path / "peft")).source_config
        adapter = replace(adapter, carried={f"{embedding}A": down, f"{embedding}B": up}, source_config=text)
        path = write(adapter, tmp_path)
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        np.testing.assert_array_equal(tensors["token_embd.weight.lora_a"], down.T)
        back = ex.read_adapter(path, base_config=tmp_path / "base")
        assert back.specs == adapter.specs
        assert all(torch.equal(back.carried[key], tensor) for key, tensor in adapter.carried.items())
        # PEFT reads the rank and alpha of the embedding from the config
        again = ex.read_adapter(ex.write_adapter(back, tmp_path / "again"))
        assert again.carried.keys() == adapter.carried.keys()

    def test_has_the_tokens_that_activate_an_alora(self, tmp_path):
        adapter = models.adapter()
        text = ex.read_adapter(ex.write_adapter(adapter, tmp_path / "peft")).source_config
        text = text.replace("{", '{"alora_invocation_tokens": [5, 7], ', 1)
        path = write(replace(adapter, source_config=text), tmp_path)
        assert list(gguf.GGUFReader(path).get_field("adapter.alora.invocation_tokens").contents()) == [5, 7]
        assert ex.read_adapter(path, base_config=tmp_path / "base").config["alora_invocation_tokens"] == [5, 7]


class TestRefused:
    def adapter_with(self, **groups):
        return replace(models.adapter(), **groups)

    @pytest.mark.parametrize(
        "key",
        ["score.weight", f"{Q}.lora_magnitude_vector", f"{Q}.lora_B.bias", "model.norm.weight"],
    )
    def test_names_a_tensor_that_llama_cpp_does_not_apply(self, tmp_path, key):
        with pytest.raises(OptionError, match=re.escape(f"base_model.model.{key}")):
            write(self.adapter_with(carried={f"base_model.model.{key}": torch.ones(3)}), tmp_path)
        assert not (tmp_path / "french.gguf").exists()

    @pytest.mark.parametrize("module", ["model.layers.0.self_attn.rotary", "model.layers.2.mlp.up_proj", "score"])
    def test_names_a_module_that_the_base_model_lacks(self, tmp_path, module):
        factors = ex.LoRAFactors(torch.ones(2, 5), torch.ones(7, 2), 1.0)
        adapter = models.adapter()
        adapter = ex.from_factors("a", {**adapter.modules, module: factors})
        with pytest.raises(OptionError, match=re.escape(f"{module}.lora_A.weight") + ".*2 layers"):
            write(adapter, tmp_path)

    def test_an_output_layer_that_shares_the_embedding(self, tmp_path):
        adapter = ex.from_factors("a", {"lm_head": ex.LoRAFactors(torch.ones(2, 48), torch.ones(37, 2), 1.0)})
        ex.write_adapter(adapter, tmp_path / "own", format="gguf", base_config=models.config())
        with pytest.raises(OptionError, match=r"lm_head.*tie_word_embeddings"):
            ex.write_adapter(
                adapter, tmp_path / "tied", format="gguf", base_config=models.config(tie_word_embeddings=True)
            )

    @pytest.mark.parametrize(
        ("architecture", "reason"),
        [("FalconForCausalLM", "fused query"), ("MixtralForCausalLM", "experts"), ("Lama", "")],
    )
    def test_lists_the_architectures_that_are_supported(self, architecture, reason, tmp_path):
        with pytest.raises(OptionError, match=f"{architecture}.*{reason}.*LlamaForCausalLM.*Qwen3ForCausalLM"):
            ex.write_adapter(models.adapter(), tmp_path / "a", format="gguf", base_config=models.config(architecture))

    def test_a_missing_or_wrong_config(self, tmp_path):
        with pytest.raises(OptionError, match="--base-config"):
            ex.write_adapter(models.adapter(), tmp_path / "a", format="gguf")
        with pytest.raises(FormatError, match=r"config\.json does not exist"):
            ex.write_adapter(models.adapter(), tmp_path / "a", format="gguf", base_config=tmp_path)
        for name in (None, ["LlamaForCausalLM"]):
            with pytest.raises(OptionError, match="architectures is .*'LlamaForCausalLM'"):
                ex.write_adapter(models.adapter(), tmp_path / "a", format="gguf", base_config=models.config(name))
        with pytest.raises(FormatError, match="num_attention_heads is 'many'"):
            ex.write_adapter(
                models.adapter(), tmp_path / "a", format="gguf", base_config=models.config(num_attention_heads="many")
            )
        with pytest.raises(ShapeError, match="5 heads"):
            ex.write_adapter(
                models.adapter(), tmp_path / "a", format="gguf", base_config=models.config(num_attention_heads=5)
            )


class TestRead:
    def test_a_file_without_a_config_where_no_heads_are_needed(self, tmp_path):
        adapter = models.adapter("Qwen2ForCausalLM")
        back = ex.read_adapter(write(adapter, tmp_path, architecture="Qwen2ForCausalLM"))
        assert back.specs == adapter.specs
        assert back.name == "french"

    def test_asks_for_the_config_where_heads_are_needed(self, tmp_path):
        with pytest.raises(
            FormatError, match=r"reorders by their heads.*convert .*french\.gguf OUT --to peft --base-config"
        ):
            ex.read_adapter(write(models.adapter(), tmp_path))

    def test_a_config_of_another_architecture(self, tmp_path):
        path = write(models.adapter(), tmp_path)
        with pytest.raises(FormatError, match="'llama'.*'qwen2'"):
            ex.read_adapter(path, base_config=models.config("Qwen2ForCausalLM"))

    def test_can_be_pickled_and_becomes_a_folder_of_peft(self, tmp_path):
        adapter = models.adapter()
        back = ex.read_adapter(write(adapter, tmp_path), base_config=tmp_path / "base")
        again = ex.read_adapter(ex.write_adapter(pickle.loads(pickle.dumps(back)), tmp_path / "peft"))
        assert torch.equal(again.modules[Q].up, adapter.modules[Q].up)

    def test_is_found_in_a_folder_beside_models(self, tmp_path):
        folder = tmp_path / "files"
        for name, rank in (("one", 2), ("two", 3)):
            adapter = models.adapter("Qwen2ForCausalLM", name=name, rank=rank)
            ex.write_adapter(adapter, folder / name, format="gguf", base_config=models.config("Qwen2ForCausalLM"))
        writer = gguf.GGUFWriter(folder / "base.gguf", "qwen2")
        writer.add_type("model")
        writer.add_tensor("token_embd.weight", np.ones((3, 5), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.warns(ex.errors.SkippedAdapterWarning, match=r"base\.gguf was passed over"):
            pack = ex.fit(folder, n_components=4)
        assert pack.names == ["one", "two"]


class TestHostile:
    def data(self, tmp_path):
        return write(models.adapter("Qwen2ForCausalLM"), tmp_path, architecture="Qwen2ForCausalLM").read_bytes()

    def refused(self, tmp_path, data, match):
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(FormatError, match=match):
            ex.read_adapter(path)

    @pytest.mark.parametrize(("at", "match"), [(8, "dimensions"), (16, "header")])
    def test_counts_of_tensors_and_metadata(self, tmp_path, at, match):
        data = bytearray(self.data(tmp_path))
        data[at : at + 8] = struct.pack("<Q", 2**63)
        self.refused(tmp_path, bytes(data), match)

    @pytest.mark.parametrize("element", [4, 8, 9])
    def test_a_list_of_any_length(self, tmp_path, element):
        key = b"general.tags"
        field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, element, 2**62)
        self.refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field, "header|list")

    def test_a_tensor_of_any_size(self, tmp_path):
        name = b"blk.0.attn_q.weight.lora_a"
        info = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)
        self.refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info, "damaged")

    def test_a_file_that_is_cut_or_longer(self, tmp_path):
        data = self.data(tmp_path)
        for end in (0, 3, 20, 100, 2000, len(data) - 64):
            self.refused(tmp_path, data[:end], "header|not a GGUF|damaged")
        self.refused(tmp_path, data + bytes(64), "64 bytes follow")

    def test_a_tensor_that_no_table_knows(self, tmp_path):
        data = self.data(tmp_path).replace(b"attn_v.weight.lora_a", b"attn_w.weight.lora_a")
        self.refused(tmp_path, data, r"blk\.0\.attn_w\.weight\.lora_a")

    def test_a_factor_without_its_partner(self, tmp_path):
        data = self.data(tmp_path).replace(b"blk.0.attn_v.weight.lora_a", b"blk.0.attn_q.weight.lora_c")
        self.refused(tmp_path, data, "lora_c")

    def test_a_pointer_of_git_lfs(self, tmp_path):
        self.refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "git lfs pull")

    def test_a_file_for_big_endian_machines(self, tmp_path):
        data = bytearray(self.data(tmp_path))
        data[4:8] = data[4:8][::-1]
        self.refused(tmp_path, bytes(data), "big-endian")

    @pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.F64])
    def test_types_of_ggml_that_are_not_read(self, tmp_path, kind):
        name = b"blk.0.attn_q.weight.lora_a"
        info = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 256, 4, kind.value, 0)
        self.refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info, f"lora_a.*{kind.name}.*F32")

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            (b"\x07\0\0\0\0\0\0\0adapter", b"\x07\0\0\0\0\0\0\0vocabul", "general.type is 'vocabul'"),
            (b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0mamba", "'mamba' is not supported.*llama"),
            (b"\x04\0\0\0\0\0\0\0lora", b"\x04\0\0\0\0\0\0\0cvec", "adapter.type is 'cvec'"),
        ],
    )
    def test_files_of_other_models_and_adapters(self, tmp_path, old, new, match):
        data = self.data(tmp_path)
        assert data.count(old) == 1
        self.refused(tmp_path, data.replace(old, new), match)

    def test_a_layer_that_the_config_lacks(self, tmp_path):
        path = write(models.adapter("Qwen2ForCausalLM"), tmp_path, architecture="Qwen2ForCausalLM")
        with pytest.raises(FormatError, match=r"blk\.1\..*1 layers"):
            ex.read_adapter(path, base_config=models.config("Qwen2ForCausalLM", num_hidden_layers=1))

    def test_a_file_with_another_suffix(self, tmp_path):
        path = tmp_path / "sha256-0123"
        path.write_bytes(self.data(tmp_path))
        with pytest.raises(FormatError, match=r"Rename it to sha256-0123\.gguf"):
            ex.read_adapter(path)

    def test_every_changed_byte_of_the_header_is_read_or_refused(self, tmp_path):
        data, path = self.data(tmp_path), tmp_path / "bad.gguf"
        for at in range(0, 1200, 7):
            changed = bytearray(data)
            changed[at] ^= 0xFF
            path.write_bytes(changed)
            try:
                ex.read_adapter(path)
            except ex.errors.EigenloraxError:
                continue
