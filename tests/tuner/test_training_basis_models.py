"""Training in the basis of a coded pack, and serving from it: on a model, against PEFT's LoRA."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import eigenlorax as ex
from coded import coded_adapters
from eigenlorax.core import projection, registry
from eigenlorax.errors import OptionError, ProjectionWarning
from eigenlorax.tuner import EigenLoraxConfig, from_lora, lora_from_components, to_lora
from tiny import BERT, IN, make_bert, shake

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SHAPES = dict.fromkeys(BERT, (IN, IN))
K = 6


@pytest.fixture(scope="module", params=["nothing", "much"])
def path(request, tmp_path_factory):
    """A coded pack of adapters that share nothing, whose own bases have no component; and one of some that share."""
    pack = ex.fit(coded_adapters(SHAPES, request.param), max_error=0.1, basis=K)
    return pack.save(tmp_path_factory.mktemp("coded") / "pack")


def trained(path, **options):
    config = EigenLoraxConfig(subspace=path, r=2, **options)
    return get_peft_model(make_bert(), config)


class TestTraining:
    @pytest.mark.parametrize("as_pack", [False, True])
    def test_is_on_the_components_of_the_basis(self, path, as_pack):
        model = trained(ex.Pack.open(path) if as_pack else str(path))
        shapes = {parameter.shape for parameter in model.parameters() if parameter.requires_grad}
        assert shapes == {(2, K), (K, 2)}
        assert model.peft_config["default"].subspace_fingerprint == ex.Pack.open(path).basis.info.fingerprint

    def test_a_trained_adapter_goes_into_the_pack_and_out_of_it(self, path, ids, tmp_path):
        model = trained(str(path))
        shake(model)
        with torch.no_grad():
            wanted = model(ids).logits
        model.save_pretrained(tmp_path / "mine")
        registry.clear()
        pack = ex.Pack.open(path)
        # by its fingerprint, as what was opened has the basis
        loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "mine").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, wanted, **CLOSE)
        record = pack.add(tmp_path / "mine", name="mine")
        assert record.delta_error <= 0.1
        again = ex.Pack.open(pack.save(tmp_path / "pack"))
        again.verify()
        exact = ex.read_adapter(tmp_path / "mine")
        assert _error(again.adapter("mine").modules, exact.modules) == pytest.approx(record.delta_error, abs=1e-5)
        # in the basis, nothing but the coding is lost
        served = again.on_basis(0.99).records["mine"]
        assert served.delta_error <= 2.2 * record.delta_error
        # in its folder in the pack, PEFT loads the codes on the pack's own bases
        in_pack = PeftModel.from_pretrained(make_bert(), tmp_path / "pack" / "adapters" / "mine").eval()
        lora = PeftModel.from_pretrained(make_bert(), again.export(tmp_path / "loras", "mine")["mine"]).eval()
        with torch.no_grad():
            torch.testing.assert_close(in_pack(ids).logits, lora(ids).logits, **CLOSE)

    def test_starts_from_an_adapter_of_the_pack(self, path, ids):
        pack = ex.Pack.open(path)
        with pytest.warns(ProjectionWarning, match="projections on the pack's basis. The error of 'a1' is then at"):
            model = trained(str(path), start="a1", core=True, lora_alpha=2)
        projected = {}
        for module, factors in pack.adapter("a1").modules.items():
            bases = pack.basis.subspace.modules[module]
            projected[module] = projection.reconstruct(projection.project(factors, bases), bases, torch.float32)
        assert _error(to_lora(model).modules, projected) < 1e-5

    def test_starts_from_the_mean(self, path):
        pack = ex.Pack.open(path)
        with pytest.warns(ProjectionWarning, match="start='mean'"):
            model = trained(str(path), start="mean", core=True, lora_alpha=2)
        for module, found in to_lora(model).modules.items():
            bases = pack.basis.subspace.modules[module]
            mean = torch.zeros(IN, IN, dtype=torch.float64)
            for name in pack.names:
                coefficients = projection.project(pack.adapter(name).modules[module], bases)
                mean += _update(projection.reconstruct(coefficients, bases)) / len(pack)
            torch.testing.assert_close(_update(found), mean, atol=1e-5, rtol=1e-4)

    def test_of_ordinary_loras(self, path, ids, tmp_path):
        pack = ex.Pack.open(path)
        bases = pack.basis.subspace.modules[BERT[0]]
        lora = lora_from_components(make_bert(), str(path), r=4, lora_alpha=4)
        weight = lora.get_submodule(f"base_model.model.{BERT[0]}").lora_A["default"].weight
        assert torch.equal(weight, bases.down.components[:4])
        with pytest.warns(ProjectionWarning):
            model = from_lora(make_bert(), pack.adapter("a0"), subspace=pack)
        assert model.peft_config["default"].subspace_fingerprint == pack.basis.info.fingerprint

    def test_a_saved_adapter_and_another_pack(self, path, tmp_path):
        model = trained(str(path))
        model.save_pretrained(tmp_path / "mine")
        other = ex.fit(coded_adapters(SHAPES, "much", first=50), max_error=0.1, basis=K)
        for subspace in (other, other.save(tmp_path / "other")):
            with pytest.raises(OptionError, match="belongs to the subspace .* Pass its own pack"):
                PeftModel.from_pretrained(
                    make_bert(),
                    tmp_path / "mine",
                    config=EigenLoraxConfig.from_pretrained(tmp_path / "mine", subspace=subspace),
                )


def test_the_bank_serves_what_the_basis_represents(ids):
    pack = ex.fit(coded_adapters(SHAPES, "much"), max_error=0.02, basis=K)
    errors = {name: record.delta_error for name, record in pack.on_basis(0.99).records.items()}
    within = sorted(errors.values())[3]
    bank = ex.AdapterBank(make_bert(), pack.on_basis(within))
    assert bank.names == sorted(name for name, error in errors.items() if error <= within)
    exact = ex.AdapterBank(make_bert(), pack, adapters=bank.names)
    assert bank.nbytes < exact.nbytes
    with torch.no_grad():
        for name in bank.names:
            found, base, wanted = (
                one(ids, adapter_names=each).logits for one, each in ((bank, name), (bank, "__base__"), (exact, name))
            )
            assert (found - wanted).norm() < 2 * within * (wanted - base).norm()


def _update(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()


def _error(found, wanted):
    """The relative error of the updates of factors by module."""
    off = sum(float((_update(found[name]) - _update(wanted[name])).square().sum()) for name in BERT)
    return (off / sum(float(_update(wanted[name]).square().sum()) for name in BERT)) ** 0.5
