"""A pack as a read-only mapping, and keywords that are nearly right."""

import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

import eigenlorax as ex
from adapters import change_tensors, make_adapter, make_adapters
from eigenlorax.errors import AdapterNameError, PackExistsError


@pytest.fixture
def pack(tmp_path):
    return ex.fit(make_adapters(tmp_path / "adapters", "b a c"), n_components=4)


class TestMapping:
    def test_names_in_order(self, pack):
        assert isinstance(pack, Mapping)
        assert list(pack) == list(pack.keys()) == ["a", "b", "c"]
        assert (len(pack), "a" in pack, "d" in pack, 3 in pack) == (3, True, False, False)

    def test_adapters_are_those_that_export_writes(self, pack, tmp_path):
        pack.export(tmp_path / "loras")
        for name, adapter in pack.items():
            exported = ex.read_adapter(tmp_path / "loras" / name)
            for module, factors in exported.modules.items():
                assert torch.equal(adapter.modules[module].down, factors.down)
                assert torch.equal(adapter.modules[module].up, factors.up)

    def test_an_unknown_name(self, pack):
        with pytest.raises(KeyError, match="no adapter named 'd' in the pack"):
            pack["d"]
        with pytest.raises(AdapterNameError):
            pack["d"]
        assert pack.get("d") is None

    def test_packs_are_compared_by_identity(self, pack, tmp_path):
        pack.save(tmp_path / "pack")
        assert pack == pack
        assert pack != ex.Pack.open(tmp_path / "pack")
        assert len({pack, ex.Pack.open(tmp_path / "pack")}) == 2


class TestSavePretrained:
    def test_replaces_a_pack(self, pack, tmp_path):
        assert pack.save_pretrained(tmp_path / "pack") == tmp_path / "pack"
        other = ex.fit(make_adapters(tmp_path / "others", "x y"), n_components=4)
        other.save_pretrained(str(tmp_path / "pack"))
        assert ex.Pack.from_pretrained(tmp_path / "pack").names == ["x", "y"]

    def test_replaces_nothing_else(self, pack, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").touch()
        with pytest.raises(PackExistsError, match="is not a pack"):
            pack.save_pretrained(tmp_path / "other")

    def test_options_of_the_hub_alone(self, pack, tmp_path):
        with pytest.raises(ex.EigenloraxError, match="private has no effect without push_to_hub=True"):
            pack.save_pretrained(tmp_path / "pack", private=True)
        assert not (tmp_path / "pack").exists()


class TestKeywords:
    @pytest.mark.parametrize(
        ("keyword", "meant"),
        [("k", "n_components"), ("tol", "max_error"), ("max_eror", "max_error"), ("Ratio", "ratio")],
    )
    def test_the_right_one_is_named(self, keyword, meant):
        with pytest.raises(TypeError, match=rf"fit\(\) got an unexpected keyword argument '{keyword}'.*'{meant}'"):
            ex.fit([], **{keyword: 3})

    def test_nothing_is_like_it(self):
        with pytest.raises(TypeError, match=r"'xyz'\.$"):
            ex.fit([], xyz=3)

    def test_warnings_are_at_the_line_of_the_call(self, tmp_path):
        make_adapters(tmp_path, "a b")
        change_tensors(make_adapter(tmp_path / "zero", seed=3), lambda tensors: [t.zero_() for t in tensors.values()])
        script = tmp_path / "script.py"
        script.write_text(f"import eigenlorax as ex\n\nex.fit({str(tmp_path)!r}, n_components=4)\n")
        # in a process of its own, because checks of shapes add frames to the stack here
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
        assert re.search(r"script\.py:3: \w*Warning: untrained", done.stderr), done.stderr
