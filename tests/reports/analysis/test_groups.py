"""Who belongs together: what is planted comes out, and nothing where nothing is planted."""

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.reports.analysis import groups
from eigenlorax.reports.analysis.pairs import beyond_chance, cosines
from made import WIDE, awkward, gauged, of_one_subspace, one_start, pairs_of, random, with_a_mean
from planted import normal, of_spectrum, random_factors


def relation(n, *edges):
    found = torch.zeros(n, n, dtype=torch.bool)
    for i, j in edges:
        found[i, j] = found[j, i] = True
    return found


class TestLinked:
    def test_by_others_too_and_in_order(self):
        assert groups.linked(relation(9, (7, 2), (2, 5), (8, 0), (3, 3))) == [[0, 8], [2, 5, 7]]

    def test_nobody(self):
        assert groups.linked(relation(4)) == []
        assert groups.linked(relation(0)) == []


def starts(collection, shapes=WIDE):
    return groups.same_start(pairs_of(collection, shapes))


class TestSameStart:
    @pytest.mark.parametrize("trained", [0.0, 0.3, 0.7, 0.9])
    @pytest.mark.parametrize("rank", [1, 4])
    def test_one_group_among_others(self, trained, rank):
        collection = [*random(5, rank=rank, seed=3), *one_start(4, trained=trained, rank=rank, seed=40)]
        assert starts(collection) == ([[5, 6, 7, 8]] if trained < 0.9 or rank > 1 else [])

    def test_two_groups(self):
        one, other = one_start(3, trained=0.5, seed=1), one_start(4, trained=0.2, seed=2000)
        assert starts([*one[:2], *other[:3], one[2], other[3]]) == [[0, 1, 5], [2, 3, 4, 6]]

    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_none_by_chance(self, rank):
        for seed in range(25):
            assert starts(random(12, rank=rank, seed=17 * seed)) == []

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_what_training_found_in_all_is_no_start(self, share):
        for seed in range(8):
            assert starts(with_a_mean(6, share=share, seed=seed)) == []

    def test_one_subspace_is_no_start(self):
        for seed in range(8):
            assert starts(of_one_subspace(6, seed=100 * seed)) == []

    def test_copies_are_no_start(self):
        one = random(1, rank=4)[0]
        assert starts([one, one, gauged(one, 5)]) == []

    def test_trained_further_is_no_start(self):
        """A and B alike: one adapter that was trained on, twice."""
        one = random(1, rank=4)[0]
        later = [
            {
                m: LoRAFactors(
                    f.down + 0.2 * normal(*f.down.shape, seed=i), f.up + 0.2 * normal(*f.up.shape, seed=i + 1), 2.0
                )
                for m, f in one.items()
            }
            for i in (60, 70)
        ]
        assert starts([one, *later]) == []

    @pytest.mark.parametrize("alike", [0.3, 0.7, 0.85])
    def test_an_untouched_start_under_updates_that_are_alike(self, alike):
        """As two GPT-2 adapters by one author have it: cosines of 0.985 of A, 0.67 of B, 0.71 of the update."""
        collection = one_start(4, trained=0.1, seed=70)
        common = {m: normal(*f.up.shape, seed=5) for m, f in collection[0].items()}
        for one in collection:
            for m, f in one.items():
                one[m] = LoRAFactors(f.down, alike**0.5 * common[m] + (1 - alike) ** 0.5 * f.up, 2.0)
        assert starts([*collection, *random(2, rank=4)]) == [[0, 1, 2, 3]]

    @pytest.mark.parametrize("own", [0.1, 0.3, 0.6])
    def test_a_mean_in_common_factors_is_no_start(self, own):
        """A and B are a common part and one's own, in equal shares: B did not begin as zeros."""
        common = random(1, rank=4, seed=9)[0]
        collection = [
            {m: LoRAFactors(f.down + own * o[m].down, f.up + own * o[m].up, 2.0) for m, f in common.items()}
            for o in random(5, rank=4, seed=31)
        ]
        assert starts(collection) == []

    def test_of_one_rank_alone(self):
        collection = one_start(2, trained=0.1, rank=4)
        collection[1] = {m: LoRAFactors(f.down[:3], f.up[:, :3], 2.0) for m, f in collection[1].items()}
        assert starts(collection) == []

    def test_modules_that_some_lack(self):
        """One with a module the other lacks is another kind of adapter, whose numbers were drawn in another order."""
        collection = one_start(4, trained=0.4)
        first = next(iter(WIDE))
        alone = [{first: one[first]} for one in collection[:2]]
        assert starts([*alone, *collection[2:]]) == [[0, 1], [2, 3]]

    def test_signs_and_sizes_of_scalings(self):
        collection = one_start(3, trained=0.4)
        collection[1] = {m: LoRAFactors(f.down, f.up, -1e6) for m, f in collection[1].items()}
        collection[2] = {m: LoRAFactors(f.down * 1e-5, f.up * 1e-7, 1.0) for m, f in collection[2].items()}
        assert starts(collection) == [[0, 1, 2]]


