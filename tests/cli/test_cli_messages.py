"""What a new user is told: options by their names on the command line, what is missing, and what to do about it."""

import json

import pytest
import typer

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.cli import command_line, spelling
from outcomes import assert_refused, succeeded

pytestmark = pytest.mark.usefixtures("without_shape_checks")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    make_adapters(tmp_path / "in", "alpha beta")
    return tmp_path / "in"


def change_config(adapter, **fields):
    config = json.loads((adapter / CONFIG).read_text("utf-8"))
    (adapter / CONFIG).write_text(json.dumps({**config, **fields}), "utf-8")


class TestOptionsByName:
    @pytest.mark.parametrize(
        ("of_python", "of_the_command"),
        [
            ("n_components must be at least 1, got 0.", "-k must be at least 1, got 0."),
            (
                "pass exactly one of n_components, energy, max_error, max_bytes and ratio: got n_components=5, "
                "energy=0.5.",
                "pass exactly one of -k, --energy, --max-error, --max-bytes and --ratio: got -k 5, --energy 0.5.",
            ),
            ("workers=0 requires engine='processes' (--engine processes).", "--workers 0 requires --engine processes."),
            (
                "Exclude it with exclude_modules=['a.b'] (--exclude-module a.b).",
                "Exclude it with --exclude-module a.b.",
            ),
            ("matches no module (exclude_modules, --exclude-module). Try", "matches no module (--exclude-module). Try"),
            ("or all with skip_bad=True (--skip-bad).", "or all with --skip-bad."),
            ("pass --allow-pickle (allow_pickle=True): then", "pass --allow-pickle: then"),
            ("Pass a smaller batch_size= (--batch-size).", "Pass a smaller --batch-size."),
            ("Or pass add=False (--no-add).", "Or pass --no-add."),
            ("More components (-k, n_components) help.", "More components (-k) help."),
            ("About -k 5 (n_components=5) would do.", "About -k 5 would do."),
            ("Columns.text (--text-column) is missing", "--text-column is missing"),
            ("Remove basis (--basis); or", "Remove --basis; or"),
            (
                "Pass n_components (-k), energy or max_error, and a float dtype or none",
                "Pass -k, --energy or --max-error, and a float dtype or none",
            ),
            (
                "without sweeps. Or pass n_components (-k), energy, or a float dtype",
                "without sweeps. Or pass -k, --energy, or a float dtype",
            ),
            ("is downloaded with allow_pickle=True, --allow-pickle only", "is downloaded with --allow-pickle only"),
            ("store wider ones (dtype='float64', --dtype float64).", "store wider ones (--dtype float64)."),
            ("Add the adapter without extend (--extend).", "Add the adapter without --extend."),
            ("extend=0: it must be 1 to 9. Remove extend to", "--extend 0: it must be 1 to 9. Remove --extend to"),
            ("Remove basis for a pack", "Remove --basis for a pack"),
            ("r must be at least 1", "--rank must be at least 1"),
            ("alpha must be a number above 0", "--alpha must be a number above 0"),
            ("head_learning_rate must be above 0", "--head-learning-rate must be above 0"),
            ("seed must be at least 0", "--seed must be at least 0"),
            ("alpha is the same as beta", "alpha is the same as beta"),
            ("epochs must be above 0", "--epochs must be above 0"),
            ("max_cpu_loras must be at least max_loras, 4", "--max-cpu-loras must be at least --max-loras, 4"),
            ("start='foo' is neither 'zero' nor", "--start foo is neither 'zero' nor"),
            # paths and words of sentences stay what they are
            ("runs/ratio=8/energy does not exist.", "runs/ratio=8/energy does not exist."),
            ("The ratio of a pack, its rank and its model.", "The ratio of a pack, its rank and its model."),
            ("r=8 and lora_alpha=None of module x", "r=8 and lora_alpha=None of module x"),
        ],
    )
    def test_in_place_of_keywords(self, of_python, of_the_command):
        assert spelling.on_command_line(of_python) == of_the_command

    def test_every_one_is_an_option_of_a_verb(self):
        verbs = typer.main.get_command(command_line()).commands.values()
        options = {option for verb in verbs for parameter in verb.params for option in parameter.opts}
        # vLLM's own option
        assert set(spelling.OPTIONS.values()) - options == set()

    def test_errors_and_notes_have_them(self, cli, folder):
        done = cli("fit", folder, "-o", folder.parent / "pack", "-k", 2, "--energy", 0.5)
        assert_refused(done, 3, "pass exactly one of -k, --energy", "got -k 2, --energy 0.5. For example -k 32")


