"""Versions within an error bound: dense errors, exact values after every way to decode, and what damaged bytes do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import reference
from eigenlorax.codec.versions import lossy
from eigenlorax.codec.versions.version import Version
from eigenlorax.core import limits
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import FormatError

SHAPES = {"layer.0": (5, 48, 40), "layer.1": (3, 56, 64)}
"""Rank, out and in, by module."""


def start(dtype=torch.float32, scaling=2.0, seed=0):
    """A version of two modules, a head and a bias."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    modules = {
        name: LoRAFactors(normal(r, n_in), normal(n_out, r), scaling) for name, (r, n_out, n_in) in SHAPES.items()
    }
    tensors = {"head.weight": normal(6, 72), "head.bias": normal(6), "steps": torch.arange(3)}
    return Version(modules, tensors, 0.05, {"head.weight": 0.1, "head.bias": 0.002, "steps": 0.0})


def moved(version, size, seed):
    """A later version: every number has moved by a random step of this relative size."""
    random = torch.Generator().manual_seed(seed)

    def move(tensor):
        return (tensor.double() + size * torch.randn(tensor.shape, generator=random, dtype=torch.float64)).to(
            tensor.dtype
        )

    modules = {
        name: LoRAFactors(move(factors.down), move(factors.up), factors.scaling)
        for name, factors in version.modules.items()
    }
    tensors = {
        key: move(tensor) if tensor.is_floating_point() else tensor + 1 for key, tensor in version.tensors.items()
    }
    return replace(version, modules=modules, tensors=tensors)


def run(count, size=0.05, **options):
    """The versions of a training run."""
    versions = [start(**options)]
    for seed in range(1, count):
        versions.append(moved(versions[-1], size, seed))
    return versions


def encode_all(versions):
    encoded = []
    for version in versions:
        encoded.append(lossy.encode(version, encoded[-1].decoded if encoded else None))
    return encoded


def dense_error(version, decoded):
    """Relative error over all modules, from dense float64 updates."""
    lost = sum(
        np.square(reference.dense(factors) - reference.dense(decoded.modules[name])).sum()
        for name, factors in version.modules.items()
    )
    total = sum(np.square(reference.dense(factors)).sum() for factors in version.modules.values())
    return float(np.sqrt(lost / total))


def relative_error(tensor, decoded):
    return float((tensor.double() - decoded.double()).norm() / tensor.double().norm())


def assert_same(first, second):
    """Both decode to the same bits."""
    assert list(first.modules) == list(second.modules)
    assert list(first.tensors) == list(second.tensors)
    for name, factors in first.modules.items():
        other = second.modules[name]
        assert torch.equal(factors.down, other.down)
        assert torch.equal(factors.up, other.up)
        assert (factors.scaling, factors.kernel) == (other.scaling, other.kernel)
        assert (factors.down.dtype, factors.up.dtype) == (other.down.dtype, other.up.dtype)
    for key, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[key])
        assert tensor.dtype == second.tensors[key].dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_version_keeps_its_bounds_in_its_dtype(dtype):
    for version, encoded in zip(versions := run(5, dtype=dtype), encode_all(versions), strict=True):
        error = dense_error(version, encoded.decoded)
        assert error == pytest.approx(encoded.delta_error, rel=1e-6)
        assert 0.9 * version.max_error < error <= version.max_error
        errors = {key: relative_error(tensor, encoded.decoded.tensors[key]) for key, tensor in version.tensors.items()}
        assert all(error <= version.tensor_bounds[key] for key, error in errors.items())
        assert max(errors.values()) == pytest.approx(encoded.tensor_error, rel=1e-6)
        assert encoded.decoded.modules["layer.0"].down.dtype == dtype
        assert encoded.lora_bytes + encoded.tensor_bytes == len(encoded.data)


@pytest.mark.parametrize(
    ("bound", "size", "scaling"),
    [(0.001, 0.0, 1.0), (0.02, 1e-3, -3.0), (0.1, 3.0, 1e-6), (0.5, 0.1, 1e9), (0.9, 0.01, 0.5), (1e-7, 0.1, 1.0)],
)
def test_bounds_hold_whatever_the_bound_and_the_change(bound, size, scaling):
    versions = [replace(version, max_error=bound) for version in run(3, size, scaling=scaling)]
    for version, encoded in zip(versions, encode_all(versions), strict=True):
        assert dense_error(version, encoded.decoded) <= bound
        assert encoded.delta_error <= bound


