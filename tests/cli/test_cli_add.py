"""`eigenlorax add`: what is lost of a new adapter, and adapters that a pack does not take."""

import json

import pytest
import torch

import eigenlorax as ex
import reference
from adapters import MODULES, change_config, change_tensors, make_adapter, make_adapters
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded

QUERY = "encoder.layer.0.query"


class TestWhatIsAdded:
    def test_figures_are_those_of_an_independent_count(self, cli, pack):
        found = json_of(cli("add", pack, pack.parent / "new", "--json"))
        source, back = ex.read_adapter(pack.parent / "new"), ex.Pack.open(pack).adapter("new")
        error = reference.delta_error(source, back)
        assert error > 0.5
        record = found["added"].pop("new")
        assert found == {"pack": str(pack), "added": {}}
        assert record.pop("delta_error") == pytest.approx(error, rel=1e-5)
        assert record.pop("rounding_error") < 1e-6
        assert len(record.pop("source_sha256")) == 64
        assert record == {
            "bound": False,
            "carried_bytes": 0,
            # float32; rank 2; 4 components a side; 3 modules
            "coefficient_bytes": 4 * 2 * (4 + 4) * 3,
            "head_bytes": 0,
            "head_error": 0.0,
            "head_numbers": 0,
            "carried_numbers": 0,
            "source_head_bytes": 0,
            "source_carried_bytes": 0,
            "in_fit": False,
            "lora_numbers": 2 * sum(n_out + n_in for n_out, n_in in MODULES.values()),
            "modules": 3,
            "ranks": [2],
            "source_file_bytes": (pack.parent / "new" / "adapter_model.safetensors").stat().st_size,
            "untrained": False,
        }

    def test_one_that_lies_in_the_subspace_loses_nothing(self, cli, tmp_path):
        # all from the same 4 directions a side: a pack of two holds any third
        make_adapters(tmp_path / "in", "alpha beta gamma", shared=4)
        succeeded(cli("fit", tmp_path / "in" / "alpha", tmp_path / "in" / "beta", "-o", tmp_path / "pack", "-k", 4))
        found = json_of(cli("add", tmp_path / "pack", tmp_path / "in" / "gamma", "--json"))
        assert found["added"]["gamma"]["delta_error"] < 1e-5

    def test_the_table_says_what_was_lost(self, cli, pack):
        out = succeeded(cli("add", pack, f"mine={pack.parent / 'new'}")).out
        (row,) = (line.split() for line in out.splitlines() if "mine" in line)
        assert row == ["mine", f"{ex.Pack.open(pack).records['mine'].delta_error:.4f}", "192", "0"]

    def test_a_parent_folder_gives_all_of_its_own(self, cli, pack):
        make_adapters(pack.parent / "more", "delta epsilon", rank=2)
        found = json_of(cli("add", pack, pack.parent / "more", pack.parent / "new", "--json"))
        assert sorted(found["added"]) == ["delta", "epsilon", "new"]
        assert ex.Pack.open(pack).names == ["alpha", "beta", "delta", "epsilon", "gamma", "new"]

    def test_the_subspace_and_the_others_stay_byte_for_byte(self, cli, pack):
        before = contents(pack)
        succeeded(cli("add", pack, pack.parent / "new"))
        after = contents(pack)
        assert {name for name in before if before[name] != after[name]} == {"subspace_config.json", "README.md"}
        assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"new"}

    def test_one_by_one_or_all_at_once_is_the_same_pack(self, cli, pack):
        make_adapters(pack.parent / "more", "delta epsilon", rank=2)
        other = ex.Pack.open(pack).save(pack.parent / "other")
        succeeded(cli("add", pack, pack.parent / "more"))
        for name in ("epsilon", "delta"):
            succeeded(cli("add", other, pack.parent / "more" / name))
        assert contents(pack) == contents(other)

    def test_an_untrained_one_is_called_so(self, cli, pack):
        change_tensors(pack.parent / "new", lambda found: [v.zero_() for k, v in found.items() if "lora_B" in k])
        assert "untrained" in succeeded(cli("add", pack, pack.parent / "new")).out

    def test_a_base_model_that_is_not_stated_is_noted(self, cli, pack):
        done = succeeded(cli("add", pack, make_adapter(pack.parent / "delta", seed=4, base=None)))
        assert done.err.startswith("note: ")
        assert "base model" in done.err
        assert "'delta'" in done.err

    def test_a_pickle_needs_the_flag(self, cli, pack):
        make_adapter(pack.parent / "delta", seed=9, rank=2, pickled=True)
        before = contents(pack.parent)
        assert_refused(cli("add", pack, pack.parent / "delta"), 3, "may run code", "--allow-pickle")
        assert contents(pack.parent) == before
        succeeded(cli("add", pack, pack.parent / "delta", pack.parent / "new", "--allow-pickle"))
        one, two = (ex.Pack.open(pack).records[name] for name in ("delta", "new"))
        assert one.source_sha256 == two.source_sha256


