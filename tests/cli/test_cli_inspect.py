"""`eigenlorax inspect`: the figures of packs and adapters, and what is neither."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
import reference
from adapters import MODULES, change_config, change_tensors, make_adapter
from outcomes import assert_refused, contents, json_of, succeeded

NAMES = ["alpha", "beta", "gamma"]
WIDTHS = sum(n_out + n_in for n_out, n_in in MODULES.values())
FLOAT = 4
EMBEDDING = {
    f"base_model.model.wte.lora_embedding_{side}": torch.ones(*s) for side, *s in (("A", 3, 9000), ("B", 16, 3))
}


class TestAPack:
    def test_figures_are_those_of_an_independent_count(self, cli, pack):
        found = json_of(cli("inspect", pack, "--json"))
        errors = {
            name: reference.delta_error(ex.read_adapter(pack.parent / "in" / name), ex.Pack.open(pack).adapter(name))
            for name in NAMES
        }
        # three adapters of rank 3 stack to 9 rows a side, whose whole spectrum is kept beside 4 components
        basis = FLOAT * (4 * WIDTHS + 2 * len(MODULES) * 9)
        coefficients = FLOAT * 3 * (4 + 4) * len(MODULES)
        lora = FLOAT * 3 * WIDTHS
        assert found["bytes"] == {
            "basis": basis,
            "carried": 0,
            "coefficients": 3 * coefficients,
            "heads": 0,
            "source_heads": 0,
            "lora": 3 * lora,
            "lora_bits": 8 * FLOAT,
            "lora_files": sum((pack.parent / "in" / n / "adapter_model.safetensors").stat().st_size for n in NAMES),
            "training_basis": 0,
            "ratio": 3 * lora / (basis + 3 * coefficients),
            "ratio_without_basis": lora / coefficients,
            "ratio_with_heads": 3 * lora / (basis + 3 * coefficients),
        }
        assert basis == sum(tensor.nbytes for tensor in load_file(next(pack.glob("subspace-*"))).values())
        assert {name: record["delta_error"] for name, record in found["adapter_records"].items()} == pytest.approx(
            errors, rel=1e-5
        )
        assert found["in_fit"]["mean"] == pytest.approx(sum(errors.values()) / 3, rel=1e-5)
        assert found["in_fit"]["worst_adapter"] == max(errors, key=errors.get)
        assert found["pack"] == str(pack)
        assert (found["adapters"], found["modules"], found["ranks"]) == (3, 3, [3])
        assert (found["base_model"], found["projected"], found["untrained"]) == ("org/base", None, [])
        assert {(found[side]["min"], found[side]["median"], found[side]["max"]) for side in ("down", "up")} == {
            (4, 4, 4)
        }

    def test_the_table_has_them_too(self, cli, pack):
        figures = json_of(cli("inspect", pack, "--json"))
        done = succeeded(cli("inspect", pack))
        lines = done.out.splitlines()
        assert done.err == ""
        assert lines[0].rstrip() == f"pack {pack}"
        (ratio,) = (line for line in lines if "compression ratio" in line)
        assert f"{figures['bytes']['ratio']:.2f} with the basis counted" in ratio
        (row,) = (line.split() for line in lines if line.split()[:1] == ["beta"])
        error = figures["adapter_records"]["beta"]["delta_error"]
        # all adapters have the same modules, which the table above says
        assert row[:3] == ["beta", "3", f"{error:.4f}"]
        assert row[-1] == "yes"

    def test_files_are_counted_as_they_are_on_disk(self, cli, pack):
        make_adapter(pack.parent / "in" / "headed", seed=8, head=(13, 31))
        succeeded(cli("fit", pack.parent / "in", "-o", pack, "-k", 4, "--overwrite", "--no-report"))
        on_disk, reports = contents(pack), {"report.html": b"<html>", "report.json": b"{}" * 5000}
        for name, data in reports.items():
            (pack / name).write_bytes(data)
        found = json_of(cli("inspect", pack, "--json"))
        sources = sum(path.stat().st_size for path in (pack.parent / "in").glob("*/adapter_model.safetensors"))
        size, heads = sum(len(data) for data in on_disk.values() if data), FLOAT * 13 * 31
        assert found["files"] == {
            "sources": sources,
            "pack": size,
            "reports": 6 + 10_000,
            "ratio": sources / size,
            "ratio_without_heads": (sources - heads) / (size - heads),
            "ratio_with_reports": sources / (size + 10_006),
        }
        figures = found["bytes"]
        lora, tensors = figures["lora"], figures["basis"] + figures["coefficients"]
        assert (figures["heads"], figures["ratio_with_heads"]) == (heads, (lora + heads) / (tensors + heads))
        lines = succeeded(cli("inspect", pack)).out.splitlines()
        start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["bytes", "of"])
        table = lines[start : start + 5]
        assert max(map(len, table)) <= 80
        (files, with_report, of_tensors) = (line.split() for line in table[2:])
        with_heads, without = found["files"]["ratio"], found["files"]["ratio_without_heads"]
        assert files == ["files", f"{sources:,}", f"{size:,}", f"{with_heads:.2f}", f"{without:.2f}"]
        assert with_report[-2:] == [f"{size + 10_006:,}", f"{found['files']['ratio_with_reports']:.2f}"]
        assert of_tensors[-2:] == [f"{figures['ratio_with_heads']:.2f}", f"{figures['ratio']:.2f}"]

    def test_one_without_adapters(self, cli, pack):
        succeeded(cli("remove", pack, *NAMES))
        found = json_of(cli("inspect", pack, "--json"))
        assert (found["adapters"], found["ranks"], found["in_fit"]) == (0, [], None)
        assert "0 (rank none)" in succeeded(cli("inspect", pack)).out

    def test_nothing_is_changed_by_looking(self, cli, pack):
        before = contents(pack.parent)
        succeeded(cli("inspect", pack))
        assert contents(pack.parent) == before

    def test_it_needs_no_right_to_write(self, cli, pack, monkeypatch):
        # who reads takes no lock: a pack may lie on a disk that is read-only
        (pack / ".lock").unlink()
        succeeded(cli("inspect", pack))
        assert not (pack / ".lock").exists()

    def test_a_reference_names_its_parent(self, cli, pack, tmp_path):
        source = pack.parent / "in" / "alpha"
        done = succeeded(
            cli("fit", source, f"copy={source}", "-o", tmp_path / "references", "--max-error", 0.1, "--no-report")
        )
        note = "copy has the same update as alpha; it is stored as a reference."
        assert done.err.count(note) == 1
        assert json_of(cli("inspect", tmp_path / "references", "--json"))["references"] == {"copy": "alpha"}
        row = next(
            line for line in succeeded(cli("inspect", tmp_path / "references")).out.splitlines() if "copy" in line
        )
        assert "as alpha" in row
        again = succeeded(cli("add", tmp_path / "references", f"third={source}"))
        assert again.err.count("third has the same update as alpha; it is stored as a reference.") == 1

    def test_of_a_newer_format(self, cli, pack):
        path = pack / "subspace_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
        before = contents(pack.parent)
        for verb in (
            ["inspect"],
            ["export", "-o", pack.parent / "out"],
            ["remove", "alpha"],
            ["add", pack.parent / "new"],
        ):
            done = cli(verb[0], pack, *verb[1:])
            assert_refused(done, 4, path, "pack format 9", "up to format 8", "pip install --upgrade eigenlorax")
        assert contents(pack.parent) == before

    def test_that_a_mistaken_tool_signed(self, cli, pack):
        path = pack / "subspace_config.json"
        body = json.loads(path.read_text())
        del body["digest"], body["fit"]
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        path.write_text(json.dumps({**body, "digest": hashlib.sha256(text.encode()).hexdigest()}))
        assert_refused(cli("inspect", pack), 4, path, "fit is null", "does not follow the pack format")


class TestAnAdapter:
    def test_figures_are_those_of_an_independent_count(self, cli, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1, alpha=12, head=(2, 31), revision="v2")
        found = json_of(cli("inspect", folder, "--json"))
        tensors = load_file(folder / "adapter_model.safetensors")
        keys = [f"base_model.model.{module}.lora" for module in MODULES]
        squares = [(4.0 * tensors[f"{key}_B.weight"] @ tensors[f"{key}_A.weight"]).square().sum() for key in keys]
        assert found.pop("delta_norm") == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
        assert len(found.pop("content_sha256")) == 64
        assert found == {
            "adapter": str(folder),
            "base_model": "org/base",
            "carried": [],
            "dtypes": ["float32"],
            "family": None,
            "file_bytes": (folder / "adapter_model.safetensors").stat().st_size,
            "format": "peft",
            "heads": ["base_model.model.classifier.weight"],
            "head_bytes": 4 * 2 * 31,
            "carried_bytes": 0,
            "license": None,
            "lora_bytes": FLOAT * 3 * WIDTHS,
            "metadata": {},
            "modules": 3,
            "ranks": [3],
            "revision": "v2",
            "scalings": [4.0],
            "untrained": False,
        }

    def test_the_table_has_them_too(self, cli, tmp_path):
        out = succeeded(cli("inspect", make_adapter(tmp_path / "one", seed=1, head=(2, 31)))).out
        for text in ("org/base", "float32", f"{FLOAT * 3 * WIDTHS:,}", "classifier.weight", "norm of the update"):
            assert text in out

    def test_that_is_untrained(self, cli, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1)
        change_tensors(folder, lambda found: [v.zero_() for k, v in found.items() if "lora_B" in k])
        assert "0 (untrained)" in succeeded(cli("inspect", folder)).out

    def test_whose_base_model_is_markup(self, cli, tmp_path):
        # what comes from outside is shown as it is, not as colour
        folder = make_adapter(tmp_path / "one", seed=1, base="[red]org[/red]/[base]")
        assert "[red]org[/red]/[base]" in succeeded(cli("inspect", folder)).out

    def test_that_holds_nan(self, cli, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1)
        change_tensors(folder, lambda found: next(iter(found.values())).view(-1)[:2].fill_(torch.nan))
        assert_refused(cli("inspect", folder), 3, "'one'", "2 of")

    def test_that_is_a_pickle(self, cli, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1, pickled=True)
        assert_refused(cli("inspect", folder), 3, folder, "may run code", "--allow-pickle")
        same = make_adapter(tmp_path / "same", seed=1)
        one, two = (json_of(cli("inspect", f, "--json", "--allow-pickle")) for f in (folder, same))
        assert one["content_sha256"] == two["content_sha256"]

    def test_of_another_kind(self, cli, tmp_path):
        folder = change_config(make_adapter(tmp_path / "one", seed=1), peft_type="IA3")
        assert_refused(cli("inspect", folder), 3, folder, "'IA3'")

    def test_of_a_pack(self, cli, pack):
        assert_refused(cli("inspect", pack / "adapters" / "beta"), 3, "eigenlorax export")


@pytest.mark.parametrize("options", [[], ["--json"]])
class TestNeither:
    def test_a_folder_of_something_else(self, cli, pack, options):
        (pack.parent / "empty").mkdir()
        done = cli("inspect", pack.parent / "empty", *options)
        assert_refused(done, 3, f"{pack.parent / 'empty'} is neither a pack nor an adapter", "no adapter was found")

    def test_a_folder_of_adapters(self, cli, pack, options):
        folder = pack.parent / "in"
        done = cli("inspect", folder, *options)
        parts = (f"{folder} is a folder of 3 adapters.", f"`eigenlorax fit {folder} -o PACK`", str(folder / "alpha"))
        assert_refused(done, 3, *parts)

    def test_weights_without_a_config(self, cli, pack, options):
        (pack.parent / "new" / "adapter_config.json").unlink()
        done = cli("inspect", pack.parent / "new", *options)
        assert_refused(done, 3, f"{pack.parent / 'new'} has no adapter_config.json beside adapter_model.safetensors")

    def test_nowhere(self, cli, tmp_path, options):
        assert_refused(cli("inspect", tmp_path / "no" / "such", *options), 3, "does not exist")

    def test_a_file(self, cli, pack, options):
        assert_refused(cli("inspect", pack / "subspace_config.json", *options), 3, "is not a folder")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"head": (40, 310)}, "49,600 of heads (modules_to_save, trained biases, resized embeddings). A pack"),
        ({"tensors": EMBEDDING}, "108,192 of carried tensors (modules outside the subspace, DoRA magnitudes). A pack"),
        ({"head": (2, 31)}, None),
    ],
)
def test_heads_and_carried_tensors_that_are_most_of_a_pack_are_told(cli, tmp_path, options, kinds):
    folder = make_adapter(tmp_path / "one", seed=1, **options)
    for done in (cli("fit", folder, "-o", tmp_path / "pack", "-k", 29), cli("inspect", tmp_path / "pack")):
        said = " ".join(succeeded(done).err.split())
        if kinds is None:
            assert "are stored unchanged" not in said
        else:
            assert "% of the pack's" in said
            assert f"bytes are stored exactly: {kinds}" in said
