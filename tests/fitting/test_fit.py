import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eigenlorax as ex
import reference
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import (
    BaseModelError,
    ModuleNameError,
    NonFiniteError,
    NothingSharedWarning,
    OptionError,
    ShapeError,
    SkippedAdapterWarning,
    UnknownBaseWarning,
    UntrainedAdapterWarning,
)
from eigenlorax.formats import ranges
from planted import (
    MODULES,
    assert_same_span,
    random_adapter,
    random_collection,
    shared_collection,
    tree,
)


def untrained(name="zero"):
    adapter = random_adapter(name, 7)
    modules = {m: ex.LoRAFactors(f.down, torch.zeros_like(f.up), f.scaling) for m, f in adapter.modules.items()}
    return from_factors(name, modules, base_model="org/base")


class TestWhatComesOut:
    def test_a_planted_subspace_is_found_and_every_adapter_comes_back(self):
        adapters, bases = shared_collection(6, dtype=torch.float64)
        pack = ex.fit(adapters, n_components=8)
        for name, (down, up) in bases.items():
            found = pack.subspace.modules[name]
            assert_same_span(found.down.components, down)
            assert_same_span(found.up.components, up)
        for adapter in adapters:
            assert reference.delta_error(adapter, pack.adapter(adapter.name)) < 1e-12

    @pytest.mark.parametrize("weighting", ["delta", "factors"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_errors_reported_are_those_of_the_adapters_given_back(self, weighting, dtype):
        adapters = random_collection()
        pack = ex.fit(adapters, n_components=6, weighting=weighting, dtype=dtype)
        for adapter in adapters:
            wanted = reference.delta_error(adapter, pack.adapter(adapter.name))
            assert pack.records[adapter.name].delta_error == pytest.approx(wanted, rel=1e-5)

    def test_an_adapters_modules_are_weighted_by_its_whole_norm(self):
        adapters = random_collection()
        weights = [
            sum(np.square(reference.dense(f)).sum() for f in adapter.modules.values()) ** -0.5 for adapter in adapters
        ]
        pack = ex.fit(adapters, n_components=4, dtype="float64")
        for module in MODULES:
            deltas = [reference.dense(adapter.modules[module]) for adapter in adapters]
            right, left, _, _ = reference.fit_delta(deltas, weights, 4, 2)
            assert_same_span(pack.subspace.modules[module].down.components, torch.from_numpy(right), atol=1e-6)
            assert_same_span(pack.subspace.modules[module].up.components, torch.from_numpy(left), atol=1e-6)

    def test_rounding_is_reported_apart(self):
        adapters, _ = shared_collection(6)
        record = ex.fit(adapters, n_components=8, dtype="float16").records["adapter-0"]
        # the planted subspace holds every adapter, so that all of the error is rounding
        assert record.delta_error == pytest.approx(record.rounding_error, rel=1e-3)
        assert 1e-5 < record.rounding_error < 2e-3
        assert ex.fit(adapters, n_components=2, dtype="float16").records["adapter-0"].rounding_error < 2e-3

    def test_basis_and_coefficients_may_differ_in_dtype(self):
        pack = ex.fit(random_collection(), n_components=4, dtype="float16", coefficient_dtype="float32")
        assert pack.subspace.modules["encoder.0.query"].down.components.dtype == torch.float16
        assert pack.packed("a0").coefficients["encoder.0.query"].down.dtype == torch.float32

    @pytest.mark.parametrize("weighting", ["delta", "factors"])
    @pytest.mark.parametrize("n", [1, 2])
    def test_few_adapters_come_back(self, weighting, n):
        adapters = random_collection(n)
        pack = ex.fit(adapters, n_components=32, weighting=weighting)
        for adapter in adapters:
            assert reference.delta_error(adapter, pack.adapter(adapter.name)) < 1e-5

    @pytest.mark.parametrize("size", [1e-6, 1e6])
    def test_extreme_norms_come_back(self, size):
        adapters = [*random_collection(3), random_adapter("odd", 900, size=size)]
        pack = ex.fit(adapters, energy=1.0)
        for adapter in adapters:
            assert reference.delta_error(adapter, pack.adapter(adapter.name)) < 1e-5

    def test_the_default_number_of_components_fits_small_modules(self):
        adapters = [random_adapter("a", 1, modules={"m.0": (7, 5)})]
        assert ex.fit(adapters, purpose="training").summary.down.max == 3


class TestOrder:
    @settings(max_examples=10, deadline=None)
    @given(order=st.permutations(range(5)))
    def test_of_arguments_does_not_matter_to_the_byte(self, tmp_path_factory, order):
        folder = tmp_path_factory.mktemp("order")
        adapters = random_collection()
        ex.fit(adapters, n_components=6).save(folder / "one")
        ex.fit([adapters[i] for i in order], n_components=6).save(folder / "two")
        assert tree(folder / "one") == tree(folder / "two")

    def test_same_input_gives_the_same_bytes(self, tmp_path):
        for name in ("one", "two"):
            ex.fit(random_collection(), n_components=6, dtype="bfloat16").save(tmp_path / name)
        assert tree(tmp_path / "one") == tree(tmp_path / "two")


class TestUntrained:
    def test_it_is_reported_left_out_of_the_fit_and_kept(self):
        adapters = random_collection()
        with pytest.warns(UntrainedAdapterWarning, match="left out of the fit: zero"):
            pack = ex.fit([*adapters, untrained()], n_components=6)
        assert pack.subspace.fingerprint == ex.fit(adapters, n_components=6).subspace.fingerprint
        record = pack.records["zero"]
        assert (record.untrained, record.in_fit, record.delta_error) == (True, False, 0.0)
        assert pack.summary.untrained == ["zero"]
        assert not any(reference.dense(f).any() for f in pack.adapter("zero").modules.values())

    def test_alone_it_cannot_be_fitted(self):
        with (
            pytest.warns(UntrainedAdapterWarning),
            pytest.raises(OptionError, match="No adapter has a trained update"),
        ):
            ex.fit([untrained()], n_components=32)

    def test_a_module_that_nobody_trained_is_kept(self):
        adapter = random_adapter("a", 1)
        modules = dict(adapter.modules)
        zero = modules["encoder.0.query"]
        modules["encoder.0.query"] = ex.LoRAFactors(zero.down, torch.zeros_like(zero.up), zero.scaling)
        pack = ex.fit([from_factors("a", modules, base_model="org/base")], energy=1.0)
        assert pack.subspace.modules["encoder.0.query"].down.k == 0
        back = pack.adapter("a").modules
        assert not reference.dense(back["encoder.0.query"]).any()
        np.testing.assert_allclose(
            reference.dense(back["encoder.0.dense"]), reference.dense(modules["encoder.0.dense"]), rtol=1e-3, atol=1e-4
        )


class TestBaseModels:
    def test_two_are_an_error_that_names_both(self):
        adapters = [random_adapter("a", 1, base="org/one"), random_adapter("b", 2, base="org/two")]
        with pytest.raises(BaseModelError, match=r"'b' has 'org/two', and adapter 'a' has 'org/one'.*--same-base"):
            ex.fit(adapters, n_components=32)

    def test_aliases_may_be_one(self):
        bases = ("/models/one", "org/one", "org/one")
        adapters = [random_adapter(f"a{i}", i, base=base) for i, base in enumerate(bases)]
        assert ex.fit(adapters, n_components=32, same_base=True).base_model == "org/one"

    def test_a_revision_that_is_not_stated_equals_any(self):
        adapters = [random_adapter("a", 1), random_adapter("b", 2, revision="main"), random_adapter("c", 3)]
        assert ex.fit(adapters, n_components=32).revision == "main"

    def test_two_revisions_are_an_error(self):
        adapters = [random_adapter("a", 1, revision="v1"), random_adapter("b", 2, revision="v2")]
        with pytest.raises(
            BaseModelError, match="revisions of the base model: adapter 'b' has 'v2', and adapter 'a' has 'v1'"
        ):
            ex.fit(adapters, n_components=32)

    def test_a_base_that_is_not_stated_is_warned_of(self):
        with pytest.warns(UnknownBaseWarning, match="no base model is stated by adapter 'b'"):
            pack = ex.fit([random_adapter("a", 1), random_adapter("b", 2, base=None)], n_components=32)
        assert pack.base_model == "org/base"


class TestModules:
    def test_adapters_may_lack_some(self):
        query = {"encoder.0.query": MODULES["encoder.0.query"]}
        adapters = [random_adapter("a", 1), random_adapter("b", 200, modules=query)]
        pack = ex.fit(adapters, energy=1.0)
        assert sorted(pack.info.modules) == sorted(MODULES)
        for adapter in adapters:
            assert set(pack.adapter(adapter.name).specs) == set(adapter.specs)
            assert reference.delta_error(adapter, pack.adapter(adapter.name)) < 1e-5

    def test_groups_with_none_in_common_are_warned_of(self):
        query, dense = {"encoder.0.query": (17, 11)}, {"encoder.0.dense": (13, 23)}
        both, other = query | dense, {"h.0.attn": (29, 19)}
        adapters = [random_adapter(name, seed, modules=query) for seed, name in enumerate("ab")]
        with pytest.warns(
            NothingSharedWarning,
            match="2 groups .* 'a', 'b', with modules like 'encoder.0.query'; 'c', with .* 'encoder.0.dense'. If they",
        ):
            ex.fit([*adapters, random_adapter("c", 3, modules=dense)], energy=1.0)
        # one that has both connects them
        linked = [*adapters, random_adapter("c", 3, modules=dense), random_adapter("z", 4, modules=both)]
        ex.fit(linked, energy=1.0)
        with pytest.warns(
            NothingSharedWarning, match="2 groups .* 'a', 'b', 'c', 'z', .*; 'd', with .* like 'h.0.attn'"
        ):
            ex.fit([*linked, random_adapter("d", 5, modules=other, base="org/other")], energy=1.0, same_base=True)

    def test_shapes_that_disagree_are_an_error_that_names_both(self):
        other = {"encoder.0.query": (41, 30)}
        adapters = [random_adapter("a", 1), random_adapter("b", 2, modules=other)]
        with pytest.raises(ShapeError, match=r"encoder.0.query.*'a' and .*'b'.*--exclude-module encoder.0.query"):
            ex.fit(adapters, n_components=32)

    @pytest.mark.parametrize("pattern", ["encoder.0.query", "query", "*.query", "enc*qu?ry"])
    def test_excluded_ones_are_carried_to_the_bit(self, pattern):
        adapters = [random_adapter("a", 1), random_adapter("b", 2, modules={**MODULES, "encoder.0.query": (41, 30)})]
        pack = ex.fit(adapters, exclude_modules=[pattern], n_components=2)
        assert list(pack.info.modules) == ["encoder.0.dense"]
        for adapter in adapters:
            back = pack.adapter(adapter.name).modules["encoder.0.query"]
            assert torch.equal(back.down, adapter.modules["encoder.0.query"].down)
            assert torch.equal(back.up, adapter.modules["encoder.0.query"].up)
            assert back.scaling == adapter.modules["encoder.0.query"].scaling
            assert pack.records[adapter.name].carried_bytes == back.down.nbytes + back.up.nbytes

    def test_a_pattern_that_fits_none_is_an_error(self):
        with pytest.raises(
            OptionError, match=r"'key' matches no module \(exclude_modules, --exclude-module\).*'encoder.0.dense'"
        ):
            ex.fit(random_collection(), n_components=32, exclude_modules=["key"])

    def test_none_may_be_left(self):
        with pytest.raises(OptionError, match="No module is left to fit"):
            ex.fit(random_collection(), n_components=32, exclude_modules=["*"])

    def test_names_that_differ_by_a_leading_component_are_one(self):
        short = {name.removeprefix("encoder."): shape for name, shape in MODULES.items()}
        adapters = [random_adapter("a", 1), random_adapter("b", 200, modules=short)]
        pack = ex.fit(adapters, energy=1.0)
        assert sorted(pack.info.modules) == sorted(MODULES)
        assert set(pack.adapter("b").specs) == set(short)
        assert reference.delta_error(adapters[1], pack.adapter("b")) < 1e-5

    def test_a_short_name_that_fits_two_is_an_error(self):
        shape = (41, 29)
        adapters = [
            random_adapter(name, i, modules=modules)
            for i, (name, modules) in enumerate(
                {"a": {"bert.0.query": shape}, "b": {"roberta.0.query": shape}, "c": {"0.query": shape}}.items()
            )
        ]
        with pytest.raises(ModuleNameError, match=r"'0.query' .* could be 'bert.0.query' or 'roberta.0.query'"):
            ex.fit(adapters, n_components=32)

    def test_two_names_of_one_adapter_are_two_modules(self):
        modules = {"decoder.0.query": (41, 29), "0.query": (41, 29)}
        pack = ex.fit([random_adapter("a", 1, modules=modules)], energy=1.0)
        assert sorted(pack.info.modules) == ["0.query", "decoder.0.query"]


class TestBadNumbers:
    def bad(self, value=float("nan")):
        adapter = random_adapter("bad", 5)
        modules = dict(adapter.modules)
        modules["encoder.0.dense"].up[4, 1] = value
        return from_factors("bad", modules, base_model="org/base")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_are_fatal_and_named(self, value):
        with pytest.raises(NonFiniteError, match=r"'bad': 1 of 159 numbers of encoder.0.dense \(up\) are NaN or Inf"):
            ex.fit([*random_collection(), self.bad(value)], n_components=32)

    def test_or_skipped_and_named(self):
        with pytest.warns(SkippedAdapterWarning, match="left out bad: .*NaN or Inf"):
            pack = ex.fit([*random_collection(), self.bad()], n_components=32, skip_bad=True)
        assert "bad" not in pack.names
        assert "NaN or Inf" in pack.summary.fit.skipped["bad"]

    def test_in_a_head_are_found_too(self):
        head = {"base_model.model.classifier.weight": torch.tensor([[1.0, float("inf")]])}
        adapter = random_adapter("bad", 5, heads=head)
        with pytest.raises(NonFiniteError, match="1 of 2 numbers of base_model.model.classifier.weight"):
            ex.fit([adapter], n_components=32)

    def test_a_coefficient_that_does_not_fit_the_dtype_is_named(self):
        with pytest.raises(NonFiniteError, match=r"Adapter 'loud', module encoder.0.dense: .* float32"):
            ex.fit([random_adapter("loud", 1, size=1e6)], n_components=32, dtype="float16")


class TestSizes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_components": 0}, "at least 1, got 0"),
            ({"n_components": 54}, "n_components=54 exceeds every dimension of every module. Pass 53"),
            ({"energy": 1.5}, "at most 1, got 1.5"),
            ({"n_components": 3, "energy": 0.5}, "pass exactly one of .* n_components=3, energy=0.5"),
            (
                {"dtype": "int3"},
                "dtype must be one of float64, float32, float16, bfloat16, int8, int4, coded, got int3",
            ),
            ({"weighting": "mean"}, "one of delta, factors"),
        ],
    )
    def test_out_of_range_are_refused(self, options, message):
        with pytest.raises(OptionError, match=message):
            ex.fit(random_collection(), **options)

    def test_the_largest_dimension_is_allowed_and_smaller_sides_are_capped(self):
        summary = ex.fit(random_collection(), n_components=53).summary
        assert (summary.down.max, summary.down.capped) == (2 + 3 + 4 + 2 + 3, sorted(MODULES))

    def test_bytes_are_those_on_disk(self, tmp_path):
        adapters = random_collection(heads={"base_model.model.classifier.weight": torch.ones(3, 5)})
        pack = ex.fit(adapters, n_components=4, dtype="float16")
        pack.save(tmp_path / "pack")
        figures = pack.summary.bytes
        assert figures.lora == 2 * sum(spec.numbers for a in adapters for spec in a.specs.values())
        from safetensors.torch import load_file

        basis = load_file(next((tmp_path / "pack").glob("subspace-*.safetensors")))
        assert figures.basis == sum(t.nbytes for t in basis.values())
        stored = [load_file(f) for f in (tmp_path / "pack" / "adapters").glob("*/adapter_model.safetensors")]
        tensors = [(key, tensor) for file in stored for key, tensor in file.items()]
        assert figures.coefficients == sum(t.nbytes for key, t in tensors if "eigenlorax_" in key)
        assert figures.heads == sum(t.nbytes for key, t in tensors if "eigenlorax_" not in key) == 5 * 60
        assert figures.ratio == pytest.approx(figures.lora / (figures.basis + figures.coefficients))
        assert figures.ratio_without_basis == pytest.approx(figures.lora / figures.coefficients)


def test_tensors_are_read_module_by_module(tmp_path, monkeypatch):
    """What is alive at one time is one module's factors, not the collection's."""
    n = 12
    folders = [ex.write_adapter(adapter, tmp_path / adapter.name) for adapter in random_collection(n)]
    alive, counts = set(), []
    real = ranges.TensorFile.load

    def counting(stored, names):
        tensors = real(stored, names)
        for tensor in tensors:
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
        counts.append(len(alive))
        return tensors

    monkeypatch.setattr(ranges.TensorFile, "load", counting)
    ex.fit(folders, n_components=4)
    assert len(counts) >= n * 2 * len(MODULES)
    assert max(counts) <= 2 * (n + 1)


def test_progress_is_told():
    seen = []
    ex.fit(random_collection(), n_components=32, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("fitting modules", 2, 2)
    assert ("reading adapters", 5, 5) in seen


def test_no_warning_where_there_is_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ex.fit(random_collection(), n_components=32)
