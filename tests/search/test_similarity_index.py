"""Search by similarity: cosines against dense float64 matrices, sketches against those, and adapters of every kind."""

import math

import numpy as np
import pytest
import torch

import eigenlorax as ex
import reference
from adapters import make_adapter
from eigenlorax.errors import (
    AdapterNameError,
    BaseModelError,
    FormatError,
    ModuleNameError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from eigenlorax.search import similarity_index
from eigenlorax.search.sketches import WIDTH, sketch_factors
from planted import MODULES, random_adapter, random_collection, random_factors
from runs import make_run, write_states

pytestmark = [
    pytest.mark.usefixtures("module_without_shape_checks"),
    pytest.mark.filterwarnings("ignore::eigenlorax.errors.UntrainedAdapterWarning"),
    pytest.mark.filterwarnings("ignore::eigenlorax.errors.UnknownBaseWarning"),
    pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning"),
]
QUERY, DENSE = MODULES


def dense_update(adapter):
    """All updates of an adapter as one vector, zeros where it lacks a module."""
    return np.concatenate(
        [
            (reference.dense(adapter.modules[module]) if module in adapter.modules else np.zeros(shape)).ravel()
            for module, shape in MODULES.items()
        ]
    )


def cosine(left, right):
    left, right = dense_update(left), dense_update(right)
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def related(n, *, seed=0):
    """Adapters of one common update, ever less of it, and one of their own; the last one has one module alone."""
    adapters = []
    for index in range(n):
        modules = {}
        for place, (module, (n_out, n_in)) in enumerate(MODULES.items()):
            common = random_factors(2, n_out, n_in, seed=seed + place)
            own = random_factors(2, n_out, n_in, seed=seed + 100 * (index + 1) + place)
            weight = index / n
            modules[module] = ex.LoRAFactors(
                torch.cat([common.down, own.down]).float(),
                torch.cat([(1 - weight) * common.up, weight * own.up], dim=1).float(),
                0.5 + index,
            )
        if index == n - 1:
            del modules[QUERY]
        adapters.append(ex.from_factors(f"r{index}", modules, base_model="org/base"))
    return adapters


KINDS = {
    "floats": {"n_components": 12, "dtype": "float32"},
    "coded": {"max_error": 0.2},
    "integers": {"n_components": 12, "dtype": "int8"},
}


@pytest.fixture(scope="module", params=KINDS)
def pack(request):
    return ex.fit(related(7), warn_above=1, **KINDS[request.param])


class TestCosines:
    def test_of_adapters_in_the_pack_are_those_of_dense_matrices(self, pack):
        found = ex.SimilarityIndex.from_pack(pack).find("r1")
        query = pack.adapter("r1", torch.float64)
        expected = {name: cosine(query, pack.adapter(name, torch.float64)) for name in pack.names if name != "r1"}
        assert {match.name: match.score for match in found} == pytest.approx(expected, abs=1e-7)
        assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)

    def test_of_an_adapter_outside(self, pack, tmp_path):
        outside = related(2, seed=0)[1]
        folder = ex.write_adapter(outside, tmp_path / "r1")
        expected = {name: cosine(outside, pack.adapter(name, torch.float64)) for name in pack.names}
        for source in (outside, folder, str(folder)):
            found = ex.SimilarityIndex.from_pack(pack).find(source)
            assert {match.name: match.score for match in found} == pytest.approx(expected, abs=1e-7)

    def test_do_not_depend_on_factors(self, pack):
        outside = related(2)[1]
        mixing = torch.tensor([[2.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0.25, 3], [0, 0, 0, 8]], dtype=torch.float64)
        gauged = {
            module: ex.LoRAFactors(
                torch.linalg.solve(mixing, factors.down.double()), factors.up.double() @ mixing, factors.scaling
            )
            for module, factors in outside.modules.items()
        }
        index = ex.SimilarityIndex.from_pack(pack)
        found = index.find(ex.from_factors("gauged", gauged, base_model="org/base"))
        assert [match.name for match in found] == [match.name for match in index.find(outside)]
        assert [match.score for match in found] == pytest.approx(
            [match.score for match in index.find(outside)], abs=1e-6
        )

    def test_the_reason_has_the_parts_of_modules(self, pack):
        (match,) = ex.SimilarityIndex.from_pack(pack).find("r0", top=1)
        query, other = (pack.adapter(name, torch.float64) for name in ("r0", match.name))
        norm = np.linalg.norm(dense_update(query)) * np.linalg.norm(dense_update(other))
        parts = {
            module: float(
                (reference.dense(query.modules[module]) * reference.dense(other.modules[module])).sum() / norm
            )
            for module in MODULES
        }
        assert sum(parts.values()) == pytest.approx(match.score, abs=1e-7)
        first, second = sorted(parts, key=parts.get, reverse=True)
        assert match.reason == (
            f"Cosine {match.score:+.4f} over 2 common modules; the largest parts are from {first} "
            f"({parts[first]:+.2g}) and {second} ({parts[second]:+.2g})."
        )


