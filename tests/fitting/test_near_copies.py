"""The note on adapters that differ by less than the error bound of a coded pack."""

import re
from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import DuplicateAdapterWarning
from planted import MODULES, normal, random_adapter

NOTE = re.compile(r"differ.* by less than (\S+), the error that the pack allows, .*--max-error (\S+)\)")


def perturbed(name, seed, noise, scale=1.0):
    """An adapter whose up factors are those of `random_adapter(seed)` but for relative noise of their own."""
    modules = {}
    for offset, (module, factors) in enumerate(random_adapter("origin", seed=3, dtype=torch.float64).modules.items()):
        added = normal(*factors.up.shape, seed=1000 * seed + offset)
        up = factors.up + noise * factors.up.norm() / added.norm() * added
        modules[module] = LoRAFactors(factors.down, scale * up, factors.scaling)
    return from_factors(name, modules, base_model="org/base")


def notes_of(adapters, **options):
    return [note for note in ex.fit(adapters, **options).notes if NOTE.search(note)]


def relative_distance(first, second):
    """Distance of two adapters' updates, with the updates written out."""
    differences, norms = 0.0, [0.0, 0.0]
    for module in MODULES:
        updates = [f.scaling * f.up @ f.down for f in (first.modules[module], second.modules[module])]
        differences += float((updates[0] - updates[1]).square().sum())
        norms = [norm + float(update.square().sum()) for norm, update in zip(norms, updates, strict=True)]
    return (differences / max(norms)) ** 0.5


class TestNearCopies:
    def test_are_counted_and_two_of_them_named(self):
        near = [perturbed(f"near-{index}", index, 0.035) for index in range(6)]
        unrelated = [random_adapter(f"other-{index}", seed=50 + 10 * index, dtype=torch.float64) for index in range(3)]

        (note,) = notes_of([*near, *unrelated], max_error=0.1)

        assert re.match(r"6 adapters, such as near-\d and near-\d, differ from another one", note)
        bound, smaller = NOTE.search(note).groups()
        distance = relative_distance(near[0], near[1])
        assert float(bound) == 0.1
        assert float(smaller) == pytest.approx(distance / 3, rel=0.5)

    def test_a_pair_is_named(self):
        adapters = [perturbed("x", 1, 0.03), random_adapter("y", seed=9, dtype=torch.float64), perturbed("z", 2, 0.03)]

        (note,) = notes_of(adapters, max_error=0.1)

        assert note.startswith("x and z differ by less than")

    def test_the_suggested_bound_gives_no_note(self):
        near = [perturbed(f"near-{index}", index, 0.035) for index in range(4)]
        (note,) = notes_of(near, max_error=0.1)

        assert notes_of(near, max_error=float(NOTE.search(note)[2])) == []

    def test_a_fit_to_a_size_has_one_at_its_largest_error(self):
        near = [perturbed(f"near-{index}", index, 0.01) for index in range(4)]

        pack = ex.fit(near, ratio=12.0)

        (note,) = [note for note in pack.notes if NOTE.search(note)]
        assert float(NOTE.search(note)[1]) == pytest.approx(pack.summary.in_fit.worst, rel=0.01)

    @pytest.mark.parametrize("scale", [1.3, -1.0])
    def test_multiples_of_an_update_are_no_near_copies(self, scale):
        assert notes_of([perturbed("x", 1, 0.0), perturbed("y", 1, 0.0, scale)], max_error=0.1) == []

    def test_unrelated_adapters_have_no_note(self):
        adapters = [random_adapter(f"other-{index}", seed=50 + index) for index in range(5)]

        assert notes_of(adapters, max_error=0.5) == []

    def test_exact_copies_have_only_the_warning_of_their_own(self):
        original = random_adapter("a", seed=1)
        with pytest.warns(DuplicateAdapterWarning, match="b has the same update as a"):
            assert notes_of([original, replace(original, name="b"), random_adapter("c", seed=2)], max_error=0.1) == []