class TestAdapters:
    def test_weights_without_a_config(self, cli, folder):
        (folder / "beta" / CONFIG).unlink()
        done = cli("fit", folder / "beta", "-o", folder.parent / "pack")
        assert_refused(done, 3, f"{folder / 'beta'} has no {CONFIG} beside {WEIGHTS}", "copy the config, too")
        assert "--exclude-adapter" not in done.err

    def test_among_others_it_can_be_left_out(self, cli, folder):
        (folder / "beta" / CONFIG).unlink()
        line = ["fit", folder / "alpha", folder / "beta", "-o", folder.parent / "pack"]
        assert_refused(cli(*line), 3, f"{folder / 'beta'} has no {CONFIG}", "Leave it out with --exclude-adapter beta")
        assert "left out beta" in succeeded(cli(*line, "--skip-bad")).err
        succeeded(cli(*line, "--exclude-adapter", "beta", "--overwrite"))

    def test_the_only_adapter_cannot_be_left_out(self, cli, folder):
        (folder / "beta" / WEIGHTS).write_bytes(b"damaged")
        done = cli("fit", folder / "beta", "-o", folder.parent / "pack")
        assert_refused(done, 3, WEIGHTS)
        assert "Leave it out" not in done.err
        assert "Leave it out with --exclude-adapter beta" in cli("fit", folder, "-o", folder.parent / "pack").err

    def test_dora_without_magnitudes(self, cli, folder):
        change_config(folder / "beta", use_dora=True)
        done = cli("fit", folder, "-o", folder.parent / "pack")
        assert_refused(done, 3, f"beta/{WEIGHTS}: use_dora is true in {CONFIG}", "have no lora_magnitude_vector")

    @pytest.mark.parametrize("targets", [5, [5], [None], {"query": 1}])
    def test_target_modules_that_are_no_names(self, cli, folder, targets):
        change_config(folder / "beta", target_modules=targets)
        done = cli("fit", folder, "-o", folder.parent / "pack")
        assert_refused(done, 3, f"beta/{CONFIG}: target_modules is {targets!r}; a list of module names")

    @pytest.mark.parametrize("targets", ["all-linear", ["query"], None])
    def test_target_modules_that_are(self, cli, folder, targets):
        change_config(folder / "beta", target_modules=targets)
        succeeded(cli("fit", folder, "-o", folder.parent / "pack"))

    def test_a_config_that_is_null(self, cli, folder):
        (folder / "beta" / CONFIG).write_text("null")
        assert_refused(cli("fit", folder, "-o", folder.parent / "pack"), 3, f"{CONFIG} contains null; an object was")

    def test_a_name_for_one_to_train(self):
        with pytest.raises(
            ex.errors.AdapterNameError, match=r"NAME=PATH for .* to read, name= \(--name\) for one to train"
        ):
            ex.core.keys.check_name("a/b")


class TestPacks:
    def test_one_that_is_larger_than_the_loras(self, cli, tmp_path):
        make_adapter(tmp_path / "one", seed=1)
        done = succeeded(cli("fit", tmp_path / "one", "-o", tmp_path / "pack", "-k", 20))
        assert done.err.count("times larger than the LoRAs: too few adapters share its basis of") == 1
        assert "Fewer components (-k) make it smaller; for storage alone, use --max-error 0.1." in done.err

    def test_one_that_is_smaller(self, cli, tmp_path):
        make_adapters(tmp_path / "in", " ".join(f"a{n}" for n in range(12)))
        assert "larger than" not in succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "-k", 2)).err

    def test_an_empty_one_is_not_exported(self, cli, pack):
        with ex.Pack.edit(pack) as edited:
            edited.remove(*edited.names)
        assert_refused(cli("export", pack, "-o", pack.parent / "out"), 3, "has no adapters to export", "eigenlorax add")

    def test_a_rank_has_no_effect_on_a_core(self, cli, pack):
        line = ["train", pack, "--task", "causal-lm", "--train", "rows.jsonl", "-o", pack.parent / "out", "--core"]
        assert_refused(cli(*line, "--rank", 4), 3, "--core trains one k × k matrix per module", "Remove --rank 4")

    def test_heads_that_differ_are_named_beside_equal_updates(self, cli, tmp_path):
        for name, classes in (("one", 2), ("two", 3), ("three", 2)):
            make_adapter(tmp_path / "in" / name, seed=1, head=(classes, 31))
        done = succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "--max-error", 0.1))
        said = " ".join(done.err.split())
        assert "three, two have the same update as one" in said
        assert "Only the updates are equal: heads or other tensors differ in" in said
        assert "two" in said.partition("differ in")[2]


def test_an_adapter_is_one_short_line():
    adapter = ex.from_factors("sst2", {}, base_model="org/base")
    assert repr(adapter) == "Adapter('sst2', base_model='org/base', modules=0, ranks=[])"


def test_only_public_names_are_listed():
    assert dir(ex) == sorted(ex.__all__)
