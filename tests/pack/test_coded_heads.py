"""Heads and other tensors outside the subspace, coded within an error bound, which is measured in float64."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_read_pack import read_pack

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.codec import tensor_codes, varint
from eigenlorax.codec.quantised_tensor import StepSize, quantise_tensor
from eigenlorax.codec.tensor_codes import References
from eigenlorax.core import atomic_files
from eigenlorax.errors import FormatError, OptionError, PackDamagedError
from planted import normal, random_adapter, tree
from signing import signed_again

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

CLASSIFIER = "base_model.model.classifier.weight"
BIAS = "base_model.model.classifier.bias"
NORM = "base_model.model.encoder.layer.0.LayerNorm.weight"
EMBEDDINGS = "base_model.model.model.embed_tokens.weight"
MAGNITUDE = "base_model.model.encoder.0.query.lora_magnitude_vector"
BOUNDS = {CLASSIFIER: 0.1, BIAS: 0.002, NORM: 0.002, EMBEDDINGS: 0.002, MAGNITUDE: 0.002}


def gauss(seed, *shape):
    return normal(*shape, seed=seed)


def distance(tensor, original):
    """The relative error of a tensor, 0 for zeros that are kept."""
    error, norm = (float(each.norm()) for each in (tensor.double() - original.double(), original.double()))
    return error / norm if norm else error


def tensors(seed, dtype=torch.float32):
    """One tensor of each kind, random, with sizes that no other has."""
    shapes = {CLASSIFIER: (7, 53), BIAS: (67,), NORM: (97,), EMBEDDINGS: (61, 37)}
    drawn = {key: gauss(seed + number, *shape).to(dtype) for number, (key, shape) in enumerate(shapes.items())}
    return {**drawn, NORM: 1 + 0.01 * drawn[NORM]}


def adapter(name, seed, dtype=torch.float32, **more):
    return random_adapter(
        name,
        seed,
        heads={**tensors(100 * seed, dtype), **more},
        carried={MAGNITUDE: gauss(seed, 41).abs().to(dtype)},
    )


def outside(of):
    return {**of.heads, **of.carried}


def fitted(originals, path, **options):
    return ex.Pack.open(ex.fit(originals, **{"max_error": 0.1, **options}).save(path))


class TestBounds:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_hold_in_the_dtype_of_the_source(self, tmp_path, dtype):
        originals = [adapter(name, seed, dtype) for seed, name in enumerate("abc", start=1)]
        pack = fitted(originals, tmp_path / "pack")
        for original in originals:
            stored = outside(pack[original.name])
            errors = {key: distance(stored[key], tensor) for key, tensor in outside(original).items()}
            assert {key: tensor.dtype for key, tensor in stored.items()} == dict.fromkeys(BOUNDS, dtype)
            assert all(errors[key] <= bound for key, bound in BOUNDS.items())
            assert errors[CLASSIFIER] > 0.09
            assert pack.records[original.name].head_error == pytest.approx(max(errors.values()), rel=1e-9)

    @pytest.mark.parametrize("bound", [0.5, 0.03, 0.001, 1e-5])
    def test_that_are_chosen(self, tmp_path, bound):
        original = adapter("a", 1)
        pack = fitted([original], tmp_path / "pack", head_error=bound)
        errors = {key: distance(tensor, outside(original)[key]) for key, tensor in outside(pack["a"]).items()}
        assert all(errors[key] <= min(bound, limit if key != CLASSIFIER else 1) for key, limit in BOUNDS.items())
        assert pack.fit_info.head_error == bound
        assert ex.verify(pack, [original]).holds

    @pytest.mark.parametrize("options", [{"max_error": 0.2, "head_error": 0}, {"n_components": 3}])
    def test_exact(self, tmp_path, options):
        original = adapter("a", 1)
        pack = ex.Pack.open(ex.fit([original], **options).save(tmp_path / "pack"))
        assert all(torch.equal(tensor, outside(original)[key]) for key, tensor in outside(pack["a"]).items())
        assert (pack.fit_info.head_error, pack.records["a"].head_error) == (None, 0.0)

    def test_zeros_integers_and_single_numbers(self, tmp_path):
        more = {
            "base_model.model.zeros.weight": torch.zeros(12, 300),
            "base_model.model.one.bias": torch.tensor([math.pi]),
            "base_model.model.empty.weight": torch.zeros(0, 5),
            "base_model.model.scalar": torch.tensor(2.5),
        }
        original = adapter("a", 1, **more)
        stored = fitted([original], tmp_path / "pack")["a"].heads
        assert all(torch.equal(stored[key], tensor) for key, tensor in more.items() if "zeros" in key or "empty" in key)
        assert all(distance(stored[key], tensor) <= 0.002 for key, tensor in more.items())

    @pytest.mark.parametrize("size", [1e200, 1e-165, 1e-200])
    def test_of_a_norm_that_float64_cannot_square(self, size):
        head = size * gauss(1, 20, 40)
        originals = [random_adapter(name, seed, heads={CLASSIFIER: head}) for seed, name in enumerate("ab")]
        pack = ex.fit(originals, max_error=0.2)
        assert all(torch.equal(pack[name].heads[CLASSIFIER], head) for name in "ab")

    def test_of_almost_nothing(self):
        originals = [random_adapter(name, seed, heads={CLASSIFIER: gauss(1, 20, 40)}) for seed, name in enumerate("ab")]
        pack = ex.fit(originals, max_error=0.2, head_error=1e-200)
        assert torch.equal(pack["b"].heads[CLASSIFIER], originals[1].heads[CLASSIFIER])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"head_error": 1.0}, "at least 0 and below 1, got 1.0"),
            ({"head_error": -0.1}, "at least 0 and below 1, got -0.1"),
            ({"head_error": float("nan")}, "at least 0 and below 1, got nan"),
            ({"head_error": 0.1, "max_error": None, "n_components": 4}, "stores heads exactly"),
        ],
    )
    def test_that_cannot_be(self, options, message):
        with pytest.raises(OptionError, match=message):
            ex.fit([adapter("a", 1)], **{"max_error": 0.2, **options})


class TestDefaults:
    @pytest.mark.parametrize(("max_error", "head_error"), [(0.02, 0.1), (0.2, 0.2), (0.6, 0.3)])
    def test_follow_the_error_bound(self, tmp_path, max_error, head_error):
        pack = fitted([adapter("a", 1)], tmp_path / "pack", max_error=max_error, warn_above=1.0)
        assert pack.fit_info.head_error == head_error
        assert 0.9 * head_error < pack.records["a"].head_error <= head_error

    def test_for_a_size_are_those_of_the_updates(self, tmp_path):
        # a head as large as the LoRA
        originals = [random_adapter(f"a{n}", n, heads={CLASSIFIER: gauss(n + 50, 20, 40).float()}) for n in range(3)]
        found = {}
        for ratio in (4.0, 5.5, 7.0):
            pack = fitted(originals, tmp_path / str(ratio), max_error=None, ratio=ratio, warn_above=1.0)
            found[ratio] = pack.fit_info.head_error
            b = pack.summary.bytes
            assert b.ratio_with_heads >= ratio
            worst = pack.summary.in_fit.worst
            assert pack.fit_info.head_error == 0.3 or worst <= 1.25 * pack.fit_info.head_error
        assert found[4.0] < found[7.0] == 0.3

    def test_without_heads_is_the_smallest(self):
        assert ex.fit([random_adapter("a", 1)], max_bytes=300, warn_above=1.0).fit_info.head_error == 0.1


class TestSizes:
    def test_of_normal_numbers_are_near_the_bound_of_rate_and_distortion(self):
        head = gauss(5, 200, 768).float()
        for bound in (0.3, 0.1, 0.02):
            quantised = quantise_tensor(head, bound)
            (coded,) = tensor_codes.encode_tensors([quantised])
            assert quantised.error <= bound
            # Gaussian numbers need log2(1 / bound) bits; a uniform quantiser with ideal coding 0.25 bits more
            assert math.log2(1 / bound) < 8 * coded.size / head.numel() < math.log2(1 / bound) + 0.37

    def test_are_counted(self, tmp_path):
        originals = [adapter(name, seed) for seed, name in enumerate("abc", start=1)]
        exact, coded = (fitted(originals, tmp_path / str(bound), head_error=bound) for bound in (0, 0.1))
        b = coded.summary.bytes
        files = sum(
            tensor.nbytes
            for path in coded.path.glob("**/*.safetensors")
            for key, tensor in load_file(path).items()
            if key != "eigenlorax_coded" and not key.startswith("components")
        )
        assert b.heads + b.carried == files < 0.5 * (exact.summary.bytes.heads + exact.summary.bytes.carried)
        assert b.source_heads == sum(2 * tensor.numel() for one in originals for tensor in one.heads.values())
        assert b.ratio_with_heads == (b.lora + b.source_heads) / (b.pack + b.heads)

    @pytest.mark.parametrize("options", [{"max_bytes": 11_000}, {"ratio": 1.9}])
    def test_for_a_size_include_them(self, tmp_path, options):
        originals = [adapter(name, seed) for seed, name in enumerate("abc", start=1)]
        pack = fitted(originals, tmp_path / "pack", max_error=None, warn_above=1.0, **options)
        b = pack.summary.bytes
        limit = options.get("max_bytes") or (b.lora + b.source_heads) / options["ratio"]
        assert 0.9 * limit <= b.pack + b.heads <= limit


class TestAlike:
    """Heads from one start: a reference tensor and differences."""

    def heads(self, n, spread):
        start = gauss(1, 40, 96)
        return [{CLASSIFIER: (start + spread * gauss(2 + index, 40, 96)).float()} for index in range(n)]

    def collection(self, heads):
        return [random_adapter(f"a{index}", index, heads=head) for index, head in enumerate(heads)]

    def test_take_the_bytes_of_their_differences(self, tmp_path):
        alike, apart = self.collection(self.heads(12, 0.02)), self.collection(self.heads(12, 3.0))
        small, large = (fitted(originals, tmp_path / name) for name, originals in (("a", alike), ("b", apart)))
        assert (len(small.reference_tensors), len(large.reference_tensors)) == (1, 0)
        assert 5 * small.summary.bytes.heads < large.summary.bytes.heads
        for original in alike:
            assert distance(small[original.name].heads[CLASSIFIER], original.heads[CLASSIFIER]) <= 0.1
        assert ex.verify(small, alike).holds

    def test_equal_ones_take_no_bytes_of_their_own(self, tmp_path):
        head = self.heads(1, 0)[0]
        pack = fitted(self.collection([head] * 5), tmp_path / "pack")
        assert max(record.head_bytes for record in pack.records.values()) < 120

    def test_do_not_depend_on_the_order(self, tmp_path):
        originals = self.collection(self.heads(5, 0.05))
        first = fitted(originals, tmp_path / "first").path
        second = fitted(originals[::-1], tmp_path / "second").path
        assert tree(first) == tree(second)

    def test_an_added_one_refers_to_them(self, tmp_path):
        *originals, late = self.collection(self.heads(6, 0.05))
        other = random_adapter("other", 9, heads={CLASSIFIER: gauss(99, 40, 96).float()})
        path = fitted(originals, tmp_path / "pack").path
        with ex.Pack.edit(path) as pack:
            records = pack.add_all([late, other])
        pack = ex.Pack.open(path)
        assert 2 * records[late.name].head_bytes < records["other"].head_bytes
        assert distance(pack[late.name].heads[CLASSIFIER], late.heads[CLASSIFIER]) <= 0.1
        assert ex.verify(pack, [*originals, late, other]).holds

    def test_removing_one_leaves_the_others(self, tmp_path):
        originals = self.collection(self.heads(4, 0.05))
        path = fitted(originals, tmp_path / "pack").path
        before = ex.Pack.open(path)["a1"].heads[CLASSIFIER]
        with ex.Pack.edit(path) as pack:
            pack.remove("a0", "a2")
        assert torch.equal(ex.Pack.open(path)["a1"].heads[CLASSIFIER], before)


class TestAgain:
    """Coding what was coded before adds no error."""

    @pytest.mark.parametrize("options", [{}, {"max_error": 0.4}, {"head_error": 0.3}, {"n_components": 2}])
    def test_a_refit_without_originals(self, tmp_path, options):
        alike = TestAlike()
        originals = alike.collection(alike.heads(4, 0.05))
        pack = fitted(originals, tmp_path / "pack")
        refitted = ex.refit(pack, warn_above=1.0, **options).pack
        again = ex.Pack.open(refitted.save(tmp_path / "again"))
        for name in pack.names:
            assert torch.equal(again[name].heads[CLASSIFIER], pack[name].heads[CLASSIFIER])
            assert again.records[name].head_error == pack.records[name].head_error
        # of originals, the recorded error holds still
        assert all(verified.heads_hold for verified in ex.verify(again, originals).adapters.values())

    def test_a_refit_for_a_ratio_counts_them_in_16_bits(self):
        # the heads are half of the adapter
        originals = [random_adapter(f"a{n}", n, heads={CLASSIFIER: gauss(n + 50, 20, 40).float()}) for n in range(4)]
        pack = ex.fit(originals, max_error=0.1)
        refitted = ex.refit(pack, ratio=3.0, warn_above=1.0).pack
        assert 3.0 <= refitted.summary.bytes.ratio_with_heads < 3.6

    def test_a_refit_with_some_originals(self, tmp_path):
        alike = TestAlike()
        originals = alike.collection(alike.heads(6, 0.05))
        pack = fitted(originals, tmp_path / "pack", head_error=0.2)
        again = ex.refit(pack, originals[:3], head_error=0.01).pack
        for original in originals[:3]:
            assert distance(again[original.name].heads[CLASSIFIER], original.heads[CLASSIFIER]) <= 0.01
        for name in pack.names[3:]:
            assert torch.equal(again[name].heads[CLASSIFIER], pack[name].heads[CLASSIFIER])
            assert again.records[name].head_error == pack.records[name].head_error

    def test_a_copy_has_the_same_bytes(self, tmp_path):
        alike = TestAlike()
        path = fitted(alike.collection(alike.heads(4, 0.05)), tmp_path / "pack").path
        copy = ex.Pack.open(path).save(tmp_path / "copy")
        assert tree(copy) == tree(path)

    def test_an_augmented_pack_has_them(self, tmp_path):
        alike = TestAlike()
        pack = fitted(alike.collection(alike.heads(4, 0.05)), tmp_path / "pack")
        grown = ex.Pack.open(pack.augment(2, seed=1).save(tmp_path / "grown"))
        assert all(torch.equal(grown[n].heads[CLASSIFIER], pack[n].heads[CLASSIFIER]) for n in pack.names)


def test_an_export_has_the_decoded_tensors_in_their_dtype(tmp_path):
    folder = make_adapter(tmp_path / "one", seed=1, head=(5, 31), dtype=torch.float16)
    pack = fitted([folder], tmp_path / "pack")
    exported = ex.read_adapter(pack.export(tmp_path / "out")["one"])
    original = ex.read_adapter(folder)
    for key, tensor in original.heads.items():
        assert exported.heads[key].dtype == tensor.dtype
        assert distance(exported.heads[key], tensor) <= 0.1
        assert torch.equal(exported.heads[key], pack["one"].heads[key])


def test_verify_measures_heads(tmp_path):
    originals = [adapter("a", 1), adapter("b", 2)]
    pack = fitted(originals, tmp_path / "pack")
    found = ex.verify(pack, originals)
    for original in originals:
        errors = [distance(tensor, outside(original)[key]) for key, tensor in outside(pack[original.name]).items()]
        assert found.adapters[original.name].head_error == pytest.approx(max(errors), rel=1e-12)
    # as if a mistaken encoder had recorded too little
    manifest = pack.path / "subspace_config.json"
    recorded = pack.records["a"].head_error
    manifest.write_text(manifest.read_text().replace(repr(recorded), repr(0.9 * recorded)))
    signed_again(pack.path)
    assert not ex.verify(ex.Pack.open(pack.path), originals).adapters["a"].holds


def test_a_reader_of_the_specification_alone_finds_the_same(tmp_path):
    alike = TestAlike()
    originals = [*alike.collection(alike.heads(3, 0.05)), adapter("b", 5)]
    pack = fitted(originals, tmp_path / "pack")
    assert len(pack.reference_tensors) == 1
    for name in pack.names:
        stored = outside(pack.packed(name))
        found = read_pack.coded_tensors(pack.path, name)
        assert found
        for key, numbers in found.items():
            assert np.array_equal(numbers.astype(np.float32), stored[key].numpy())


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        alike = TestAlike()
        return fitted(alike.collection(alike.heads(3, 0.05)), tmp_path / "pack").path

    def changed(self, path, pattern, key, change):
        (file,) = path.glob(pattern)
        stored = load_file(file)
        stored[key] = torch.from_numpy(np.frombuffer(change(stored[key].numpy().tobytes()), np.uint8).copy())
        save_file(stored, file)
        if file.name.startswith("subspace"):
            digest = atomic_files.digest(file.read_bytes())
            moved = file.with_name(f"subspace-{digest[:8]}.safetensors")
            file.rename(moved)
            manifest = path / "subspace_config.json"
            manifest.write_text(manifest.read_text().replace(file.name, moved.name))
        signed_again(path)
        return ex.Pack.open(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data[:-1],
            lambda data: data + b"\0",
            lambda data: b"\xff" * 9 + data,
            lambda data: bytes([data[0] ^ 1]) + data[1:],
            lambda data: b"",
        ],
    )
    def test_of_codes(self, path, change):
        pack = self.changed(path, "adapters/a0/adapter_model.safetensors", "eigenlorax_heads", change)
        with pytest.raises(PackDamagedError):
            dict(pack.packed("a0").heads)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ({"shape": [10**6, 10**6]}, "would have"),
            ({"shape": [40, 95]}, "refers to reference 0"),
            ({"shape": [10**6, 10**6], "reference": None}, "would have|classes"),
            ({"shape": [0, 3]}, "the shape"),
            ({"shape": [-1, 3]}, "the shape"),
            ({"dtype": "int64"}, "dtype must be one of"),
            ({"mantissa": 2**40}, "step size"),
            ({"exponent": 10**6}, "step size"),
            ({"reference": 5}, "refers to reference 5"),
            ({"reference": -1}, "negative"),
            ({"classes": 10**9}, "classes, and should have"),
            ({"stream": 10**9, "classes": 40}, "end too early"),
            ({"name": 5}, "a string|str was expected"),
        ],
    )
    def test_of_a_header(self, path, header, message):
        def change(data):
            ((name, coded),) = tensor_codes.from_bytes(data)
            fields = ["name", "dtype", "shape", "mantissa", "exponent", "reference", "classes", "stream"]
            values = [
                name,
                "float32",
                list(coded.shape),
                coded.step_size.mantissa,
                coded.step_size.exponent,
                coded.reference,
                len(coded.classes),
                len(coded.stream),
            ]
            text = json.dumps([list({**dict(zip(fields, values, strict=True)), **header}.values())]).encode()
            parts = [tensor_codes._deflate(text), tensor_codes._deflate(coded.classes)]
            return b"".join([*(varint.encode(len(part)) + part for part in parts), coded.stream])

        pack = self.changed(path, "adapters/a0/adapter_model.safetensors", "eigenlorax_heads", change)
        with pytest.raises(PackDamagedError, match=message):
            dict(pack.packed("a0").heads)

    def test_of_sizes_that_the_bytes_do_not_explain(self, path):
        def zeros(count, references):
            coded = tensor_codes.CodedTensor(torch.float32, (10**4, 10**3), StepSize(512, 0), references, b"", b"")
            return lambda data: tensor_codes.to_bytes([(f"{CLASSIFIER}{n}", coded) for n in range(count)])

        for count, reference in ((40, None), (10**4, 0)):
            change = zeros(count, reference)
            pack = self.changed(path, "adapters/a0/adapter_model.safetensors", "eigenlorax_heads", change)
            with pytest.raises(PackDamagedError, match="coded tensors together would have"):
                pack.packed("a0")

    def test_of_classes_that_take_memory_before_they_are_compared(self):
        header = [["x", "float32", [1, 4], 512, 0, None, 10**8, 0]]
        parts = [tensor_codes._deflate(part) for part in (json.dumps(header).encode(), bytes(10**8))]
        data = b"".join(varint.encode(len(part)) + part for part in parts)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="100000000 classes, and should have 0"):
                tensor_codes.from_bytes(data)
            assert tracemalloc.get_traced_memory()[1] < 10**6
        finally:
            tracemalloc.stop()

    def test_of_references(self, path):
        pack = self.changed(path, "subspace-*.safetensors", "references.coded", lambda data: data[:-2])
        with pytest.raises(PackDamagedError, match="end too early"):
            pack["a0"]

    def test_that_is_not_signed(self, path):
        file = path / "adapters" / "a0" / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
        with pytest.raises(PackDamagedError, match="was changed after it was written"):
            ex.Pack.open(path)["a0"]


@pytest.mark.parametrize("size", [1.0, 0.1, 3e-7, 1e12, 5e-290])
def test_step_sizes_are_just_below_the_wanted_one(size):
    assert 0.998 * size < float(StepSize.at_most(size)) <= size


def test_a_decoded_head_is_the_caller_s_own(tmp_path):
    heads = fitted([adapter("a", 1)], tmp_path / "pack")["a"].heads
    before = heads[BIAS].clone()
    heads[BIAS].zero_()
    assert torch.equal(heads[BIAS], before)


def test_tensors_have_the_same_bytes_together_as_alone():
    heads = [gauss(1, 5, 70), torch.zeros(3), gauss(2, 900).half(), gauss(3, 41, 3).float()]
    quantised = [quantise_tensor(head, 0.05) for head in heads]
    alone = [code for each in quantised for code in tensor_codes.encode_tensors([each])]
    assert tensor_codes.encode_tensors(quantised) == alone
    assert [distance(code.decode(()), head) <= 0.05 for code, head in zip(alone, heads, strict=True)] == [True] * 4


def test_references_are_decoded_once():
    (coded,) = tensor_codes.encode_tensors([quantise_tensor(gauss(1, 5, 70).float(), 0.1)])
    references = References([coded])
    assert references[0] is references[0]
    assert References.from_bytes(references.data).coded == references.coded


@pytest.mark.parametrize(("head_error", "text"), [(0.1, "coded, each within 0.1 of its norm"), (0, "exact")])
def test_the_model_card_says_how_heads_are_stored(tmp_path, head_error, text):
    pack = fitted([adapter("a", 1)], tmp_path / "pack", head_error=head_error)
    row = f"| head bytes ({text}) | {pack.summary.bytes.heads:,} |"
    assert row in (pack.path / "README.md").read_text("utf-8")
