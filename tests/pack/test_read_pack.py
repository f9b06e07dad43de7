"""docs/read_pack.py reads packs by their specification alone: it must find what the library finds."""

import importlib.util
import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_site import json_reference
from peft import LoraConfig
from safetensors import safe_open
from safetensors.numpy import load_file

import eigenlorax as ex
from adapters import MODULES, change_tensors, factors, make_adapter, make_adapters
from eigenlorax.codec import class_tables, entropy, short_streams
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import PackDamagedError, SkippedAdapterWarning, UntrainedAdapterWarning
from eigenlorax.pack.history import VersionRecord
from planted import factors_in, orthonormal, shared_collection
from rests import with_rests
from versions import entries_of, write_older

DOCS = Path(__file__).parents[2] / "docs"
QUERY = "encoder.layer.0.query"


def _reader():
    spec = importlib.util.spec_from_file_location("read_pack", DOCS / "read_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


read_pack = _reader()


def assert_reads_what_the_library_reads(folder):
    """Every delta weight of every adapter, 1e-6 of its norm or closer; how many of them were compared."""
    pack, compared = ex.Pack.open(folder), 0
    for name in pack.names:
        adapter, found = pack.adapter(name), read_pack.delta_weights(folder, name)
        assert sorted(found) == sorted(pack.packed(name).coefficients)
        for module, delta in found.items():
            one = adapter.modules[module]
            wanted = one.scaling * (one.up.double() @ one.down.double()).numpy()
            assert delta.shape == wanted.shape
            assert np.linalg.norm(delta - wanted) <= 1e-6 * np.linalg.norm(wanted), (name, module)
            compared += 1
    return compared


def fitted(parent, *, n_components=4, **options):
    """A saved pack of three adapters, each with directions of its own, so that the pack loses some of each."""
    make_adapters(parent / "sources", "a b c", **options)
    return ex.fit(parent / "sources", n_components=n_components).save(parent / "pack")


def test_rests(tmp_path):
    pack = with_rests(ex.Pack.open(fitted(tmp_path)), {"a": ["both"], "b": ["down", "none", "up"]})
    assert assert_reads_what_the_library_reads(pack.save(tmp_path / "rests")) == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
class TestDtypes:
    def test_of_a_pack(self, tmp_path, dtype):
        folder = fitted(tmp_path, dtype=dtype)
        assert ex.Pack.open(folder).dtype == dtype
        assert all(record.delta_error > 0.1 for record in ex.Pack.open(folder).records.values())
        assert assert_reads_what_the_library_reads(folder) == 3 * len(MODULES)

    def test_of_a_pack_augmented_twice(self, tmp_path, dtype):
        # the adapter comes last, so that it has coefficients on the directions that are rebuilt
        pack = ex.Pack.open(fitted(tmp_path, dtype=dtype)).augment(3, seed=7).augment(2, seed=8)
        pack.add(make_adapter(tmp_path / "late", seed=9, dtype=dtype))
        extra = pack.packed("late").coefficients[QUERY].down[:, 4:]
        assert extra.shape == (3, 5)
        assert bool((extra != 0).all())
        assert_reads_what_the_library_reads(pack.save(tmp_path / "augmented"))


def test_basis_and_coefficients_of_two_dtypes(tmp_path):
    make_adapters(tmp_path / "sources", "a b")
    pack = ex.fit(tmp_path / "sources", n_components=4, dtype="float16", coefficient_dtype="float64")
    assert_reads_what_the_library_reads(pack.save(tmp_path / "pack"))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"r": 8, "lora_alpha": 5, "rank_pattern": {"layer.0.query": 3, "value": 3, "layer.1.query": 3}},
        {"alpha_pattern": {"layer.0.query": 0.5, "query": 40}},
        {"use_rslora": True, "alpha_pattern": {r".*\.1\.query": 24}},
        {"lora_alpha": ..., "alpha_pattern": ..., "rank_pattern": None},
    ],
    ids=["rslora", "rank_pattern", "alpha_pattern", "rslora and alpha_pattern", "defaults of PEFT"],
)
def test_scalings(tmp_path, config):
    make_adapter(tmp_path / "sources" / "plain", seed=1)
    make_adapter(tmp_path / "sources" / "other", seed=2, config=config)
    folder = ex.fit(tmp_path / "sources", n_components=4).save(tmp_path / "pack")
    assert_reads_what_the_library_reads(folder)


