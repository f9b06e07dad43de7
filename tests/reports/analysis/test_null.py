"""Adapters in random directions: what they keep of the real ones, and what is kept of them, against dense matrices and
what theory says."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

from eigenlorax.core.adapter import LoRAFactors, delta_square
from eigenlorax.core.batch import delta_squares, in_row_spaces, pad_factors, unpadded
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.reports import refits
from eigenlorax.reports.analysis import crowded, losses, null, spectra
from eigenlorax.reports.analysis.null import COLLECTIONS, NullModel
from eigenlorax.reports.analysis.pairs import beyond_chance, overlap, overlap_by_chance
from made import awkward, pairs_of
from planted import factors_in, generator, of_spectrum, orthonormal
from reference import dense, fit_delta, projected

N_OUT, N_IN = 41, 29


def members(n, *, ranks=(2, 3, 4), shape=(N_OUT, N_IN)):
    """Some of them near a subspace; ranks, signs, sizes and dtypes differ."""
    bases = orthonormal(5, shape[1], 1), orthonormal(6, shape[0], 2)
    found = [
        factors_in(bases, ranks[i % len(ranks)], seed=100 * i, scaling=(-1.5) ** (i % 7), noise=0.3) for i in range(n)
    ]
    found[1] = LoRAFactors(found[1].down.half(), found[1].up.half(), 0.7)
    return found


def drawn_like(found, seed=3):
    one = pad_factors(found, found[0].down.shape[1], found[0].up.shape[0])
    return one, NullModel.of(one).draw(generator(seed))


class TestNullModel:
    # the last has more rows than either side has dimensions
    @pytest.mark.parametrize(("ranks", "shape"), [((2, 3, 4), (N_OUT, N_IN)), ((5, 1), (11, 7)), ((9, 4), (7, 5))])
    def test_keeps_singular_values_norms_ranks_and_inner_products(self, ranks, shape):
        one, drawn = drawn_like(members(6, ranks=ranks, shape=shape))
        assert drawn.ranks == one.ranks
        for rows, its in ((one.down, drawn.down), (one.up, drawn.up)):
            torch.testing.assert_close(rows @ rows.mT, its @ its.mT, rtol=1e-10, atol=1e-10)
        for i, rank in enumerate(one.ranks):
            updates = [(found.up[i].mT @ found.down[i]).numpy() for found in (one, drawn)]
            sigma, its = (np.linalg.svd(update, compute_uv=False) for update in updates)
            np.testing.assert_allclose(its, sigma, atol=1e-12 * sigma[0])
            assert not drawn.down[i, rank:].any()
        assert delta_squares(drawn).tolist() == pytest.approx(delta_squares(one).tolist())

    def test_singular_values_far_apart_are_kept_to_the_last_digits(self):
        sigma = [1.0, 1e-4, 1e-9]
        _, drawn = drawn_like([of_spectrum(sigma, N_OUT, N_IN, seed=4)])
        update = (drawn.up[0].mT @ drawn.down[0]).numpy()
        np.testing.assert_allclose(np.linalg.svd(update, compute_uv=False)[:3], sigma, rtol=1e-5)

    def test_directions_are_their_own_and_the_generators(self):
        found = members(5)
        one, drawn = drawn_like([found[0]] * 5)
        for other in (one, drawn.select([1]), drawn_like([found[0]] * 5, seed=4)[1]):
            assert not torch.allclose(other.down[0], drawn.down[0])
            assert not torch.allclose(other.up[0], drawn.up[0])
        assert torch.equal(drawn_like([found[0]] * 5)[1].up, drawn.up)

    def test_factors_are_those_of_the_stack(self):
        found = members(5)
        _, drawn = drawn_like(found)
        for original, factors, update in zip(found, unpadded(drawn), drawn.up.mT @ drawn.down, strict=True):
            assert (factors.down.shape, factors.up.shape, factors.scaling) == (
                original.down.shape,
                original.up.shape,
                original.scaling,
            )
            np.testing.assert_allclose(dense(factors), update.numpy(), atol=1e-12 * float(update.abs().max()))

    def test_a_fit_weighs_them_alike(self):
        """In both weightings, the stack's rows have the lengths that they had."""
        found = members(6)
        one, drawn = drawn_like(found)
        weights = torch.tensor([delta_square(f) ** -0.5 for f in found], dtype=torch.float64)
        for weighting in ("delta", "factors"):
            for rows, its in zip(*(crowded.weighted(each, weights, weighting) for each in (one, drawn)), strict=True):
                torch.testing.assert_close(rows.square().sum(2), its.square().sum(2), rtol=1e-10, atol=1e-12)


