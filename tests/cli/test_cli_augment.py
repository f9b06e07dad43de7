"""`eigenlorax augment`: more directions, the same adapters, another folder."""

import pytest
import torch

import children
import eigenlorax as ex
from adapters import MODULES
from children import at_change, needs_fork, no_more_room
from eigenlorax.cli.main import IO_ERROR, main
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded

# the narrowest side of the modules here is 11 wide, and holds 4 components
ROOM = min(min(shape) for shape in MODULES.values()) - 4


def augment(cli, pack, *options, output="more"):
    return cli("augment", pack, "-o", pack.parent / output, *options)


def test_adds_directions_and_changes_no_adapter(cli, pack):
    before = contents(pack)
    found = json_of(augment(cli, pack, "--n-extra", 5, "--seed", 3, "--json"))
    assert contents(pack) == before
    assert found["pack"] == str(pack.parent / "more")
    assert found["n_extra"] == 5
    # one check number for every extra direction is what is stored of them; coefficients stay as they are
    basis = sum(tensor.numel() for _, tensor in tensors(pack)) + 5 * 2 * len(MODULES)
    assert found["bytes"]["basis"] == 4 * basis
    assert found["bytes"]["coefficients"] == 3 * 4 * 3 * (4 + 4) * len(MODULES)
    one, two = ex.Pack.open(pack), ex.Pack.open(pack.parent / "more")
    assert one.names == two.names
    for name in one.names:
        for module, factors in one.adapter(name).modules.items():
            again = two.adapter(name).modules[module]
            torch.testing.assert_close(again.up @ again.down, factors.up @ factors.down, atol=1e-6, rtol=1e-6)


def tensors(pack):
    from safetensors.torch import load_file

    return load_file(next(pack.glob("subspace-*"))).items()


def test_the_table_says_how_many(cli, pack):
    out = succeeded(augment(cli, pack, "--n-extra", 5, "--seed", 3)).out
    assert "5 on each side" in out
    assert "9 / 9 / 9" in out


@pytest.mark.parametrize(("options", "is_noted"), [({}, True), ({"basis": 2}, False)])
def test_a_coded_pack_without_a_basis_is_noted(cli, pack, tmp_path, options, is_noted):
    opened = ex.Pack.open(pack)
    coded = ex.fit([opened.adapter(name) for name in opened.names], max_error=0.1, **options)
    run = succeeded(augment(cli, coded.save(tmp_path / "coded"), "--n-extra", 3, "--seed", 3))
    said = "The pack was made for storage and has no basis for training" in run.err
    assert said == ("--basis 32" in run.err) == is_noted


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(cli, pack):
    for output, seed in (("one", 3), ("two", 3), ("three", 4)):
        succeeded(augment(cli, pack, "--n-extra", 2, "--seed", seed, output=output))
    one, two, three = (contents(pack.parent / output) for output in ("one", "two", "three"))
    assert one == two != three


def test_twice_with_two_seeds_but_not_with_one(cli, pack):
    succeeded(augment(cli, pack, "--n-extra", 2, "--seed", 3))
    before = contents(pack.parent)
    done = augment(cli, pack.parent / "more", "--n-extra", 2, "--seed", 3, output="twice")
    assert_refused(done, 3, "already has components from seed 3", "another seed")
    assert contents(pack.parent) == before
    succeeded(augment(cli, pack.parent / "more", "--n-extra", 2, "--seed", 4, output="twice"))
    assert ex.Pack.open(pack.parent / "twice").info.n_extra == 4


@pytest.mark.parametrize(
    ("n_extra", "parts"),
    [
        (0, ["--n-extra must be at least 1, got 0"]),
        (-1, ["--n-extra must be at least 1, got -1"]),
        (ROOM + 1, ["encoder.layer.0.query.down", f"--n-extra can be at most {ROOM}"]),
        (10**30, [f"--n-extra can be at most {ROOM}"]),
    ],
)
def test_a_number_out_of_range(cli, pack, n_extra, parts):
    before = contents(pack.parent)
    assert_refused(augment(cli, pack, "--n-extra", n_extra, "--seed", 3), 3, *parts)
    assert contents(pack.parent) == before