class TestWhichAdapters:
    def test_an_opposite_adapter_is_last(self):
        adapters = random_collection(4)
        opposite = {
            module: ex.LoRAFactors(factors.down, -factors.up, 3.0) for module, factors in adapters[0].modules.items()
        }
        pack = ex.fit([*adapters, ex.from_factors("minus", opposite, base_model="org/base")], max_error=0.05)
        last = ex.SimilarityIndex.from_pack(pack).find("a0")[-1]
        assert last.name == "minus"
        assert last.score == pytest.approx(-1, abs=0.01)

    def test_updates_of_zero_are_left_out_and_refused(self):
        zero = {
            module: ex.LoRAFactors(torch.ones(3, n_in), torch.zeros(n_out, 3), 1.0)
            for module, (n_out, n_in) in MODULES.items()
        }
        untrained = ex.from_factors("zero", zero, base_model="org/base")
        pack = ex.fit([*random_collection(3), untrained], n_components=6)
        index = ex.SimilarityIndex.from_pack(pack)
        assert index.names == ("a0", "a1", "a2")
        assert [match.name for match in index.find("a0", candidates=1)] == [match.name for match in index.find("a0")]
        for source in ("zero", untrained):
            with pytest.raises(OptionError, match="update of .* is zero"):
                index.find(source)

    def test_an_adapter_with_other_modules(self):
        def of(name, module, seed):
            return random_adapter(name, seed, modules={module: MODULES[module]})

        pack = ex.fit([of("q", QUERY, 1), of("d", DENSE, 2), of("q2", QUERY, 3)], n_components=6)
        found = {match.name: match for match in ex.SimilarityIndex.from_pack(pack).find("q")}
        assert found["d"].score == 0
        assert found["d"].reason == "The two have no module in common."
        assert "over 1 common module;" in found["q2"].reason

    def test_a_module_outside_the_subspace_counts(self):
        extra = {**MODULES, "encoder.0.extra": (43, 31)}
        pack = ex.fit(random_collection(3), n_components=29, dtype="float32", warn_above=1)
        first, second = (random_adapter(name, seed, modules=extra) for name, seed in (("x", 7), ("y", 7)))
        second.modules["encoder.0.extra"].up.mul_(-0.5)
        for adapter in (first, second):
            pack.add(adapter, carry_missing=True, warn_above=1)
        found = {match.name: match for match in ex.SimilarityIndex.from_pack(pack).find(first)}
        left, right = (
            np.concatenate([reference.dense(adapter.modules[module]).ravel() for module in extra])
            for adapter in (first, pack.adapter("y", torch.float64))
        )
        expected = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert found["y"].score == pytest.approx(expected, abs=1e-7)
        assert found["a0"].score == pytest.approx(
            cosine(first, pack.adapter("a0", torch.float64))
            * np.linalg.norm(dense_update(first))
            / np.linalg.norm(left),
            abs=1e-7,
        )

    def test_adapters_with_residuals_and_of_an_earlier_subspace(self):
        pack = ex.fit(random_collection(3), n_components=4, dtype="float32", warn_above=1)
        pack.add(random_adapter("whole", 77), residual=True)
        pack.add(random_adapter("extended", 78), extend=3, warn_above=1)
        found = ex.SimilarityIndex.from_pack(pack).find("whole")
        query = pack.adapter("whole", torch.float64)
        assert {match.name: match.score for match in found} == pytest.approx(
            {name: cosine(query, pack.adapter(name, torch.float64)) for name in ("a0", "a1", "a2", "extended")},
            abs=1e-7,
        )

    def test_a_version_is_compared_and_a_pack_of_histories_is_not_searched(self, tmp_path):
        write_states(make_run(tmp_path / "run", (10, 20)), max_steps=20)
        pack = ex.fit([make_adapter(tmp_path / name, seed=seed) for seed, name in ((1, "a"), (2, "b"))], n_components=6)
        pack.append(tmp_path / "run/checkpoint-10", "10", name="run")
        first, second = ex.SimilarityIndex.from_pack(pack).find("run@latest")
        # the run starts from the seed of "a"
        assert (first.name, second.name) == ("a", "b")
        assert first.score > 0.9 > abs(second.score)
        with pytest.raises(AdapterNameError, match="'run' is a history"):
            ex.SimilarityIndex.from_pack(pack).find("run")
        ex.track(tmp_path / "run", tmp_path / "history")
        runs = ex.Pack.open(tmp_path / "history")
        with pytest.raises(OptionError, match="no adapters to compare with. Versions of histories are not searched"):
            ex.SimilarityIndex.from_pack(runs).find("run@latest")