def frames(n, k, d):
    return null.rotate(torch.eye(k).double().expand(n, k, k), d, generator(1))


class TestTurned:
    @pytest.mark.parametrize("d", [3, 5, 7])
    def test_rows_are_orthonormal(self, d):
        for rows in frames(5, 3, d):
            torch.testing.assert_close(rows @ rows.mT, torch.eye(3).double(), atol=1e-12, rtol=0)

    def test_rows_are_uniform(self):
        """The trace of a random rotation has the mean 0 and the variance 1, its squared entries the mean 1 / d."""
        rotations = frames(20_000, 3, 3)
        traces = rotations.diagonal(dim1=1, dim2=2).sum(1)
        assert float(traces.mean()) == pytest.approx(0.0, abs=0.03)
        assert float(traces.square().mean()) == pytest.approx(1.0, abs=0.05)
        torch.testing.assert_close(rotations.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.01, rtol=0)
        # and so are the rows of less than a rotation
        rows = frames(20_000, 2, 5)
        assert rows.mean(0).abs().max() < 0.01
        torch.testing.assert_close(rows.square().mean(0), torch.full((2, 5), 1 / 5).double(), atol=0.01, rtol=0)
        products = (rows[:, :, :, None] * rows[:, :, None, :]).mean(0)
        torch.testing.assert_close(products, torch.eye(5).double().expand(2, 5, 5) / 5, atol=0.01, rtol=0)


class TestWhatIsKeptOfStrangers:
    @pytest.mark.parametrize("sigma", [[1.0, 1.0, 1.0], [1.0, 0.1, 0.01]])
    def test_is_in_expectation_the_share_of_the_dimensions(self, sigma):
        one = pad_factors([of_spectrum(sigma, N_OUT, N_IN, seed=1)] * 4000, N_IN, N_OUT)
        drawn = NullModel.of(one).draw(generator(2))
        kept = losses.kept(drawn, orthonormal(9, N_IN, 5), orthonormal(20, N_OUT, 6))
        expected = null.expected(delta_squares(one), [(9, 20)] * 4000, (N_IN, N_OUT))
        assert expected[0] == pytest.approx(sum(s**2 for s in sigma) * 9 / N_IN * 20 / N_OUT)
        assert float(kept.mean()) == pytest.approx(float(expected[0]), rel=0.02)

    def test_of_more_directions_than_there_are_is_all(self):
        one = pad_factors(members(3), N_IN, N_OUT)
        found = null.expected(delta_squares(one), [(N_IN + 5, N_OUT + 1), (0, 7), (N_IN, 0)], (N_IN, N_OUT))
        assert found.tolist() == pytest.approx([float(delta_squares(one)[0]), 0.0, 0.0])


class TestAngles:
    def test_are_those_of_random_subspaces(self):
        """Squared cosines add up to k·j/d in expectation; and some angles are no right ones."""
        found = torch.stack([null.cosines(9, 12, 40, generator(seed)) for seed in range(300)])
        assert found.shape == (300, 9)
        assert bool((found.diff(dim=1) <= 0).all())
        assert float(found.square().sum(1).mean()) == pytest.approx(9 * 12 / 40, rel=0.02)
        expected = [torch.linalg.svdvals(orthonormal(12, 40, s) @ orthonormal(9, 40, s + 999).mT) for s in range(300)]
        torch.testing.assert_close(found.mean(0), torch.stack(expected).mean(0), atol=0.02, rtol=0)

    @pytest.mark.parametrize(("k", "j"), [(0, 5), (5, 0)])
    def test_of_nothing_are_none(self, k, j):
        assert len(null.cosines(k, j, 7, generator(1))) == 0

    def test_of_all_are_none_at_all(self):
        torch.testing.assert_close(null.cosines(9, 7, 7, generator(1)), torch.ones(7).double())


def fitted(one, k, weights=None, sweeps=2):
    """Squared norms that a fit with k components keeps, and one of k without sweeps."""
    weights = delta_squares(one).rsqrt() if weights is None else weights
    options = FitOptions(n_components=k, sweeps=sweeps)
    asked = refits.RefitOptions(options, (k, k), fixed=True, grid=[k], chosen=[], draws=2)
    return refits._null_fit(refits.Members(one, weights), asked)