class TestResiduals:
    def test_store_all_but_the_rounding(self, cli, pack):
        record = json_of(cli("add", pack, pack.parent / "new", "--residual", "--json"))["added"]["new"]
        source, back = ex.read_adapter(pack.parent / "new"), ex.Pack.open(pack).adapter("new")
        error = reference.delta_error(source, back)
        assert error < 1e-5
        assert record["delta_error"] == pytest.approx(error, abs=1e-6)
        ex.Pack.open(pack).verify()

    def test_are_for_packs_of_floats(self, cli, pack):
        adapters = [pack.parent / name for name in ("new", "delta")]
        make_adapters(pack.parent, "delta", rank=2)
        for options, message in ((("-k", 2, "--dtype", "int8"), "as int8"), (("--max-error", 0.3), "within its error")):
            other = pack.parent / "other"
            succeeded(cli("fit", *adapters, "-o", other, *options, "--no-report", "--overwrite"))
            assert_refused(cli("add", other, f"mine={adapters[0]}", "--residual"), 3, message, "--residual")


class TestModulesThatTheSubspaceLacks:
    @pytest.fixture
    def more(self, pack):
        return make_adapter(pack.parent / "more", seed=4, modules={**MODULES, "encoder.layer.2.key": (37, 41)})

    def test_are_refused(self, cli, pack, more):
        before = contents(pack.parent)
        assert_refused(cli("add", pack, more), 3, "1 of 4 modules", "'encoder.layer.2.key'", "--carry-missing")
        assert contents(pack.parent) == before

    def test_are_carried_to_the_bit_with_carry_missing(self, cli, pack, more):
        found = json_of(cli("add", pack, more, "--carry-missing", "--json"))["added"]["more"]
        assert found["carried_bytes"] == 4 * 3 * (37 + 41)
        assert found["modules"] == 3
        succeeded(cli("export", pack, "more", "-o", pack.parent / "out"))
        source, back = ex.read_adapter(more), ex.read_adapter(pack.parent / "out" / "more")
        assert sorted(source.specs) == sorted(back.specs)
        assert torch.equal(source.modules["encoder.layer.2.key"].down, back.modules["encoder.layer.2.key"].down)

    def test_may_be_all_of_them(self, cli, pack):
        other = make_adapter(pack.parent / "other", seed=4, modules={"decoder.dense": (37, 41)})
        assert_refused(cli("add", pack, other), 3, "1 of 1 modules", "'decoder.dense'")
        done = cli("add", pack, other, "--carry-missing", "--json")
        assert "Adapter 'other' has no module in common with the pack, such as 'encoder.layer.0.query'" in done.err
        found = json_of(done)["added"]["other"]
        assert (found["modules"], found["coefficient_bytes"], found["untrained"]) == (0, 0, False)


def nan(folder):
    change_tensors(folder, lambda found: next(iter(found.values())).view(-1)[:2].fill_(torch.nan))


# what is wrong with an adapter named `bad`, and what the message must have
BAD = {
    "another base": ({"base": "org/other"}, None, ["the pack has 'org/base'", "'bad' has 'org/other'", "--same-base"]),
    "another shape": ({"modules": {QUERY: (17, 12)}}, None, [QUERY, "(17, 12)", "'bad'", "(17, 11)"]),
    "NaN": ({}, nan, ["'bad'", "2 of 33", "NaN"]),
    "cut": (
        {},
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 9),
        ["bad", "not a valid safetensors file"],
    ),
    "no weights": ({}, lambda f: (f / "adapter_model.safetensors").unlink(), ["bad", "adapter_model.safetensors"]),
    "wrong JSON": ({}, lambda f: (f / "adapter_config.json").write_text("{"), ["bad", "not valid JSON"]),
    "another method": ({"config": {"peft_type": "IA3"}}, None, ["bad", "'IA3'"]),
}


