"""What `fit` chooses for a purpose, and what it says of it: in its tables, in JSON, in the model card and later."""

import pytest

import eigenlorax as ex
from eigenlorax.cli import spelling
from eigenlorax.pack import purposes
from outcomes import assert_refused, json_of, succeeded
from planted import shared_collection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("purposes") / "in"
    for adapter in shared_collection(6, noise=0.1)[0]:
        ex.write_adapter(adapter, folder / adapter.name)
    return folder


@pytest.mark.parametrize("purpose", ["storage", "training", "serving"])
def test_fit_inspect_and_the_card_say_the_same(cli, folder, tmp_path, purpose):
    output = tmp_path / "pack"
    fitted = json_of(cli("fit", folder, "-o", output, "--for", purpose, "--no-report", "--json"))
    shown = json_of(cli("inspect", output, "--json"))
    summary = ex.Pack.open(output).summary
    choice, in_python = purposes.choice(summary), purposes.limits(summary)
    limits = spelling.on_command_line(in_python)
    assert "purpose=" in in_python
    assert "=" not in limits
    assert choice.startswith(f"for {purpose}: ")
    for document in (fitted, shown):
        assert (document["fit"]["purpose"], document["choice"], document["limits"]) == (purpose, choice, limits)
    for done in (cli("inspect", output), cli("fit", folder, "-o", output, "--for", purpose, "--overwrite")):
        words = " ".join(succeeded(done).out.split())
        assert f"fit {choice} limits {limits}" in words
    text = (output / "README.md").read_text("utf-8")
    assert f"| asked for | {choice} |\n| limits | {in_python} |" in text


def test_storage_is_the_default(cli, folder, tmp_path):
    found = json_of(cli("fit", folder, "-o", tmp_path / "pack", "--no-report", "--json"))
    assert (found["fit"]["purpose"], found["fit"]["max_error"], found["dtype"]) == ("storage", 0.1, "coded")
    assert found["in_fit"]["worst"] <= 0.1


def test_a_size_without_a_purpose_has_none(cli, folder, tmp_path):
    found = json_of(cli("fit", folder, "-o", tmp_path / "pack", "-k", 5, "--no-report", "--json"))
    assert (found["fit"]["purpose"], found["fit"]["n_components"], found["dtype"]) == (None, 5, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--for", "serve"), "--for must be one of storage, training, serving, got 'serve'"),
        (("--for", "training", "--ratio", 18), "--ratio 18 means entropy coding, which gives no basis for training"),
        (("--for", "serving", "--max-bytes", "2MB"), "--max-bytes 2000000 means entropy coding"),
        (("--dtype", "int8"), "dtype int8 needs a number of components: pass -k 32"),
    ],
)
def test_what_contradicts_itself_is_refused(cli, folder, tmp_path, options, message):
    assert_refused(cli("fit", folder, "-o", tmp_path / "pack", *options), 3, message)
    assert list(tmp_path.iterdir()) == []
