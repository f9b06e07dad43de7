"""Adapter folders of mlx-lm: read, written again to the bit, and written for PEFT with the same logits."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from eigenlorax.cli import main
from eigenlorax.errors import FormatError, NonFiniteError, OptionError, ShapeError, SourceWarning

RANK, SCALE = 5, 7.3
LINEAR = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (48, 32)}


def planted(modules=LINEAR, *, rank=RANK, dora=False, dtype=torch.float32, seed=0):
    """Tensors of a file of mlx-lm: lora_a (in, r), lora_b (r, out), and magnitudes m (out,)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (n_out, n_in) in modules.items():
        tensors[f"{module}.lora_a"] = torch.randn(n_in, rank, generator=draw).to(dtype) * 0.1
        tensors[f"{module}.lora_b"] = torch.randn(rank, n_out, generator=draw).to(dtype) * 0.1
        if dora:
            tensors[f"{module}.m"] = torch.rand(n_out, generator=draw) + 0.5
    return tensors


def save(folder, tensors, *, file="adapters.safetensors", kind="lora", scale=SCALE, **fields):
    folder.mkdir(exist_ok=True)
    config = {
        "model": "org/base",
        "num_layers": 2,
        "fine_tune_type": kind,
        "lora_parameters": {"rank": RANK, "dropout": 0.0, "scale": scale},
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    save_file(tensors, folder / file, metadata={"format": "mlx"})
    return folder


def assert_same_tensors(folder, tensors):
    written = load_file(folder / "adapters.safetensors")
    assert written.keys() == tensors.keys()
    assert all(written[name].dtype == tensors[name].dtype for name in tensors)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_comes_back_to_the_bit(tmp_path, kind, dtype):
    tensors = planted(dora=kind == "dora", dtype=dtype)
    source = save(tmp_path / "in", tensors, kind=kind)
    written = ex.write_adapter(ex.read_adapter(source), tmp_path / "out")
    assert_same_tensors(written, tensors)
    assert (written / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
    # also by way of PEFT, with a config of its own
    ex.write_adapter(ex.read_adapter(source), tmp_path / "peft", format="peft")
    again = ex.write_adapter(ex.read_adapter(tmp_path / "peft"), tmp_path / "again", format="mlx")
    assert_same_tensors(again, tensors)
    parameters = json.loads((again / "adapter_config.json").read_text())["lora_parameters"]
    assert parameters["rank"] == RANK
    assert parameters["scale"] == pytest.approx(SCALE)
    assert parameters["keys"] == ["mlp.up_proj", "self_attn.q_proj"]


def test_embeddings_and_experts_are_carried_and_come_back(tmp_path):
    tensors = planted({**LINEAR, "model.embed_tokens": (32, 64)})
    tensors["model.layers.1.mlp.switch_mlp.up_proj.lora_a"] = torch.randn(3, RANK, 32)
    tensors["model.layers.1.mlp.switch_mlp.up_proj.lora_b"] = torch.randn(3, 48, RANK)
    adapter = ex.read_adapter(save(tmp_path / "in", tensors))
    assert len(adapter.specs) == 2
    assert len(adapter.carried) == 4
    assert_same_tensors(ex.write_adapter(adapter, tmp_path / "out"), tensors)
    with pytest.raises(OptionError, match=r"stacked experts model\.layers\.1\.mlp\.switch_mlp\.up_proj"):
        ex.write_adapter(adapter, tmp_path / "peft", format="peft")


def test_peft_computes_the_logits_of_the_formula(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tensors = planted()
    ex.write_adapter(ex.read_adapter(save(tmp_path / "in", tensors)), tmp_path / "peft", format="peft")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    tokens = torch.tensor([[1, 5, 9, 33, 2]])
    # oracle: the weight with scale · (lora_a @ lora_b)ᵀ added, in float64
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = dict(base)
    for module in LINEAR:
        update = SCALE * tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()
        merged[f"{module}.weight"] = base[f"{module}.weight"] + update.mT
    with torch.no_grad():
        plain = model(tokens).logits
        model.load_state_dict(merged)
        expected = model(tokens).logits
        model.load_state_dict(base)
        logits = peft.PeftModel.from_pretrained(model, tmp_path / "peft").double().eval()(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert (expected - plain).abs().max() > 1e-3


def test_a_bare_folder_is_fitted_and_exported_in_its_format(tmp_path):
    for index in range(3):
        (tmp_path / "all").mkdir(exist_ok=True)
        save(tmp_path / "all" / f"a{index}", planted(seed=index))
    pack = ex.fit(tmp_path / "all", n_components=15)
    pack.save(tmp_path / "pack")
    written = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out")
    for name, folder in written.items():
        source = load_file(tmp_path / "all" / name / "adapters.safetensors")
        back = load_file(folder / "adapters.safetensors")
        for module in LINEAR:
            expected = source[f"{module}.lora_a"] @ source[f"{module}.lora_b"]
            torch.testing.assert_close(back[f"{module}.lora_a"] @ back[f"{module}.lora_b"], expected, atol=1e-5, rtol=0)
        config = (tmp_path / "all" / name / "adapter_config.json").read_bytes()
        assert (folder / "adapter_config.json").read_bytes() == config


def test_several_ranks_and_scalings_become_one(tmp_path):
    factors = {
        "model.layers.0.self_attn.q_proj": ex.LoRAFactors(torch.randn(3, 32), torch.randn(16, 3), 2.0),
        "model.layers.0.self_attn.v_proj": ex.LoRAFactors(torch.randn(5, 32), torch.randn(24, 5), 2.0),
        "model.layers.3.self_attn.v_proj": ex.LoRAFactors(torch.randn(4, 32), torch.randn(24, 4), 0.5),
    }
    adapter = ex.from_factors("mixed", factors, base_model="org/base")
    back = ex.read_adapter(ex.write_adapter(adapter, tmp_path / "out", format="mlx"))
    assert back.ranks == (5,)
    for module, each in factors.items():
        written = back.modules[module]
        expected = each.scaling * each.up.double() @ each.down.double()
        torch.testing.assert_close(written.scaling * written.up.double() @ written.down.double(), expected)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "fields", "error", "match"),
    [
        (without(planted(), f"{Q}.lora_b"), {}, FormatError, rf"'{Q}\.lora_a' has no partner lora_b"),
        ({**planted(), "model.norm.weight": torch.ones(4)}, {}, FormatError, r"'model\.norm\.weight' is not part"),
        (planted(rank=4), {}, ShapeError, r"q_proj\.lora_a' is \(32, 4\)"),
        (planted(dora=True), {}, FormatError, r"q_proj\.m' is a magnitude"),
        (planted(), {"kind": "dora"}, FormatError, r"q_proj\.lora_a' has no partner m"),
        (planted(), {"kind": "full"}, FormatError, "no LoRA"),
        (planted(), {"lora_parameters": None}, FormatError, "lora_parameters is None.*RANK"),
        (planted(), {"lora_parameters": None, "rank": 5, "alpha": 10}, FormatError, "mlx-vlm are not read"),
        ({"model.layers.0.self_attn.q_proj.A": torch.ones(32, 5)}, {}, FormatError, r"q_proj\.A'.*mlx-vlm"),
        ({f"{Q}.lora_A": torch.ones(32, 5)}, {}, FormatError, r"q_proj\.lora_A' is not part"),
        ({**planted(), f"{Q}.linear.scales": torch.ones(4, 4)}, {}, FormatError, r"linear\.scales' is not part"),
        (
            {**planted(), f"{Q}.lora_a": torch.ones(32, 5, dtype=torch.int32)},
            {},
            FormatError,
            r"lora_a' is not float64",
        ),
        ({f"{Q}.lora_a": torch.ones(5), f"{Q}.lora_b": torch.ones(5)}, {}, ShapeError, r"lora_a' is \(5,\)"),
        ({}, {}, FormatError, "no tensor at all"),
        (planted(), {"lora_parameters": {"rank": 5, "alpha": 16}}, FormatError, "scale in lora_parameters is None"),
        (planted(), {"lora_parameters": {"scale": 2.0}}, FormatError, "rank in lora_parameters is None"),
    ],
)
def test_what_is_not_understood_is_an_error(tmp_path, tensors, fields, error, match):
    with pytest.raises(error, match=match):
        ex.read_adapter(save(tmp_path / "in", tensors, **fields))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 5\n", "git lfs pull"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "ends within its header"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, content, match):
    folder = save(tmp_path / "in", planted())
    (folder / "adapters.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=rf"adapters\.safetensors.*{match}"):
        ex.read_adapter(folder)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapters.safetensors"])
def test_an_archive_of_early_releases_is_an_error_that_says_how_to_convert_it(tmp_path, missing):
    folder = save(tmp_path / "in", planted())
    np.savez(folder / "adapters.npz", **{f"{Q}.lora_a": np.ones((32, 5))})
    (folder / "adapters.safetensors").unlink()
    (folder / missing).unlink(missing_ok=True)
    for source in (folder, folder / "adapters.npz"):
        with pytest.raises(FormatError, match=r"adapters\.npz.*mx\.save_safetensors"):
            ex.read_adapter(source)


def test_files_of_other_names_and_without_a_config(tmp_path):
    folder = save(tmp_path / "in", planted(), file="best_adapters.safetensors")
    assert ex.read_adapter(folder / "best_adapters.safetensors").specs.keys() == LINEAR.keys()
    save(folder, planted(), file="0000100_adapters.safetensors")
    with pytest.raises(FormatError, match=r"no adapters\.safetensors\..*0000100_adapters\.safetensors"):
        ex.read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    for file in ("best_adapters.safetensors", "0000100_adapters.safetensors"):
        with pytest.raises(FormatError, match=rf"no adapter_config\.json beside {file}"):
            ex.read_adapter(folder / file)


@pytest.mark.parametrize(
    "fields",
    [
        # an early release's name of num_layers, no fine_tune_type
        {"kind": None, "lora_layers": 16, "use_dora": True},
        # a converter's, which kept PEFT's fields
        {"kind": "dora", "peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": ["q_proj"]},
    ],
)
def test_configs_of_early_releases_and_of_converters(tmp_path, fields):
    tensors = planted(dora=True)
    adapter = ex.read_adapter(save(tmp_path / "in", tensors, **fields))
    assert {spec.scaling for spec in adapter.specs.values()} == {SCALE}
    assert len(adapter.carried) == len(LINEAR)
    written = ex.write_adapter(adapter, tmp_path / "out")
    assert_same_tensors(written, tensors)
    assert ex.read_adapter(written).specs == adapter.specs


def test_a_number_that_is_none_is_an_error_that_names_the_module(tmp_path):
    tensors = {**planted(), f"{Q}.lora_a": torch.full((32, RANK), torch.nan)}
    adapter = ex.read_adapter(save(tmp_path / "in", tensors))
    for options in ({"format": "mlx"}, {"format": "peft"}, {"dtype": "float16"}):
        with pytest.raises(NonFiniteError, match=r"q_proj.*NaN"):
            ex.write_adapter(adapter, tmp_path / "out", **options)


def test_the_alpha_of_old_configs_is_ignored_with_a_warning(tmp_path):
    old = {"rank": RANK, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    source = save(tmp_path / "in", planted(), lora_parameters=old, lora_layers=16)
    with pytest.warns(SourceWarning, match=r"scale · alpha / rank"):
        adapter = ex.read_adapter(source)
    assert {spec.scaling for spec in adapter.specs.values()} == {10.0}


def test_names_that_mlx_lm_does_not_have_are_errors(tmp_path):
    factors = {"transformer.h.0.attn.c_attn": ex.LoRAFactors(torch.ones(2, 8), torch.ones(6, 2), 1.0)}
    with pytest.raises(OptionError, match=r"transformer\.h\.0\.attn\.c_attn"):
        ex.write_adapter(ex.from_factors("gpt", factors), tmp_path / "out", format="mlx")
    head = ex.from_factors(
        "head",
        {Q: ex.LoRAFactors(torch.ones(2, 8), torch.ones(6, 2), 1.0)},
        heads={"base_model.model.score.weight": torch.ones(2, 8)},
    )
    with pytest.raises(OptionError, match=r"score\.weight"):
        ex.write_adapter(head, tmp_path / "out", format="mlx")


def test_a_series_of_checkpoints_is_tracked(tmp_path):
    run = tmp_path / "run"
    for step in (100, 200):
        save(run, planted(seed=step), file=f"{step:07d}_adapters.safetensors", iters=250)
    save(run, planted(seed=250), iters=250)
    for file in run.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    tracked = ex.track(run, tmp_path / "history", lossless=True)
    assert [record.version for record in tracked.appended] == ["100", "200", "250"]
    assert tracked.is_finished
    assert ex.track(run, tmp_path / "history", lossless=True).appended == ()
    history = ex.Pack.open(tmp_path / "history")
    for step in (100, 200, 250):
        assert_same_tensors(history.restore(f"run@{step}", tmp_path / f"back-{step}"), planted(seed=step))
    # a file that is empty is passed over, and named
    (run / "0000300_adapters.safetensors").write_bytes(b"")
    again = ex.track(run, tmp_path / "history", lossless=True)
    assert again.appended == ()
    assert "0 bytes" in again.unfinished[run / "0000300_adapters.safetensors"]
    (run / "0000300_adapters.safetensors").unlink()
    # a last file that repeats the last checkpoint is no version of its own
    shutil.copy(run / "0000200_adapters.safetensors", run / "adapters.safetensors")
    os.utime(run / "adapters.safetensors", (1_000_000_000, 1_000_000_000))
    assert len(ex.track(run, tmp_path / "second").appended) == 2


def test_a_note_is_printed_once(tmp_path, capsys):
    old = {"rank": RANK, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    for step in (100, 200, 300):
        save(tmp_path / "run", planted(seed=step), file=f"{step:07d}_adapters.safetensors", lora_parameters=old)
    with pytest.raises(SystemExit):
        main(["track", str(tmp_path / "run"), "-o", str(tmp_path / "history")])
    assert capsys.readouterr().err.count("alpha in lora_parameters is ignored") == 1