def test_up_to_the_last_dimension(cli, pack):
    succeeded(augment(cli, pack, "--n-extra", ROOM, "--seed", 3))
    info = ex.Pack.open(pack.parent / "more").info
    assert max(side.k - side.dimension for pair in info.modules.values() for side in pair.values()) == 0


@pytest.mark.parametrize("seed", [-1, 0, 2**70])
def test_any_whole_number_is_a_seed(cli, pack, seed):
    succeeded(augment(cli, pack, "--n-extra", 2, "--seed", seed))
    succeeded(cli("inspect", pack.parent / "more"))
    assert ex.Pack.open(pack.parent / "more").subspace.fingerprint


@pytest.mark.parametrize("value", ["x", "1.5", ""])
@pytest.mark.parametrize("option", ["--n-extra", "--seed"])
def test_a_number_of_the_wrong_type(cli, pack, option, value):
    options = {"--n-extra": 2, "--seed": 3, option: value}
    assert_usage_error(augment(cli, pack, *(x for pair in options.items() for x in pair)), option)


@pytest.mark.parametrize("left_out", ["--n-extra", "--seed", "--output"])
def test_an_option_that_is_missing(cli, pack, left_out):
    options = {"--n-extra": 2, "--seed": 3, "--output": pack.parent / "more"}
    del options[left_out]
    assert_usage_error(cli("augment", pack, *(x for pair in options.items() for x in pair)), left_out)


def test_a_pack_is_refused_without_overwrite_be_it_itself(cli, pack):
    before = contents(pack.parent)
    assert_refused(
        augment(cli, pack, "--n-extra", 2, "--seed", 3, output="pack"), 4, "is a pack already", "--overwrite"
    )
    assert contents(pack.parent) == before


def test_in_its_own_place_with_overwrite(cli, pack):
    succeeded(augment(cli, pack, "--n-extra", 2, "--seed", 3))
    succeeded(augment(cli, pack, "--n-extra", 2, "--seed", 3, "--overwrite", output="pack"))
    assert contents(pack) == contents(pack.parent / "more")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("output", "part"),
    [("in", "is not a pack"), ("pack/more", "is in the pack"), ("new/adapter_config.json", "not a folder")],
)
def test_what_is_no_place_for_a_pack(cli, pack, output, part, overwrite):
    before = contents(pack.parent)
    assert_refused(augment(cli, pack, "--n-extra", 2, "--seed", 3, *overwrite, output=output), 4, part)
    assert contents(pack.parent) == before


@pytest.mark.parametrize("given", ["nowhere", "in", "in/beta"])
def test_what_is_not_a_pack(cli, pack, given):
    before = contents(pack.parent)
    done = cli("augment", pack.parent / given, "--n-extra", 2, "--seed", 3, "-o", pack.parent / "more")
    assert_refused(done, 4, f"{pack.parent / given} is not a pack")
    assert contents(pack.parent) == before


def test_an_adapter_may_be_added_to_it(cli, pack):
    plain = json_of(cli("add", pack, f"plain={pack.parent / 'new'}", "--json"))["added"]["plain"]
    succeeded(augment(cli, pack, "--n-extra", 5, "--seed", 3))
    more = json_of(cli("add", pack.parent / "more", pack.parent / "new", "--json"))["added"]["new"]
    assert more["delta_error"] < plain["delta_error"]


@needs_fork
def test_a_disk_that_gets_full_leaves_nothing(cli, pack):
    succeeded(augment(cli, pack, "--n-extra", 2, "--seed", 3, output="wanted"))
    refused = 0
    for n in range(1, 60, 4):
        out = pack.parent / "more"

        def filled(n=n, out=out):
            at_change(n, out, no_more_room)
            main(["augment", str(pack), "--n-extra", "2", "--seed", "3", "-o", str(out)])

        done = children.run(filled)
        if done.code == 0:
            break
        assert_refused(done, IO_ERROR, "File too large", out)
        assert not out.exists()
        refused += 1
    assert contents(out) == contents(pack.parent / "wanted")
    assert refused > 3
