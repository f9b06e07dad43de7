"""Adapters of packs whose configs do without PEFT's defaults and without the modules that all adapters have."""

import dataclasses
import json

import pytest
import torch
from peft import PeftConfig, PeftModel

import eigenlorax as ex
from coded import coded_adapters
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import FormatError
from eigenlorax.pack.adapter_files import DEFAULTS
from eigenlorax.tuner import EigenLoraxConfig
from tiny import BERT, IN, make_bert

SHAPES = dict.fromkeys(BERT, (IN, IN))


def test_what_is_left_out_is_the_default_of_the_config():
    config = EigenLoraxConfig()
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields >= set(DEFAULTS)
    assert {name: getattr(config, name) for name in DEFAULTS} == dict(DEFAULTS)


@pytest.mark.parametrize("options", [{"max_error": 0.05}, {"n_components": 9}, {"n_components": 9, "dtype": "int8"}])
def test_peft_loads_them_from_their_folder(ids, tmp_path, options):
    adapters = coded_adapters(SHAPES, "much", n=3)
    # one that lacks a module
    adapters.append(from_factors("part", {name: adapters[0].modules[name] for name in BERT[:3]}))
    pack = ex.fit(adapters, **options)
    folder = pack.save(tmp_path / "pack")
    loras = pack.export(tmp_path / "loras")
    for name in ("a1", "part"):
        config = json.loads((folder / "adapters" / name / "adapter_config.json").read_text())
        assert ("target_modules" in config) == (name == "part")
        assert "lora_dropout" not in config
        assert PeftConfig.from_pretrained(folder / "adapters" / name).peft_type == "EIGENLORAX"
        ours = PeftModel.from_pretrained(make_bert(), folder / "adapters" / name).eval()
        theirs = PeftModel.from_pretrained(make_bert(), loras[name]).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
        ours.load_adapter(folder / "adapters" / "a0", adapter_name="second")
        ours.set_adapter("second")
        # saved elsewhere, it names its modules
        ours.save_pretrained(tmp_path / "saved" / name, selected_adapters=["second"])
        saved = json.loads((tmp_path / "saved" / name / "second" / "adapter_config.json").read_text())
        assert sorted(saved["target_modules"]) == sorted(BERT)


@pytest.mark.parametrize("digits", ["3", "3334", "333a", "３" * len(BERT)])
def test_digits_of_residuals_that_do_not_fit_the_modules(tmp_path, digits):
    folder = ex.fit(coded_adapters(SHAPES, "nothing", n=2), max_error=0.3).save(tmp_path / "pack") / "adapters" / "a0"
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["residual_sides"] == "3" * len(BERT)
    path.write_text(json.dumps({**config, "residual_sides": digits}))
    with pytest.raises(FormatError, match="a digit from 0 to 3 for each of the adapter's modules"):
        PeftModel.from_pretrained(make_bert(), folder)
