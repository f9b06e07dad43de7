"""Packs by an attacker who can sign: every outcome is a pack that works or one of our errors, in bounded memory."""

import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from core_packs import fit_with_cores

import eigenlorax as ex
import hostile
from adapters import MODULES, make_adapters
from children import needs_fork
from coded import coded_pack
from eigenlorax.codec import basis_bytes, entropy
from eigenlorax.core import keys, limits
from eigenlorax.errors import FormatError, PackDamagedError
from hostile import (
    allowed,
    change_json,
    changed,
    coded_bytes,
    manifest,
    needs_proc,
    outcome,
    packed_levels,
    sides,
    tensors,
)

pytestmark = pytest.mark.slow

SHAPES = {"encoder.0.query": (41, 53), "encoder.0.value": (29, 37)}
CONFIG = "adapter_config.json"
SOURCE = "source_config.json"


def of_rank(r):
    """Another rank in the config of every source, which may be stored as differences."""
    return change_json(SOURCE, lambda body: body.get("eigenlorax_changed", body).update(r=r))


def modules_of(body):
    """The modules of an adapter's config: all of the pack if it names none."""
    return body.setdefault("target_modules", sorted(MODULES))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Packs of each storage by name."""
    place = tmp_path_factory.mktemp("packs")
    make_adapters(place / "in", "a b c", shared=5)
    fits = {
        "float32": {"n_components": 4},
        "int8": {"n_components": 4, "dtype": "int8"},
        "int4": {"n_components": 4, "dtype": "int4"},
    }
    for name, options in fits.items():
        ex.fit(place / "in", **options).save(place / name)
    for kind in keys.CORES:
        fit_with_cores(place / "in", kind, n_components=4).save(place / kind)
    ex.fit(place / "in", n_components=4).augment(3, seed=7).save(place / "augmented")
    for name in ("nothing", "much"):
        coded_pack(SHAPES, name).save(place / f"coded, sharing {name}")
    return place


def bases(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of the coded bases of a pack."""

    def apply(found: dict[str, torch.Tensor]) -> None:
        data = change(found[keys.CODED_COMPONENTS].numpy().tobytes())
        found[keys.CODED_COMPONENTS] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())

    return tensors(apply, "subspace")


def rows_claimed(data: bytes) -> bytes:
    """Bases each of which says in its head that it has 255 clusters of 65,535 rows."""
    head = bytes([255]) + b"\xff\xff" * 255
    parts = basis_bytes.split(data, 2 * len(SHAPES))
    return b"".join(basis_bytes.with_length(head + part) for part in parts)


ZEROS = zlib.compressobj(9, zlib.DEFLATED, -15)
BOMB = ZEROS.compress(bytes(1 << 28)) + ZEROS.flush()

