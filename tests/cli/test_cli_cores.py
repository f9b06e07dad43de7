"""`--cores` in the shell, and the verbs on what it makes."""

import pytest

import eigenlorax as ex
from adapters import make_adapter
from outcomes import assert_refused, contents, json_of, succeeded


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_every_verb(cli, pack, kind):
    sources, place = pack.parent / "in", pack.parent / "cores"
    done = succeeded(cli("fit", sources, "-o", place, "-k", 4, "--cores", kind, "--warn-above", 1))
    assert ("adapters come back as LoRAs of rank 4" in done.err) == (kind == "diagonal")
    said = json_of(cli("inspect", place, "--json"))
    assert said["coefficient_dtype"] == f"{kind}-{said['dtype']}"
    wanted = ex.fit(sources, n_components=4, cores=kind, warn_above=1.0)
    assert contents(wanted.save(pack.parent / "wanted")) == contents(place)
    succeeded(cli("inspect", place, "--verify", sources))
    make_adapter(pack.parent / "late", seed=41)
    extended = cli("add", place, pack.parent / "late", "--extend", 2)
    if kind == "diagonal":
        assert_refused(extended, 3, "rows of its sides go in pairs")
        succeeded(cli("add", place, pack.parent / "late"))
    succeeded(cli("augment", place, "--n-extra", 1, "--seed", 5, "-o", place, "--overwrite"))
    succeeded(cli("remove", place, "beta"))
    succeeded(cli("export", place, "-o", pack.parent / "loras"))
    assert sorted(p.name for p in (pack.parent / "loras").iterdir()) == ["alpha", "gamma", "late"]
    succeeded(cli("refit", place, "-o", pack.parent / "again", "-k", 3))
    assert json_of(cli("inspect", pack.parent / "again", "--json"))["coefficient_dtype"] == said["coefficient_dtype"]
    other = json_of(cli("refit", pack, "-o", pack.parent / "other", "-k", 3, "--cores", kind, "--json"))
    assert other["coefficient_dtype"] == said["coefficient_dtype"]


def test_what_does_not_go_together(cli, pack):
    done = cli("fit", pack.parent / "in", "-o", pack.parent / "none", "--max-error", 0.2, "--cores", "full")
    assert_refused(done, 3, "not found by max_error=0.2", "leave cores away")
    assert not (pack.parent / "none").exists()
