import pkgutil
import subprocess
import sys

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
