"""Fits on a device that stands for an accelerator: what is computed there stays there until a stage ends."""

import pytest
import torch

import eigenlorax as ex
from accelerator import DEVICE, Accelerator
from eigenlorax.core import gram_search, iterative, krylov
from eigenlorax.fitting import jobs
from planted import MODULES, random_adapter

K, RANK = 4, 3


@pytest.fixture(params=["exact", "gram search", "passes over rows"])
def solver(request, monkeypatch):
    """Each way to find the bases, which the size of a module decides."""
    if request.param != "exact":
        monkeypatch.setattr(iterative, "is_suitable", lambda *sizes: True)
        monkeypatch.setattr(krylov, "BLOCK", K)
    if request.param == "passes over rows":
        monkeypatch.setattr(gram_search, "LARGEST_GRAM", 0)


@pytest.fixture(autouse=True)
def without_threads(monkeypatch):
    """Jobs in this thread, because a dispatch mode is of one thread alone."""
    monkeypatch.setattr(jobs, "run", lambda todo, engine: map(jobs.load_and_fit, todo))


def adapters_of(ranks):
    return [random_adapter(f"a{i}", seed=100 * i, rank=rank) for i, rank in enumerate(ranks)]


def fitted_on(device, ranks=(3, 3, 3, 3, 3), **options):
    return ex.fit(adapters_of(ranks), **{"n_components": K, "device": device, "warn_above": 1, **options})


@pytest.mark.parametrize(
    ("weighting", "ranks"), [("delta", (3, 3, 3, 3, 3)), ("delta", (2, 3, 4, 3, 2)), ("factors", (2, 3, 4, 3, 2))]
)
@pytest.mark.usefixtures("solver")
def test_a_fit_on_a_device_is_that_of_the_cpu(weighting, ranks):
    expected = fitted_on("cpu", ranks, weighting=weighting)
    with Accelerator():
        pack = fitted_on(DEVICE, ranks, weighting=weighting)
    for name, bases in expected.subspace.modules.items():
        for side in ("down", "up"):
            found = pack.subspace.modules[name].side(side)
            assert torch.equal(found.components, bases.side(side).components)
            assert found.energy == bases.side(side).energy
    assert pack.records == expected.records


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_every_storage_is_computed_on_the_device(dtype):
    with Accelerator():
        pack = fitted_on(DEVICE, dtype=dtype)
    assert pack.records == fitted_on("cpu", dtype=dtype).records


@pytest.mark.usefixtures("solver")
def test_factors_go_to_the_device_once_and_only_results_come_back():
    counts = set()
    for n in (3, 7):
        with Accelerator() as accelerator:
            fitted_on(DEVICE, (RANK,) * n)
        widths = sorted(width for shape in MODULES.values() for width in shape)
        factors = [shape for shape in accelerator.uploads if shape[:-1] == (n, RANK)]
        assert sorted(factors) == [(n, RANK, width) for width in widths]
        # nothing as wide as a module but its components
        wide = [shape for shape in accelerator.downloads if set(shape) & set(widths)]
        assert sorted(wide) == [(K, width) for width in widths]
        coefficients = [shape for shape in accelerator.downloads if len(shape) == 3]
        assert coefficients == [(n, RANK, K), (n, K, RANK)] * len(MODULES)
        counts.add((len(accelerator.uploads), len(accelerator.downloads)))
    assert len(counts) == 1


def test_the_device_is_asked_for_one_number_per_adapter_in_an_exact_fit():
    """Each number is a wait for the device. Searches ask for some in each step."""
    counts = {}
    for n in (3, 7):
        with Accelerator() as accelerator:
            fitted_on(DEVICE, (RANK,) * n)
        counts[n] = len(accelerator.scalars)
    assert counts[7] - counts[3] == len(MODULES) * (7 - 3)
    assert counts[3] < 36 * len(MODULES)


def test_tensors_of_two_devices_are_refused():
    with Accelerator() as accelerator:
        on_device = torch.ones(3, 2).to(DEVICE)
        with pytest.raises(
            AssertionError, match=r"mm of tensors on the device and of tensors on the CPU: \[\(2, 5\)\]"
        ):
            on_device @ torch.ones(2, 5)
        assert torch.equal((on_device @ torch.ones(2, 5).to(DEVICE)).cpu(), torch.full((3, 5), 2.0))
        assert float(on_device.sum()) == 6
    assert accelerator.uploads == [(3, 2), (2, 5)]
    assert accelerator.downloads == [(3, 5)]
    assert accelerator.scalars == ["_local_scalar_dense"]