class TestTheory:
    def test_in_many_dimensions_the_fit_keeps_the_largest_singular_values_of_all(self):
        """Random directions are all but orthogonal there."""
        spectra_of = [[3.0, 1.0], [2.5, 2.0], [1.5, 1.2], [0.9, 0.1]]
        found = [of_spectrum(sigma, 3001, 2999, seed=10 * i) for i, sigma in enumerate(spectra_of)]
        drawn = NullModel.of(pad_factors(found, 2999, 3001)).draw(generator(1))
        got = fitted(drawn, 5, weights=torch.ones(4).double())
        # the five largest of all: 3, 2.5, 2, 1.5, 1.2
        for kept in (got.kept, got.by_k[:, 0]):
            assert kept.tolist() == pytest.approx([9.0, 2.5**2 + 4.0, 1.5**2 + 1.2**2, 0.0], abs=0.15)
        total = sum(s**2 for sigma in spectra_of for s in sigma)
        assert got.energies == pytest.approx([(9 + 6.25 + 4 + 2.25 + 1.44) / total] * 2, abs=0.01)

    @pytest.mark.parametrize("k", [10, 40])
    def test_of_equal_norm_and_rank_one_the_spectrum_is_that_of_marchenko_and_pastur(self, k):
        n, d = 400, 200
        found = [of_spectrum([1.0], 211, d, seed=10 * i) for i in range(n)]
        drawn = NullModel.of(pad_factors(found, d, 211)).draw(generator(1))
        rows, _ = crowded.weighted(drawn, torch.ones(n).double(), "delta")
        shares = spectra.explained_ratios(crowded.Spectrum.of(rows).values.sqrt(), d)
        assert sum(shares[:k]) == pytest.approx(energy_by_marchenko_pastur(k / d, d / n), rel=0.01)

    def test_as_many_directions_as_rows_lose_nothing(self):
        found = [of_spectrum([1.0, 0.3], N_OUT, N_IN, seed=10 * i) for i in range(4)]
        drawn = NullModel.of(pad_factors(found, N_IN, N_OUT)).draw(generator(1))
        got = fitted(drawn, 8)
        assert got.kept.tolist() == pytest.approx(delta_squares(drawn).tolist())
        assert got.energies == pytest.approx((1.0, 1.0))


