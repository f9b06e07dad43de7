"""The reader of docs/read_version.py, written from the page, reads what the library reads."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from test_lossy import encode_all, moved, run, start, without_update

from eigenlorax.codec.versions import increments
from eigenlorax.codec.versions.version import Version
from eigenlorax.core.adapter import LoRAFactors


def assert_reads(read_version: ModuleType, versions: list[Version]) -> None:
    encoded = encode_all(versions)
    for stop in range(1, len(encoded) + 1):
        updates, tensors = read_version.version([each.data for each in encoded[:stop]])
        decoded = encoded[stop - 1].decoded
        assert list(updates) == list(decoded.modules)
        for name, (up, down, scaling) in updates.items():
            factors = decoded.modules[name]
            np.testing.assert_array_equal(torch.from_numpy(up).to(factors.up.dtype), factors.up)
            np.testing.assert_array_equal(torch.from_numpy(down).to(factors.down.dtype), factors.down)
            assert scaling == factors.scaling
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(torch.from_numpy(tensor).to(decoded.tensors[key].dtype), decoded.tensors[key])


@pytest.mark.parametrize("size", [0.002, 0.05, 1.0])
def test_versions_of_a_run(read_version: ModuleType, size: float) -> None:
    assert_reads(read_version, run(4, size=size))


def test_other_ranks_modules_and_tensors(read_version: ModuleType) -> None:
    first = start()
    factors = first.modules["layer.0"]
    narrow = LoRAFactors(factors.down[1:4], factors.up[:, 1:4], factors.scaling)
    second = Version({"layer.0": narrow, "layer.2": first.modules["layer.1"]}, {}, 0.05, {})
    assert_reads(read_version, [first, moved(first, 0.3, 1), second, first])


def test_rows_that_grow_and_shrink(read_version: ModuleType) -> None:
    versions = run(3)
    for factor in (2.0, 5.0, 0.3):
        last = moved(versions[-1], 0.05, len(versions))
        modules = {name: replace(factors, up=factor * factors.up) for name, factors in last.modules.items()}
        versions.append(replace(last, modules=modules))
    labels = [rows.labels for each in encode_all(versions) for rows in each.decoded.all_rows]
    assert any(each.gains.any() for each in labels)
    assert_reads(read_version, versions)


def test_updates_of_zero_and_references_without_integers(read_version: ModuleType) -> None:
    first = start()
    zero = without_update(first)
    empty = Version({}, {}, 0.05, {})
    assert_reads(read_version, [first, zero, first, empty, first, zero])


def test_several_streams(read_version: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(increments, "CODED_TOGETHER", 90)
    monkeypatch.setattr(read_version, "MOST_TOGETHER", 90)
    assert_reads(read_version, run(3))
