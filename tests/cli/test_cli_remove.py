"""`eigenlorax remove`: adapters and their files go, everything else stays."""

import pytest

import eigenlorax as ex
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded


def test_they_and_their_files_go_and_the_rest_stays_byte_for_byte(cli, pack):
    before = contents(pack)
    found = json_of(cli("remove", pack, "gamma", "alpha", "--json"))
    assert found == {"pack": str(pack), "removed": ["alpha", "gamma"], "left": ["beta"]}
    after = contents(pack)
    gone = before.keys() - after.keys()
    assert {name.split("/")[1] for name in gone} == {"alpha", "gamma"}
    assert {name for name in after if before[name] != after[name]} == {"subspace_config.json", "README.md"}
    ex.Pack.open(pack).verify()


def test_the_table_says_what_is_left(cli, pack):
    out = succeeded(cli("remove", pack, "gamma")).out
    assert [line.split() for line in out.splitlines() if line.split()[:1] in (["removed"], ["adapters"])] == [
        ["removed", "gamma"],
        ["adapters", "left", "2"],
    ]


def test_a_name_given_twice_is_removed_once(cli, pack):
    assert json_of(cli("remove", pack, "beta", "beta", "--json"))["removed"] == ["beta"]


def test_what_is_removed_and_added_again_gives_the_same_figures(cli, pack):
    first = ex.Pack.open(pack).records["beta"]
    succeeded(cli("remove", pack, "beta"))
    second = json_of(cli("add", pack, pack.parent / "in" / "beta", "--json"))["added"]["beta"]
    assert second["delta_error"] == pytest.approx(first.delta_error, rel=1e-5)
    assert (first.in_fit, second["in_fit"]) == (True, False)


@pytest.mark.parametrize("name", ["delta", "Beta", "", "..", "../in/beta", "adapters/beta", "*"])
def test_a_name_that_is_not_there_removes_nothing(cli, pack, name):
    before = contents(pack.parent)
    assert_refused(cli("remove", pack, "alpha", name), 3, f"no adapter named {name!r}", "alpha, beta, gamma")
    assert contents(pack.parent) == before


def test_of_many_names_a_dozen_are_listed(cli, pack):
    succeeded(cli("add", pack, *(f"n{i:02}={pack.parent / 'new'}" for i in range(12))))
    done = cli("remove", pack, "delta")
    assert_refused(done, 3, "alpha, beta, gamma, n00", "n08 …")
    assert "n09" not in done.err


@pytest.mark.parametrize("given", ["nowhere", "in", "in/beta"])
def test_what_is_not_a_pack(cli, pack, given):
    before = contents(pack.parent)
    assert_refused(cli("remove", pack.parent / given, "beta"), 4, f"{pack.parent / given} is not a pack")
    assert contents(pack.parent) == before


def test_nothing(cli, pack):
    assert_usage_error(cli("remove", pack), "NAME")
