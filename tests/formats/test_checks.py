"""Adapters that were made in memory are held to what a reader holds files to; and options to what they can be."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.options import to_float, to_int
from eigenlorax.errors import (
    FormatError,
    ModuleNameError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UntrainedAdapterWarning,
)
from planted import MODULES, random_adapter, random_collection, random_factors

NAME = "encoder.0.query"

NO_FACTORS = {
    "torch.ones(3, 20), torch.ones(30, 4), 1": "ShapeError",
    "torch.ones(20), torch.ones(30, 4), 1": "ShapeError",
    "torch.ones(0, 20), torch.ones(30, 0), 1": "ShapeError",
    "torch.ones(3, 20).long(), torch.ones(30, 3), 1": "FormatError",
    "torch.ones(3, 20).numpy(), torch.ones(30, 3).numpy(), 1": "FormatError",
    "torch.ones(3, 20), torch.ones(30, 3), 'x'": "OptionError",
}
SCALED_BY_NUMPY = "torch.ones(3, 20), torch.ones(30, 3), numpy.float32(0.5)"


@pytest.fixture(scope="module")
def said_of_factors():
    """What becomes of `LoRAFactors` of each of these, in a process of its own: here types and shapes are checked before
    our own code sees them."""
    code = (
        "import eigenlorax as ex, json, numpy, sys, torch\n"
        "said = {}\n"
        "for arguments in sys.argv[1:]:\n"
        "    try:\n"
        "        found = ex.LoRAFactors(*eval(f'({arguments})')).scaling\n"
        "        said[arguments] = f'scaling: {found}, a {type(found).__name__}'\n"
        "    except ex.EigenloraxError as error:\n"
        "        said[arguments] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(said))"
    )
    command = [sys.executable, "-c", code, *NO_FACTORS, SCALED_BY_NUMPY]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one(**fields):
    factors = random_factors(3, 7, 5, seed=1, dtype=torch.float32, scaling=1.0)
    return ex.from_factors("one", {NAME: factors}, base_model="org/base", **fields)


class TestAdaptersInMemory:
    def refused(self, adapter, error, match):
        with pytest.raises(error, match=match):
            ex.fit([adapter], n_components=2)
        modules = dict.fromkeys([NAME], (7, 5))
        pack = ex.fit([random_adapter("first", 1, modules=modules)], n_components=2)
        with pytest.raises(error, match=match):
            pack.add(adapter)
        assert pack.names == ["first"]

    def test_a_config_that_says_another_scaling(self):
        config = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 99})
        self.refused(one(source_config=config), FormatError, "differ from its config, 3 and 33. Set source")

    def test_factors_that_were_replaced(self):
        adapter = one()
        twice = {NAME: dataclasses.replace(adapter.modules[NAME], scaling=2.0)}
        self.refused(
            dataclasses.replace(adapter, modules=twice), ShapeError, "Create the adapter with eigenlorax.from_factors"
        )

    @pytest.mark.parametrize("text", ["{", "[]", '"LORA"'])
    def test_a_config_that_is_none(self, text):
        self.refused(one(source_config=text), FormatError, "source_config is not")

    @pytest.mark.parametrize("module", ["", " ", "a b", "a\nb", ".", f"base_model.model.{NAME}"])
    def test_names_of_no_module(self, module):
        factors = random_factors(3, 7, 5, seed=1, dtype=torch.float32)
        self.refused(ex.from_factors("one", {module: factors}), ModuleNameError, "is not a module name")

    def test_a_head_with_the_name_of_a_factor(self):
        heads = {"base_model.model.m.lora_A.weight": torch.ones(2, 3)}
        self.refused(one(heads=heads), FormatError, "lora_A.weight' has the name of a LoRA tensor")

    @pytest.mark.slow
    @pytest.mark.parametrize(("arguments", "error"), NO_FACTORS.items())
    def test_factors_that_are_none(self, said_of_factors, arguments, error):
        assert said_of_factors[arguments].startswith(f"{error}: ")

    def test_scalings_may_be_numpy_s(self, said_of_factors):
        assert said_of_factors[SCALED_BY_NUMPY] == "scaling: 0.5, a float"


class TestOptions:
    @pytest.mark.parametrize("value", [True, 8.0, "8", None, [8]])
    def test_what_is_no_integer(self, value):
        with pytest.raises(OptionError, match="n must be an integer, got"):
            to_int("n", value)

    @pytest.mark.parametrize("value", [True, "0.9", None, [1]])
    def test_what_is_no_number(self, value):
        with pytest.raises(OptionError, match="x must be a number, got"):
            to_float("x", value)

    @pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), torch.tensor(8)])
    def test_integers_of_others_are_plain_ones(self, value):
        assert type(to_int("n", value)) is int
        assert to_int("n", value) == 8

    @pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5)])
    def test_numbers_of_others_are_plain_ones(self, value):
        assert type(to_float("x", value)) is float
        assert to_float("x", value) == 0.5

    @pytest.mark.parametrize("options", [{"n_components": True}, {"n_components": 3, "sweeps": True}])
    def test_a_fit_asks_for_them(self, options):
        with pytest.raises(OptionError, match="must be an integer, got True"):
            ex.fit(random_collection(), **options)

    def test_and_so_does_an_augmentation(self):
        with pytest.raises(OptionError, match="seed must be an integer, got True"):
            ex.fit(random_collection(), n_components=3).augment(2, True)

    def test_a_name_alone_is_a_list_of_one(self, tmp_path):
        pack = ex.fit(random_collection(), n_components=3, exclude_adapters="a1", exclude_modules="*query")
        assert "a1" not in pack
        assert len(pack) == 4
        assert list(pack.info.modules) == [name for name in MODULES if "query" not in name]
        assert list(pack.export(tmp_path / "out", "a2")) == ["a2"]

    def test_unknown_ones_are_named(self):
        with pytest.raises(TypeError, match="got an unexpected keyword argument 'n_component'"):
            ex.fit(random_collection(), n_component=3)


def test_what_cannot_be_read_again_replaces_nothing(tmp_path):
    pack = ex.fit(random_collection(), n_components=3)
    pack.save(tmp_path / "pack")
    before = (tmp_path / "pack" / "subspace_config.json").read_bytes()
    broken = ex.fit(random_collection(), n_components=2)
    broken.fit_info = dataclasses.replace(broken.fit_info, energy=0.5)
    with pytest.raises(ex.EigenloraxError, match="one of n_components, energy, max_error, max_bytes and ratio"):
        broken.save(tmp_path / "pack", overwrite=True)
    assert (tmp_path / "pack" / "subspace_config.json").read_bytes() == before
    ex.Pack.open(tmp_path / "pack").verify()


def test_numbers_that_vanish_in_a_dtype_are_an_error():
    factors = {NAME: random_factors(3, 7, 5, seed=1, size=1e-20)}
    with pytest.raises(NonFiniteError, match="vanish in torch.float16.*Store them as float32"):
        ex.fit([ex.from_factors("quiet", factors)], n_components=3, dtype="float16")


def test_an_untrained_one_that_is_added_is_noted():
    pack = ex.fit(random_collection(), n_components=3)
    factors = {name: random_factors(2, *shape, seed=1, size=0.0) for name, shape in MODULES.items()}
    with pytest.warns(UntrainedAdapterWarning, match="zero"):
        pack.add(ex.from_factors("zero", factors, base_model="org/base"))


def test_a_pack_says_what_it_is(tmp_path):
    pack = ex.fit(random_collection(), n_components=3)
    assert repr(pack) == "<Pack of 5 adapters of org/base, 2 modules>"
    pack.save(tmp_path / "pack")
    assert repr(pack).endswith(f" in {str(tmp_path / 'pack')!r}>")
    assert "a1" in pack


def test_what_an_export_rounds_is_told(tmp_path):
    pack = ex.fit(random_collection(), energy=1.0, dtype="float32")
    folder = pack.export(tmp_path, "a1", dtype="bfloat16")["a1"]
    got, wanted = ex.read_adapter(folder), pack.adapter("a1", torch.float64)
    lost = total = 0.0
    for module, factors in wanted.modules.items():
        exact, rounded = (f.scaling * f.up.double() @ f.down.double() for f in (factors, got.modules[module]))
        lost, total = lost + (exact - rounded).square().sum(), total + exact.square().sum()
    assert pack.export_rounding("a1", "bfloat16") == pytest.approx(float(lost / total) ** 0.5, rel=1e-6)
    assert pack.export_rounding("a1") < 1e-7
