"""`eigenlorax fit` on what users give it: broken files, odd names, options out of range."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import eigenlorax as ex
from adapters import MODULES, change_config, change_tensors, factors, make_adapter, make_adapters
from eigenlorax.cli.main import IO_ERROR
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded
from users import make_users

QUERY = "encoder.layer.0.query"
QUERY_A, QUERY_B = (f"base_model.model.{QUERY}.lora_{side}.weight" for side in "AB")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config_text(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_bytes(data)


def config(**fields: object) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **fields)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, change)


def head(tensor: Tensor) -> Callable[[Path], object]:
    return tensors(lambda found: found.update({"base_model.model.classifier.weight": tensor}))


def cut(folder: Path, end: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:end])


def every_down(change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    return tensors(lambda found: found.update({k: change(v).clone() for k, v in found.items() if "lora_A" in k}))


def set_number(key: str, value: float) -> Callable[[Path], object]:
    return tensors(lambda found: found[key].view(-1)[4:5].fill_(value))


# name → how the second of two adapters is broken, and what the message must have besides the adapter's place
BROKEN = {
    "the weights end too early": (lambda f: cut(f, -10), ["not a valid safetensors file"]),
    "the weights end in the header": (lambda f: cut(f, 30), ["not a valid safetensors file"]),
    "the weights are empty": (lambda f: cut(f, 0), ["not a valid safetensors file"]),
    # nothing of the Hub: the folder is on this machine
    "the weights are missing": (lambda f: (f / WEIGHTS).unlink(), [f"neither {WEIGHTS} nor adapter_model.bin."]),
    "the weights are a link to nothing": (
        lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(f / "gone")],
        ["has neither"],
    ),
    "the weights are a folder": (lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], ["has neither"]),
    "no tensor": (lambda f: save_file({}, f / WEIGHTS), ["no LoRA tensor"]),
    "config cut short": (config_text(b'{"peft_type": "LO'), [CONFIG, "not valid JSON"]),
    "config empty": (config_text(b""), [CONFIG, "not valid JSON"]),
    "config is a list": (config_text(b"[1, 2]"), [CONFIG, "contains an array"]),
    "config is a text": (config_text(b'"LORA"'), [CONFIG, 'contains "LORA"']),
    "config is binary": (config_text(bytes(range(256))), [CONFIG, "not valid JSON"]),
    "config is UTF-16": (config_text('{"peft_type": "LORA"}'.encode("utf-16")), [CONFIG, "not valid JSON"]),
    "config nested without end": (config_text(b"[" * 100_000), [CONFIG]),
    "no peft_type": (config(peft_type=...), ["peft_type", "LORA"]),
    "IA3": (config(peft_type="IA3"), ["'IA3'", "LORA"]),
    "coefficients of a pack": (config(peft_type="EIGENLORAX"), ["coefficients were expected"]),
    "r is a text": (config(r="3"), ["r='3'"]),
    "r is 0": (config(r=0), ["r=0"]),
    "r is null": (config(r=None), ["r=None"]),
    "r is true": (config(r=True), ["r=True"]),
    "r is not the tensors' rank": (config(r=5), ["rank 3", "says 5"]),
    "lora_alpha is null": (config(lora_alpha=None), ["lora_alpha=None"]),
    "lora_alpha is NaN": (config(lora_alpha=float("nan")), ["lora_alpha=nan"]),
    "lora_alpha is beyond floats": (config(lora_alpha=10**400), ["lora_alpha"]),
    "rank_pattern is a list": (config(rank_pattern=["query"]), ["rank_pattern"]),
    "rank_pattern is no regular expression": (
        config(rank_pattern={"(query": 3}),
        ["cannot be used as a regular expression", "is not closed"],
    ),
    "rank_pattern nested without end": (config(rank_pattern={"(" * 3000 + ")" * 3000: 3}), ["pattern"]),
    "rank_pattern repeats without end": (config(rank_pattern={"a{99999999999999999999}": 3}), ["pattern"]),
    "the base model is a list": (config(base_model_name_or_path=["org/base"]), ["base_model_name_or_path"]),
    "the revision is a number": (config(revision=5), ["revision"]),
    "target_parameters is a number": (config(target_parameters=5), ["target_parameters"]),
    "target_parameters has numbers": (config(target_parameters=[5]), ["target_parameters"]),
    "lora_A without lora_B": (tensors(lambda found: found.pop(QUERY_B)), [QUERY_A, "no partner lora_B"]),
    "lora_B without lora_A": (tensors(lambda found: found.pop(QUERY_A)), [QUERY_B, "no partner lora_A"]),
    "integers in lora_A": (every_down(Tensor.int), [QUERY_A, "float32"]),
    "truth values in lora_A": (every_down(lambda t: t > 0), [QUERY_A, "float32"]),
    "float8 in lora_A": (every_down(lambda t: t.to(torch.float8_e4m3fn)), [QUERY_A, "float32"]),
    "lora_A is a vector": (every_down(lambda t: t[0]), [QUERY_A]),
    "lora_A is a number": (every_down(lambda t: t[0, 0]), [QUERY_A]),
    "A and B differ in rank": (every_down(lambda t: torch.cat([t, t])), [QUERY_A, "(6, 11)", QUERY_B, "(17, 3)"]),
    "rank 0": (
        tensors(
            lambda found: found.update({k: v[:0] if "lora_A" in k else v[:, :0].clone() for k, v in found.items()})
        ),
        ["(0, 11)", "at least 1"],
    ),
    "a tensor of another method": (
        tensors(lambda found: found.update({"base_model.model.dense.lokr_w1": torch.ones(2, 5)})),
        ["base_model.model.dense.lokr_w1", "Nothing was read"],
    ),
    "NaN in lora_A": (set_number(QUERY_A, float("nan")), [f"1 of 33 numbers of {QUERY}", "--exclude-adapter beta"]),
    "Inf in lora_B": (set_number(QUERY_B, float("-inf")), [f"1 of 51 numbers of {QUERY}", "--skip-bad"]),
    "NaN in a head": (head(torch.full((2, 31), float("nan"))), ["62 of 62", "classifier.weight", "--skip-bad"]),
    "updates beyond floats": (config(lora_alpha=1e300), ["beta"]),
}


def cases() -> list[object]:
    return [pytest.param(*case, id=name) for name, case in BROKEN.items()]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A parent folder of two sound adapters, `alpha` and `beta`."""
    make_adapters(tmp_path / "in", "alpha beta")
    return tmp_path / "in"


