"""Clusters of adapters that were planted are found, and more of them never lose more."""

import sys
from pathlib import Path

import joint
import pytest
import torch

from eigenlorax.core.batch import delta_squares, pad_factors
from made import awkward, random
from planted import MODULES, factors_in, orthonormal

# at the end: nothing there may hide a module of another name
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from adapter_clusters import clustered

QUERY, DENSE = MODULES
N_OUT, N_IN = MODULES[QUERY]


def unit(one):
    return delta_squares(one).clamp_min(1e-300).rsqrt() * (delta_squares(one) > 0)


class TestClusters:
    @staticmethod
    def planted(n=18, k=6, rank=3):
        """Three subspaces in two modules, adapters in turn, one of which lacks a module."""
        made = []
        for i in range(n):
            which = i % 3
            one = {}
            for place, (name, (n_out, n_in)) in enumerate(MODULES.items()):
                bases = orthonormal(k, n_in, 100 * which + place), orthonormal(k, n_out, 100 * which + place + 50)
                one[name] = factors_in(bases, rank, seed=31 * i + 7 * place, noise=0.01)
            made.append(one)
        del made[4][DENSE]
        return {
            name: pad_factors([one.get(name) for one in made], n_in, n_out) for name, (n_out, n_in) in MODULES.items()
        }

    @pytest.mark.parametrize(("fit", "k"), [(joint.full, 6), (joint.diagonal, 18)])
    def test_planted_ones_are_found(self, fit, k):
        modules = self.planted()
        total = sum(delta_squares(one) for one in modules.values())
        found = clustered(modules, total.rsqrt(), k, 3, fit, tolerance=1e-4)
        assert found.members == tuple(tuple(range(which, 18, 3)) for which in range(3))
        assert float((found.lost / total).sqrt().max()) < 0.12
        for members, bases in zip(found.members, found.modules, strict=True):
            lost = sum(each.lost for each in bases.values())
            torch.testing.assert_close(found.lost[list(members)], lost)
            assert len(bases[QUERY].cores) == len(members)

    def test_more_of_them_lose_no_more_than_one(self):
        made = random(10, shapes=MODULES)
        modules = {m: pad_factors([one[m] for one in made], n_in, n_out) for m, (n_out, n_in) in MODULES.items()}
        weights = sum(delta_squares(one) for one in modules.values()).rsqrt()
        lost = [float((weights.square() * clustered(modules, weights, 4, c).lost).sum()) for c in (1, 2, 4)]
        assert lost[0] > lost[1] > lost[2]

    def test_no_more_of_them_than_adapters_and_untrained_ones_are_somewhere(self):
        made = [one for one in awkward() if QUERY in one]
        one = pad_factors([each[QUERY] for each in made], N_IN, N_OUT)
        found = clustered({QUERY: one}, unit(one), 3, 12)
        assert sorted(i for members in found.members for i in members) == list(range(len(made)))
