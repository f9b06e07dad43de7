"""Fingerprints and growth of a subspace."""

import pytest
from small_fits import collection, fitted

from eigenlorax.core import subspace
from eigenlorax.errors import OptionError


class TestSubspace:
    def make(self, **options):
        names = ("encoder.0.query", "encoder.0.value")
        return subspace.Subspace(
            {name: fitted(collection(i), n_components=4, **options) for i, name in enumerate(names)}
        )

    def test_fingerprint_follows_every_bit(self):
        one, same = self.make(), self.make()
        assert one.fingerprint == same.fingerprint
        same.modules["encoder.0.value"].up.components[3, 46] += 1e-15
        assert one.fingerprint != same.fingerprint

    def test_augmented_subspaces_are_told_apart_by_seed_and_number(self):
        plain = self.make()
        prints = {
            plain.fingerprint,
            subspace.augment(plain, 2, seed=1).fingerprint,
            subspace.augment(plain, 2, seed=2).fingerprint,
            subspace.augment(plain, 3, seed=1).fingerprint,
            subspace.augment(subspace.augment(plain, 2, seed=1), 2, seed=2).fingerprint,
        }
        assert len(prints) == 5

    def test_one_seed_gives_every_matrix_rows_of_its_own(self):
        augmented = subspace.augment(self.make(), 1, seed=1)
        one, two = (augmented.modules[name].down.components[-1] for name in augmented.modules)
        assert abs(float(one @ two)) < 0.9

    def test_a_seed_cannot_be_used_twice(self):
        with pytest.raises(OptionError, match="already has components from seed 1"):
            subspace.augment(subspace.augment(self.make(), 2, seed=1), 3, seed=1)