N = 90


@pytest.fixture(scope="module")
def index():
    return ex.SimilarityIndex.from_pack(ex.fit(random_collection(N), n_components=9, warn_above=1))


class TestSketches:
    def cosines(self, index):
        updates = np.stack([dense_update(index.pack.adapter(name, torch.float64)) for name in index.names])
        unit = updates / np.linalg.norm(updates, axis=1, keepdims=True)
        return unit @ unit.T

    def test_their_error_is_as_stated(self, index):
        errors = (index.sketches @ index.sketches.mT).double().numpy() - self.cosines(index)
        off_diagonal = errors[~np.eye(N, dtype=bool)]
        # the standard deviation, and five of them for the worst of 4005 pairs
        assert 0.5 < off_diagonal.std() * math.sqrt(WIDTH) < 1.3
        assert abs(off_diagonal.mean()) * math.sqrt(WIDTH) < 0.1
        assert abs(off_diagonal).max() * math.sqrt(WIDTH) < 5
        assert errors.diagonal() == pytest.approx(0, abs=1e-6)

    def test_from_coefficients_are_those_from_factors(self, index):
        own = sketch_factors(index.pack.adapter("a7", torch.float64).modules)
        torch.testing.assert_close(own, index.sketches[index.names.index("a7")], atol=1e-5, rtol=0)

    def test_are_the_same_for_tiny_updates(self):
        factors = random_adapter("a", 3).modules
        tiny = {m: ex.LoRAFactors(f.down * 1e-20, f.up * 1e-20, f.scaling * 1e-3) for m, f in factors.items()}
        torch.testing.assert_close(sketch_factors(tiny), sketch_factors(factors), atol=1e-5, rtol=0)

    def test_a_relative_is_found_among_candidates(self, index):
        pack = index.pack
        relative = {
            module: ex.LoRAFactors(factors.down, factors.up + 0.5 * random_factors(3, *MODULES[module], seed=5).up, 1.0)
            for module, factors in pack.adapter("a7", torch.float64).modules.items()
        }
        (match,) = index.find(ex.from_factors("relative", relative, base_model="org/base"), top=1, candidates=3)
        assert match.name == "a7"
        assert match.score == pytest.approx(
            cosine(ex.from_factors("relative", relative), pack.adapter("a7", torch.float64)), abs=1e-7
        )

    def test_bytes_bring_the_index_back(self, index):
        again = similarity_index.from_bytes(index.pack, similarity_index.to_bytes(index))
        assert again.names == index.names
        assert torch.equal(again.sketches, index.sketches)


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({"base": "org/other"}, BaseModelError, "different base models"),
            ({"modules": {QUERY: (41, 31)}}, ShapeError, r"Module encoder.0.query has shape"),
            ({"modules": {"decoder.q": (5, 7)}}, ModuleNameError, "no module in common with the pack, such as"),
            ({"size": math.nan}, NonFiniteError, "NaN"),
        ],
    )
    def test_an_adapter_of_another_model(self, index, fields, error, match):
        with pytest.raises(error, match=match):
            index.find(random_adapter("x", 3, **fields))

    def test_an_unknown_name_and_a_folder_without_an_adapter(self, index, tmp_path):
        with pytest.raises(AdapterNameError, match="no adapter named 'b9' in the pack"):
            index.find("b9")
        with pytest.raises(FormatError):
            index.find(tmp_path)

    @pytest.mark.parametrize("option", ["top", "candidates"])
    def test_numbers_below_one(self, index, option):
        with pytest.raises(OptionError, match=f"{option} .*at least 1, got 0"):
            index.find("a0", **{option: 0})

    def test_another_base_is_accepted_on_request(self, index):
        other = random_adapter("x", 0, rank=2, base="org/other")
        assert index.find(other, top=1, same_base=True)[0].name == "a0"