def test_module_names_that_differ_by_leading_components(tmp_path):
    longer = {f"bert.{module}": shape for module, shape in MODULES.items()}
    longest = {f"base.bert.{module}": shape for module, shape in MODULES.items()}
    make_adapter(tmp_path / "sources" / "short", seed=1)
    make_adapter(tmp_path / "sources" / "long", seed=2, modules=longer)
    pack = ex.fit(tmp_path / "sources", n_components=4)
    assert list(pack.subspace.modules) == sorted(longer)
    pack.add(make_adapter(tmp_path / "longest", seed=3, modules=longest))
    short_of_fit = {module.removeprefix("encoder."): shape for module, shape in MODULES.items()}
    pack.add(make_adapter(tmp_path / "shorter-still", seed=4, modules=short_of_fit))
    assert assert_reads_what_the_library_reads(pack.save(tmp_path / "pack")) == 4 * len(MODULES)


def test_a_module_that_was_dropped(tmp_path):
    make_adapters(tmp_path / "sources", "a b c")
    for name in "abc":
        change_tensors(
            tmp_path / "sources" / name, lambda found: [found[key].mul_(1e-3) for key in found if QUERY in key]
        )
    pack = ex.fit(tmp_path / "sources", max_error=0.2)
    assert pack.info.modules[QUERY]["down"].k == pack.info.modules[QUERY]["up"].k == 0
    folder = pack.save(tmp_path / "pack")
    assert not read_pack.delta_weights(folder, "a")[QUERY].any()
    assert_reads_what_the_library_reads(folder)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_earlier_versions(tmp_path, version):
    folder = fitted(tmp_path)
    newest = json.loads((folder / "subspace_config.json").read_text())
    before = write_older(folder, version)
    assert assert_reads_what_the_library_reads(folder) == 3 * len(MODULES)
    with ex.Pack.edit(folder) as pack:
        assert (pack.fit_info.n_components, pack.fit_info.max_error, pack.fit_info.auto) == (4, None, False)
        pack.verify()
        pack.remove("b")
    manifest = json.loads((folder / "subspace_config.json").read_text())
    assert manifest["format_version"] == 8
    assert manifest["subspace"] == newest["subspace"]
    # the files stay what they were, with whole configs
    assert entries_of(manifest) == {
        name: {**entry, "files": before["adapters"][name]["files"]}
        for name, entry in entries_of(newest).items()
        if name != "b"
    }


def test_an_augmented_pack_of_version_2(tmp_path):
    pack = ex.Pack.open(fitted(tmp_path)).augment(3, seed=7).augment(2, seed=8)
    pack.add(make_adapter(tmp_path / "late", seed=9))
    folder = pack.save(tmp_path / "augmented")
    # there, the adapters were widened with their subspace: those that are older are not in it
    with ex.Pack.edit(folder) as edited:
        edited.remove("a", "b", "c")
    manifest = write_older(folder, 2)
    assert manifest["subspace"]["augmentations"] == [{"n_extra": 3, "seed": 7}, {"n_extra": 2, "seed": 8}]
    assert assert_reads_what_the_library_reads(folder) == len(MODULES)
    with ex.Pack.edit(folder) as edited:
        edited.add(make_adapter(tmp_path / "later", seed=10))
    assert json.loads((folder / "subspace_config.json").read_text())["format_version"] == 8
    assert assert_reads_what_the_library_reads(folder) == 2 * len(MODULES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_pack_that_has_grown_in_both_ways(tmp_path, dtype):
    pack = ex.Pack.open(fitted(tmp_path, dtype=dtype))
    widths = []
    for step, grow in enumerate(
        [
            lambda p, one: p.add(one, extend=2) and p,
            lambda p, one: p.augment(3, seed=7),
            lambda p, one: p.add(one, extend=1) and p,
            lambda p, one: p.augment(1, seed=8),
        ]
    ):
        one = make_adapter(tmp_path / f"late-{step}", seed=20 + step, dtype=dtype)
        pack = grow(pack, one)
        if f"late-{step}" not in pack.names:
            pack.add(one)
        widths.append(pack.packed(f"late-{step}").coefficients[QUERY].down.shape[1])
        folder = pack.save(tmp_path / f"pack-{step}")
        assert assert_reads_what_the_library_reads(folder) == (4 + step) * len(MODULES)
        # and as it was written
        pack = ex.Pack.open(folder)
    assert widths == [6, 9, 10, 11]
    assert pack.info.sizes(pack.info.growth[1].fingerprint, QUERY).k == (6, 6)


def test_an_adapter_of_another_subspace_is_noticed(tmp_path):
    folder = fitted(tmp_path)
    with ex.Pack.edit(folder) as pack:
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=2)
    path = folder / "subspace_config.json"
    manifest = json.loads(path.read_text())
    manifest["subspace"]["growth"][0]["fingerprint"] = "0" * 64
    del manifest["digest"]
    canonical = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["digest"] = sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(ValueError, match="is not in"):
        read_pack.delta_weights(folder, "a")
    with pytest.raises(PackDamagedError, match="subspace_fingerprint is .*, which the subspace never had"):
        ex.Pack.open(folder).packed("a")
    with pytest.raises(PackDamagedError, match="its rows have the fingerprint .* it is 000000000000"):
        ex.Pack.open(folder).subspace  # noqa: B018


