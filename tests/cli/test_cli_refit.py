"""`eigenlorax refit`: what changed for whom, and where the new pack goes."""

import pytest

import eigenlorax as ex
from adapters import make_adapter
from outcomes import assert_refused, contents, json_of, succeeded


def refit(cli, pack, *options, output="again"):
    return cli("refit", pack, "-o", pack.parent / output, *options)


def test_figures_are_those_of_the_call(cli, pack):
    before = contents(pack)
    found = json_of(refit(cli, pack, "--adapters", pack.parent / "in", "-k", 2, "--json"))
    assert contents(pack) == before
    opened, wanted = ex.Pack.open(pack), ex.refit(pack, pack.parent / "in", n_components=2)
    assert sorted(found["changes"]) == opened.names
    for name, change in found["changes"].items():
        one = wanted.changes[name]
        assert change.pop("worse") is True
        assert change == {field: getattr(one, field) for field in change}
        assert change["error_before"] == opened.records[name].delta_error
    assert found["worse"] == wanted.worse
    assert found["fingerprint_before"] == opened.info.fingerprint
    assert found["fingerprint"] == ex.Pack.open(pack.parent / "again").info.fingerprint


def test_the_table_names_who_got_worse_and_says_what_no_longer_belongs(cli, pack):
    done = succeeded(refit(cli, pack, "-k", 2))
    for name in ex.Pack.open(pack).names:
        (row,) = (line for line in done.out.splitlines() if name in line and "the pack" in line)
        assert f"{ex.Pack.open(pack.parent / 'again').records[name].delta_error:.4f}" in row
    assert "got worse" in done.out
    assert "do not fit the new one" in done.err


def test_a_bound_is_shown_as_one(cli, pack):
    succeeded(cli("add", pack, pack.parent / "new", "--extend", 2))
    done = succeeded(refit(cli, pack, "-k", 3))
    (row,) = (line for line in done.out.splitlines() if "alpha" in line and "the pack" in line)
    assert "≤ 0." in row
    assert "got worse, or may have" in done.out
    assert "delta error, at most" in succeeded(cli("inspect", pack.parent / "again")).out
    assert "| delta error, at most, 4 adapters fitted |" in (pack.parent / "again" / "README.md").read_text()
    (row,) = (line for line in done.out.splitlines() if " new " in line)
    assert "≤" not in row


def test_in_place(cli, pack):
    before = ex.Pack.open(pack).info.fingerprint
    assert_refused(refit(cli, pack, "-k", 2, output="pack"), 4, "is a pack already", "--overwrite")
    assert ex.Pack.open(pack).info.fingerprint == before
    succeeded(refit(cli, pack, "-k", 2, "--overwrite", output="pack"))
    opened = ex.Pack.open(pack)
    opened.verify()
    assert opened.info.fingerprint != before
    assert opened.names == ["alpha", "beta", "gamma"]


def test_of_an_adapter_that_was_added_with_others(cli, pack):
    make_adapter(pack.parent / "more" / "delta", seed=31)
    make_adapter(pack.parent / "more" / "epsilon", seed=32)
    out = succeeded(cli("add", pack, pack.parent / "more", "--extend", 2)).out
    assert "basis extended" in out
    assert "at most 2 on one" in out
    found = json_of(cli("inspect", pack, "--json"))
    assert found["n_extended"] == 2 * 2 * 3


@pytest.mark.parametrize(("extend", "part"), [("0", "from 1 to 29"), ("30", "from 1 to 29")])
def test_directions_out_of_range(cli, pack, extend, part):
    before = contents(pack)
    assert_refused(cli("add", pack, pack.parent / "new", "--extend", extend), 3, f"--extend {extend}", part)
    assert contents(pack) == before


def test_what_is_not_missing_is_not_added(cli, pack):
    found = json_of(cli("add", pack, pack.parent / "new", "--extend", 2, "--json"))
    assert found["extended"] == {
        "directions": 12,
        "sides": 6,
        "most": 2,
        "basis_bytes": 4 * 2 * (17 + 11 + 13 + 23 + 19 + 29),
    }
    out = succeeded(cli("add", pack, f"again={pack.parent / 'new'}", "--extend", 2)).out
    assert "it represents the new adapters exactly" in " ".join(out.split())
