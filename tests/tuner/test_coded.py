"""Coded packs on models: PEFT, the bank and pipelines run them as the LoRAs that they give back."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from convnets import CONVOLUTIONS, images, make_convnet, random_loras
from eigenlorax.core import registry
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import FormatError
from loaders import several
from planted import factors_in, orthonormal, random_factors
from renamed_vit import dense, lora, make_vit, pictures
from tiny import BERT, IN, RANK, make_bert

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


SHARED = [f"s{number}" for number in range(8)]


def collection(kind):
    """Adapters of directions of their own; or, beside one of them, some that share three."""
    names = [*SHARED, "far"] if kind == "shared" else ["a0", "a1", "a2"]
    bases = {module: (orthonormal(3, IN, 3 * i), orthonormal(3, IN, 3 * i + 1)) for i, module in enumerate(BERT)}
    found = []
    for number, name in enumerate(names):
        modules = {}
        for place, module in enumerate(BERT):
            seed = 100 * number + 7 * place
            if name not in SHARED:
                one = random_factors(RANK, IN, IN, seed=seed, size=0.3)
            else:
                one = factors_in(bases[module], RANK, seed=seed, scaling=0.5, noise=0.02)
            modules[module] = LoRAFactors(one.down.float(), one.up.float(), one.scaling)
        found.append(from_factors(name, modules, base_model=None))
    return found


@pytest.fixture(scope="module", params=[("shared", 0.3), ("shared", 0.04), ("apart", 0.1)], ids=str)
def path(request, tmp_path_factory):
    """A pack with cores, one with coefficients and rests, and one with rests and no component at all."""
    kind, error = request.param
    return ex.fit(collection(kind), max_error=error).save(tmp_path_factory.mktemp("coded") / f"{kind}-{error}")


@pytest.fixture(scope="module")
def names(path):
    return ex.Pack.open(path).names


@pytest.fixture(scope="module")
def loras(path, tmp_path_factory):
    return ex.Pack.open(path).export(tmp_path_factory.mktemp("coded") / "loras")


@pytest.fixture(scope="module")
def both(path, loras, names):
    return several(lambda name: path / "adapters" / name, make_bert(), names), several(
        lambda name: loras[name], make_bert(), names
    )


def test_what_they_have_is_what_is_to_be_tried(path):
    pack = ex.Pack.open(path)
    found = [one for name in pack.names for one in pack.packed(name).coefficients.values()]
    kinds = any(one.down.any() for one in found), any(one.down_residual is not None for one in found)
    assert kinds == (path.name.startswith("shared"), True)
    assert any(basis.down.k for basis in pack.subspace.modules.values()) == kinds[0]


@pytest.mark.slow
@torch.no_grad()
def test_each_alone_and_two_at_once(both, names, ids):
    for active in [*([name] for name in names), names[-2:]]:
        for model in both:
            model.base_model.set_adapter(active)
        torch.testing.assert_close(both[0](ids).logits, both[1](ids).logits, **CLOSE)


@torch.no_grad()
def test_each_row_has_its_own(both, names, ids):
    rows = [names[0], "__base__", names[2], names[1], names[0]]
    got, wanted = (model(ids, adapter_names=rows).logits for model in both)
    torch.testing.assert_close(got, wanted, **CLOSE)


@torch.no_grad()
def test_merged_and_back(path, loras, names, ids):
    got = several(lambda name: path / "adapters" / name, make_bert(), names[:2])
    wanted = several(lambda name: loras[name], make_bert(), names[1:2])
    got.base_model.set_adapter(names[1])
    before = got(ids).logits
    torch.testing.assert_close(before, wanted(ids).logits, **CLOSE)
    got.merge_adapter()
    torch.testing.assert_close(got(ids).logits, before, **CLOSE)
    got.unmerge_adapter()
    torch.testing.assert_close(got(ids).logits, before, **CLOSE)
    torch.testing.assert_close(got.merge_and_unload()(ids).logits, before, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9])
def test_in_a_bank(path, loras, names, ids, tokens):
    bank, ids = ex.AdapterBank(make_bert(), path), ids[:, :tokens]
    rows = [names[0], names[2], names[1], names[2], names[0]]
    got = bank(ids, adapter_names=rows).logits
    for row, name in enumerate(rows):
        alone = PeftModel.from_pretrained(make_bert(), loras[name]).eval()
        torch.testing.assert_close(got[row : row + 1], alone(ids[row : row + 1]).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("naming", ["old", "new"])
def test_modules_that_transformers_has_renamed(tmp_path, naming):
    originals = [lora(f"a{i}", naming, 100 * i) for i in range(3)]
    path = ex.fit(originals, max_error=1e-4).save(tmp_path / naming)
    for original in originals:
        model = PeftModel.from_pretrained(make_vit(), path / "adapters" / original.name).eval()
        torch.testing.assert_close(model(pictures()).logits, dense(original)(pictures()).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_convolutions_without_a_component(tmp_path):
    modules = (*CONVOLUTIONS, "head")
    adapters = random_loras(make_convnet(), modules)
    path = ex.fit(adapters, max_error=1e-5).save(tmp_path / "pack")
    bank = ex.AdapterBank(make_convnet(), path)
    assert {basis.down.k for basis in bank.pack.subspace.modules.values()} == {0}
    rows = ["a0", "a2", "a0", "a1"]
    got = bank(images(4), adapter_names=rows)
    for row, name in enumerate(rows):
        whole = make_convnet()
        for module, one in adapters[int(name[1])].modules.items():
            weight = whole.get_submodule(module).weight
            weight += dense_of(one).reshape(weight.shape).float()
        wanted = whole(images(4)[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], wanted, atol=1e-3, rtol=1e-3)
        model = PeftModel.from_pretrained(make_convnet(), path / "adapters" / name).eval()
        torch.testing.assert_close(model(images(4)[row : row + 1]), wanted, atol=1e-3, rtol=1e-3)


class TestMovedOutOfItsPack:
    """Its folder, as PEFT saves such an adapter: its subspace is elsewhere."""

    @pytest.fixture
    def folder(self, path, names, tmp_path):
        moved = shutil.copytree(path / "adapters" / names[-1], tmp_path / names[-1])
        config = json.loads((moved / "adapter_config.json").read_text())
        (moved / "adapter_config.json").write_text(json.dumps({**config, "subspace": str(path)}))
        return moved

    def test_with_its_pack_at_hand_it_is_a_lora(self, path, folder):
        wanted = ex.Pack.open(path).adapter(folder.name)
        found = ex.read_adapter(folder)
        assert set(found.specs) == set(wanted.specs)
        for module, one in wanted.modules.items():
            assert found.specs[module].rank == one.down.shape[0]
            torch.testing.assert_close(dense_of(found.modules[module]), dense_of(one), **CLOSE)

    def test_and_goes_into_another_pack(self, path, folder):
        wanted = ex.Pack.open(path).adapter(folder.name)
        again = ex.fit([folder], max_error=1e-4).adapter(folder.name)
        for module, one in wanted.modules.items():
            torch.testing.assert_close(dense_of(again.modules[module]), dense_of(one), atol=1e-3, rtol=1e-3)

    def test_without_it_the_way_out_is_said(self, folder, monkeypatch):
        monkeypatch.setattr(registry, "find", lambda fingerprint: None)
        with pytest.raises(FormatError, match="which is not loaded. Open its pack .* or, .* `eigenlorax export` it"):
            ex.read_adapter(folder)

    def test_inside_of_it_it_is_exported(self, path, names):
        with pytest.raises(FormatError, match="has coefficients of an adapter in a pack. Write it as an ordinary LoRA"):
            ex.read_adapter(path / "adapters" / names[0])


def dense_of(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()
