"""Fits of stacks that are too large for whole spectra; fits by several processes; fits that were interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax
from eigenlorax import formats
from eigenlorax.core import atomic_files, checkpoint
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import NonFiniteError, OptionError
from eigenlorax.fitting import jobs
from planted import factors_in, orthonormal, tree

pytestmark = pytest.mark.slow

N, K = 110, 8
SHAPES = {"layers.0.q": (400, 410), "layers.0.v": (396, 410), "layers.1.q": (400, 410)}  # (out, in)
STRENGTHS = torch.arange(1, 41, dtype=torch.float64)[:, None] ** -0.7


def planted(name, index, dtype=torch.bfloat16):
    modules = {}
    for place, (module, (n_out, n_in)) in enumerate(SHAPES.items()):
        bases = STRENGTHS * orthonormal(40, n_in, 11 + place), STRENGTHS * orthonormal(40, n_out, 77 + place)
        one = factors_in(bases, 4, seed=100 * index + 10 * place, scaling=0.5 + index % 3, noise=0.01)
        modules[module] = type(one)(one.down.to(dtype), one.up.to(dtype), one.scaling)
    return from_factors(name, modules, base_model="org/base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """110 adapters of rank 4, three modules some 400 wide, in bfloat16."""
    path = tmp_path_factory.mktemp("many")
    for index in range(N):
        formats.write_adapter(planted(f"a{index:03d}", index), path / f"a{index:03d}")
    return path


@pytest.fixture(scope="module")
def pack(folder):
    return eigenlorax.fit(folder, n_components=K, warn_above=1.0)


def energies(pack):
    return {f"{name}.{side}": one.energy for name, sides in pack.info.modules.items() for side, one in sides.items()}


def test_a_large_stack_is_fitted_by_iteration_and_the_pack_says_so(pack, folder):
    exact = eigenlorax.fit(folder, n_components=K, solver="exact", warn_above=1.0)
    assert (pack.fit_info.solver, exact.fit_info.solver) == ("iterative", "exact")
    for side, energy in energies(exact).items():
        assert energies(pack)[side] == pytest.approx(energy, abs=1e-4)
    for name in pack.names:
        assert pack.records[name].delta_error == pytest.approx(exact.records[name].delta_error, abs=1e-2)
    squares = [sum(one.records[name].delta_error ** 2 for name in one.names) / N for one in (pack, exact)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-3)
    sides = [side for pair in pack.info.modules.values() for side in pair.values()]
    assert all(0 < side.shortfall < 1e-4 for side in sides)
    assert all(side.shortfall == 0 for pair in exact.info.modules.values() for side in pair.values())
    for module, pair in exact.info.modules.items():
        for side, one in pair.items():
            assert pack.info.modules[module][side].square == pytest.approx(one.square, rel=1e-5)


def test_first_bases_lack_less_than_is_promised_on_every_side(folder):
    found, exact = (
        eigenlorax.fit(folder, n_components=K, sweeps=0, solver=s, warn_above=1.0) for s in ("auto", "exact")
    )
    for side, energy in energies(exact).items():
        assert energy - 1e-4 < energies(found)[side] < energy + 1e-6


def test_errors_are_those_of_the_whole_matrices(pack):
    for name in pack.names[::40]:
        original, back = planted(name, int(name[1:])), pack.adapter(name, torch.float64)
        lost = total = 0.0
        for module, one in original.modules.items():
            dense = one.scaling * one.up.double() @ one.down.double()
            other = back.modules[module]
            lost += float((dense - other.scaling * other.up @ other.down).square().sum())
            total += float(dense.square().sum())
        assert pack.records[name].delta_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_a_pack_that_was_fitted_by_iteration_is_saved_and_opened(pack, tmp_path):
    pack.save(tmp_path / "pack")
    opened = eigenlorax.Pack.open(tmp_path / "pack")
    assert opened.fit_info.solver == "iterative"
    assert opened.info == pack.info
    for name, bases in pack.subspace.modules.items():
        for side in ("down", "up"):
            one, other = bases.side(side), opened.subspace.modules[name].side(side)
            assert other.square == pytest.approx(one.square, rel=1e-6)
            assert other.shortfall == one.shortfall


def test_the_order_of_adapters_changes_rounding_alone(pack, folder):
    paths = sorted(folder.iterdir())
    other = eigenlorax.fit(paths[::-1], n_components=K, warn_above=1.0)
    assert other.info.fingerprint == pack.info.fingerprint


def test_memory_for_a_module_may_be_too_little_for_it(pack, folder, monkeypatch):
    """Then chunks are read anew in every round, and what comes out is the same."""
    monkeypatch.setattr(jobs, "HELD_BYTES", 1000)
    other = eigenlorax.fit(folder, n_components=K, warn_above=1.0)
    assert energies(other) == pytest.approx(energies(pack), abs=1e-6)


@pytest.mark.parametrize("workers", [2, 4], ids=["modules", "chunks"])
def test_several_processes_make_the_same_pack(pack, folder, workers):
    """With more workers than modules, it is the chunks of each round that they share."""
    other = eigenlorax.fit(folder, n_components=K, engine="processes", workers=workers, warn_above=1.0)
    assert energies(other) == pytest.approx(energies(pack), abs=1e-6)
    for name in pack.names:
        assert other.records[name].delta_error == pytest.approx(pack.records[name].delta_error, rel=1e-3)


def test_a_number_that_is_none_in_the_middle_of_a_collection_is_found(folder, tmp_path):
    shutil.copytree(folder / "a100", tmp_path / "a100")
    file = tmp_path / "a100" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.v.lora_B.weight"][5, 2] = float("nan")
    save_file(tensors, file)
    paths = [tmp_path / "a100" if path.name == "a100" else path for path in sorted(folder.iterdir())]
    with pytest.raises(NonFiniteError, match=r"'a100': 1 of 1584 numbers of layers.0.v \(up\) are NaN or Inf"):
        eigenlorax.fit(paths, n_components=K)
    with pytest.warns(eigenlorax.errors.SkippedAdapterWarning, match="left out a100"):
        pack = eigenlorax.fit(paths, n_components=K, skip_bad=True, warn_above=1.0)
    assert len(pack) == N - 1


class StoppedError(Exception):
    pass


def stop_after(modules):
    def progress(stage, done, total):
        if stage == "fitting modules" and done == modules:
            raise StoppedError

    return progress


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """What a fit keeps that was stopped after two of three modules."""
    kept = tmp_path_factory.mktemp("stopped") / "kept"
    with pytest.raises(StoppedError):
        eigenlorax.fit(folder, n_components=K, checkpoint=kept, progress=stop_after(2), warn_above=1.0)
    return kept


@pytest.fixture
def kept(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "kept")


class TestInterrupted:
    def test_a_fit_goes_on_where_it_was(self, pack, folder, kept, tmp_path, monkeypatch):
        done, do = [], jobs.fit_loaded
        monkeypatch.setattr(
            jobs, "fit_loaded", lambda loaded, *rest: done.append(loaded.job.module) or do(loaded, *rest)
        )
        again = eigenlorax.fit(folder, n_components=K, checkpoint=kept, warn_above=1.0)
        assert done == ["layers.1.q"]
        assert any("2 of 3 modules" in note for note in again.notes)
        again.save(tmp_path / "again")
        pack.save(tmp_path / "pack", overwrite=True)
        assert tree(tmp_path / "again") == tree(tmp_path / "pack")

    @pytest.mark.parametrize(
        "change", [{"n_components": K - 1}, {"sweeps": 1}, {"dtype": "float32"}, {"adapters": N - 1}]
    )
    def test_another_fit_does_not_take_what_is_there(self, folder, kept, change):
        options = {"n_components": K, "warn_above": 1.0, "checkpoint": kept}
        paths = sorted(folder.iterdir())[: change.pop("adapters", N)]
        other = eigenlorax.fit(paths, **{**options, **change})
        assert not any("interrupted" in note for note in other.notes)
        plain = eigenlorax.fit(paths, **{**options, **change, "checkpoint": None})
        assert other.info.fingerprint == plain.info.fingerprint

    def test_a_module_that_was_half_written_is_fitted_again(self, pack, folder, kept):
        whole = (kept / "00001.safetensors").read_bytes()
        (kept / "00001.safetensors").write_bytes(whole[: len(whole) // 2])
        again = eigenlorax.fit(folder, n_components=K, checkpoint=kept, warn_above=1.0)
        assert again.info.fingerprint == pack.info.fingerprint

    def test_a_folder_with_anything_else_in_it_is_left_alone(self, folder, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(OptionError, match="not a checkpoint of a fit: it contains 'thesis.txt'"):
            eigenlorax.fit(folder, n_components=K, checkpoint=tmp_path)
        with pytest.raises(OptionError, match="thesis"):
            checkpoint.discard(tmp_path)
        assert (tmp_path / "thesis.txt").exists()

    def test_two_fits_do_not_share_one(self, tmp_path):
        other = (
            "from pathlib import Path; from eigenlorax.core import checkpoint; "
            f"checkpoint.open_checkpoint(Path({str(tmp_path)!r}), {{}}).__enter__()"
        )
        with checkpoint.open_checkpoint(tmp_path, {}):
            refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert "PackBusyError" in refused.stderr

    def test_what_is_kept_outlives_another_mistake(self, folder, stopped, tmp_path):
        command = [sys.executable, "-m", "eigenlorax", "fit", str(folder), "-o", str(tmp_path / "pack"), "--no-report"]
        kept = shutil.copytree(stopped, tmp_path / ".pack.fitting")
        there = tree(kept)
        assert subprocess.run([*command, "-k", "99999"], capture_output=True, check=False).returncode == 3
        assert tree(kept) == there
        with atomic_files.lock(kept / ".lock", 0.0):
            busy = subprocess.run([*command, "-k", str(K)], capture_output=True, text=True, check=False)
        assert busy.returncode == 5
        assert "another process is writing" in busy.stderr
        assert tree(kept) == there

    def test_a_fit_that_kept_nothing_leaves_nothing(self, folder, tmp_path):
        with pytest.raises(StoppedError):
            eigenlorax.fit(folder, n_components=K, checkpoint=tmp_path / "kept", progress=stop_after(0))
        assert not (tmp_path / "kept").exists()

    def test_the_command_is_killed_and_run_again(self, pack, folder, tmp_path):
        command = [sys.executable, "-m", "eigenlorax", "fit", str(folder), "-o", str(tmp_path / "pack")]
        command += ["-k", str(K), "--warn-above", "1", "--no-report"]
        kept = tmp_path / ".pack.fitting"
        running = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not list(kept.glob("*.safetensors")) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        assert not (tmp_path / "pack").exists()
        again = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "modules were read from the checkpoint of an interrupted fit" in again.stderr
        assert not kept.exists()
        pack.save(tmp_path / "wanted")
        assert eigenlorax.Pack.open(tmp_path / "pack").info.fingerprint == pack.info.fingerprint
