"""Adapters of packs in integers, out of their folders and onto a model, beside the LoRAs that they stand for."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_integers import changed

import eigenlorax as ex
from eigenlorax.core import keys
from eigenlorax.errors import FormatError, PackDamagedError
from loaders import base, load
from tiny import BERT, IN, make_pack, shake

pytestmark = pytest.mark.slow

KINDS = [("int8", None), ("int4", None), ("int4", "int4")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def pack(request, tmp_path):
    """A saved pack; `a2` came when it had grown."""
    _, adapters = make_pack(dict.fromkeys(BERT, (IN, IN)))
    dtype, coefficients = request.param
    made = ex.fit(adapters[:2], n_components=5, dtype=dtype, coefficient_dtype=coefficients)
    made.add(adapters[2], extend=3)
    return made.save(tmp_path / "pack")


def wanted(saved_base, pack, name, ids, folder):
    """What PEFT gives of the LoRA that is exported."""
    ex.Pack.open(pack).export(folder, name)
    with torch.no_grad():
        return PeftModel.from_pretrained(base(saved_base), folder / name).eval()(ids).logits


@pytest.mark.parametrize("loader", ["peft", "low_cpu"])
@pytest.mark.parametrize("name", ["a0", "a2"])
def test_by_peft(saved_base, pack, tmp_path, ids, loader, name):
    loaded = load(loader, saved_base, pack / "adapters" / name).eval()
    with torch.no_grad():
        got = loaded(ids).logits
        plain = base(saved_base).eval()(ids).logits
    expected = wanted(saved_base, pack, name, ids, tmp_path / "loras")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert float((plain - expected).abs().max()) > 1e-3


def test_by_what_reads_floats_alone_it_is_refused(saved_base, pack, tmp_path, ids):
    """transformers would give the base model's answers, and no more than a line in a log."""
    opened = ex.Pack.open(pack)
    model = load("native", saved_base, pack / "adapters" / "a0").eval()
    with pytest.raises(FormatError, match=f"'default' stores its coefficients as {opened.coefficient_storage}.*export"):
        model(ids)
    floats = ex.refit(opened, dtype="float32", coefficient_dtype="float32").pack.save(tmp_path / "floats")
    ex.Pack.open(floats)
    model = load("native", saved_base, floats / "adapters" / "a0").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, wanted(saved_base, floats, "a0", ids, tmp_path / "loras"), atol=1e-5, rtol=1e-5
        )


def test_beside_each_other_in_one_batch(saved_base, pack, tmp_path, ids):
    model = PeftModel.from_pretrained(base(saved_base), pack / "adapters" / "a0", adapter_name="a0")
    model.load_adapter(pack / "adapters" / "a2", adapter_name="a2")
    names = ["a0", "a2", "__base__", "a2", "a0"]
    with torch.no_grad():
        got = model.eval()(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name != "__base__":
            one = wanted(saved_base, pack, name, ids, tmp_path / f"loras-{row}")
            torch.testing.assert_close(got[row], one[row], atol=1e-5, rtol=1e-5)


def test_by_a_bank(saved_base, pack, tmp_path, ids):
    bank = ex.AdapterBank(base(saved_base).eval(), pack)
    with torch.no_grad():
        got = bank(ids, adapter_names=["a2", "a0", "a1", "a0", "a2"]).logits
    for row, name in enumerate(["a2", "a0", "a1", "a0", "a2"]):
        one = wanted(saved_base, pack, name, ids, tmp_path / f"loras-{row}")
        torch.testing.assert_close(got[row], one[row], atol=1e-5, rtol=1e-5)


def test_saved_again_they_are_floats(saved_base, pack, tmp_path, ids):
    model = PeftModel.from_pretrained(base(saved_base), pack / "adapters" / "a0").eval()
    model.save_pretrained(tmp_path / "mine")
    again = PeftModel.from_pretrained(base(saved_base), tmp_path / "mine").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_is_trained_on_such_a_basis_joins_the_pack(saved_base, pack, tmp_path):
    config = ex.EigenLoraxConfig(subspace=str(pack), task_type="SEQ_CLS", r=4, lora_alpha=9, start="a0")
    shake(get_peft_model(base(saved_base), config)).save_pretrained(tmp_path / "mine")
    with ex.Pack.edit(pack) as opened:
        # it lies in the subspace: what is lost is its rounding
        assert opened.add(tmp_path / "mine", name="mine").delta_error < 0.25
    assert "mine" in ex.Pack.open(pack).names


def test_read_as_a_lora_away_from_its_pack(pack, tmp_path):
    folder = shutil.copytree(pack / "adapters" / "a2", tmp_path / "alone")
    path = folder / keys.ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "subspace": None}))
    opened = ex.Pack.open(pack)
    found = ex.read_adapter(folder)
    for module, factors in opened.adapter("a2").modules.items():
        assert torch.equal(found.modules[module].down, factors.down)
        assert torch.equal(found.modules[module].up, factors.up)


def test_damage_is_named(saved_base, pack):
    name = f"{keys.coefficients_key(BERT[0], 'down')}.scales"
    opened = changed(pack, f"adapters/a0/{keys.ADAPTER_WEIGHTS}", lambda found: found.pop(name))
    with pytest.raises(PackDamagedError, match="adapters/a0"):
        opened.packed("a0")
    with pytest.raises(FormatError, match=f"cannot be read: .*{keys.coefficients_key(BERT[0], 'down')}.scales"):
        PeftModel.from_pretrained(base(saved_base), pack / "adapters" / "a0")
