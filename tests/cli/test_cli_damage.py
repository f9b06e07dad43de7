"""A pack whose files are not the ones that were written: each verb says which, writes nothing, and `fit` heals it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core import keys
from outcomes import assert_refused, contents, succeeded
from signing import signed_again

CARRIED = "base_model.model.embeddings.lora_embedding_A"
# every kind of file that a pack has; alpha carries an embedding
FILES = [
    keys.MANIFEST,
    "subspace-*.safetensors",
    *(
        f"adapters/alpha/{file}"
        for file in (keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS, keys.SOURCE_CONFIG, keys.CARRIED)
    ),
    f"adapters/beta/{keys.ADAPTER_WEIGHTS}",
]


def flipped(where: float) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


DAMAGES = {
    "the first byte flipped": flipped(0),
    "a byte in the middle flipped": flipped(0.5),
    "the last byte flipped": flipped(1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a link to nothing": lambda path: [path.unlink(), path.symlink_to("gone")],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    parent = tmp_path_factory.mktemp("sources")
    carried = {CARRIED: torch.ones(3, 7), CARRIED[:-1] + "B": torch.ones(43, 3)}
    make_adapter(parent / "in" / "alpha", seed=1, tensors=carried)
    make_adapter(parent / "in" / "beta", seed=2)
    make_adapter(parent / "gamma", seed=3)
    return parent


@pytest.fixture(scope="module")
def sound(sources, tmp_path_factory):
    return ex.fit(sources / "in", n_components=4).save(tmp_path_factory.mktemp("sound") / "pack")


@pytest.fixture
def pack(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "pack")


def test_every_kind_of_file_is_damaged_here(pack):
    files = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    damaged = {path.relative_to(pack).as_posix() for pattern in FILES for path in pack.glob(pattern)}
    # the card is for people, and a function of the manifest; the lock is empty
    assert {Path(name).name for name in files - damaged} <= {
        keys.CARD,
        keys.LOCK,
        keys.ADAPTER_CONFIG,
        keys.SOURCE_CONFIG,
    }


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_each_verb_names_the_file_and_fit_heals_it(cli, sources, sound, pack, pattern, damage):
    (path,) = pack.glob(pattern)
    damage(path)
    gone = pattern == keys.MANIFEST and not path.is_file()
    before = contents(pack.parent)
    if gone:
        assert_refused(cli("inspect", pack), 3, f"{pack} is neither a pack nor an adapter", keys.MANIFEST)
        assert_refused(cli("export", pack, "-o", pack.parent / "out"), 4, f"{pack} is not a pack", keys.MANIFEST)
    else:
        assert_refused(cli("inspect", pack), 4, path, "estore the pack")
        assert_refused(cli("inspect", pack, "--json"), 4, path)
        assert_refused(cli("export", pack, "-o", pack.parent / "out"), 4, path)
    if pattern == keys.MANIFEST:
        assert_refused(cli("add", pack, sources / "gamma"), 4, pack)
        assert_refused(cli("remove", pack, "beta"), 4, pack)
        assert_refused(cli("augment", pack, "--n-extra", 2, "--seed", 1, "-o", pack.parent / "more"), 4, pack)
    if pattern == "subspace-*.safetensors":
        assert_refused(cli("add", pack, sources / "gamma"), 4, path)
    if pattern != keys.MANIFEST:
        assert_refused(cli("augment", pack, "--n-extra", 2, "--seed", 1, "-o", pack.parent / "more"), 4, path)
        assert_refused(cli("refit", pack, "-o", pack.parent / "more"), 4, path)
    if gone:
        assert_refused(cli("fit", sources / "in", "-o", pack, "-k", 4, "--overwrite"), 4, "is not a pack", keys.CARD)
    assert contents(pack.parent) == before
    if gone:
        return
    succeeded(cli("fit", sources / "in", "-o", pack, "-k", 4, "--overwrite"))
    assert contents(pack) == contents(sound)


def test_what_is_not_damaged_can_be_had(cli, sources, pack):
    (pack / "adapters" / "alpha" / keys.ADAPTER_WEIGHTS).write_bytes(b"")
    done = cli("export", pack, "-o", pack.parent / "out", "beta")
    assert sorted(contents(pack.parent / "out")) == [
        "beta",
        "beta/adapter_config.json",
        "beta/adapter_model.safetensors",
    ]
    succeeded(done)
    succeeded(cli("add", pack, sources / "gamma"))
    assert_refused(cli("inspect", pack), 4, "alpha")
    succeeded(cli("remove", pack, "alpha"))
    succeeded(cli("inspect", pack))


def test_the_card_and_the_lock_are_no_content(cli, pack):
    (pack / keys.CARD).write_text("mine")
    (pack / keys.LOCK).unlink()
    succeeded(cli("inspect", pack))


def tensors_of(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "encoder.layer.0.query.down.components"
MISTAKES = {
    "no safetensors in the subspace": ("subspace-*", lambda path: path.write_bytes(b"x" * 99)),
    "a basis is missing": ("subspace-*", lambda path: tensors_of(path, lambda found: found.pop(KEY))),
    "a basis of another shape": (
        "subspace-*",
        lambda path: tensors_of(path, lambda found: found.update({KEY: found[KEY][:, 1:].clone()})),
    ),
    "a basis of another dtype": (
        "subspace-*",
        lambda path: tensors_of(path, lambda found: found.update({KEY: found[KEY].half()})),
    ),
    "no safetensors in an adapter": ("adapters/beta/*.safetensors", lambda path: path.write_bytes(b"")),
    "a coefficient is missing": (
        "adapters/beta/*.safetensors",
        lambda path: tensors_of(path, lambda found: [found.pop(key) for key in list(found) if "up" in key]),
    ),
    "coefficients of too few components": (
        "adapters/beta/*.safetensors",
        lambda path: tensors_of(
            path, lambda found: found.update({k: v[:, 1:].clone() for k, v in found.items() if "_down" in k})
        ),
    ),
    "no JSON in a config": ("adapters/beta/adapter_config.json", lambda path: path.write_bytes(b"{")),
    "no object in a config": ("adapters/beta/adapter_config.json", lambda path: path.write_bytes(b"[]")),
    "no modules in a config": ("adapters/beta/adapter_config.json", lambda path: path.write_bytes(b"{}")),
    "no JSON in the source's config": ("adapters/beta/source_config.json", lambda path: path.write_bytes(b"\xff")),
    "no rank in the source's config": (
        "adapters/beta/source_config.json",
        lambda path: path.write_bytes(b'{"peft_type": "LORA", "r": "x"}'),
    ),
}


@pytest.mark.parametrize(("pattern", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_mistaken_tool_wrote_and_signed_is_named(cli, pack, pattern, mistake):
    (path,) = pack.glob(pattern)
    mistake(path)
    signed_again(pack)
    before = contents(pack.parent)
    place = path if path.parent == pack else path.parent
    assert_refused(cli("export", pack, "beta", "-o", pack.parent / "out"), 4, place, "Write the pack again")
    assert contents(pack.parent) == before


def test_what_is_signed_again_as_it_was_is_sound(cli, pack):
    signed_again(pack)
    succeeded(cli("export", pack, "-o", pack.parent / "out"))