class TestDuplicates:
    def test_in_any_factors(self):
        collection = random(5)
        one, other = collection[1], collection[3]
        negative = {m: LoRAFactors(-f.down, f.up, -f.scaling) for m, f in one.items()}
        narrow = {m: LoRAFactors(f.down.half(), f.up.half(), f.scaling) for m, f in other.items()}
        # of a higher rank, for which there is no need
        padded = {
            m: LoRAFactors(
                torch.cat([f.down, torch.zeros_like(f.down[:1])]),
                torch.cat([f.up, torch.ones_like(f.up[:, :1])], 1),
                f.scaling,
            )
            for m, f in one.items()
        }
        found = [*collection, gauged(one, 9, 50.0), negative, narrow, padded]
        assert groups.duplicates(pairs_of(found, WIDE)) == [[1, 5, 6, 8], [3, 7]]

    def test_near_is_not_the_same(self):
        one, noise = random(2)
        near = {m: LoRAFactors(f.down + 0.05 * noise[m].down, f.up, f.scaling) for m, f in one.items()}
        opposite = {m: LoRAFactors(f.down, f.up, -f.scaling) for m, f in one.items()}
        assert 0.99 < float(cosines(pairs_of([one, near], WIDE).delta)[0, 1]) < groups.DUPLICATE
        assert groups.duplicates(pairs_of([one, near, opposite], WIDE)) == []

    def test_zero_updates_are_not_the_same(self):
        zero = {m: LoRAFactors(f.down, torch.zeros_like(f.up), 1.0) for m, f in random(1)[0].items()}
        assert groups.duplicates(pairs_of([zero, zero, *random(2)], WIDE)) == []


def shared_by(collection, shapes=WIDE):
    """Overlaps beyond chance, and how they scatter by chance."""
    return beyond_chance(pairs_of(collection, shapes))


class TestClusters:
    @pytest.mark.parametrize("noise", [0.0, 0.05])
    def test_two_planted(self, noise):
        one, other = of_one_subspace(5, noise=noise), of_one_subspace(4, noise=noise, seed=9000)
        matrix = shared_by([*one[:3], *other[:2], *one[3:], *other[2:]])
        found = groups.clustering(*matrix)
        assert found.clusters == [[0, 1, 2, 5, 6], [3, 4, 7, 8]]
        assert 0.1 < found.silhouette < 0.4
        assert sorted(found.order) == list(range(9))
        # the adapters of a cluster are neighbours in the order of the leaves
        assert {tuple(sorted(found.order[:5])), tuple(sorted(found.order[:4]))} & {tuple(c) for c in found.clusters}
        assert found.tree.shape == (8, 4)

    def test_three_planted_and_a_stranger(self):
        made = [of_one_subspace(n, seed=5000 * n) for n in (6, 4, 3)]
        matrix = shared_by([*made[0], *made[1], *made[2], *random(1)])
        found = groups.clustering(*matrix)
        assert found.clusters == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12]]

    def test_one_subspace_is_not_divided(self):
        for seed in range(10):
            assert groups.clustering(*shared_by(of_one_subspace(9, seed=3000 * seed, noise=0.02))).clusters == []

    def test_none_by_chance(self):
        for seed in range(10):
            assert groups.clustering(*shared_by(random(10, seed=29 * seed))).clusters == []

    @pytest.mark.parametrize("n", [0, 1, 2, 3])
    def test_few(self, n):
        found = groups.clustering(*shared_by(random(n)))
        assert (found.clusters, sorted(found.order), len(found.tree)) == ([], list(range(n)), max(n - 1, 0))

    def test_copies_alone(self):
        found = groups.clustering(*shared_by([random(1)[0]] * 4))
        assert found.clusters == []

    def test_means_over_pairs(self):
        matrix = normal(7, 7, seed=4)
        matrix = matrix + matrix.mT
        group = [0, 3, 5]
        inside = [float(matrix[i, j]) for i in group for j in group if i != j]
        across = [float(matrix[i, j]) for i in group for j in (1, 2, 4, 6)]
        assert groups.within(matrix, group) == pytest.approx(sum(inside) / len(inside))
        assert groups.between(matrix, group) == pytest.approx(sum(across) / len(across))
        assert groups.between(matrix, range(7)) == 0.0