def energy_by_marchenko_pastur(share, ratio):
    """Energy in the largest share of the eigenvalues, which have the mean 1, of d/n = ratio."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x):
        return math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * ratio * x)

    edge = optimize.brentq(lambda x: integrate.quad(density, x, high)[0] - share, low + 1e-9, high - 1e-9)
    return integrate.quad(lambda x: x * density(x), edge, high)[0]


class TestRefits:
    """What the report takes of the null model is what dense float64 fits of the same draws give."""

    K, GRID, DRAWS = (4, 6), [1, 3, 6, 9], 3

    def found(self, n, weighting="delta", sweeps=2):
        factors = members(n)
        weights = torch.tensor([delta_square(f) ** -0.5 for f in factors], dtype=torch.float64)
        one = pad_factors(factors, N_IN, N_OUT)
        options = FitOptions(n_components=6, weighting=weighting, sweeps=sweeps)
        asked = refits.RefitOptions(options, self.K, fixed=True, grid=self.GRID, chosen=[0, 2], draws=self.DRAWS)
        found = refits.refit_module(refits.Members(one, weights), in_row_spaces(one), asked, generator(8))
        # the division into halves is drawn first
        again = generator(8)
        torch.randperm(n, generator=again)
        model = NullModel.of(one)
        draws = [model.draw(again) for _ in range(self.DRAWS)]
        return found, [[(d.up[i].mT @ d.down[i]).numpy() for i in range(n)] for d in draws], weights.tolist()

    def expected(self, deltas, weights, sweeps):
        """Kept in a fit of k, by k, and the energies."""
        rows = [
            np.concatenate([w * (d if side else d.T) for w, d in zip(weights, deltas, strict=True)]) for side in (1, 0)
        ]
        nested = fit_delta(deltas, weights, self.GRID[-1], 0)[:2]
        first = nested[0][: self.K[0]], nested[1][: self.K[1]]
        swept = swept_by(deltas, weights, first, sweeps)
        kept = [np.square(projected(d, *swept)).sum() for d in deltas]
        by_k = [[np.square(projected(d, nested[0][:k], nested[1][:k])).sum() for k in self.GRID] for d in deltas]
        energies = [np.square(r @ s.T).sum() / np.square(r).sum() for r, s in zip(rows, swept, strict=True)]
        return kept, by_k, energies

    # with fewer rows than there are dimensions, with more, and with so many that fits are not repeated
    @pytest.mark.parametrize("n", [7, 16, 90])
    @pytest.mark.parametrize("sweeps", [0, 2])
    def test_equal_dense_fits(self, n, sweeps):
        found, draws, weights = self.found(n, sweeps=sweeps)
        tolerance = 1e-4 if crowded.is_crowded(3 * n) else 1e-9
        spectrum, swept = [np.zeros(256), np.zeros(256)], np.zeros(2)
        for row, deltas in enumerate(draws):
            kept, by_k, energies = self.expected(deltas, weights, sweeps)
            total = [np.square(d).sum() for d in deltas]
            assert (found.null.fitted[row] / torch.tensor(total)).tolist() == pytest.approx(
                (np.array(kept) / total).tolist(), abs=tolerance
            )
            np.testing.assert_allclose(
                found.null.by_k[row].numpy() / np.array(total)[:, None],
                np.array(by_k) / np.array(total)[:, None],
                atol=tolerance,
            )
            swept += np.array(energies) / self.DRAWS
            for side, turned in enumerate((deltas, [d.T for d in deltas])):
                stacked = np.concatenate([w * d for w, d in zip(weights, turned, strict=True)])
                sigma = np.square(np.linalg.svd(stacked, compute_uv=False))
                first = sigma[: self.K[side]].sum() / sigma.sum()
                assert float(found.null.energies[row, side]) == pytest.approx(first, abs=tolerance)
                spectrum[side][: len(sigma)] += sigma / sigma.sum() / self.DRAWS
        for side, mean in zip(found.sides, spectrum, strict=True):
            np.testing.assert_allclose(side.null, mean[: len(side.null)], atol=tolerance)
            assert sum(side.null) == pytest.approx(1.0, abs=1e-3)
        assert [side.null_energy for side in found.sides] == pytest.approx(swept.tolist(), abs=tolerance)

    def test_strangers_meet_as_many_directions_as_the_others_have(self):
        """Of an adapter left out: by so many directions of none of its, and by so many at most as there are."""
        found, draws, _ = self.found(3)
        rows = [3 + 4, 2 + 3]
        assert found.left_out.sizes == [self.K, (4, 5)]
        assert found.left_out.max_components == [(7, 7), (5, 5)]
        for row, deltas in enumerate(draws):
            for column, (place, most) in enumerate(zip((0, 2), rows, strict=True)):
                corner = [np.square(deltas[place][: min(k, most), : min(k, most)]).sum() for k in self.GRID]
                assert found.null.left_out_by_k[row, column].tolist() == pytest.approx(corner)
                down, up = found.left_out.sizes[column]
                kept = np.square(deltas[place][:up, :down]).sum()
                assert float(found.null.left_out[row, column]) == pytest.approx(kept)

    def test_of_random_adapters_is_what_is_kept_of_them(self):
        """They are one more draw of the model."""
        factors = [of_spectrum([1.0, 0.5, 0.05], N_OUT, N_IN, seed=50 * i) for i in range(9)]
        one, weights = pad_factors(factors, N_IN, N_OUT), torch.ones(9).double()
        asked = refits.RefitOptions(FitOptions(n_components=6), (6, 6), fixed=True, grid=[2, 6], chosen=[], draws=60)
        found = refits.refit_module(refits.Members(one, weights), in_row_spaces(one), asked, generator(3))
        real = refits._null_fit(refits.Members(one, weights), asked)
        drawn = found.null.fitted.mean(1)
        assert abs(float(real.kept.mean() - drawn.mean())) < 4 * float(drawn.std())
        energies = found.null.energies
        for side in (0, 1):
            assert abs(real.first_energies[side] - float(energies[:, side].mean())) < 4 * float(energies[:, side].std())


def swept_by(deltas, weights, bases, sweeps):
    """Dense alternating refinements from (right, left)."""
    right, left = bases
    for _ in range(sweeps):
        right = np.linalg.svd(np.concatenate([w * left @ d for w, d in zip(weights, deltas, strict=True)]))[2][
            : len(right)
        ]
        left = np.linalg.svd(np.concatenate([w * right @ d.T for w, d in zip(weights, deltas, strict=True)]))[2][
            : len(left)
        ]
    return right, left


class TestCollections:
    def test_take_every_draw_of_a_module_equally_often(self):
        for draws in null._DRAWS:
            found = null.shuffled_draws(draws, generator(1))
            assert [found.count(draw) for draw in range(draws)] == [COLLECTIONS // draws] * draws

    @pytest.mark.parametrize(("modules", "draws"), [(12, 2), (4, 6), (1, 24)])
    def test_scatter_as_independent_ones_do(self, modules, draws):
        """Of a sum over modules that scatter differently; the mean over many seeds."""
        sizes = 1 + torch.arange(modules).double()
        found = []
        for seed in range(200):
            source, total = generator(seed), torch.zeros(COLLECTIONS).double()
            for size in sizes:
                total += (size * torch.randn(draws, generator=source).double())[null.shuffled_draws(draws, source)]
            found.append(float(null.spread(total, draws)) ** 2)
        assert math.fsum(found) / 200 == pytest.approx(float(sizes.square().sum()), rel=0.15)

    @pytest.mark.parametrize(
        ("modules", "affordable", "expected"),
        [
            (1, 1e9, 24),
            (2, 1e9, 12),
            (5, 1e9, 6),
            (12, 1e9, 4),
            (12, 3.5, 3),
            (200, 1e9, 4),
            (1, 0.1, 4),
            (1, 7.0, 6),
            (2, 0.0, 3),
            (24, 0.0, 2),
        ],
    )
    def test_are_as_many_draws_as_tell_their_scatter(self, modules, affordable, expected):
        assert null.draws(modules, affordable) == expected


class TestOverlap:
    def made(self):
        """Of one module and of two, with spectra that are even and steep."""
        shapes = {"a": (17, 13), "b": (11, 19)}
        made = [
            {
                m: of_spectrum(sigma, *shapes[m], seed=100 * i + 10 * j)
                for j, m in enumerate(shapes)
                if (i, m) != (2, "b")
            }
            for i, sigma in enumerate([[1.0] * 8, [1.0, 0.1], [2.0, 1.0, 0.5], [1e9]])
        ]
        return made, shapes

    def test_by_chance_is_that_of_random_directions(self):
        made, shapes = self.made()
        mean, deviation = overlap_by_chance(pairs_of(made, shapes))
        source, found = generator(5), []
        models = {
            m: NullModel.of(pad_factors([one[m] for one in made if m in one], *reversed(shapes[m]))) for m in shapes
        }
        for _ in range(400):
            drawn = [{} for _ in made]
            for m, model in models.items():
                factors = iter(unpadded(model.draw(source)))
                for one, its in zip(made, drawn, strict=True):
                    if m in one:
                        its[m] = next(factors)
            found.append(overlap(pairs_of(drawn, shapes)).fill_diagonal_(0))
        found = torch.stack(found)
        torch.testing.assert_close(found.mean(0), mean, atol=0.01, rtol=0)
        torch.testing.assert_close(found.std(0), deviation, rtol=0.15, atol=1e-9)
        # of equal singular values, the rank by the dimension
        alone = overlap_by_chance(pairs_of([{"a": made[0]["a"]}] * 2, shapes))[0]
        assert float(alone[0, 1]) == pytest.approx((8 / 17 + 8 / 13) / 2)

    def test_beyond_chance(self):
        made, shapes = self.made()
        found, deviation = beyond_chance(pairs_of([*made, made[1]], shapes))
        assert float(found[1, 4]) == pytest.approx(1.0)
        assert found.diagonal().tolist() == pytest.approx([1.0] * 5)
        strangers = found[:4, :4] - torch.eye(4)
        assert bool((strangers.abs() <= 4 * deviation[:4, :4] + 1e-12).all())

    def test_of_all_directions_evenly_nothing_is_said(self):
        even = [{"m": LoRAFactors(orthonormal(5, 5, i), orthonormal(5, 5, i + 50), 1.0)} for i in range(3)]
        found, deviation = beyond_chance(pairs_of(even, {"m": (5, 5)}))
        torch.testing.assert_close(found, torch.eye(3).double())
        assert not deviation.any()

    def test_of_some_and_of_awkward_ones(self):
        pairs = pairs_of(awkward())
        chosen = [8, 2, 5, 7]
        for one, other in zip(beyond_chance(pairs), beyond_chance(pairs.subset(chosen)), strict=True):
            assert bool(one.isfinite().all())
            torch.testing.assert_close(one[chosen][:, chosen], other)
