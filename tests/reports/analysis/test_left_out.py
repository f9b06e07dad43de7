"""Errors of adapters that were left out, against packs that were fitted without them; and the work this is spared."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eigenlorax as ex
from eigenlorax.core import projection
from eigenlorax.core.adapter import LoRAFactors, delta_square, from_factors
from eigenlorax.core.batch import delta_squares, pad_factors
from eigenlorax.core.exact_fit import ExactFit
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.reports.analysis import losses, spectra
from eigenlorax.reports.analysis.left_out import left_out
from eigenlorax.reports.analysis.null import NullModel
from made import gauged, pairs_of
from planted import MODULES, factors_in, orthonormal, random_factors
from reference import dense, fit_delta, projected

pytestmark = pytest.mark.slow

QUERY, DENSE = MODULES


def collection(n, *, noise=0.2, ranks=(3, 2, 4), seed=0):
    """Adapters near a subspace; signs, sizes and ranks differ, and some lack a module or have not trained it."""
    bases = {
        m: (orthonormal(5, n_in, 11 + i), orthonormal(6, n_out, 77 + i))
        for i, (m, (n_out, n_in)) in enumerate(MODULES.items())
    }
    made = []
    for i in range(n):
        one = {
            m: factors_in(
                bases[m], ranks[i % len(ranks)], seed=seed + 100 * i + 10 * j, scaling=(-2.0) ** i, noise=noise
            )
            for j, m in enumerate(MODULES)
        }
        if i % 5 == 1:
            del one[QUERY]
        if i % 5 == 3:
            one[DENSE] = replace(one[DENSE], up=torch.zeros_like(one[DENSE].up))
        made.append(one)
    return made


def errors_left_out(made, chosen, options, *, k=None, grid=(1, 4, 9)):
    """Relative errors by adding what is kept, module by module; and by k."""
    totals = [sum(delta_square(f) for f in one.values()) for one in made]
    kept, by_k = torch.zeros(len(chosen)).double(), torch.zeros(len(chosen), len(grid)).double()
    for m, (n_out, n_in) in MODULES.items():
        places = [i for i, one in enumerate(made) if m in one and delta_square(one[m]) > 0]
        members = [made[i][m] for i in places], [totals[i] ** -0.5 for i in places]
        rows = [j for j, i in enumerate(chosen) if i in places]
        found = left_out(
            members,
            pad_factors(members[0], n_in, n_out),
            [places.index(chosen[j]) for j in rows],
            options,
            k,
            list(grid),
        )
        kept[rows] += found.fitted
        by_k[rows] += found.by_k
    total = torch.tensor([totals[i] for i in chosen], dtype=torch.float64)
    return (1 - kept / total).clamp_min(0).sqrt().tolist(), (1 - by_k / total[:, None]).clamp_min(0).sqrt()


def errors_of_refits(made, chosen, **options):
    """What a pack of the others says of each when it is added."""
    adapters = [from_factors(f"a{i:03d}", one, base_model="org/base") for i, one in enumerate(made)]
    found = []
    for i in chosen:
        pack = ex.fit([*adapters[:i], *adapters[i + 1 :]], dtype="float64", **options)
        found.append(pack.add(adapters[i]).delta_error)
    return found


def rows_of(made, module):
    return sum(one[module].down.shape[0] for one in made if module in one and delta_square(one[module]) > 0)


# rows between the dimensions of some module, fewer than those of another; and more than all
FEW, MANY = 9, 40


def test_sizes_are_what_the_names_say():
    few, many = ([rows_of(collection(n), module) for module in MODULES] for n in (FEW, MANY))
    sizes = sorted(MODULES.values())
    assert any(rows < n_in for rows, (_, n_in) in zip(few, sizes, strict=True))
    assert all(rows > max(shape) for rows, shape in zip(many, sizes, strict=True))


class TestAgainstRefits:
    @pytest.mark.parametrize("n", [FEW, 16, MANY])
    @pytest.mark.parametrize("weighting", ["delta", "factors"])
    @pytest.mark.parametrize("sweeps", [0, 2])
    def test_the_same_error(self, n, weighting, sweeps):
        made, chosen = collection(n), [0, 1, 3, 7]
        options = FitOptions(n_components=7, weighting=weighting, sweeps=sweeps)
        found, _ = errors_left_out(made, chosen, options)
        refits = errors_of_refits(made, chosen, n_components=7, weighting=weighting, sweeps=sweeps)
        assert found == pytest.approx(refits, abs=1e-9)
        assert min(refits) > 0.1

    @pytest.mark.parametrize("n", [FEW, MANY])
    @pytest.mark.parametrize("energy", [0.8, 1.0])
    def test_sizes_by_the_energy_of_the_others(self, n, energy):
        made, chosen = collection(n), [0, 5, 6]
        found, _ = errors_left_out(made, chosen, FitOptions(energy=energy, sweeps=0))
        assert found == pytest.approx(errors_of_refits(made, chosen, energy=energy, sweeps=0), abs=1e-7)

    @pytest.mark.parametrize("n", [FEW, MANY])
    def test_sizes_as_they_are_given(self, n):
        """As where max_error chose them: each side its own."""
        made, chosen, k = collection(n, ranks=(3,)), [0, 4], (6, 9)
        found, _ = errors_left_out(made, chosen, FitOptions(max_error=0.5, sweeps=0), k=k)
        for i, error in zip(chosen, found, strict=True):
            assert error == pytest.approx(error_of_dense_fit(made, i, k), abs=1e-8)

    @pytest.mark.parametrize("n", [FEW, MANY])
    def test_by_k_is_a_fit_of_each_size(self, n):
        made, chosen, grid = collection(n, ranks=(3,)), [0, 2], (1, 3, 6, 11)
        _, by_k = errors_left_out(made, chosen, FitOptions(n_components=5, sweeps=0), grid=grid)
        for row, i in zip(by_k, chosen, strict=True):
            expected = [error_of_dense_fit(made, i, (k, k)) for k in grid]
            assert row.tolist() == pytest.approx(expected, abs=1e-8)
            assert expected == sorted(expected, reverse=True)


def error_of_dense_fit(made, i, k):
    """The error of adapter i in dense bases of the others without sweeps."""
    totals = [sum(delta_square(f) for f in one.values()) for one in made]
    lost = 0.0
    for m in made[i]:
        others = [j for j, one in enumerate(made) if j != i and m in one and delta_square(one[m]) > 0]
        deltas, weights = [dense(made[j][m]) for j in others], [totals[j] ** -0.5 for j in others]
        right, left, _, _ = fit_delta(deltas, weights, max(k), 0)
        delta = dense(made[i][m])
        lost += ((delta - projected(delta, right[: k[0]], left[: k[1]])) ** 2).sum()
    return math.sqrt(lost / totals[i])


class TestStacksOfLowRank:
    """Many adapters of few directions: beyond their rank there is none, though a basis of all may have one."""

    def made(self, n):
        shared = collection(n, noise=0.0, ranks=(3,))
        stranger = {m: random_factors(2, *shape, seed=9 + i) for i, (m, shape) in enumerate(MODULES.items())}
        return [*shared, stranger]

    @pytest.mark.parametrize("n", [FEW, MANY])
    def test_a_stranger_keeps_nothing_of_its_own_directions(self, n):
        made = self.made(n)
        grid = (5, 7, 12, 29)
        found, by_k = errors_left_out(made, [n, 0], FitOptions(n_components=9, sweeps=2), grid=grid)
        refits = errors_of_refits(made, [n, 0], n_components=9)
        assert refits[0] > 0.9
        assert found == pytest.approx([refits[0], 0.0], abs=1e-6)
        assert bool((by_k[0] > 0.9).all())
        assert by_k[0, 1:].tolist() == pytest.approx([refits[0]] * 3, abs=1e-6)
        # for the others, a stranger is among the first
        assert by_k[1, 2:].tolist() == pytest.approx([0.0] * 2, abs=1e-6)

    def test_copies_miss_nothing(self):
        made = collection(FEW, ranks=(3,))
        made.append(gauged(made[0], 5))
        found, _ = errors_left_out(made, [0, len(made) - 1], FitOptions(n_components=53))
        assert found == pytest.approx([0.0, 0.0], abs=1e-6)


def test_alone_in_a_module_nothing_is_kept():
    one = [{m: random_factors(2, *shape, seed=1) for m, shape in MODULES.items()}]
    found, by_k = errors_left_out(one, [0], FitOptions(n_components=3))
    assert found == [1.0]
    assert by_k.tolist() == [[1.0] * 3]


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_matrix_is_as_large_as_the_weight():
    """Whatever is done with few rows: rows beside rows at most."""
    n_out, n_in, rank, n = 1201, 997, 2, 6
    factors = [random_factors(rank, n_out, n_in, seed=10 * i) for i in range(n)]
    weights = [delta_square(f) ** -0.5 for f in factors]
    options, k, grid = FitOptions(n_components=4), (4, 4), [1, 4, 9]
    generator = torch.Generator().manual_seed(1)
    with Largest() as largest:
        bases = ExactFit.stack(factors, weights, options)
        bases = bases.fit(bases.full_spectrum(), k)
        one = pad_factors(factors, n_in, n_out)
        delta_squares(one)
        losses.stored(one, factors, [projection.project(f, bases) for f in factors], bases)
        rows = [losses.random_rows(5, d, generator) for d in (n_in, n_out)]
        losses.kept(one, *rows)
        losses.kept_by_k(one, *rows, grid)
        losses.singular_squares(one)
        losses.rounded_squares(one, 8)
        pairs_of([{"m": f} for f in factors], {"m": (n_out, n_in)})
        NullModel.of(one).draw(generator)
        spectra.halves((factors, weights), [0, 2, 4], [1, 3, 5], k)
        spectra.energy(one, torch.tensor(weights).double(), k, "delta")
        left_out((factors, weights), one, [0, 3], options, None, grid)
    assert 0 < largest.numbers <= n * 2 * rank * (n_in + n_out)
    with Largest() as largest:
        LoRAFactors(factors[0].down, factors[0].up, 1.0).up @ factors[0].down
    assert largest.numbers == n_out * n_in


def test_nobody_is_left_out():
    """As of a module that none of those in a sample has."""
    members = [one[DENSE] for one in collection(3)], [1.0] * 3
    n_out, n_in = MODULES[DENSE]
    options = FitOptions(n_components=3)
    found = left_out(members, pad_factors(members[0], n_in, n_out), [], options, None, [1, 3])
    assert (found.fitted.shape, found.by_k.shape) == ((0,), (0, 2))