class TestWhatIsRefused:
    @pytest.mark.parametrize(("options", "change", "parts"), BAD.values(), ids=BAD)
    def test_one_bad_adapter_and_the_pack_stays_byte_for_byte(self, cli, pack, options, change, parts):
        bad = make_adapter(pack.parent / "bad", seed=4, **options)
        if change is not None:
            change(bad)
        before = contents(pack.parent)
        # the first is sound: neither is added
        assert_refused(cli("add", pack, pack.parent / "new", bad), 3, *parts)
        assert contents(pack.parent) == before

    @pytest.mark.parametrize("name", ["beta", "Beta"])
    def test_a_name_that_the_pack_has(self, cli, pack, name):
        before = contents(pack.parent)
        done = cli("add", pack, f"{name}={pack.parent / 'new'}")
        assert_refused(done, 3, f"already has an adapter named '{name}'", "NAME=PATH")
        assert contents(pack.parent) == before

    def test_a_name_given_twice(self, cli, pack):
        before = contents(pack.parent)
        done = cli("add", pack, pack.parent / "new", f"new={pack.parent / 'in' / 'alpha'}")
        assert_refused(done, 3, "two adapters have the same name, 'new'")
        assert contents(pack.parent) == before

    @pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "x y"])
    def test_a_name_that_climbs(self, cli, pack, name):
        before = contents(pack.parent)
        assert_refused(cli("add", pack, f"{name}={pack.parent / 'new'}"), 3, f"adapter name {name!r} is not allowed")
        assert contents(pack.parent) == before

    def test_the_pack_itself_and_its_own(self, cli, pack):
        before = contents(pack.parent)
        for given in (pack, pack / "adapters", f"again={pack / 'adapters' / 'beta'}"):
            assert_refused(cli("add", pack, given), 3, "eigenlorax export")
        assert contents(pack.parent) == before

    @pytest.mark.parametrize(("given", "part"), [("nowhere", "does not exist"), ("", "empty"), ("x=", "no path after")])
    def test_what_is_not_there(self, cli, pack, given, part, monkeypatch):
        monkeypatch.chdir(pack.parent)
        before = contents(pack.parent)
        assert_refused(cli("add", pack, given), 3, part)
        assert contents(pack.parent) == before

    @pytest.mark.parametrize("given", ["nowhere", "in", "in/beta"])
    def test_what_is_not_a_pack(self, cli, pack, given):
        before = contents(pack.parent)
        done = cli("add", pack.parent / given, pack.parent / "new")
        assert_refused(done, 4, f"{pack.parent / given} is not a pack", "subspace_config.json")
        assert contents(pack.parent) == before

    def test_nothing(self, cli, pack):
        assert_usage_error(cli("add", pack), "ADAPTER")
        assert_usage_error(cli("add"), "PACK")

    def test_a_folder_in_the_way_of_the_new_one(self, cli, pack):
        mine = pack / "adapters" / "new"
        mine.mkdir()
        (mine / "mine.txt").write_text("mine")
        before = contents(pack.parent)
        assert_refused(cli("add", pack, pack.parent / "new"), 4, mine, "in the way", "move it elsewhere")
        assert contents(pack.parent) == before


def test_two_bases_may_be_one_under_two_names(cli, pack):
    other = make_adapter(pack.parent / "other", seed=4, base="/models/base")
    succeeded(cli("add", pack, other, "--same-base"))
    opened = ex.Pack.open(pack)
    assert opened.base_model == "org/base"
    config = json.loads((pack / "adapters" / "other" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "/models/base"


def test_a_revision_that_differs_is_refused(cli, pack):
    change_config(pack.parent / "new", revision="v2")
    succeeded(cli("add", pack, pack.parent / "new"))
    other = make_adapter(pack.parent / "other", seed=4, revision="v3")
    assert_refused(cli("add", pack, other), 3, "revision", "'v3'", "--same-base")


def test_losses_are_noted_together_above_the_share_that_was_asked_for(cli, pack):
    sources = pack.parent / "in"
    both = [f"one={sources / 'alpha'}", f"two={pack.parent / 'new'}"]
    done = succeeded(cli("add", pack, *both, "--warn-above", 0.1))
    errors = {name: ex.Pack.open(pack).records[name].delta_error for name in ("one", "two")}
    assert min(errors.values()) > 0.1
    worst, other = sorted(errors, key=errors.get, reverse=True)
    named = f"{worst} ({errors[worst]:.2f}), {other} ({errors[other]:.2f})."
    assert done.err.startswith(f"note: The delta error is above 0.1 for {named} To store all of an adapter, remove it")
    done = succeeded(cli("add", pack, f"three={pack.parent / 'new'}", "--warn-above", 1))
    assert done.err == "note: three has the same update as two.\n"