class TestOutliers:
    @pytest.mark.parametrize("n", [6, 11, 20])
    def test_one_planted(self, n):
        for seed in range(10):
            collection = of_one_subspace(n, seed=3000 * seed, noise=0.02)
            collection.insert(seed % n, random(1, seed=seed)[0])
            assert groups.outliers(shared_by(collection)[0], []) == [seed % n]

    def test_none_planted(self):
        """Over many seeds, whatever it is that they share."""
        for seed in range(30):
            n = 4 + seed % 9
            assert groups.outliers(shared_by(random(n, seed=seed))[0], []) == []
            assert groups.outliers(shared_by(of_one_subspace(n, seed=3000 * seed, noise=0.05))[0], []) == []
            assert groups.outliers(shared_by(with_a_mean(n, share=0.6, seed=seed))[0], []) == []

    def test_a_cluster_is_none(self):
        one, other = of_one_subspace(8), of_one_subspace(2, seed=9000)
        matrix = shared_by([*one, *other])
        assert groups.outliers(matrix[0], []) == [8, 9]
        assert groups.outliers(matrix[0], [8, 9]) == []

    def test_of_three_nobody_stands_out(self):
        assert groups.outliers(shared_by([*of_one_subspace(2), *random(1)])[0], []) == []


def long_row(seed, n_out, n_in):
    """Of A, one row is ten times as long as the others: the cosine of two such A is that of these rows."""
    down = normal(8, n_in, seed=seed)
    down[0] *= 10
    return LoRAFactors(down, normal(n_out, 8, seed=seed + 7), 1.0)


