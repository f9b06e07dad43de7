"""Examples in the docstrings of public names run, and say what is true. Each public function and method has one."""

import doctest
import inspect
import shutil

import pytest
import torch

import eigenlorax
from adapters import make_adapters
from runs import make_run, write_states

NAMES = [name for name in eigenlorax.__all__ if name != "__version__"]
# methods that PEFT or other packages of this project call
NOT_FOR_USERS = {"EigenLoraxConfig.check_saving", "EigenLoraxModel.inject_adapter"}
NOT_FOR_USERS |= {"Pack.adapter_folder", "Pack.codes", "Pack.digest", "Pack.from_folder"}
NOT_FOR_USERS |= {f"VersionCallback.on_{event}" for event in ("save", "step_end", "train_begin")}
PIPELINE, REPORT = "load_into", ("Report", "Report.save", "report")


def documented():
    """Each public name with what it is: functions, classes, and the methods that are defined here."""
    for name in NAMES:
        owner = getattr(eigenlorax, name)
        yield name, owner
        for base in reversed(inspect.getmro(owner)) if inspect.isclass(owner) else ():
            for attribute, member in vars(base).items() if base.__module__.startswith("eigenlorax") else ():
                function = member.__func__ if isinstance(member, classmethod) else member
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", function


def examples():
    parser = doctest.DocTestParser()
    for name, owner in dict(documented()).items():
        text = inspect.cleandoc(owner.__doc__ or "")
        test = parser.get_doctest(text, {}, name, None, None)
        if test.examples:
            yield pytest.param(test, id=name)


def test_every_public_function_and_method_has_one():
    with_one = {parameter.id for parameter in examples()}
    assert {name for name, _ in documented()} - with_one == NOT_FOR_USERS


@pytest.fixture(scope="module")
def _files(tmp_path_factory):
    """A folder with adapters, a pack of them, a run and its history, a language model and a pack for it."""
    import trainable

    folder = tmp_path_factory.mktemp("files")
    make_adapters(folder / "adapters", "a b c", shared=3)
    eigenlorax.fit(folder / "adapters", n_components=4).save(folder / "a-pack")
    write_states(make_run(folder / "run", (10, 20, 30)), max_steps=30)
    eigenlorax.track(folder / "run", folder / "runs")
    trainable.gpt2_pack(folder / "lm-pack", trainable.save_gpt2(folder / "model"))
    return folder


@pytest.fixture
def globs(_files, tmp_path, monkeypatch, request):
    """The variables of examples: a pack of "adapters/", and where they are used a model, its bank, and a pipeline."""
    shutil.copytree(_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    test = request.getfixturevalue("test")
    found = {"eigenlorax": eigenlorax, "torch": torch, "pack": eigenlorax.Pack.open("a-pack/")}
    if "runs." in test.docstring or "run/" in test.docstring:
        found["runs"] = eigenlorax.Pack.open("runs/")
    if "model" in test.docstring or "bank" in test.docstring:
        from transformers import AutoModelForCausalLM

        found["model"] = AutoModelForCausalLM.from_pretrained("model/")
    if "bank." in test.docstring:
        found["bank"] = eigenlorax.AdapterBank(found["model"], "lm-pack/")
    if "pipe" in test.docstring and test.name == PIPELINE:
        import tinypipes

        found["pipe"] = pipe = tinypipes.make_sd(tmp_path)
        styles = [tinypipes.style(pipe, name, seed) for seed, name in enumerate(("toy", "sketch"))]
        eigenlorax.fit(styles, n_components=4, warn_above=1.0).save("style-pack/")
    return found


@pytest.mark.parametrize("test", list(examples()))
def test_the_example_of(test, globs, without_shape_checks):
    if test.name.startswith(REPORT):
        pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")
    test.globs = globs
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert outcome.attempted
    assert not outcome.failed