class TestABrokenAdapter:
    @pytest.mark.parametrize(("break_it", "parts"), cases())
    def test_is_named_and_nothing_is_written(self, cli, pair, break_it, parts):
        break_it(pair / "beta")
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 4)
        assert_refused(done, 3, "beta", *parts)
        assert contents(pair.parent) == before

    @pytest.mark.parametrize(("break_it", "parts"), cases())
    def test_is_left_out_and_named_with_skip_bad(self, cli, pair, break_it, parts):
        break_it(pair / "beta")
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 3, "--skip-bad")
        assert succeeded(done).err.startswith("note: left out beta: ")
        # what to do is left to those whom an error stops
        assert all(part in done.err for part in parts if not part.startswith("--"))
        pack = ex.Pack.open(pair.parent / "pack")
        assert pack.names == ["alpha"]
        assert list(pack.fit_info.skipped) == ["beta"]

    def test_is_not_read_if_it_is_excluded(self, cli, pair):
        cut(pair / "beta", 5)
        (pair / "beta" / CONFIG).write_text("{")
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 3, "--exclude-adapter", "beta"))
        assert ex.Pack.open(pair.parent / "pack").names == ["alpha"]

    def test_skip_bad_has_to_leave_something(self, cli, pair):
        for name in ("alpha", "beta"):
            cut(pair / name, 5)
        before = contents(pair.parent)
        assert_refused(cli("fit", pair, "-o", pair.parent / "pack", "--skip-bad"), 3, "No adapter is left to fit")
        assert contents(pair.parent) == before

    def test_without_a_config_it_is_an_error(self, cli, pair):
        (pair / "beta" / CONFIG).unlink()
        assert_refused(
            cli("fit", pair, "-o", pair.parent / "pack", "-k", 3), 3, f"beta has no {CONFIG} beside {WEIGHTS}"
        )
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 3, "--skip-bad"))

    def test_a_whole_model_is_passed_over_by_name(self, cli, pair):
        (pair / "beta" / CONFIG).unlink()
        (pair / "beta" / WEIGHTS).rename(pair / "beta/model.safetensors")
        done = succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 3))
        assert done.err.startswith(
            f"note: {pair / 'beta'} was passed over: it holds model.safetensors but no {CONFIG}."
        )

    def test_notes_come_before_an_error_too(self, cli, pair):
        (pair / "beta" / CONFIG).unlink()
        (pair / "beta" / WEIGHTS).rename(pair / "beta/model.safetensors")
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 30)
        assert_refused(done, 3, "-k 30")
        assert done.err.startswith(f"note: {pair / 'beta'} was passed over")


