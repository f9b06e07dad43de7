"""Adapters by somebody hostile: each is refused by a message that names the file; nothing is waited for or filled."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
import lora_files
import remote_disk  # noqa: F401 (registers disk://)
from adapters import change_config, make_adapter
from eigenlorax.errors import MAX_MESSAGE, FormatError, ModuleNameError, ShapeError
from eigenlorax.formats import checks
from make_reference_packs import PACKS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return make_adapter(tmp_path / "one", seed=1)


def written(path, value):
    path.write_text(json.dumps(value))


DEEP = json.loads("[" * 200 + "]" * 200)
CONFIGS = {
    "null": (lambda path: written(path, None), "contains null; an object was expected"),
    "not text": (lambda path: path.write_bytes(b'{"r": "\xff"}'), "is not valid JSON"),
    "deeper than Python reads": (lambda path: path.write_text("[" * 100_000), "is not valid JSON"),
    "deeper than Python writes": (
        lambda path: written(path, {"a": DEEP}),
        "nests lists and objects more than 100 deep",
    ),
    "larger than any": (lambda path: os.truncate(path, 1 << 42), "has 4,398,046,511,104 bytes; at most 67,108,864"),
    "a revision that is a number": (
        lambda path: change_config(path.parent, revision=3),
        "revision is 3; a string or null",
    ),
    "a rank of ten millions": (lambda path: change_config(path.parent, r=10**7), "has rank 3, but .* says 10000000"),
    "a kind as long as a book": (lambda path: change_config(path.parent, peft_type="x" * 10**6), "peft_type is 'xxx"),
}


@pytest.mark.parametrize("remote", [False, True], ids=["on disk", "behind a URL"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none(folder, case, remote):
    change, said = CONFIGS[case]
    change(folder / CONFIG)
    if remote and case == "larger than any":
        said = "bytes; at most 67,108,864 were expected"
    with pytest.raises((FormatError, ShapeError), match=f"one/{CONFIG}.*{said}|{said}") as caught:
        ex.read_adapter(f"disk://{folder}" if remote else folder)
    assert len(str(caught.value)) <= MAX_MESSAGE


def replaced_by(kind):
    def change(path):
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"device": "/dev/zero", "cycle": path.name, "dangling": "nothing"}[kind])

    return change


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "cycle", "dangling"])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, "adapter_model.bin", "style.safetensors"])
def test_what_is_no_plain_file_is_not_waited_for(folder, file, kind):
    if file == "adapter_model.bin":
        (folder / WEIGHTS).rename(folder / file)
    if file == "style.safetensors":
        shutil.move(folder / WEIGHTS, folder.parent / file)
        folder = folder.parent / file
    replaced_by(kind)(folder if file == "style.safetensors" else folder / file)
    with pytest.raises(FormatError, match=f"{folder.name}.* (has no|has neither|is not|does not exist)"):
        ex.read_adapter(folder, allow_pickle=True)


class TestCoefficients:
    """An adapter that was trained in the subspace of a pack, changed by somebody."""

    @pytest.fixture
    def trained(self, tmp_path):
        def make(pack="float32"):
            self.pack = ex.Pack.open(PACKS / pack)
            own = self.pack.adapter_folder(self.pack.names[0])
            (tmp_path / "one").mkdir()
            shutil.copy(own / WEIGHTS, tmp_path / "one")
            config = {**json.loads((own / CONFIG).read_text()), "subspace": "elsewhere"}
            written(tmp_path / "one" / CONFIG, config)
            return tmp_path / "one"

        return make

    @pytest.mark.parametrize("pack", ["float32", "int8", "coded-cores", "full-cores-float32", "diagonal-cores-float32"])
    def test_unchanged_it_is_read(self, trained, pack):
        adapter = ex.read_adapter(trained(pack))
        assert adapter.modules.keys() == self.pack.adapter(self.pack.names[0]).modules.keys()
        checks.scan(adapter)

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"subspace_modules": 3}, "subspace_modules is 3; dict was expected"),
            ({"subspace_modules": {"encoder.0.query": 3}}, "subspace_modules.encoder.0.query is 3; str was expected"),
            ({"kernels": {"encoder.0.query": [2.5]}}, r"kernels.encoder.0.query\[0\] is 2.5; int was expected"),
            ({"r": 2**62}, "eigenlorax_down is .* expected a float tensor of shape .* another rank"),
            ({"r": 1}, "eigenlorax_down is .* expected a float tensor of shape .* another rank"),
        ],
    )
    def test_fields_of_other_types_and_ranks(self, trained, fields, said):
        with pytest.raises((FormatError, ShapeError), match=f"one/{WEIGHTS}.*{said}"):
            ex.read_adapter(change_config(trained(), **fields))

    @pytest.mark.parametrize("pack", ["coded-cores", "full-cores-float32", "int8"])
    @pytest.mark.parametrize("rank", [10**7, 2**62, 2**64])
    def test_a_rank_that_nothing_has(self, trained, pack, rank):
        folder = change_config(trained(pack), r=rank)
        with pytest.raises((FormatError, ShapeError), match=str(rank)):
            ex.read_adapter(folder)

    def test_a_module_that_the_subspace_lacks(self, trained):
        folder = change_config(trained(), subspace_modules={"encoder.0.query": "nowhere"})
        with pytest.raises(ModuleNameError, match="module 'encoder.0.query' is not in the subspace"):
            ex.read_adapter(folder)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda found, key: found.pop(key), "has no eigenlorax_up: the file is incomplete"),
            (lambda found, key: found.update({key: found[key][:-1].clone()}), r"eigenlorax_up is \(\d+, \d+\)"),
            (lambda found, key: found.update({key: found[key][0].clone()}), r"eigenlorax_up is \(\d+,\)"),
            (lambda found, key: found.update({key: found[key].to(torch.complex64)}), "torch.complex64"),
            (lambda found, key: found.update({f"{key}_rest": torch.ones(2, 3)}), r"eigenlorax_up_rest is \(2, 3\)"),
            (
                lambda found, key: found.update({"x.lora_C.weight": torch.ones(2)}),
                "tensor 'x.lora_C.weight' is not part of a PEFT LoRA",
            ),
            (
                lambda found, key: found.update({"x.lora_A.weight": torch.ones(2, 3)}),
                "tensor 'x.lora_A.weight' belongs to a LoRA; coefficients",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, trained, change, said):
        folder = trained()
        tensors = load_file(folder / WEIGHTS)
        change(tensors, "base_model.model.encoder.0.query.eigenlorax_up")
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises((FormatError, ShapeError), match=f"one/{WEIGHTS}.*{said}"):
            ex.read_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_an_alpha_that_is_no_number(tmp_path, dtype):
    modules = {"unet.mid_block.attentions.0.proj_in": (7, 5, 1, 1)}
    path = lora_files.write(tmp_path / "style.safetensors", lora_files.planted(modules, seed=1), "kohya")
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".alpha"))
    save_file({**tensors, key: torch.ones((), dtype=torch.uint8).to(dtype)}, path)
    with pytest.raises(FormatError, match=f"style.safetensors: '{key}' is {dtype}; an alpha is a float or an integer"):
        ex.read_adapter(path)


def test_a_head_of_four_bits_goes_through_a_pack(tmp_path):
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no four-bit floats")
    head = torch.arange(6, dtype=torch.uint8).view(2, 3)
    key = "base_model.model.classifier.weight"
    folder = make_adapter(tmp_path / "a", seed=1, tensors={key: head.view(dtype)})
    ex.fit([folder], n_components=3).save(tmp_path / "pack")
    (path,) = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out").values()
    assert torch.equal(ex.read_adapter(path).heads[key].view(torch.uint8), head)


@pytest.mark.parametrize(
    ("rank", "shape", "said"),
    [
        (1100, (17, 11), r"has the rank 1100 and the shape \(17, 11\)"),
        (3, (17, 0), r"has the rank 3 and the shape \(17, 0\)"),
        (1, (2, (1 << 22) + 1), r"has the rank 1 and the shape \(2, 4194305\)"),
    ],
)
def test_what_no_pack_could_give_back_does_not_come_into_one(tmp_path, rank, shape, said):
    folder = make_adapter(tmp_path / "one", seed=1, rank=rank, modules={"a.b": shape, "a.c": (1030, 1031)})
    with pytest.raises(ShapeError, match=f"module a.b of adapter 'one' {said}.*--exclude-module a.b"):
        ex.fit(folder, n_components=2)
    ex.fit(folder, n_components=2, exclude_modules="a.b").save(tmp_path / "pack")
    (path,) = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out").values()
    assert ex.read_adapter(path).specs["a.c"].rank == rank