@pytest.mark.parametrize("bound", [1e-10, 1e-13, 1e-170])
def test_bounds_hold_below_the_precision_of_squares(bound):
    version = replace(start(dtype=torch.float64), max_error=bound)
    version = replace(version, tensor_bounds=dict.fromkeys(version.tensors, bound))
    encoded = lossy.encode(version, None)
    assert dense_error(version, encoded.decoded) <= bound
    assert all(
        relative_error(tensor, encoded.decoded.tensors[key]) <= bound
        for key, tensor in version.tensors.items()
        if tensor.is_floating_point()
    )


@pytest.mark.filterwarnings("error")
def test_factors_beyond_their_dtype_are_stored_exactly():
    # in the gauge of equal norms, one side is too large
    factors = LoRAFactors(torch.full((2, 40), 6e4).half(), torch.full((48, 2), 6e4).half(), 1.0)
    version = replace(start(), modules={"layer": factors})
    encoded = lossy.encode(version, None)
    assert torch.equal(encoded.decoded.modules["layer"].up, factors.up)
    assert encoded.delta_error == 0


def test_a_chain_decodes_to_what_the_encoder_saw():
    encoded = encode_all(run(6))
    assert [each.has_reference for each in encoded] == [False] + [True] * 5
    for stop in range(1, 7):
        assert_same(lossy.decode_chain([each.data for each in encoded[:stop]]), encoded[stop - 1].decoded)
    assert_same(lossy.decode_chain([encoded[5].data], encoded[4].decoded), encoded[5].decoded)


@pytest.mark.parametrize("growth", [0.95, 1.05, 1.1, 1.3])
def test_a_tensor_with_a_row_of_zeros_decodes_to_what_the_encoder_saw(growth):
    # the norm decides whether the tensor keeps its level, and the row of zeros would not
    head = start().tensors["head.weight"]
    head[0] = 0
    first, second = start(), moved(start(), 0.05, seed=1)
    first = replace(first, tensors={**first.tensors, "head.weight": head})
    second = replace(second, tensors={**second.tensors, "head.weight": growth * head + 0.02})
    encoded = encode_all([first, second])
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[-1].decoded)


def test_later_versions_take_fewer_bytes_than_by_themselves():
    versions = run(4, size=0.03)
    predicted = encode_all(versions)
    for version, encoded in zip(versions[1:], predicted[1:], strict=True):
        assert len(encoded.data) < 0.75 * len(lossy.encode(version, None).data)


def test_an_equal_version_takes_almost_no_bytes():
    version = start()
    first = lossy.encode(version, None)
    again = lossy.encode(version, first.decoded)
    # the header, the labels, and integers that are stored exactly
    assert len(again.data) < 0.2 * len(first.data)


def test_an_update_that_grows_as_a_whole_is_predicted_with_gains():
    first = replace(start(), tensors={}, tensor_bounds={})
    modules = {name: replace(factors, up=2 * factors.up) for name, factors in first.modules.items()}
    encoded = encode_all([first, replace(first, modules=modules)])
    for module in encoded[1].decoded.module_rows.values():
        gains = (64 + module.up.labels.gains.astype(float)) * (64 + module.down.labels.gains.astype(float)) / 64**2
        assert gains == pytest.approx(2, abs=0.1)
    assert encoded[1].lora_bytes < 0.6 * encoded[0].lora_bytes
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[-1].decoded)


@pytest.mark.parametrize("growth", [1.0, 1.3, 0.8])
def test_encoding_again_without_every_other_version_takes_fewer_bytes(growth):
    versions = [
        replace(
            version,
            modules={
                name: replace(factors, up=growth**number * factors.up) for name, factors in version.modules.items()
            },
        )
        for number, version in enumerate(run(8, size=0.1))
    ]
    encoded = encode_all(versions)
    thinned, earlier = 0, None
    for each in encoded[1::2]:
        thinned += len(lossy.encode_again(each.decoded, earlier).data)
        earlier = each.decoded
    assert thinned < 0.95 * sum(len(each.data) for each in encoded)


