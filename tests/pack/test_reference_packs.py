"""Frozen packs of every storage and format still open, have their fingerprints, and export the same bytes.

`make_reference_packs.py` wrote the packs of tests/data/packs; expected.json beside them says what each exported then.
Exported factors are sums of a few products, taken in float64 and rounded once to float32 or less. The order of a sum
depends on the machine; in none of these packs does it change a rounded number, so bytes are compared on every machine.
Two cases are otherwise (`BY_KERNEL`): exports in float64, whose last bits depend on the order, and factors that come
from a singular value decomposition, whose signs depend on the library. Their bytes are compared where a product and
decompositions of known matrices (`digest_arithmetic`) have the same bits as on the machine that wrote the pack.
Elsewhere their updates must be those that docs/read_pack.py finds, up to rounding, and all other exported files must
have the same bytes.
"""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from test_read_pack import assert_reads_what_the_library_reads, read_pack

import eigenlorax as ex
import reference
from make_reference_packs import EXPECTED, EXPORTS, KINDS, PACKS, digest_arithmetic, export
from planted import tree

EXPECTATIONS = json.loads(EXPECTED.read_text("utf-8"))
BY_KERNEL = {
    "float64",
    "full-cores-float32",
    "full-cores-float16",
    "coded-cores",
    "coded-terms-and-cores",
    "coded-for-ratio",
    "coded-clusters",
    "coded-and-grown",
    "coded-copies",
}
BFLOAT16 = {"bfloat16", "diagonal-cores-bfloat16", "heads"}
"""Kinds with tensors that NumPy cannot read."""
WEIGHTS, MANIFEST = "adapter_model.safetensors", "subspace_config.json"

pytestmark = pytest.mark.filterwarnings("ignore::eigenlorax.errors.SourceWarning")
of_every_kind = pytest.mark.parametrize("kind", sorted(EXPECTATIONS))


def test_every_kind_has_a_pack():
    assert {path.name for path in PACKS.iterdir() if path.is_dir()} == set(KINDS) == set(EXPECTATIONS)
    for kind, expected in EXPECTATIONS.items():
        assert [one["options"] for one in expected["exports"]] == EXPORTS.get(kind, [{}])


def test_every_format_has_a_pack():
    assert {expected["format_version"] for expected in EXPECTATIONS.values()} == {1, 2, 3, 4, 5, 6, 7, 8}


@of_every_kind
def test_the_pack_is_whole_and_has_its_fingerprints(kind):
    pack, expected = ex.Pack.open(PACKS / kind), EXPECTATIONS[kind]
    pack.verify()
    assert json.loads((PACKS / kind / MANIFEST).read_text("utf-8"))["format_version"] == expected["format_version"]
    assert list(pack.subspace.lineage) == expected["fingerprints"]
    # what formats 1 and 2 did not note is null
    noted = [fingerprint for fingerprint in pack.info.lineage if fingerprint is not None]
    assert noted == expected["fingerprints"][-len(noted) :]


@of_every_kind
def test_exports_have_the_same_bytes(kind, tmp_path):
    pack, expected = ex.Pack.open(PACKS / kind), EXPECTATIONS[kind]
    exact = kind not in BY_KERNEL or expected["arithmetic"] == digest_arithmetic()
    for number, one in enumerate(expected["exports"]):
        folder = tmp_path / str(number)
        files = {path: sha256(data).hexdigest() for path, data in export(pack, folder, one["options"]).items()}
        assert files.keys() == one["files"].keys()
        differing = {path for path in files if files[path] != one["files"][path]}
        if exact:
            assert not differing
        else:
            assert all(path.endswith(WEIGHTS) for path in differing)
            assert_has_the_updates(pack, folder)


def assert_has_the_updates(pack, folder):
    """The exported adapters have the updates of the pack's files, as far as their dtype goes."""
    for name in pack.names:
        exported = ex.read_adapter(folder / name)
        for module, delta in read_pack.delta_weights(pack.path, name).items():
            found = reference.dense(exported.modules[module])
            tolerance = 8 * torch.finfo(exported.specs[module].dtype).eps
            assert ((found - delta) ** 2).sum() <= (tolerance**2) * (delta**2).sum()


@of_every_kind
def test_a_copy_has_the_same_bytes(kind, tmp_path):
    pack = ex.Pack.open(PACKS / kind)
    copy = pack.save(tmp_path / "copy")
    before, after = tree(PACKS / kind), tree(copy)
    manifests = [json.loads(files.pop(MANIFEST)) for files in (before, after)]
    assert manifests[1]["format_version"] == 8
    if pack.is_coded and manifests[0]["format_version"] == 5:
        # coded bases have another form in format 6; adapters are as they were
        before, after = ({path: data for path, data in files.items() if "/" in path} for files in (before, after))
    if manifests[0]["format_version"] < 8:
        # configs have other forms in formats 7 and 8; tensors are as they were
        before, after = (
            {path: data for path, data in files.items() if not path.endswith(".json")} for files in (before, after)
        )
    # neither is covered by the format
    assert {path: data for path, data in after.items() if path not in ("README.md", ".lock")} == before
    if manifests[0]["format_version"] == 8:
        for manifest in manifests:
            del manifest["eigenlorax_version"], manifest["digest"]
        assert manifests[1] == manifests[0]
    opened = ex.Pack.open(copy)
    stored_bytes = opened.info.stored_bytes if pack.is_coded else pack.info.stored_bytes
    assert opened.info == replace(pack.info, stored_bytes=stored_bytes)
    assert opened.subspace.lineage == pack.subspace.lineage
    assert (opened.records, opened.fit_info) == (pack.records, pack.fit_info)
    assert all(opened.packed(name).source_config == pack.packed(name).source_config for name in pack.names)
    assert all(opened.packed(name).origin == pack.packed(name).origin for name in pack.names)
    assert opened.histories == pack.histories


@pytest.mark.parametrize("kind", sorted(set(EXPECTATIONS) - BFLOAT16))
def test_a_reader_of_the_specification_alone_finds_the_same(kind):
    assert_reads_what_the_library_reads(PACKS / kind)


@pytest.mark.parametrize("kind", ["histories", "histories-only", "population"])
def test_a_reader_of_the_specification_alone_finds_the_same_versions(kind, read_version):
    pack, compared = ex.Pack.open(PACKS / kind), 0
    for name, history in pack.histories.items():
        for record in history:
            if record.lossless:
                continue
            updates, tensors = read_version.version(read_pack.version_files(PACKS / kind, name, record.version))
            adapter = pack[history.full_name(record)]
            assert list(updates) == list(adapter.modules)
            for module, (up, down, scaling) in updates.items():
                factors = adapter.modules[module]
                assert torch.equal(torch.from_numpy(up).to(factors.up.dtype), factors.up)
                assert torch.equal(torch.from_numpy(down).to(factors.down.dtype), factors.down)
                assert scaling == factors.scaling
            assert tensors.keys() == adapter.heads.keys()
            for key, tensor in tensors.items():
                assert torch.equal(torch.from_numpy(tensor).to(adapter.heads[key].dtype), adapter.heads[key])
            compared += 1
    assert compared > 3
