import pkgutil
import subprocess
import sys

import pytest

import eigenlorax as ex


def test_no_submodule_bears_a_public_name():
    """Importing a submodule puts it on the package: `ex.fit` would be a module as soon as anything had imported it."""
    submodules = {module.name for module in pkgutil.iter_modules(ex.__path__)}
    assert not submodules & set(ex.__all__)


def test_public_names_are_there_and_others_are_not():
    assert all(getattr(ex, name) is not None for name in ex.__all__)
    assert set(ex.__all__) <= set(dir(ex))
    assert not hasattr(ex, "train_everything")


def test_import_is_cheap():
    code = (
        "import sys, eigenlorax; print(sorted({'torch', 'peft', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import eigenlorax; import peft",
        "import peft; import eigenlorax",
        "from eigenlorax.tuner.config import EigenLoraxConfig",
    ],
)
def test_peft_knows_the_method_whichever_way_it_is_imported(code):
    pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
    check = (
        "import peft, pickle; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
        "kind = peft.PeftType('EIGENLORAX')\n"
        "assert kind is peft.PeftType.EIGENLORAX is peft.PeftType['EIGENLORAX'] is pickle.loads(pickle.dumps(kind))\n"
        "assert kind in list(peft.PeftType) and known[kind].__name__ == 'EigenLoraxConfig'\n"
        "assert known['EIGENLORAX'] is known[kind] and peft.__loader__ is peft.__spec__.loader\n"
        "print(type(peft.__loader__).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "SourceFileLoader\n"
