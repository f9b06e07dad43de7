"""`--dtype int8` and `int4` in the shell, and the verbs on what they make."""

import pytest

import eigenlorax as ex
from adapters import make_adapter
from outcomes import assert_refused, contents, json_of, succeeded


@pytest.fixture(params=[("int8", None), ("int4", "int4")], ids=lambda given: "-".join(map(str, given)))
def stored(request, cli, pack):
    """A pack of integers beside the fixture's, which is one of floats; and what `fit` has said of it."""
    dtype, coefficients = request.param
    more = ["--coefficient-dtype", coefficients] if coefficients else []
    place = pack.parent / "integers"
    return place, json_of(cli("fit", pack.parent / "in", "-o", place, "-k", 4, "--dtype", dtype, *more, "--json"))


def test_figures_are_those_of_the_call(cli, stored, pack):
    place, said = stored
    wanted = ex.fit(
        pack.parent / "in", n_components=4, dtype=said["dtype"], coefficient_dtype=said["coefficient_dtype"]
    )
    assert contents(wanted.save(pack.parent / "wanted")) == contents(place)
    found = json_of(cli("inspect", place, "--json"))
    assert (found["dtype"], found["coefficient_dtype"]) == (said["dtype"], said["coefficient_dtype"])
    assert found["bytes"] == said["bytes"]
    assert found["bytes"]["lora"] == 2 * sum(record.lora_numbers for record in wanted.records.values())
    assert said["dtype"] in succeeded(cli("inspect", place)).out


def test_every_verb(cli, stored, pack):
    place, said = stored
    make_adapter(pack.parent / "late", seed=41)
    succeeded(cli("add", place, pack.parent / "late", "--extend", 2))
    succeeded(cli("augment", place, "--n-extra", 1, "--seed", 5, "-o", place, "--overwrite"))
    succeeded(cli("remove", place, "beta"))
    succeeded(cli("export", place, "-o", pack.parent / "loras"))
    assert sorted(p.name for p in (pack.parent / "loras").iterdir()) == ["alpha", "gamma", "late"]
    succeeded(cli("refit", place, "-o", pack.parent / "again", "-k", 3))
    again = json_of(cli("inspect", pack.parent / "again", "--json"))
    assert (again["dtype"], again["coefficient_dtype"]) == (said["dtype"], said["coefficient_dtype"])
    for one in (place, pack.parent / "again"):
        ex.Pack.open(one).verify()


def test_damage(cli, stored):
    place, _ = stored
    (file,) = place.glob("subspace-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert_refused(cli("inspect", place), 4, file.name, "was changed after it was written")
