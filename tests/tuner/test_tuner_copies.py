"""Adapters of a coded pack whose codes are those of another one there, loaded by PEFT from their folders."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from coded import coded_adapters
from eigenlorax.core import registry
from eigenlorax.errors import DuplicateAdapterWarning, FormatError
from loaders import base, load
from tiny import BERT, IN, make_bert


@pytest.fixture(scope="module", params=["nothing", "much"])
def path(request, tmp_path_factory):
    """A pack of a0 to a3, and the copy of a1."""
    adapters = coded_adapters(dict.fromkeys(BERT, (IN, IN)), request.param, n=4)
    with pytest.warns(DuplicateAdapterWarning, match="copy has the same update as a1"):
        pack = ex.fit([*adapters, replace(adapters[1], name="copy")], max_error=0.2)
    return pack.save(tmp_path_factory.mktemp("copies") / "pack")


@pytest.fixture
def unknown():
    """No pack is known in this process."""
    registry.clear()


@pytest.mark.parametrize("loader", ["peft", "low_cpu"])
@torch.no_grad()
def test_a_copy_computes_what_its_parent_does(path, saved_base, ids, loader, unknown):
    expected = load("peft", saved_base, path / "adapters" / "a1").eval()(ids).logits
    registry.clear()
    assert torch.equal(load(loader, saved_base, path / "adapters" / "copy").eval()(ids).logits, expected)
    assert not torch.equal(base(saved_base).eval()(ids).logits, expected)


@torch.no_grad()
def test_the_folder_that_the_pack_gives(path, saved_base, ids):
    pack = ex.Pack.open(path)
    ours, theirs = (PeftModel.from_pretrained(base(saved_base), pack.adapter_folder(name)) for name in ("copy", "a1"))
    assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


@torch.no_grad()
def test_after_its_parent_was_removed(path, saved_base, ids, tmp_path):
    pack = shutil.copytree(path, tmp_path / "pack")
    before = PeftModel.from_pretrained(base(saved_base), pack / "adapters" / "copy").eval()(ids).logits
    with ex.Pack.edit(pack) as edited:
        edited.remove("a1")
    assert torch.equal(
        PeftModel.from_pretrained(base(saved_base), pack / "adapters" / "copy").eval()(ids).logits, before
    )


@torch.no_grad()
def test_when_the_bases_have_grown(path, saved_base, ids, tmp_path):
    before = PeftModel.from_pretrained(base(saved_base), path / "adapters" / "copy").eval()(ids).logits
    grown = ex.Pack.open(path).augment(2, seed=3).save(tmp_path / "grown")
    after = PeftModel.from_pretrained(base(saved_base), grown / "adapters" / "copy").eval()(ids).logits
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_what_is_saved_has_no_parent(path, saved_base, ids, tmp_path):
    model = PeftModel.from_pretrained(base(saved_base), path / "adapters" / "copy").eval()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["parent"] == {}
    again = PeftModel.from_pretrained(base(saved_base), tmp_path / "saved", subspace=path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_without_its_pack(path, saved_base, tmp_path, unknown):
    """The name of a parent alone means nothing: another pack may have an adapter of that name."""
    moved = shutil.copytree(path / "adapters" / "copy", tmp_path / "moved")
    other = [
        replace(adapter, name=f"a{number}")
        for number, adapter in enumerate(coded_adapters(dict.fromkeys(BERT, (IN, IN)), "much", n=3, first=50))
    ]
    config = json.loads((moved / "adapter_config.json").read_text())
    pack = ex.fit(other, max_error=0.2)
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "subspace": None, "subspace_fingerprint": pack.info.fingerprint})
    )
    pack.remember()
    with pytest.raises(FormatError, match="cannot be read from .*: the parent 'a1' has other codes than"):
        PeftModel.from_pretrained(base(saved_base), moved)
    pack.remove("a1")
    message = "no codes of its own: they are those of 'a1' in its pack, which is not loaded. Load it from its folder"
    with pytest.raises(FormatError, match=message):
        PeftModel.from_pretrained(base(saved_base), moved)


@pytest.mark.parametrize("parent", [{"name": "a1"}, {"name": 3, "sha256": "0"}, ["a1"], "a1"])
def test_a_config_of_another_form(path, saved_base, tmp_path, parent):
    pack = shutil.copytree(path, tmp_path / "pack")
    config = pack / "adapters" / "copy" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "parent": parent}))
    with pytest.raises(FormatError, match="the adapter's config: parent"):
        PeftModel.from_pretrained(base(saved_base), config.parent)


@torch.no_grad()
def test_in_a_bank(path, ids):
    bank = ex.AdapterBank(make_bert(), path)
    rows = bank(ids[:2], adapter_names=["copy", "a1"]).logits
    alone = [bank(ids[:2], adapter_names=name).logits for name in ("copy", "a1")]
    assert torch.equal(*alone)
    torch.testing.assert_close(rows[:1], alone[0][:1])