# which pack, what is done to it, what the error says
CLAIMS = {
    "a width beyond all": ("coded, sharing nothing", sides(dimension=2**62), "a dimension is not 1 to"),
    "a width that takes a terabyte": ("coded, sharing nothing", sides(dimension=2**40), "a dimension is not 1 to"),
    "a width that takes gigabytes": ("coded, sharing nothing", sides(dimension=4_000_000), "lora_numbers is"),
    "other rows than there are": ("coded, sharing much", sides(k=37), "rows, and should have 37"),
    "millions of rows": ("coded, sharing much", bases(rows_claimed), "a basis (end too early|have)"),
    "a basis longer than all": (
        "coded, sharing much",
        bases(lambda data: b"\xff" * 8 + b"\x01" + data),
        "a number of several bytes does not end|bytes of the bases end too early",
    ),
    "a length without an end": ("coded, sharing much", bases(lambda data: b"\x80" * len(data)), "does not end"),
    "one more basis": ("coded, sharing much", bases(lambda data: data + b"\x01\x00"), "are followed by 2 more"),
    "no basis": ("coded, sharing much", bases(lambda data: b""), "does not end"),
    "augmented rows that nothing explains": (
        "augmented",
        manifest(
            lambda body: (
                [
                    side.update(dimension=4_000_000, k=90_000, grown=[89_996])
                    for pair in body["subspace"]["modules"].values()
                    for side in pair.values()
                ]
                and None
            )
        ),
        "augmented rows of the bases would take",
    ),
    "a rank": ("coded, sharing much", of_rank(10_000_000), "rank 10000000"),
    "a rank that a wide module may have": (
        "coded, sharing much",
        of_rank(900),
        "ranks are",
    ),
    "a rank of cores": ("full", of_rank(10_000_000), "rank 10000000"),
    "a rank of floats": ("float32", of_rank(10_000_000), "rank 10000000"),
    "a deflated stream": ("coded, sharing much", coded_bytes(packed_levels(BOMB)), "levels of an adapter cannot be"),
    "more components than the rank": (
        "coded, sharing nothing",
        coded_bytes(lambda data: data[:3] + b"\x00" + bytes([200, 200, 0, 0]) + bytes(2400) + data),
        "components|levels",
    ),
    "a config that is null": (
        "float32",
        lambda pack: null(pack, SOURCE),
        "source_config.json contains null",
    ),
    "a config that is a list": (
        "coded, sharing much",
        change_json(SOURCE, lambda body: [body]),
        "source_config.json contains an array",
    ),
    "an adapter config that is null": ("float32", lambda pack: null(pack, CONFIG), "contains null"),
    "modules that are no names": (
        "float32",
        change_json(CONFIG, lambda body: body.update(target_modules=[1, 2])),
        r"target_modules\[0\] is 1",
    ),
    "kernels that are no numbers": (
        "float32",
        change_json(CONFIG, lambda body: body.update(kernels={"encoder.layer.0.query": [0, 3]})),
        r"the kernel of module .* is \(0, 3\)",
    ),
    "an integer beyond 64 bits": ("float32", sides(k=2**64), "a k is out of range"),
    "two modules in one place": (
        "float32",
        change_json(
            CONFIG,
            lambda body: body.update(subspace_modules=dict.fromkeys(modules_of(body), "encoder.layer.0.query")),
        ),
        "two modules of the adapter are in one place",
    ),
    "a place that is not there": (
        "float32",
        change_json(CONFIG, lambda body: body.update(subspace_modules=dict.fromkeys(modules_of(body)[:1], "none"))),
        "'none' is not in the subspace",
    ),
    "a fingerprint that is not that of the rows": (
        "float32",
        lambda pack: refinger(pack, "0" * 64),
        "its rows have the fingerprint",
    ),
    "complex coefficients": (
        "float32",
        tensors(lambda found: found.update({k: v.to(torch.complex64) for k, v in found.items() if "eigenlorax" in k})),
        "are torch.complex64, and should be torch.float32",
    ),
    "boolean coefficients": (
        "float32",
        tensors(lambda found: found.update({k: v > 0 for k, v in found.items() if "eigenlorax" in k})),
        "are torch.bool, and should be torch.float32",
    ),
    "coefficients that are not finite": (
        "float32",
        tensors(lambda found: [v.fill_(torch.nan) for k, v in found.items() if "eigenlorax" in k] and None),
        "are not finite",
    ),
    "cores that are not finite": (
        "full",
        tensors(lambda found: [v.fill_(torch.inf) for k, v in found.items() if "eigenlorax" in k] and None),
        "is not finite",
    ),
    "spectra that are not finite": (
        "float32",
        tensors(lambda found: [v.fill_(torch.nan) for k, v in found.items() if "singular" in k] and None, "subspace"),
        "should be finite numbers of at least 0",
    ),
    "components that are not finite": (
        "float32",
        tensors(lambda found: [v.fill_(torch.nan) for k, v in found.items() if "comp" in k] and None, "subspace"),
        "components of .* are not finite",
    ),
    "a cluster that is not there": (
        "coded, sharing much",
        coded_bytes(lambda data: bytes([0, 0, 0, 124]) + data[4:]),
        "is in cluster 31",
    ),
    "levels beyond all classes": (
        "coded, sharing nothing",
        coded_bytes(lambda data: bytes(4) + bytes([1, 0, 0, 0, 0, 2, 255]) + data[4:]),
        "class 254",
    ),
}