def test_a_module_without_components(tmp_path):
    zeros = {key: torch.zeros_like(value) for key, value in factors(seed=1).items() if QUERY in key}
    make_adapter(tmp_path / "sources" / "a", seed=1, tensors=zeros)
    make_adapter(tmp_path / "sources" / "b", seed=2, tensors=zeros)
    pack = ex.fit(tmp_path / "sources", n_components=4)
    assert pack.subspace.modules[QUERY].down.k == 0
    assert_reads_what_the_library_reads(pack.save(tmp_path / "pack"))
    pack = pack.augment(2, seed=1)
    pack.add(make_adapter(tmp_path / "late", seed=3))
    assert_reads_what_the_library_reads(pack.save(tmp_path / "augmented"))


def test_carried_modules_and_heads_are_passed_over(tmp_path):
    make_adapters(tmp_path / "sources", "a b", head=(2, 31))
    pack = ex.fit(tmp_path / "sources", n_components=4, exclude_modules=[QUERY])
    folder = pack.save(tmp_path / "pack")
    assert assert_reads_what_the_library_reads(folder) == 2 * (len(MODULES) - 1)


def test_an_adapter_in_its_spare_place(tmp_path):
    folder = fitted(tmp_path)
    entry = entries_of(json.loads((folder / "subspace_config.json").read_text()))["b"]
    content = "".join(file + digest for file, digest in sorted(entry["files"].items()))
    spare = sha256(content.encode()).hexdigest()[:8]
    (folder / "adapters" / "b").rename(folder / "adapters" / f"b@{spare}")
    # what a writer that was killed leaves: its own place still holds the adapter of the pack before
    (folder / "adapters" / "a").rename(folder / "adapters" / "b")
    (folder / "adapters" / "c").rename(folder / "adapters" / "a")
    for module, delta in read_pack.delta_weights(folder, "b").items():
        one = ex.Pack.open(folder).adapter("b").modules[module]
        np.testing.assert_allclose(delta, one.scaling * (one.up @ one.down).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="was changed"):
        read_pack.delta_weights(folder, "a")
    with pytest.raises(PackDamagedError, match="was changed"):
        ex.Pack.open(folder).adapter("a")


def in_groups(n, groups):
    """Adapters of one module, each in the planted subspace of its group, but for a little noise."""
    found = []
    for index in range(n):
        group = index % groups
        bases = orthonormal(3, 29, seed=100 + group), orthonormal(3, 41, seed=200 + group)
        one = factors_in(bases, 3, seed=10 * index, noise=0.02)
        modules = {"layer": LoRAFactors(one.down.float(), one.up.float(), one.scaling)}
        found.append(from_factors(f"adapter-{index}", modules, base_model="org/base"))
    return found