def test_an_unrelated_version_is_not_predicted():
    first, other = start(seed=1), start(seed=2)
    alone, after = lossy.encode(other, None), lossy.encode(other, lossy.encode(first, None).decoded)
    assert after.lora_bytes < 1.02 * alone.lora_bytes


def test_a_version_after_a_much_larger_one_takes_no_more_bytes_than_by_itself():
    first, other = start(seed=1), start(seed=2)
    modules = {name: replace(factors, up=100 * factors.up) for name, factors in first.modules.items()}
    earlier = lossy.encode(replace(first, modules=modules), None)
    after = lossy.encode(other, earlier.decoded)
    assert after.lora_bytes < 1.02 * lossy.encode(other, None).lora_bytes
    assert_same(lossy.decode_chain([earlier.data, after.data]), after.decoded)


def test_the_bytes_do_not_depend_on_the_factorisation():
    first, second = run(2, dtype=torch.float64)
    random = torch.Generator().manual_seed(9)
    modules = {}
    for name, factors in second.modules.items():
        change = torch.randn(len(factors.down), len(factors.down), generator=random, dtype=torch.float64)
        modules[name] = LoRAFactors(change.inverse() @ factors.down, factors.up @ change, factors.scaling)
    earlier = lossy.encode(first, None).decoded
    plain, changed = (lossy.encode(each, earlier) for each in (second, replace(second, modules=modules)))
    assert changed.lora_bytes == pytest.approx(plain.lora_bytes, rel=0.02)


def test_ranks_may_shrink_and_grow():
    first = start()
    factors = first.modules["layer.0"]
    shrunk = replace(
        first, modules={**first.modules, "layer.0": LoRAFactors(factors.down[1:], factors.up[:, 1:], factors.scaling)}
    )
    versions = [first, shrunk, first]
    encoded = encode_all(versions)
    for version, each in zip(versions, encoded, strict=True):
        assert dense_error(version, each.decoded) <= 0.05
    assert encoded[1].decoded.modules["layer.0"].down.shape == (4, 40)
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[2].decoded)
    # a row that was removed costs nothing, and the others are predicted
    assert encoded[1].lora_bytes < 0.6 * lossy.encode(shrunk, None).lora_bytes


def test_modules_and_tensors_may_come_and_go():
    first = start()
    fewer = replace(
        first, modules={"layer.1": first.modules["layer.1"]}, tensors={"head.bias": first.tensors["head.bias"]}
    )
    encoded = encode_all([first, fewer, first])
    assert list(encoded[1].decoded.modules) == ["layer.1"]
    assert list(encoded[1].decoded.tensors) == ["head.bias"]
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[2].decoded)


@pytest.mark.filterwarnings("ignore:overflow encountered in matmul")
@pytest.mark.parametrize("change", ["zero up", "zero scaling", "huge", "tiny", "no tensors", "no modules"])
def test_special_versions(change):
    version = start(dtype=torch.float64)
    scale = {"huge": 1e200, "tiny": 1e-200}.get(change, 1.0)
    modules = {
        name: LoRAFactors(
            factors.down * scale,
            factors.up * (0 if change == "zero up" else scale),
            0.0 if change == "zero scaling" else factors.scaling,
        )
        for name, factors in version.modules.items()
    }
    version = replace(
        version,
        modules={} if change == "no modules" else modules,
        tensors={} if change == "no tensors" else version.tensors,
    )
    encoded = encode_all([version, version])
    for each in encoded:
        for name, factors in version.modules.items():
            dense, decoded = reference.dense(factors), reference.dense(each.decoded.modules[name])
            np.testing.assert_allclose(decoded, dense, atol=0.2 * np.abs(dense).max(), rtol=0)
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[1].decoded)


@pytest.mark.parametrize("zero", ["up", "down"])
def test_a_module_that_has_not_moved_keeps_its_other_factor(zero):
    first, second = run(2)
    idle = replace(first.modules["layer.1"], **{zero: torch.zeros_like(getattr(first.modules["layer.1"], zero))})
    versions = [replace(version, modules=version.modules | {"layer.1": idle}) for version in (first, second)]
    encoded = encode_all([*versions, run(3)[2]])
    for version, each in zip(versions, encoded[:2], strict=True):
        assert torch.equal(each.decoded.modules["layer.1"].up, idle.up)
        assert torch.equal(each.decoded.modules["layer.1"].down, idle.down)
        assert dense_error(version, each.decoded) <= 0.05
    # its factors have 768 bytes, which are stored once
    alone = replace(versions[1], modules={"layer.0": second.modules["layer.0"]})
    assert len(encoded[1].data) < len(lossy.encode(alone, lossy.encode(first, None).decoded).data) + 300
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[2].decoded)


