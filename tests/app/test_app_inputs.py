"""Uploads and names: which adapters they become, and what is never written or read."""

import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from adapters import make_adapter, make_adapters
from eigenlorax import read_adapter
from eigenlorax.app import inputs
from eigenlorax.errors import FormatError, OptionError
from eigenlorax.formats import sources
from outcomes import contents

LARGE = 10**8


@pytest.fixture
def adapters(tmp_path):
    make_adapters(tmp_path / "in", "alpha beta")
    return tmp_path / "in"


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def zipped(path, entries, method=zipfile.ZIP_DEFLATED):
    """Write a zip file of bytes by name, in order."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def names_of(found):
    return [sources.default_name(adapter) for adapter in sources.find_adapters(found)]


class TestUnpack:
    @pytest.mark.parametrize(
        ("root", "base", "names"),
        [
            ("in", ".", ["alpha", "beta"]),
            (".", "in", ["alpha", "beta"]),
            (".", "in/alpha", ["alpha"]),
            ("in/alpha", ".", ["mine"]),
        ],
    )
    def test_zip_files_of_folders_at_any_depth(self, adapters, work, root, base, names):
        archive = shutil.make_archive(str(work.parent / "mine"), "zip", adapters.parent / root, base)
        found = inputs.unpack([Path(archive)], work, LARGE)
        assert names_of(found) == names
        read = read_adapter(sources.find_adapters(found)[0].source)
        original = read_adapter(adapters / "alpha")
        assert all((read.modules[name].down == original.modules[name].down).all() for name in original.modules)

    def test_several_files_and_what_systems_add(self, adapters, work):
        files = [
            (f"{name}/{file.name}", file.read_bytes()) for name in ("alpha",) for file in (adapters / name).iterdir()
        ]
        extra = [("__MACOSX/alpha/._adapter_config.json", b"x"), ("alpha/.DS_Store", b"x"), ("empty/", b"")]
        first = zipped(work.parent / "a.zip", [*files, *extra])
        beta = shutil.make_archive(str(work.parent / "b"), "zip", adapters, "beta")
        assert names_of(inputs.unpack([first, Path(beta)], work, LARGE)) == ["alpha", "beta"]
        assert not [path for path in contents(work) if "DS_Store" in path or "MACOSX" in path]

    def test_a_lora_file_keeps_its_name(self, adapters, work):
        file = Path(shutil.copy(adapters / "alpha/adapter_model.safetensors", work.parent / "style.safetensors"))
        (found,) = inputs.unpack([file], work, LARGE)
        assert (found.name, found.read_bytes()) == ("style.safetensors", file.read_bytes())

    @pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "..\\out", "C:/out", "a/.."])
    def test_paths_that_lead_out_are_errors(self, work, name):
        archive = zipped(work.parent / "a.zip", [("fine", b"1"), (name, b"2")])
        with pytest.raises(FormatError, match="is a link or leads out"):
            inputs.unpack([archive], work, LARGE)
        assert set(contents(work)) <= {"0", "0/a", "0/a/fine"}
        assert not (work.parent / "out").exists()

    def test_links_are_errors(self, work):
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        with pytest.raises(FormatError, match="is a link"):
            inputs.unpack([zipped(work.parent / "a.zip", [(entry, "/etc/passwd")])], work, LARGE)

    def test_sizes_are_of_unpacked_files_and_of_all_together(self, work):
        bomb = zipped(work.parent / "a.zip", [("zeros", bytes(10**6))])
        assert bomb.stat().st_size < 10**4
        with pytest.raises(FormatError, match=r"1\.0 MB unpacked, and 999\.0 kB are left .*--max-upload"):
            inputs.unpack([bomb], work, 999_000)
        assert contents(work).keys() <= {"0", "0/a"}
        (work.parent / "two").mkdir()
        with pytest.raises(FormatError, match=r"1\.0 MB unpacked, and 500\.0 kB are left"):
            inputs.unpack([bomb, bomb], work.parent / "two", 1_500_000)

    def test_too_many_files(self, work, monkeypatch):
        monkeypatch.setattr(inputs, "MAX_ENTRIES", 3)
        archive = zipped(work.parent / "a.zip", [(f"{number}", b"") for number in range(4)])
        with pytest.raises(FormatError, match="4 files, at most 3"):
            inputs.unpack([archive], work, LARGE)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compressions_are_errors(self, work, method):
        with pytest.raises(FormatError, match="another method than deflate"):
            inputs.unpack([zipped(work.parent / "a.zip", [("a", b"1" * 100)], method)], work, LARGE)

    def test_a_file_that_is_there_twice(self, work):
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive = zipped(work.parent / "a.zip", [("a/b", b"1"), ("a/b", b"2")])
        with pytest.raises(FormatError, match="'a/b' twice"):
            inputs.unpack([archive], work, LARGE)
        with pytest.raises(FormatError, match="'a/b/c' twice"):
            inputs.unpack([zipped(work.parent / "b.zip", [("a/b", b"1"), ("a/b/c", b"2")])], work / "0", LARGE)

    @pytest.mark.parametrize("change", ["cut", "flipped", "text"])
    def test_damaged_files(self, work, change):
        archive = zipped(work.parent / "a.zip", [("a", bytes(range(256)) * 40)], zipfile.ZIP_STORED)
        data = bytearray(archive.read_bytes())
        data[500] ^= 1
        archive.write_bytes({"cut": data[:-30], "flipped": data, "text": b"no zip"}[change])
        with pytest.raises(FormatError, match=r"a\.zip is damaged, or no zip file"):
            inputs.unpack([archive], work, LARGE)

    def test_other_files(self, work):
        (work.parent / "adapter_model.bin").write_bytes(b"pickle")
        with pytest.raises(FormatError, match="neither a zip file nor a LoRA"):
            inputs.unpack([work.parent / "adapter_model.bin"], work, LARGE)


class TestNames:
    def test_lines(self):
        assert inputs.parse_names(" demo/adapters \n\n a=b/c\n", allows_paths=True) == ["demo/adapters", "a=b/c"]
        assert inputs.parse_names("org/name@v1\norg/other", allows_paths=False) == ["org/name@v1", "org/other"]

    @pytest.mark.parametrize(
        "name", ["/etc", "../in", "in", "s3://bucket/a", "a=org/name", "org/name/file.safetensors"]
    )
    def test_only_ids_of_the_hub_where_folders_are_not_read(self, name):
        with pytest.raises(OptionError, match="is not the id of a repository on the Hub"):
            inputs.parse_names(name, allows_paths=False)

    def test_a_folder_with_the_form_of_an_id_is_not_read(self, tmp_path, monkeypatch):
        make_adapter(tmp_path / "org/name", seed=1)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(OptionError, match="reads no folders"):
            inputs.parse_names("org/name", allows_paths=False)

    def test_too_many(self):
        with pytest.raises(OptionError, match="257 names were typed"):
            inputs.parse_names("org/name\n" * 257, allows_paths=False)