class TestCoded:
    @pytest.mark.parametrize(
        ("error", "forms"),
        [(0.88, {"terms", "zero"}), (0.3, {"core"}), (0.05, {"terms", "rest"}), (0.001, {"terms", "rest"})],
    )
    def test_every_form_of_an_update(self, tmp_path, error, forms):
        adapters, _ = shared_collection(8, noise=0.05)
        pack = ex.fit(adapters, max_error=error, warn_above=1.0)
        found = set()
        for name in pack.names:
            for one in pack.packed(name).coefficients._codes.modules.values():
                found.add("core" if one.core_level else "terms" if one.count else "zero")
                found |= {"rest"} if (one.down.residual_levels > 0).any() and one.count else set()
        assert found >= forms
        assert assert_reads_what_the_library_reads(pack.save(tmp_path / "pack")) == 16

    def test_clusters(self, tmp_path):
        pack = ex.fit(in_groups(12, 2), max_error=0.3)
        assert {pack.packed(name).coefficients._codes.cluster for name in pack.names} == {0, 1}
        assert assert_reads_what_the_library_reads(pack.save(tmp_path / "pack")) == 12

    def test_an_adapter_that_came_later(self, tmp_path):
        *first, late = in_groups(13, 2)
        pack = ex.fit(first, max_error=0.3)
        pack.add(late)
        assert assert_reads_what_the_library_reads(pack.save(tmp_path / "pack")) == 13

    def test_an_augmented_pack(self, tmp_path):
        *first, late = in_groups(13, 2)
        pack = ex.fit(first, max_error=0.3).augment(2, seed=7)
        pack.add(late)
        assert assert_reads_what_the_library_reads(pack.save(tmp_path / "pack")) == 13

    def test_a_budget_and_adapters_of_all_kinds(self, tmp_path):
        sources = tmp_path / "sources"
        make_adapter(sources / "plain", seed=1, head=(2, 31))
        make_adapter(
            sources / "patterns", seed=2, config={"r": 8, "lora_alpha": 5, "rank_pattern": {"query": 3, "value": 3}}
        )
        zeros = {key: torch.zeros_like(value) for key, value in factors(seed=1).items()}
        make_adapter(sources / "untrained", seed=3, tensors=zeros)
        longer = {f"bert.{module}": shape for module, shape in MODULES.items()}
        make_adapter(sources / "long", seed=4, modules=longer)
        with pytest.warns(UntrainedAdapterWarning):
            pack = ex.fit(sources, max_bytes=3300, exclude_modules=["*layer.1.query"], warn_above=1.0)
        assert not read_pack.delta_weights(pack.save(tmp_path / "pack"), "untrained")[QUERY].any()
        assert assert_reads_what_the_library_reads(tmp_path / "pack") == 4 * (len(MODULES) - 1)

    def test_lanes_and_numbers_of_every_class(self):
        random = np.random.default_rng(1)
        classes = np.sort(random.integers(0, class_tables.CLASSES, 40_000))
        values = (
            np.rint(random.logistic(size=40_000) * 2.0 ** (classes / 4 - 4)).clip(-(2**31), 2**31 - 1).astype(np.int64)
        )
        (data,) = entropy.encode([(values, classes)])
        assert (read_pack.decoded(data, classes) == values).all()

    @pytest.mark.parametrize("n", [0, 1, 9, 1024])
    def test_short_streams(self, n):
        random = np.random.default_rng(n)
        classes = random.integers(0, class_tables.CLASSES, n)
        values = np.rint(random.logistic(size=n) * 2.0 ** (classes / 4 - 4)).clip(-(2**31), 2**31 - 1).astype(int)
        values[::100] = -(2**31)
        data = short_streams.encode(values, classes)
        assert read_pack.short_stream(data, classes.tolist()).tolist() == values.tolist()

    def test_tables_of_every_class(self):
        for number in range(class_tables.CLASSES):
            one = class_tables.class_table(number)
            assert read_pack.table(number) == (one.raw_bits, one.first, one.bounds.tolist())

    def test_bytes_that_are_no_stream_are_noticed(self):
        classes = np.full(500, 20)
        (data,) = entropy.encode([(np.arange(500) % 7 - 3, classes)])
        with pytest.raises(AssertionError, match="not such a stream"):
            read_pack.decoded(data[:60] + bytes([data[60] ^ 1]) + data[61:], classes)