def test_a_training_can_start_from_an_untrained_version():
    version = start()
    modules = {
        name: LoRAFactors(factors.down, torch.zeros_like(factors.up), factors.scaling)
        for name, factors in version.modules.items()
    }
    first = lossy.encode(replace(version, modules=modules), None)
    for name, factors in modules.items():
        decoded = first.decoded.modules[name]
        assert not decoded.up.any()
        assert relative_error(factors.down, decoded.down) < 0.06
    # and predicts the versions after it
    second = lossy.encode(version, first.decoded)
    assert second.lora_bytes < 0.8 * lossy.encode(version, None).lora_bytes


def without_update(version, scale=1.0):
    """The version with B = 0, and A at another scale."""
    modules = {
        name: replace(factors, down=scale * factors.down, up=torch.zeros_like(factors.up))
        for name, factors in version.modules.items()
    }
    return replace(version, modules=modules)


@pytest.mark.parametrize("size", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("bound", [0.003, 0.05, 0.3])
def test_an_update_of_zero_after_others_is_zero(size, bound):
    versions = [
        start(),
        without_update(moved(start(), size, 1)),
        replace(without_update(start(), 2.0), max_error=bound),
        without_update(moved(start(), size, 2)),
        moved(start(), size, 3),
    ]
    encoded = encode_all(versions)
    for number, (version, each) in enumerate(zip(versions, encoded, strict=True)):
        assert_same(lossy.decode_chain([one.data for one in encoded[: number + 1]]), each.decoded)
        if not any(factors.up.any() for factors in version.modules.values()):
            assert not any(factors.up.any() for factors in each.decoded.modules.values())
            first, second = (
                torch.cat([factors.down.flatten() for factors in modules.values()])
                for modules in (version.modules, each.decoded.modules)
            )
            assert relative_error(first, second) <= version.max_error


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
def test_the_bound_of_untrained_factors_holds_in_their_dtype(bound):
    # rounded up, the numbers are infinite
    factors = LoRAFactors(torch.linspace(-65504, 65504, 80).view(2, 40).half(), torch.zeros(48, 2).half(), 1.0)
    version = replace(start(), modules={"layer": factors}, max_error=bound)
    decoded = lossy.encode(version, None).decoded.modules["layer"]
    assert relative_error(factors.down, decoded.down) <= bound
    assert not decoded.up.any()


def test_versions_that_take_too_few_bytes_to_be_read_are_stored_exactly(monkeypatch):
    zeros = {"big": LoRAFactors(torch.zeros(2, 400), torch.zeros(300, 2), 1.0)}
    version = Version(zeros, {}, 0.05, {})
    assert not lossy.encode(version, None).decoded.exact
    monkeypatch.setattr(limits, "MEMORY_ALLOWANCE", 0)
    monkeypatch.setattr(limits, "MAX_EXPANSION", 10)
    encoded = lossy.encode(version, None)
    assert len(encoded.decoded.exact) == 2
    assert torch.equal(encoded.decoded.modules["big"].down, zeros["big"].down)


def test_many_numbers_that_hardly_change_can_be_read(monkeypatch):
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=random) for shape in ((16, 1500), (1400, 16)))
    first, second = (
        Version({"layer": LoRAFactors(down, up + change, 1.0)}, {}, 0.3, {})
        for change in (0, 0.05 * torch.randn(1400, 16, generator=random))
    )
    monkeypatch.setattr(limits, "MEMORY_ALLOWANCE", 0)
    encoded = encode_all([first, second])
    # far less than half a bit for each number
    assert encoded[1].has_reference
    assert len(encoded[1].data) < 46_400 / 16
    assert_same(lossy.decode_chain([each.data for each in encoded]), encoded[1].decoded)


