"""One adapter of a collection is broken: the error names its file and the way out, and the others are as without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eigenlorax as ex
import remote_disk  # noqa: F401 (registers disk://)
from adapters import MODULES, change_config, change_tensors, make_adapter, make_adapters
from eigenlorax.errors import FormatError, NonFiniteError, ShapeError, SkippedAdapterWarning
from outcomes import contents

pytestmark = pytest.mark.slow

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = [f"task-{i:02}" for i in range(20)]
BROKEN = "task-07"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    make_adapters(place / "in", " ".join(NAMES), shared=5)
    shutil.copytree(place / "in", place / "without", ignore=lambda _, names: [n for n in names if n == BROKEN])
    ex.fit(place / "without", n_components=4).save(place / "pack")
    return place


@pytest.fixture
def collection(made, tmp_path):
    shutil.copytree(made / "in", tmp_path / "in")
    return tmp_path / "in"


def in_header(old: bytes, new: bytes):
    """Puts other bytes into the header, as many."""

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        assert data.count(old) >= 1
        assert len(old) == len(new)
        (folder / WEIGHTS).write_bytes(data.replace(old, new, 1))

    return change


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


# name → what is done to one of the adapters, and the file that the message names
DAMAGE = {
    "the header's brace": (in_header(b"{", b"["), WEIGHTS),
    "the header's length": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" + (f / WEIGHTS).read_bytes()[1:]), WEIGHTS),
    "a dtype": (in_header(b'"F32"', b'"F33"'), WEIGHTS),
    "an offset": (in_header(b'"data_offsets":[0,', b'"data_offsets":[8,'), WEIGHTS),
    "a shape": (in_header(b'"shape":[3,', b'"shape":[7,'), WEIGHTS),
    "a tensor's name": (in_header(b"query.lora_A", b"quary.lora_A"), WEIGHTS),
    "cut in the middle": (cut, WEIGHTS),
    "zeros from the middle on": (lambda f: (cut(f), (f / WEIGHTS).open("ab").write(bytes(9))), WEIGHTS),
    "the config": (lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:-40]), CONFIG),
    "another rank": (lambda f: change_config(f, r=9), WEIGHTS),
    "NaN": (lambda f: change_tensors(f, lambda found: next(iter(found.values()))[0].fill_(float("nan"))), BROKEN),
}


@pytest.mark.parametrize("remote", [False, True], ids=["on disk", "behind a URL"])
@pytest.mark.parametrize("case", DAMAGE)
def test_one_of_twenty(made, collection, tmp_path, case, remote):
    damage, file = DAMAGE[case]
    damage(collection / BROKEN)
    source = f"disk://{collection}" if remote else collection
    with pytest.raises((FormatError, ShapeError, NonFiniteError), match=f"(?s){BROKEN}.*--skip-bad") as caught:
        ex.fit(source, n_components=4)
    assert file in str(caught.value)
    with pytest.warns(SkippedAdapterWarning, match=f"left out {BROKEN}: .*{file}"):
        pack = ex.fit(source, n_components=4, skip_bad=True)
    pack.save(tmp_path / "pack")
    found, wanted = contents(tmp_path / "pack"), contents(made / "pack")
    manifests = [json.loads(files.pop("subspace_config.json")) for files in (found, wanted)]
    # what says which were left out, and the digest of the whole
    for manifest in manifests:
        del manifest["digest"]
    ((name, reason),) = manifests[0]["fit"].pop("skipped").items()
    assert name == BROKEN
    assert file in reason
    assert manifests[1]["fit"].pop("skipped") == {}
    assert manifests[0] == manifests[1]
    # others who get the pack do not learn where it was made
    assert not any(str(tmp_path).encode() in data for data in contents(tmp_path / "pack").values() if data)
    # the card says it too
    assert BROKEN in found.pop("README.md").decode()
    assert wanted.pop("README.md")
    assert found == wanted


@pytest.mark.parametrize("bit", [0, 1, 2, 5])
def test_no_flip_of_a_header_s_bit_gives_other_numbers(tmp_path, bit):
    folder = make_adapter(tmp_path / "a", seed=1)
    whole = (folder / WEIGHTS).read_bytes()
    original = ex.read_adapter(folder)
    downs = {module: original.modules[module].down for module in MODULES}
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(flipped)
        try:
            read = ex.read_adapter(folder)
        except (FormatError, ShapeError):
            continue
        # what is beside the tensors, and blanks
        assert read.specs == original.specs, place
        assert all(torch.equal(read.modules[module].down, down) for module, down in downs.items())
        assert not read.heads
        assert not read.carried