class TestDamage:
    @pytest.mark.parametrize("position", [0, 0.5, -1])
    @pytest.mark.parametrize("file", ["subspace-*.safetensors", *(f"adapters/b/{name}*" for name in "as")])
    def test_a_flipped_byte_is_noticed(self, tmp_path, file, position):
        folder = fitted(tmp_path)
        for path in sorted(folder.glob(file)):
            data = path.read_bytes()
            at = int(position * len(data)) if position > 0 else position
            changed = bytearray(data)
            changed[at] ^= 1
            path.write_bytes(changed)
            with pytest.raises(AssertionError, match="was changed"):
                read_pack.delta_weights(folder, "b")
            path.write_bytes(data)
        assert read_pack.delta_weights(folder, "b")

    @pytest.mark.parametrize("field", ["k", "square", "format_version", "delta_error", "fingerprint", "in_fit"])
    def test_a_changed_manifest_is_noticed(self, tmp_path, field):
        folder = fitted(tmp_path)
        path = folder / "subspace_config.json"
        text = path.read_text()
        changed, times = re.subn(rf'("{field}":)("?)[0-9a-z]', r"\1\g<2>7", text, count=1)
        assert times == 1
        assert changed != text
        path.write_text(changed)
        with pytest.raises((AssertionError, ValueError)):
            read_pack.delta_weights(folder, "b")

    def test_another_generator_is_noticed(self, tmp_path, monkeypatch):
        folder = ex.Pack.open(fitted(tmp_path)).augment(3, seed=7).save(tmp_path / "augmented")
        normal = read_pack.normal
        monkeypatch.setattr(read_pack, "normal", lambda n, d, seed, label: normal(n, d, seed + 1, label))
        with pytest.raises(AssertionError, match="rebuilt differently"):
            read_pack.delta_weights(folder, "b")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A pack with everything that a manifest may tell of."""
    parent = tmp_path_factory.mktemp("everything")
    make_adapters(parent / "sources", "a b", head=(2, 31))
    (make_adapter(parent / "sources" / "broken", seed=3) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.warns(SkippedAdapterWarning, match="broken"):
        pack = ex.fit(parent / "sources", n_components=4, exclude_modules=[QUERY], skip_bad=True)
    pack.add(make_adapter(parent / "late", seed=4), extend=1, carry_missing=True)
    return pack.augment(2, seed=1).save(parent / "pack")


class TestSpecification:
    """docs/pack-format.md names all that a pack is made of, and the reference of the JSON its figures."""

    text = (DOCS / "pack-format.md").read_text("utf-8")
    figures = json_reference.markdown()

    def test_of_the_manifests_bytes(self, everything):
        data = (everything / "subspace_config.json").read_bytes()
        written = json.dumps(json.loads(data), separators=(",", ":"), sort_keys=True, allow_nan=False) + "\n"
        assert data == written.encode()

    def test_of_the_fingerprint(self, everything):
        subspace = read_pack.whole(json.loads((everything / "subspace_config.json").read_text())["subspace"])
        tensors = load_file(everything / subspace["file"])
        assert sha256((everything / subspace["file"]).read_bytes()).hexdigest()[:8] == subspace["file"][9:17]
        digest = sha256()
        for module in sorted(subspace["modules"]):
            for side in ("down", "up"):
                rows = tensors[f"{module}.{side}.components"][:4]
                digest.update(f"{module}\0{side}\0{rows.shape}\0torch.{subspace['dtype']}\0".encode())
                digest.update(rows.astype("<f4").tobytes())
                spectrum = tensors[f"{module}.{side}.singular_values"].astype(float)
                assert subspace["modules"][module][side]["square"] == pytest.approx(np.square(spectrum).sum())
        extension, augmentation = subspace["growth"]
        assert digest.hexdigest() == extension["fingerprint"]
        digest.update(b"extension\0")
        for module in sorted(subspace["modules"]):
            for side in ("down", "up"):
                rows = tensors[f"{module}.{side}.components"][4:]
                assert subspace["modules"][module][side]["grown"] == [1, 2]
                digest.update(f"{module}\0{side}\0{rows.shape}\0torch.{subspace['dtype']}\0".encode())
                digest.update(rows.astype("<f4").tobytes())
        assert digest.hexdigest() == augmentation["fingerprint"]
        digest.update(f"augmentation\0{2}\0{augmentation['seed']}\0".encode())
        assert digest.hexdigest() == subspace["fingerprint"]
        assert subspace["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())

    def test_of_the_fingerprint_of_a_coded_pack(self, tmp_path):
        folder = ex.fit(in_groups(12, 2), max_error=0.3).save(tmp_path / "pack")
        subspace = read_pack.whole(json.loads((folder / "subspace_config.json").read_text())["subspace"])
        tensors = load_file(folder / subspace["file"])
        bases = read_pack.coded_bases(tensors, subspace["modules"], joined=True)
        digest = sha256()
        for side, dimension in (("down", 29), ("up", 41)):
            clusters = read_pack.coded_basis(bases["layer", side], dimension)
            assert len(clusters) == 2
            rows = np.concatenate([rows for rows, _ in clusters])
            assert len(rows) == subspace["modules"]["layer"][side]["k"]
            digest.update(f"layer\0{side}\0{rows.shape}\0torch.float32\0".encode())
            digest.update(rows.astype("<f4").tobytes())
        assert digest.hexdigest() == subspace["fingerprint"]
        assert subspace["stored_bytes"] == tensors["components.coded"].nbytes
        self.assert_named({*tensors, "eigenlorax_coded"})
        config = json.loads((folder / "adapters" / "adapter-0" / "adapter_config.json").read_text())
        self.assert_named(config.keys() - LoraConfig.__dataclass_fields__.keys())

    def test_of_the_fields_of_a_history(self, tmp_path):
        pack = ex.Pack.empty()
        for number in (1, 2):
            pack.append(make_adapter(tmp_path / "a", seed=number, head=(2, 31)), lossless=True)
        history = json.loads((pack.save(tmp_path / "pack") / "subspace_config.json").read_text())["histories"][
            "adapter"
        ]
        self.assert_named({*history, *VersionRecord.__dataclass_fields__})

    def example(self):
        """Return the bytes, numbers and classes of the example of a stream."""
        example = re.search(
            r"the bytes `([0-9a-f ]+)` are\s+the numbers ([\d, −]+) in the classes ([\d,\s]+):", self.text
        )
        numbers, classes = (
            [int(number) for number in text.replace("−", "-").split(",")] for text in example.groups()[1:]
        )
        return bytes.fromhex(example[1]), np.array(numbers), np.array(classes)

    def test_of_a_streams_bytes(self):
        data, numbers, classes = self.example()
        assert entropy.decode([(data, classes)])[0].tolist() == numbers.tolist()
        assert read_pack.decoded(data, classes).tolist() == numbers.tolist()

    def test_of_a_short_streams_bytes(self):
        (written,) = re.findall(r"the bytes `([0-9a-f]+)` are\s+the\s+same\s+numbers", self.text)
        _, numbers, classes = self.example()
        data = short_streams.encode(numbers, classes)
        assert data.hex() == written
        assert list(read_pack.short_stream(data, classes.tolist())) == numbers.tolist()

    def test_of_the_hash_of_a_source(self, everything):
        entry = json.loads((everything / "subspace_config.json").read_text())["adapters"]["a"]
        source = load_file(everything.parent / "sources" / "a" / "adapter_model.safetensors")
        digest = sha256()
        for module in sorted(MODULES):
            for side, part in (("down", "lora_A"), ("up", "lora_B")):
                tensor = source.pop(f"base_model.model.{module}.{part}.weight")
                digest.update(f"{module}\0{side}\0{tensor.shape}\0torch.float32\0{2.0!r}\0".encode())
                digest.update(tensor.tobytes())
        for key, tensor in sorted(source.items()):
            digest.update(f"{key}\0{tensor.shape}\0torch.float32\0".encode())
            digest.update(tensor.tobytes())
        assert digest.hexdigest() == entry["source_sha256"]

    def assert_named(self, names):
        missing = [name for name in sorted(names) if f"`{name}`" not in self.text + self.figures]
        assert not missing, f"docs/pack-format.md does not name {missing}"

    def test_every_field_of_a_manifest(self, everything):
        manifest = json.loads((everything / "subspace_config.json").read_text())
        assert manifest["fit"]["skipped"]
        assert manifest["fit"]["excluded_modules"]
        named = set()

        def collect(value, *place):
            if isinstance(value, dict):
                for key, inner in value.items():
                    # these objects are keyed by names of adapters, modules and files, not by fields
                    if place and place[-1] in ("adapters", "modules", "files", "skipped", "source_fields"):
                        collect(inner, *place, "*")
                    else:
                        named.add(key)
                        collect(inner, *place, key)
            for inner in value if isinstance(value, list) else ():
                collect(inner, *place)

        collect(manifest)
        assert {"digest", "lora_numbers", "square", "grown", "down"} <= named
        assert not named & {"a", "b", "broken", *MODULES}
        self.assert_named(named)

    def test_every_file_and_every_field_of_its_configs(self, everything):
        files = {path.name for path in (everything / "adapters" / "a").iterdir()}
        assert "carried.safetensors" in files
        config = json.loads((everything / "adapters" / "a" / "adapter_config.json").read_text())
        self.assert_named({"subspace_config.json", "README.md", ".lock"} | files)
        self.assert_named(config.keys() - LoraConfig.__dataclass_fields__.keys())

    def test_every_kind_of_tensor(self, everything):
        (path,) = everything.glob("subspace-*.safetensors")
        with safe_open(path, framework="numpy") as file:
            kinds = {key.rpartition(".")[2] for key in file.keys()}  # noqa: SIM118 (not a dict)
        self.assert_named({f"<module>.<side>.{kind}" for kind in kinds})
        self.assert_named({"base_model.model.<module>.eigenlorax_down", "base_model.model.<module>.eigenlorax_up"})