def null(pack: Path, file: str) -> None:
    for path in pack.glob(f"adapters/*/{file}"):
        path.write_text("null")


def place_all(pack: Path, place: str, n: int = 99) -> None:
    """Put the first modules of every adapter in one place of the subspace."""
    change_json(CONFIG, lambda body: body.update(subspace_modules=dict.fromkeys(modules_of(body)[:n], place)))(pack)


def refinger(pack: Path, fingerprint: str) -> None:
    """Give a pack and its adapters another fingerprint."""
    manifest(lambda body: body["subspace"].update(fingerprint=fingerprint))(pack)
    change_json(CONFIG, lambda body: body.update(subspace_fingerprint=fingerprint))(pack)


@needs_fork
@needs_proc
@pytest.mark.parametrize("case", CLAIMS)
def test_a_claim_is_refused_before_it_takes_memory(packs, tmp_path, case):
    name, change, message = CLAIMS[case]
    pack = changed(packs / name, tmp_path / "pack", change)
    text, memory = outcome(pack)
    assert text.startswith("PackDamagedError"), text
    with pytest.raises(PackDamagedError, match=message):
        hostile.use(pack, tmp_path / "out")
    # the smallest of these packs would have taken two gigabytes
    assert memory < allowed(pack, 0)


@needs_fork
@needs_proc
def test_packs_that_are_not_hostile_pass_by_the_same_measure(packs):
    for pack in packs.iterdir():
        if pack.name != "in":
            text, memory = outcome(pack)
            assert text == "ok", pack.name
            assert memory < allowed(pack, 0)


@pytest.mark.parametrize("storage", ["float32", "coded, sharing much"])
@pytest.mark.parametrize("file", ["subspace_config.json", CONFIG, "subspace"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a sparse file", "a folder", "a link to itself"])
def test_what_is_no_regular_file_is_neither_waited_for_nor_read(packs, tmp_path, storage, file, kind):
    pack = changed(packs / storage, tmp_path / "pack")
    (path,) = pack.glob("subspace-*") if file == "subspace" else [pack / file, pack / "adapters" / "a0" / file][:1]
    if file == CONFIG:
        path = min(pack.glob(f"adapters/*/{file}"))
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a sparse file":
        with open(path, "wb") as sparse:
            sparse.truncate(1 << 42)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(ex.errors.PackError, match=r"not a regular file|bytes; at most|is missing|is not a pack"):
        hostile.use(pack, tmp_path / "out")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert limits.read_file(path, 100) == bytes(100)
    with pytest.raises(FormatError, match="has 100 bytes; at most 99 were expected"):
        limits.read_file(path, 99)
    with pytest.raises(FileNotFoundError, match="none"):
        limits.read_file(tmp_path / "none", 99)


def test_a_link_to_a_file_is_read_as_the_hub_s_cache_has_them(packs, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(packs / "float32", tmp_path / "blobs")
    for path in (tmp_path / "blobs").rglob("*"):
        if path.is_file():
            (pack / path.relative_to(tmp_path / "blobs")).parent.mkdir(parents=True, exist_ok=True)
            (pack / path.relative_to(tmp_path / "blobs")).symlink_to(path)
    hostile.use(pack, tmp_path / "out")


@needs_fork
@needs_proc
def test_decoding_takes_a_few_bytes_an_integer():
    numbers = 20_000_000
    classes = np.full(numbers, 8, np.uint8)
    values = np.random.default_rng(0).integers(-1, 2, numbers)
    (data,) = entropy.encode([(values, classes)])

    def call() -> None:
        hostile.reset_peak()
        before = hostile.peak()
        (found,) = entropy.decode([(data, classes)])
        assert np.array_equal(found, values)
        sys.stdout.write(str(hostile.peak() - before))

    done = hostile.run(call)
    assert done.code == 0, done
    # four bytes of the result, and what the comparison takes; it was ninety
    assert int(done.out) < 12 * numbers