class TestAPickle:
    def test_needs_the_flag(self, cli, pair):
        shutil.rmtree(pair / "beta")
        make_adapter(pair / "beta", seed=2, pickled=True)
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 4)
        assert_refused(done, 3, pair / "beta", "adapter_model.bin", "may run code", "--allow-pickle")
        assert contents(pair.parent) == before

    def test_reads_the_same_as_safetensors_with_the_flag(self, cli, pair, tmp_path):
        make_adapter(tmp_path / "pickled", seed=2, pickled=True)
        options = ["--allow-pickle", "-k", 4]
        for output, beta in (("one", pair / "beta"), ("two", tmp_path / "pickled")):
            succeeded(cli("fit", pair / "alpha", f"beta={beta}", "-o", tmp_path / output, *options))
        one, two = (ex.Pack.open(tmp_path / name) for name in ("one", "two"))
        assert one.subspace.fingerprint == two.subspace.fingerprint

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_is_never_run(self, cli, pair, tmp_path, protocol, zipped):
        (pair / "beta" / WEIGHTS).unlink()
        torch.save(
            {QUERY_A: Payload(tmp_path / "owned")},
            pair / "beta" / "adapter_model.bin",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", tmp_path / "pack", "-k", 4, "--allow-pickle")
        assert_refused(done, 3, pair / "beta" / "adapter_model.bin", "weights_only=True")
        assert contents(pair.parent) == before
        assert not (tmp_path / "owned").exists()

    def test_the_payload_would_have_worked(self, tmp_path):
        torch.save(Payload(tmp_path / "owned"), tmp_path / "file.bin")
        torch.load(tmp_path / "file.bin", weights_only=False)
        assert (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "content",
        [
            [torch.ones(2, 3)],
            {QUERY_A: "text"},
            {5: torch.ones(2, 3)},
        ],
    )
    def test_that_holds_no_state_dict(self, cli, pair, content):
        (pair / "beta" / WEIGHTS).unlink()
        torch.save(content, pair / "beta" / "adapter_model.bin")
        done = cli("fit", pair, "-o", pair.parent / "pack", "--allow-pickle")
        assert_refused(done, 3, pair / "beta", "not a state dict")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04garbage", b"text"])
    def test_that_is_broken(self, cli, pair, content):
        (pair / "beta" / WEIGHTS).unlink()
        (pair / "beta" / "adapter_model.bin").write_bytes(content)
        done = cli("fit", pair, "-o", pair.parent / "pack", "--allow-pickle")
        assert_refused(done, 3, pair / "beta" / "adapter_model.bin", "cannot be read")


class Payload:
    """Unpickled without restraint, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class TestAdaptersThatDoNotBelongTogether:
    def test_shapes_name_module_both_adapters_and_a_way_out(self, cli, pair):
        make_adapter(pair / "beta", seed=2, modules={**MODULES, QUERY: (17, 12)})
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 4)
        parts = [QUERY, "(17, 11) in adapter 'alpha'", "(17, 12) in 'beta'", f"--exclude-module {QUERY}"]
        assert_refused(done, 3, *parts)
        assert contents(pair.parent) == before
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--exclude-module", QUERY))

    def test_two_base_models_are_both_named(self, cli, pair):
        make_adapter(pair / "beta", seed=2, base="org/other")
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 4)
        assert_refused(done, 3, "'alpha' has 'org/base'", "'beta' has 'org/other'", "--same-base")
        assert contents(pair.parent) == before
        assert json_of(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--same-base", "--json"))[
            "base_model"
        ] in ("org/base", "org/other")

    def test_two_revisions_are_both_named(self, cli, pair):
        make_adapter(pair / "alpha", seed=1, revision="v1")
        make_adapter(pair / "beta", seed=2, revision="v2")
        done = cli("fit", pair, "-o", pair.parent / "pack", "-k", 4)
        assert_refused(done, 3, "revision", "'alpha' has 'v1'", "'beta' has 'v2'", "--same-base")
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--same-base"))

    def test_a_revision_that_is_not_stated_fits_any(self, cli, pair):
        make_adapter(pair / "beta", seed=2, revision="v2")
        found = json_of(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--json"))
        assert (found["base_model"], found["revision"]) == ("org/base", "v2")

    def test_a_base_model_that_is_not_stated_is_noted(self, cli, pair):
        make_adapter(pair / "beta", seed=2, base=None)
        done = succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4))
        assert done.err.startswith("note: no base model is stated by adapter 'beta'")
        assert "base model" in done.err
        assert ex.Pack.open(pair.parent / "pack").base_model == "org/base"

    def test_an_untrained_one_is_kept_and_named(self, cli, pair):
        change_tensors(pair / "beta", lambda found: [v.zero_() for k, v in found.items() if "lora_B" in k])
        done = succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--json"))
        assert "untrained" in done.err
        assert "beta" in done.err
        assert json.loads(done.out)["untrained"] == ["beta"]
        assert ex.Pack.open(pair.parent / "pack").records["beta"].in_fit is False

    def test_none_that_is_trained(self, cli, pair):
        for name in ("alpha", "beta"):
            change_tensors(pair / name, lambda found: [v.zero_() for k, v in found.items() if "lora_B" in k])
        before = contents(pair.parent)
        assert_refused(cli("fit", pair, "-o", pair.parent / "pack"), 3, "No adapter has a trained update")
        assert contents(pair.parent) == before

    def test_one_alone_is_a_pack_that_loses_nothing(self, cli, pair):
        found = json_of(cli("fit", pair / "alpha", "-o", pair.parent / "pack", "-k", 4, "--json"))
        assert found["adapters"] == 1
        assert found["in_fit"]["worst"] < 1e-6


class TestNames:
    @pytest.mark.parametrize("given", ["a b", "größe", "..a", "lr=3", "a.", "a" * 97, "-a", "日本", "a\nb"])
    def test_a_folder_that_cannot_give_one_asks_for_one(self, cli, tmp_path, given):
        make_adapter(tmp_path / "in" / given, seed=1)
        before = contents(tmp_path)
        done = cli("fit", tmp_path / "in" / given, "-o", tmp_path / "pack", "-k", 3)
        assert_refused(done, 3, f"adapter name {given!r} is not allowed", "NAME=PATH")
        assert contents(tmp_path) == before
        succeeded(cli("fit", f"good={tmp_path / 'in' / given}", "-o", tmp_path / "pack", "-k", 3))
        assert ex.Pack.open(tmp_path / "pack").names == ["good"]

    @pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "a.", "x y", "", "ä", "a" * 97, "con:", "a\\b"])
    def test_that_are_given_and_not_allowed(self, cli, pair, name):
        before = contents(pair.parent)
        done = cli("fit", f"{name}={pair / 'alpha'}", "-o", pair.parent / "pack")
        assert_refused(done, 3, f"adapter name {name!r} is not allowed", "letters")
        assert contents(pair.parent) == before

    @pytest.mark.parametrize("name", ["a", "0", "A.b-c_9", "a" * 96, "alpha.2"])
    def test_that_are_given_and_allowed(self, cli, pair, name):
        succeeded(cli("fit", f"{name}={pair / 'alpha'}", "-o", pair.parent / "pack", "-k", 3))
        assert ex.Pack.open(pair.parent / "pack").names == [name]

    @pytest.mark.parametrize(
        "first",
        ["alpha", "a"],
    )
    def test_twice_the_same(self, cli, tmp_path, first):
        one, two = make_adapter(tmp_path / "one" / first, seed=1), make_adapter(tmp_path / "two" / first, seed=2)
        before = contents(tmp_path)
        done = cli("fit", one, two, "-o", tmp_path / "pack", "-k", 4)
        assert_refused(done, 3, f"two adapters have the same name, {first!r}", "NAME=PATH")
        assert contents(tmp_path) == before
        succeeded(cli("fit", one, f"other={two}", "-o", tmp_path / "pack", "-k", 4))
        assert ex.Pack.open(tmp_path / "pack").names == sorted([first, "other"])

    def test_that_differ_by_case_alone(self, cli, tmp_path):
        one, two = make_adapter(tmp_path / "one" / "Alpha", seed=1), make_adapter(tmp_path / "two" / "alpha", seed=2)
        done = cli("fit", one, two, "-o", tmp_path / "pack", "-k", 4)
        assert_refused(done, 3, "'Alpha'", "'alpha'", "case is ignored", "NAME=PATH")

    def test_one_adapter_by_two_paths(self, cli, pair):
        done = cli("fit", pair, f"{pair}/../in/alpha/", "-o", pair.parent / "pack", "-k", 4)
        assert_refused(done, 3, "two adapters have the same name, 'alpha'")

    def test_of_paths_that_are_roundabout(self, cli, pair, monkeypatch):
        monkeypatch.chdir(pair / "alpha")
        succeeded(cli("fit", ".", "../beta//", "-o", "../../pack", "-k", 4))
        assert ex.Pack.open(pair.parent / "pack").names == ["alpha", "beta"]

    def test_of_a_link_is_its_own(self, cli, pair):
        (pair / "gamma").symlink_to(make_adapter(pair.parent / "elsewhere", seed=3))
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4))
        assert ex.Pack.open(pair.parent / "pack").names == ["alpha", "beta", "gamma"]

    def test_to_exclude_that_fit_none(self, cli, pair):
        done = cli("fit", pair, "-o", pair.parent / "pack", "--exclude-adapter", "gamma")
        assert_refused(done, 3, "no adapter named 'gamma' in the sources (--exclude-adapter)", "alpha, beta")


class TestWhereAdaptersAre:
    def test_an_empty_folder(self, cli, tmp_path):
        (tmp_path / "in").mkdir()
        done = cli("fit", tmp_path / "in", "-o", tmp_path / "pack")
        assert_refused(done, 3, tmp_path / "in", CONFIG, "no adapter was found")
        assert not (tmp_path / "pack").exists()

    @pytest.mark.parametrize("given", ["nowhere", "nowhere/", "./no/where", "/no/such/place"])
    def test_nowhere(self, cli, tmp_path, monkeypatch, given):
        monkeypatch.chdir(tmp_path)
        assert_refused(cli("fit", given, "-o", "pack"), 3, given.strip("./"), "does not exist", "org/name")
        assert contents(tmp_path) == {}

    def test_nowhere_with_an_equals_sign(self, cli, pair):
        given = f"{pair}/lr=3/best"
        assert_refused(cli("fit", given, "-o", pair.parent / "pack"), 3, f"{given} does not exist", "NAME=PATH")

    @pytest.mark.parametrize(("given", "part"), [("", "empty"), (" ", "empty"), ("name=", "no path after the '='")])
    def test_an_unset_variable_is_not_the_current_folder(self, cli, pair, monkeypatch, given, part):
        monkeypatch.chdir(pair)
        before = contents(pair.parent)
        assert_refused(cli("fit", given, "-o", "../pack", "-k", 4), 3, part)
        assert contents(pair.parent) == before

    def test_a_file(self, cli, pair):
        done = cli("fit", pair / "alpha" / WEIGHTS, "-o", pair.parent / "pack")
        assert_refused(done, 3, pair / "alpha" / WEIGHTS, "not a folder", CONFIG)

    def test_one_level_too_deep(self, cli, pair):
        done = cli("fit", pair.parent, "-o", pair.parent / "pack")
        assert_refused(done, 3, f"try {pair}.")

    def test_a_parent_folder_has_many_names(self, cli, pair):
        done = cli("fit", f"mine={pair}", "-o", pair.parent / "pack")
        assert_refused(done, 3, f"mine={pair}", "one adapter", "has 2.")

    def test_a_pack(self, cli, pair):
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4))
        done = cli("fit", pair.parent / "pack", "-o", pair.parent / "other")
        assert_refused(done, 3, "is a pack, not an adapter", "eigenlorax export")
        done = cli("fit", pair.parent / "pack" / "adapters", "-o", pair.parent / "other")
        assert_refused(done, 3, "alpha", "eigenlorax export")

    def test_a_pack_beside_them_is_passed_over_by_name(self, cli, pair):
        succeeded(cli("fit", pair, "-o", pair / "pack", "-k", 4))
        done = succeeded(cli("fit", pair, "-o", pair / "again", "-k", 4))
        assert done.err == f"note: {pair / 'pack'} was passed over: it is a pack.\n"

    def test_a_path_with_an_equals_sign_is_a_path(self, cli, tmp_path):
        make_adapter(tmp_path / "lr=3" / "alpha", seed=1)
        succeeded(cli("fit", tmp_path / "lr=3" / "alpha", f"b={tmp_path}/lr=3/alpha", "-o", tmp_path / "pack", "-k", 3))
        assert ex.Pack.open(tmp_path / "pack").names == ["alpha", "b"]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["-k", 0], ["-k must be at least 1, got 0"]),
            (["-k", -3], ["-k must be at least 1, got -3"]),
            (["-k", 30], ["-k 30 exceeds", "Pass 29, the largest dimension"]),
            (["-k", 10**30], ["Pass 29, the largest dimension"]),
            (["--energy", 1.5], ["energy", "at most 1", "1.5"]),
            (["--energy", 0], ["energy", "above 0", "0.0"]),
            (["--energy", "nan"], ["energy", "nan"]),
            (["--energy", 0.9, "-k", 4], ["pass exactly one of -k, --energy", "-k 4, --energy 0.9"]),
            (["--max-error", 1], ["--max-error", "above 0 and below 1", "1.0"]),
            (["--max-error", 0.3, "--energy", 0.9], ["--energy 0.9, --max-error 0.3"]),
            (["--max-error", 1e-9], ["--max-error 1e-09 is less than numbers in float32 can keep", "--dtype float64"]),
            (["-k", "auto"], ["-k auto leaves out", "needs at least 3 trained ones, got 2"]),
            (
                ["-k", "auto", "--max-error", 0.3],
                ["-k auto chooses a number by itself, and so does --max-error 0.3. Pass one of them."],
            ),
            (["-k", 4, "--warn-above", 2], ["--warn-above", "0 to 1", "2.0"]),
            (["-k", 4, "--weighting", "pca"], ["weighting", "delta, factors", "'pca'"]),
            (["-k", 4, "--sweeps", -1], ["sweeps", "-1"]),
            (["-k", 4, "--dtype", "int3"], ["float64, float32, float16, bfloat16, int8, int4", "int3"]),
            (["-k", 4, "--coefficient-dtype", "half"], ["float16", "half"]),
            (
                ["-k", 4, "--exclude-module", "key"],
                ["'key' matches no module (--exclude-module)", QUERY],
            ),
            (["-k", 4, "--exclude-module", "*"], ["No module is left to fit"]),
        ],
    )
    def test_out_of_range(self, cli, pair, options, parts):
        before = contents(pair.parent)
        assert_refused(cli("fit", pair, "-o", pair.parent / "pack", *options), 3, *parts)
        assert contents(pair.parent) == before

    @pytest.mark.parametrize("device", ["bogus", "cuda:99", "meta"])
    def test_a_device_that_is_not_there(self, cli, pair, device):
        assert_refused(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--device", device), 3, device)

    @pytest.mark.parametrize("k", ["x", "1.5", ""])
    def test_of_the_wrong_type(self, cli, pair, k):
        assert_usage_error(cli("fit", pair, "-o", pair.parent / "pack", "-k", k), "--n-components")

    def test_a_number_that_is_found_and_why(self, cli, pack):
        done = succeeded(cli("fit", pack.parent / "in", "-o", pack.parent / "two", "-k", "auto", "--warn-above", 1))
        k = ex.Pack.open(pack.parent / "two").fit_info.n_components
        assert re.fullmatch(rf"note: -k {k} was chosen: adapters left out of the fit .*\.\n", done.err)
        assert f"at most {k} components (auto)" in done.out

    def test_why_is_in_the_json(self, cli, pack):
        done = cli("fit", pack.parent / "in", "-o", pack.parent / "two", "--n-components", "auto", "--json")
        found = json_of(done)
        (sentence,) = found["notes"]
        assert sentence.startswith(f"n_components={found['fit']['n_components']} was chosen: ")
        assert found["fit"]["auto"] is True
        assert json_of(cli("fit", pack.parent / "in", "-o", pack.parent / "three", "-k", 4, "--json"))["notes"] == []

    def test_an_error_that_may_not_be_passed(self, cli, pair):
        found = json_of(cli("fit", pair, "-o", pair.parent / "pack", "--max-error", 0.3, "--json"))
        assert 0.1 < found["in_fit"]["worst"] <= 0.3
        assert found["fit"]["max_error"] == 0.3

    def test_losses_are_noted_above_the_share_that_was_asked_for(self, cli, pair):
        done = succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 2))
        worst = max(record.delta_error for record in ex.Pack.open(pair.parent / "pack").records.values())
        assert worst > 0.5
        assert re.fullmatch(r"note: The delta error is above 0\.5 for .*\. About -k \d+ .*\.\n", done.err)
        for share, noted in ((worst + 1e-6, False), (worst - 1e-6, True)):
            done = succeeded(
                cli("fit", pair, "-o", pair.parent / "pack", "-k", 2, "--warn-above", share, "--overwrite")
            )
            assert ("delta error is above" in done.err) is noted

    def test_that_are_missing(self, cli, pair):
        assert_usage_error(cli("fit", "-o", pair.parent / "pack"), "ADAPTER")
        assert_usage_error(cli("fit", pair), "--output")
        assert_usage_error(cli("fit", pair, "-o", pair.parent / "pack", "--nope"), "--nope")

    @pytest.mark.parametrize(("option", "passed"), [("--basis", "3.5"), ("--sweeps", "two"), ("--ratio", "2,5")])
    def test_a_text_that_is_no_number(self, cli, pair, option, passed):
        done = cli("fit", pair, "-o", pair.parent / "pack", option, passed)
        assert_usage_error(done, option, f"'{passed}' is not a valid ")

    @pytest.mark.parametrize(("pattern", "left"), [("query", 1), ("layer.1.*", 2), ("encoder.layer.[0]*.value", 2)])
    def test_modules_to_exclude_are_carried(self, cli, pair, pattern, left):
        found = json_of(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4, "--exclude-module", pattern, "--json"))
        assert found["modules"] == left
        assert len(found["fit"]["excluded_modules"]) == 3 - left
        excluded = found["fit"]["excluded_modules"][0]
        source, kept = ex.read_adapter(pair / "beta"), ex.Pack.open(pair.parent / "pack").adapter("beta")
        assert torch.equal(kept.modules[excluded].down, source.modules[excluded].down)


class TestTheOutput:
    def test_a_file_is_refused(self, cli, pair):
        target = pair.parent / "file"
        target.write_text("mine")
        assert_refused(cli("fit", pair, "-o", target, "-k", 4), 4, target, "not a folder")
        assert_refused(cli("fit", pair, "-o", target / "below", "-k", 4), 4, target, "not a folder")
        assert target.read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    @pytest.mark.parametrize(
        "there", ["notes.txt", "README.md", "subspace-notes.txt", "subspace-x.safetensors", "adapters/mine.txt", "a/b"]
    )
    def test_a_folder_of_somebody_else_is_refused(self, cli, pair, there, overwrite):
        target = pair.parent / "pack"
        (target / there).parent.mkdir(parents=True)
        (target / there).write_text("mine")
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", target, "-k", 4, *overwrite)
        assert_refused(done, 4, target, "is not a pack", there.partition("/")[0], "nothing was changed")
        assert contents(pair.parent) == before

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_the_folder_that_holds_the_sources_is_refused(self, cli, tmp_path, monkeypatch, overwrite):
        # a pack keeps its own adapters under this very name
        make_adapters(tmp_path / "adapters", "alpha beta")
        before = contents(tmp_path)
        monkeypatch.chdir(tmp_path)
        assert_refused(cli("fit", "adapters/", "-o", ".", "-k", 4, *overwrite), 4, "is not a pack", "'adapters'")
        assert contents(tmp_path) == before

    def test_a_pack_is_refused_without_overwrite(self, cli, pair):
        target = pair.parent / "pack"
        succeeded(cli("fit", pair, "-o", target, "-k", 4))
        before = contents(pair.parent)
        assert_refused(cli("fit", pair, "-o", target, "-k", 3), 4, target, "is a pack already", "--overwrite")
        assert contents(pair.parent) == before

    def test_a_pack_is_replaced_with_overwrite(self, cli, pair):
        target = pair.parent / "pack"
        succeeded(cli("fit", pair, "-o", target, "-k", 4))
        succeeded(cli("fit", pair / "beta", "-o", target, "-k", 2, "--overwrite"))
        succeeded(cli("fit", pair / "beta", "-o", pair.parent / "fresh", "-k", 2))
        assert contents(target) == contents(pair.parent / "fresh")

    def test_the_inside_of_a_pack_is_refused(self, cli, pair):
        target = pair.parent / "pack"
        succeeded(cli("fit", pair, "-o", target, "-k", 4))
        before = contents(pair.parent)
        done = cli("fit", pair, "-o", target / "adapters" / "more", "-k", 4)
        assert_refused(done, 4, f"is in the pack {target}")
        assert contents(pair.parent) == before

    def test_a_link_to_a_folder_is_followed_and_stays(self, cli, pair):
        (pair.parent / "disk").mkdir()
        (pair.parent / "pack").symlink_to("disk")
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4))
        assert (pair.parent / "pack").is_symlink()
        assert ex.Pack.open(pair.parent / "disk").names == ["alpha", "beta"]

    def test_a_link_to_nothing_is_refused(self, cli, pair):
        (pair.parent / "pack").symlink_to("gone")
        assert_refused(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4), 4, "link to nothing")

    def test_a_name_too_long_for_the_disk(self, cli, pair):
        done = cli("fit", pair, "-o", pair.parent / ("p" * 300), "-k", 4)
        assert_refused(done, IO_ERROR, "File name too long", "p" * 300)

    def test_the_same_input_gives_the_same_bytes_in_any_order(self, cli, pair):
        succeeded(cli("fit", pair / "alpha", pair / "beta", "-o", pair.parent / "one", "-k", 4))
        succeeded(cli("fit", f"{pair}/beta/", pair / "alpha", "-o", pair.parent / "two", "-k", 4))
        assert contents(pair.parent / "one") == contents(pair.parent / "two")

    def test_sources_are_never_touched(self, cli, pair):
        before = contents(pair)
        succeeded(cli("fit", pair, "-o", pair.parent / "pack", "-k", 4))
        assert contents(pair) == before


class TestOddButSound:
    @pytest.mark.parametrize(
        "change",
        [
            config(rank_pattern={"|".join(f"layer{number}" for number in range(400)): 5}),
            config(lora_alpha=-4),
            config(lora_alpha=0.37),
            config(modules_to_save=[]),
            head(torch.ones(2, 31, dtype=torch.int64)),
            head(torch.tensor(3.0)),
            head(torch.zeros(0, 5)),
            tensors(lambda found: found.update({k: v * 1e-30 for k, v in found.items()})),
            config(base_model_name_or_path="größe/日本"),
        ],
    )
    def test_adapters_are_taken_and_come_back(self, cli, tmp_path, change):
        change(make_adapter(tmp_path / "alpha", seed=1))
        succeeded(cli("fit", tmp_path / "alpha", "-o", tmp_path / "pack", "-k", 4))
        succeeded(cli("export", tmp_path / "pack", "-o", tmp_path / "out"))
        assert (tmp_path / "out" / "alpha" / CONFIG).read_bytes() == (tmp_path / "alpha" / CONFIG).read_bytes()
        source, back = ex.read_adapter(tmp_path / "alpha"), ex.read_adapter(tmp_path / "out" / "alpha")
        assert sorted(source.specs) == sorted(back.specs)
        for module, expected in source.modules.items():
            got = back.modules[module]
            delta, wanted = (f.scaling * f.up.double() @ f.down.double() for f in (got, expected))
            assert torch.linalg.norm(delta - wanted) <= 1e-5 * torch.linalg.norm(wanted)
        assert all(torch.equal(back.heads[key], value) for key, value in source.heads.items())

    def test_a_base_model_that_utf8_cannot_hold(self, cli, tmp_path):
        make_adapter(tmp_path / "alpha", seed=1)
        path = tmp_path / "alpha" / CONFIG
        path.write_text(path.read_text().replace("org/base", "org/\\ud800"))
        succeeded(cli("fit", tmp_path / "alpha", "-o", tmp_path / "pack", "-k", 4))
        ex.Pack.open(tmp_path / "pack").verify()
        assert r"org/\ud800" in (tmp_path / "pack" / "README.md").read_text()

    def test_factors_of_one_file_may_share_nothing_with_another(self, cli, tmp_path):
        make_adapter(tmp_path / "in" / "alpha", seed=1, modules={QUERY: MODULES[QUERY]})
        make_adapter(tmp_path / "in" / "beta", seed=2, modules={"encoder.layer.0.value": (13, 23)})
        found = json_of(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "-k", 4, "--json"))
        assert found["modules"] == 2
        assert found["in_fit"]["worst"] < 1e-6

    def test_ranks_may_differ(self, cli, tmp_path):
        make_adapter(tmp_path / "in" / "alpha", seed=1, rank=2)
        make_adapter(tmp_path / "in" / "beta", seed=2, rank=5)
        extra = factors(seed=4, rank=4, modules={"encoder.layer.2.key": (37, 41)})
        make_adapter(tmp_path / "in" / "gamma", seed=3, tensors=extra, config={"rank_pattern": {"layer.2.key": 4}})
        found = json_of(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "-k", 4, "--json"))
        assert found["ranks"] == [2, 3, 4, 5]


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    return make_users(tmp_path_factory.mktemp("users"), ["ann", "bob"])


class TestReference:
    def test_members_are_stored_as_changes_from_the_common_adapter(self, cli, users, tmp_path):
        common, members = users
        arguments = ("fit", *members.values(), "--reference", common, "-o", tmp_path / "pack")
        out = succeeded(cli(*arguments)).out
        assert "members (members)" in out
        history = ex.Pack.open(tmp_path / "pack").histories["members"]
        own = sum(record.file_bytes for record in history.versions[1:])
        assert (
            f"{own / 2:,.0f}, with its share of the common adapter {(own + history['common'].file_bytes) / 2:,.0f}"
            in out
        )
        assert "at most 0.2" in out or "at most 0.19" in out
        fitted = json_of(cli(*arguments, "--max-bytes-per-adapter", "0.3kB", "--overwrite", "--json"))
        assert fitted["histories"]["members"]["common_bytes"] == history["common"].file_bytes
        sizes = [record.file_bytes for record in ex.Pack.open(tmp_path / "pack").histories["members"]][1:]
        assert all(250 < size <= 300 for size in sizes)
        inspected = succeeded(cli("inspect", tmp_path / "pack")).out
        assert "bytes of the common adapter" in inspected

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-k", 3), "-k has no effect on adapters that are coded as changes from a common one (--reference)"),
            (("--report",), "--report is about adapters over a subspace"),
            (("--max-error", 0.1, "--max-bytes-per-adapter", 900), "--max-bytes-per-adapter chooses the errors of"),
        ],
    )
    def test_what_it_contradicts_is_an_error(self, cli_with_reports, users, tmp_path, options, message):
        common, members = users
        done = cli_with_reports("fit", *members.values(), "--reference", common, "-o", tmp_path / "pack", *options)
        assert_refused(done, 3, message)
        assert not (tmp_path / "pack").exists()