def test_memory_does_not_grow_along_a_chain(monkeypatch):
    monkeypatch.setattr(limits, "MAX_EXPANSION", 10**9)
    encoded = []
    for count in range(1, 4):
        zeros = {f"m{number}": LoRAFactors(torch.zeros(2, 4000), torch.zeros(3000, 2), 1.0) for number in range(count)}
        encoded.append(lossy.encode(Version(zeros, {}, 0.05, {}), encoded[-1].decoded if encoded else None))
    assert [each.has_reference for each in encoded] == [False, True, True]
    monkeypatch.setattr(limits, "MAX_EXPANSION", 64)
    with pytest.raises(FormatError, match="bytes of memory more"):
        lossy.decode_chain([each.data for each in encoded])
    # the writer makes what can be read
    again = lossy.encode(Version(zeros, {}, 0.05, {}), encoded[0].decoded)
    assert not again.has_reference
    assert_same(lossy.decode_chain([again.data]), again.decoded)


def test_encoding_again_keeps_every_number_with_other_references():
    encoded = encode_all(run(5, size=0.2))
    decoded = [each.decoded for each in encoded]
    for reference_version in (None, decoded[0], decoded[3]):
        again = lossy.encode_again(decoded[4], reference_version)
        before = reference_version if again.has_reference else None
        assert_same(lossy.decode_chain([again.data], before), decoded[4])
    # the version before the last is closer than the first one
    assert len(lossy.encode_again(decoded[4], decoded[3]).data) < len(lossy.encode_again(decoded[4], decoded[0]).data)


def scaled(version, size):
    """A version whose numbers are this many times as large."""
    modules = {
        name: replace(factors, down=size * factors.down, up=size * factors.up)
        for name, factors in version.modules.items()
    }
    return replace(
        version, modules=modules, tensors={key: (size * t).to(t.dtype) for key, t in version.tensors.items()}
    )


@pytest.mark.parametrize("size", [1e-12, 1e-30])
def test_differences_beyond_32_bits_need_no_reference(size):
    first, second = run(2, dtype=torch.float64)
    second = scaled(second, size)
    large, small = lossy.encode(first, None), lossy.encode(second, None)
    again = lossy.encode_again(small.decoded, large.decoded)
    assert not again.has_reference
    assert_same(lossy.decode_chain([again.data]), small.decoded)
    after = lossy.encode(second, large.decoded)
    assert dense_error(second, after.decoded) <= second.max_error
    before = large.decoded if after.has_reference else None
    assert_same(lossy.decode_chain([after.data], before), after.decoded)


def test_what_cannot_be_read_without_its_reference_is_stored_exactly(monkeypatch):
    decoded = encode_all(run(2))[1].decoded
    monkeypatch.setattr(limits, "MEMORY_ALLOWANCE", 0)
    monkeypatch.setattr(limits, "MAX_EXPANSION", 2)
    again = lossy.encode_again(decoded, None)
    assert_same(lossy.decode_chain([again.data]), decoded)


def test_encoding_again_after_a_change_of_rank():
    first = start()
    factors = first.modules["layer.0"]
    narrow = {**first.modules, "layer.0": LoRAFactors(factors.down[:3], factors.up[:, :3], factors.scaling)}
    wide, small = (lossy.encode(each, None).decoded for each in (first, replace(first, modules=narrow)))
    for decoded, earlier in ((wide, small), (small, wide)):
        again = lossy.encode_again(decoded, earlier)
        assert_same(lossy.decode_chain([again.data], earlier if again.has_reference else None), decoded)


def test_damaged_bytes_raise_format_errors_only():
    first, second = encode_all(run(2))
    for at in range(len(second.data)):
        damaged = bytearray(second.data)
        damaged[at] ^= 1 << at % 8
        for data in (bytes(damaged), second.data[:at]):
            try:
                lossy.decode_chain([data], first.decoded)
            except FormatError:
                continue
            assert data == bytes(damaged)


def test_a_level_out_of_range_is_an_error():
    decoded = replace(lossy.encode(start(), None).decoded, level=4001)
    data = lossy._to_bytes(decoded, None, {}).data
    with pytest.raises(FormatError, match="level"):
        lossy.decode_chain([data])


def test_a_version_needs_its_reference():
    first, second = encode_all(run(2))
    with pytest.raises(FormatError, match="refers to an earlier version"):
        lossy.decode_chain([second.data])
    with pytest.raises(FormatError, match="refers to no earlier version"):
        lossy.decode_chain([first.data], second.decoded)
    with pytest.raises(FormatError, match="a chain has no version"):
        lossy.decode_chain([])