BY_CHANCE = {
    "a long row": (64, lambda i, seed: long_row(seed, 61, 64)),
    "ranks of three kinds": (16, lambda i, seed: of_spectrum([1.0] * (1, 3, 8)[i // 4], 17, 16, seed=seed)),
    "one of rank 1": (16, lambda i, seed: of_spectrum([1.0] * (8 if i else 1), 17, 16, seed=seed)),
    "of rank 1": (16, lambda i, seed: of_spectrum([1.0], 17, 16, seed=seed)),
    "of rank 2, in few dimensions": (8, lambda i, seed: of_spectrum([1.0, 0.3], 7, 8, seed=seed)),
}


@pytest.mark.parametrize("kind", BY_CHANCE)
def test_nothing_by_chance_whatever_singular_values_and_rows_are(kind):
    """What adapters have in common by chance depends on these."""
    n_in, make = BY_CHANCE[kind]
    for seed in range(12):
        collection = [{"m": make(i, 1000 * seed + 10 * i)} for i in range(12)]
        pairs = pairs_of(collection, {"m": (collection[0]["m"].up.shape[0], n_in)})
        beyond, deviation = beyond_chance(pairs)
        assert groups.same_start(pairs) == []
        assert groups.clustering(beyond, deviation).clusters == []
        assert groups.outliers(beyond, []) == []


class TestMap:
    def test_what_lies_in_a_plane_is_shown_as_it_is(self):
        angles = torch.tensor([0.0, 0.4, 1.1, 2.0, 4.0]).double()
        places = torch.stack([angles.cos(), angles.sin()], dim=1)
        found, share = groups.on_a_map(places @ places.mT)
        np.testing.assert_allclose(pdist(found.numpy()), pdist(places.numpy()), rtol=1e-9)
        assert share == pytest.approx(1.0)

    def test_share_and_places_of_many(self):
        matrix = cosines(pairs_of(of_one_subspace(8), WIDE).delta)
        found, share = groups.on_a_map(matrix)
        # classical scaling of the distances of unit vectors, in its words
        squares = squareform(pdist(unit_vectors(of_one_subspace(8)))) ** 2
        centring = np.eye(8) - 1 / 8
        values, vectors = np.linalg.eigh(-centring @ squares @ centring / 2)
        assert share == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-9)
        expected = vectors[:, -2:] * np.sqrt(values[-2:])
        np.testing.assert_allclose(pdist(found.numpy()), pdist(expected), rtol=1e-7)
        assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())

    def test_clusters_lie_apart(self):
        base = [with_a_mean(n, share=0.7, seed=seed) for n, seed in ((5, 1), (4, 77))]
        found, _ = groups.on_a_map(cosines(pairs_of([*base[0], *base[1]], WIDE).delta))
        centres = found[:5].mean(0), found[5:].mean(0)
        for part, centre in zip((found[:5], found[5:]), centres, strict=True):
            assert float((centres[0] - centres[1]).norm()) > 2 * float((part - centre).norm(dim=1).max())

    def test_one_and_two(self):
        assert groups.on_a_map(torch.ones(1, 1).double())[0].tolist() == [[0.0, 0.0]]
        found, share = groups.on_a_map(torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double())
        assert float((found[0] - found[1]).norm()) == pytest.approx(1.0)
        assert share == pytest.approx(1.0)


def unit_vectors(collection, shapes=WIDE):
    vectors = np.array([oracle.flat(update) for update in oracle.updates(collection, shapes)])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class TestMean:
    @pytest.mark.parametrize("made", ["random", "mean", "subspace", "sizes"])
    def test_equals_dense_means(self, made):
        collection = {
            "random": lambda: random(5),
            "mean": lambda: with_a_mean(5, share=0.6),
            "subspace": lambda: of_one_subspace(7),
            "sizes": lambda: loud(random(6)),
        }[made]()
        plain, scaled, share = groups.mean_errors(pairs_of(collection, WIDE))
        vectors = np.array([oracle.flat(update) for update in oracle.updates(collection, WIDE)])
        units = unit_vectors(collection)
        for i, (own, unit) in enumerate(zip(vectors, units, strict=True)):
            expected = np.linalg.norm(own - vectors.mean(0)) / np.linalg.norm(own)
            assert float(plain[i]) == pytest.approx(expected, rel=1e-9)
            mean = units.mean(0)
            multiple = (own @ mean) / (mean @ mean)
            expected = np.linalg.norm(own - multiple * mean) / np.linalg.norm(own)
            assert float(scaled[i]) == pytest.approx(expected, rel=1e-9)
            others = np.delete(units, i, axis=0).mean(0)
            expected = max(unit @ others, 0.0) ** 2 / (others @ others)
            assert float(share[i]) == pytest.approx(expected, rel=1e-7, abs=1e-12)

    def test_a_planted_mean_explains_its_share(self):
        """The others' mean is the common update and little else, the more of them there are."""
        share = groups.mean_errors(pairs_of(with_a_mean(40, share=0.6), WIDE))[2]
        assert share.tolist() == pytest.approx([0.6] * 40, abs=0.04)

    def test_a_mean_of_nothing_stands_for_nobody(self):
        """Where the updates cancel, the best multiple of their mean is none of it."""
        for seed in range(20):
            one = random(3, seed=seed)
            collection = [*one, *({m: LoRAFactors(f.down, -f.up, f.scaling) for m, f in a.items()} for a in one)]
            plain, scaled, share = groups.mean_errors(pairs_of(collection, WIDE))
            assert plain.tolist() == pytest.approx([1.0] * 6)
            assert scaled.tolist() == pytest.approx([1.0] * 6)
            assert share.tolist() == pytest.approx([0.0] * 6, abs=1e-9)

    def test_copies_have_no_error(self):
        plain, scaled, share = groups.mean_errors(pairs_of([random(1)[0]] * 3, WIDE))
        assert plain.tolist() == pytest.approx([0.0] * 3, abs=1e-7)
        assert scaled.tolist() == pytest.approx([0.0] * 3, abs=1e-7)
        assert share.tolist() == pytest.approx([1.0] * 3)

    def test_one_alone(self):
        plain, scaled, share = groups.mean_errors(pairs_of(random(1), WIDE))
        assert (float(plain), float(scaled)) == (pytest.approx(0, abs=1e-7), pytest.approx(0, abs=1e-7))
        assert share.tolist() == [0.0]

    def test_a_zero_update_is_no_part_of_the_mean_of_the_others(self):
        """One that was trained only where the subspace holds nothing: a direction of its own would dilute the mean."""
        collection = with_a_mean(4, share=0.6)
        zero = {m: LoRAFactors(f.down, torch.zeros_like(f.up), 1.0) for m, f in collection[0].items()}
        plain, scaled, share = groups.mean_errors(pairs_of([*collection, zero], WIDE))
        _, its_scaled, its_share = groups.mean_errors(pairs_of(collection, WIDE))
        torch.testing.assert_close(scaled[:4], its_scaled)
        torch.testing.assert_close(share[:4], its_share)
        assert plain[4].isnan()
        assert scaled[4].isnan()
        assert float(share[4]) == 0.0


def loud(collection):
    return [
        {m: LoRAFactors(f.down, f.up, (-1) ** i * 10.0 ** (i % 3)) for m, f in one.items()}
        for i, one in enumerate(collection)
    ]


def test_awkward_collections_are_grouped_without_a_complaint():
    found = pairs_of(awkward())
    assert groups.duplicates(found) == [[0, 9]]
    assert groups.same_start(found) == []
    assert groups.clustering(*beyond_chance(found)).order != []
    assert groups.on_a_map(cosines(found.delta))[0].isfinite().all()


def test_thousands_of_rows_in_float32_say_the_same(monkeypatch):
    collection = [*one_start(4, trained=0.5), *of_one_subspace(5), *random(3)]
    collection += [gauged(collection[10], 3)]
    exact = pairs_of(collection, WIDE)
    monkeypatch.setattr("eigenlorax.reports.analysis.pairs.FLOAT64_ROWS", 0)
    fast = pairs_of(collection, WIDE)
    assert groups.same_start(exact) == groups.same_start(fast) == [[0, 1, 2, 3]]
    assert groups.duplicates(exact) == groups.duplicates(fast) == [[10, 12]]
    assert groups.clustering(*beyond_chance(exact)).clusters == groups.clustering(*beyond_chance(fast)).clusters
    for one, other in zip(groups.mean_errors(exact), groups.mean_errors(fast), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_random_factors_of_one_size_are_what_the_tests_take_them_for():
    """No planted collection above is one by mistake."""
    assert float(shared_by(random(6))[0].fill_diagonal_(0).max()) < 0.1
    assert float(shared_by(of_one_subspace(6))[0].min()) > 0.12
    assert random_factors(3, 5, 4, seed=1).scaling == 2.0


def test_two_strangers_of_one_start(shared):
    """By one author, on GPT-2: A of two of three is all but the same, and B is not."""
    folder = shared / "zoo" / "gpt2"
    adapters = [ex.read_adapter(path) for path in sorted(folder.iterdir())]
    shapes = {m: (spec.out_features, spec.in_features) for m, spec in adapters[0].specs.items()}
    found = groups.same_start(pairs_of([one.modules for one in adapters], shapes))
    assert [[adapters[i].name.split("__")[-1] for i in group] for group in found] == [["medical", "sports"]]


@pytest.fixture(scope="module")
def found():
    """Names of the demo's adapters, their pairs, and the places of those of several seeds."""
    data = Path(ex.__file__).parent / "train" / "demo_data"
    folders = [sorted((data / folder).iterdir()) for folder in ("adapters", "one_seed/adapters")]
    adapters = [ex.read_adapter(path) for folder in folders for path in folder]
    shapes = {m: (spec.out_features, spec.in_features) for m, spec in adapters[0].specs.items()}
    several = list(range(len(folders[0])))
    return [one.name for one in adapters], pairs_of([one.modules for one in adapters], shapes), several


class TestRealAdapters:
    """The demo's, of a MiniLM: those of several seeds beside those of one."""

    def test_one_start(self, found):
        _, pairs, several = found
        assert groups.same_start(pairs) == [list(range(16, 24))]
        assert groups.same_start(pairs.subset(several)) == []
        assert groups.duplicates(pairs) == []

    def test_clusters_are_the_tasks(self, found):
        names, pairs, several = found
        expected = {}
        for place in several:
            expected.setdefault(names[place].split("-")[0], []).append(place)
        clusters = groups.clustering(*beyond_chance(pairs.subset(several))).clusters
        assert sorted(clusters) == sorted(expected.values())
        assert groups.outliers(beyond_chance(pairs.subset(several))[0], []) == []


class TestSilhouette:
    def test_is_that_of_scikit_learn(self):
        metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install '.[test]'")
        random = np.random.default_rng(1)
        points = random.normal(size=(17, 3))
        distance = np.linalg.norm(points[:, None] - points[None], axis=2)
        # the last cluster has one point
        labels = np.array([*random.integers(1, 4, size=16), 9])
        expected = metrics.silhouette_score(distance, labels, metric="precomputed")
        assert groups.mean_silhouette(distance, labels) == pytest.approx(float(expected))

    def test_of_equal_points_is_0(self):
        assert groups.mean_silhouette(np.zeros((4, 4)), np.array([1, 1, 2, 2])) == 0.0
