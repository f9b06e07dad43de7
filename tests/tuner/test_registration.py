"""What PEFT is told, and what is said where it cannot be."""

import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import eigenlorax as ex
from eigenlorax.errors import MissingExtraError
from eigenlorax.tuner import registration


def test_it_may_be_said_again():
    before = [dict(table) for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)]
    members = list(peft.PeftType)
    registration.register()
    assert [dict(table) for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)] == before
    assert list(peft.PeftType) == members
    assert PEFT_TYPE_TO_PREFIX_MAPPING["EIGENLORAX"] == "eigenlorax_"


@pytest.mark.parametrize("version", ["0.18.1", "0.20.0"])
def test_an_old_peft_is_named(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(MissingExtraError, match=f"newer PEFT than {version}: pip install 'peft>=0.21'"):
        registration.check_peft()


@pytest.mark.parametrize("version", ["0.21.0", "0.22.0.dev0", "1.0"])
def test_a_new_one_is_taken(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    registration.check_peft()


def test_a_method_of_that_name_in_peft_itself_is_left_alone(monkeypatch):
    kind = registration.peft_type()
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, kind, peft.LoraConfig)
    with pytest.raises(MissingExtraError, match="has its own method EIGENLORAX"):
        registration.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is peft.LoraConfig


def test_an_old_peft_goes_on_working_for_others(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("__version__ = '0.10.0'\nworks = True\n")
    code = "import eigenlorax, peft; assert peft.works; eigenlorax.fit\neigenlorax.EigenLoraxConfig"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "RegistrationWarning: eigenlorax.tuner requires a newer PEFT than 0.10.0" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("eigenlorax.errors.MissingExtraError")


def test_the_config_is_peft_s():
    assert issubclass(ex.EigenLoraxConfig, peft.PeftConfig)
    assert ex.EigenLoraxConfig().peft_type is peft.PeftType.EIGENLORAX
