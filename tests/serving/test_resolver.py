"""What vLLM is told of names that it asks for, and what the log says of them."""

import asyncio
import logging

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

from vllm.lora.resolver import LoRAResolverRegistry

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.errors import OptionError, PackMissingError
from eigenlorax.serving.vllm import plugin, resolver
from eigenlorax.serving.vllm.resolver import PackResolver
from eigenlorax.serving.vllm.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path):
    make_adapters(tmp_path / "in", "alpha beta")
    ex.fit(tmp_path / "in", n_components=4).save(tmp_path / "pack")
    return Settings(str(tmp_path / "pack"), cache=tmp_path / "cache")


@pytest.fixture
def said():
    """The lines that the log has got: level and text."""
    lines = []

    class Note(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    handler, before = Note(), resolver._log.level
    resolver._log.setLevel(logging.DEBUG)
    resolver._log.addHandler(handler)
    yield lines
    resolver._log.removeHandler(handler)
    resolver._log.setLevel(before)


@pytest.fixture
def registry(monkeypatch):
    """Without what other tests have registered."""
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    return LoRAResolverRegistry.resolvers


def resolved(one, *names, base="org/base"):
    async def all_at_once():
        return await asyncio.gather(*(one.resolve_lora(base, name) for name in names))

    return asyncio.run(all_at_once())


def test_adapters_of_the_pack_are_folders_and_other_names_are_nothing(settings, said):
    alpha, nothing, beta, climbing = resolved(PackResolver(settings), "alpha", "gamma", "beta", "../alpha")
    assert (alpha.lora_name, beta.lora_name) == ("alpha", "beta")
    assert alpha.lora_path.startswith(str(settings.cache))
    assert nothing is None
    assert climbing is None
    assert sorted(said) == [
        ("INFO", "eigenlorax: '../alpha' is not a valid name of an adapter."),
        ("INFO", f"eigenlorax: no adapter named 'gamma' in the pack {settings.pack}. It has: alpha, beta."),
    ]


def test_what_cannot_be_served_is_said_once(settings, said, tmp_path):
    with ex.Pack.edit(settings.pack) as pack:
        pack.add(make_adapter(tmp_path / "gamma", seed=5, config={"bias": "all"}))
    assert resolved(PackResolver(settings), *["gamma"] * 5) == [None] * 5
    ((level, text),) = said
    assert level == "WARNING"
    assert "trained biases" in text


def test_a_damaged_pack_is_said_once_and_the_server_goes_on(settings, said, tmp_path):
    one = PackResolver(settings)
    assert resolved(one, "alpha") != [None]
    (tmp_path / "pack" / "subspace_config.json").write_text("{")
    assert resolved(one, "beta", "beta") == [None, None]
    ((level, text),) = said
    assert level == "WARNING"
    assert "not valid JSON" in text


def test_an_error_that_is_not_ours_is_said_and_the_server_goes_on(settings, said, monkeypatch):
    one = PackResolver(settings)
    monkeypatch.setattr(one.open(), "_digest", lambda *_: 1 / 0)
    assert resolved(one, "alpha") == [None]
    assert said == [("ERROR", "eigenlorax: ZeroDivisionError: division by zero")]


@pytest.mark.parametrize("served", ["org/base", "/models/Base", "mirror/base/"])
def test_a_copy_of_the_base_model_is_the_base_model(settings, said, served):
    assert resolved(PackResolver(settings), "alpha", base=served) != [None]
    assert said == []


def test_another_base_model_is_said_once_and_served(settings, said):
    assert None not in resolved(PackResolver(settings), "alpha", "beta", base="org/other")
    assert said == [
        ("WARNING", "eigenlorax: the pack's adapters are for the base model org/base; the served one is org/other.")
    ]


def test_a_flood_of_names_does_not_fill_the_memory(settings, said, monkeypatch):
    monkeypatch.setattr(resolver, "_MAX_LOGGED", 10)
    one = PackResolver(settings)
    resolved(one, *(f"name{i}" for i in range(50)))
    assert len(said) == 50
    assert len(one._logged) == 10


def test_it_is_registered_once(registry, settings, monkeypatch):
    monkeypatch.setenv("EIGENLORAX_PACK", settings.pack)
    monkeypatch.setenv("EIGENLORAX_CACHE", str(settings.cache))
    plugin.register()
    first = registry["eigenlorax"]
    plugin.register()
    assert registry == {"eigenlorax": first}


def test_without_a_pack_there_is_none(registry, monkeypatch, said):
    monkeypatch.delenv("EIGENLORAX_PACK", raising=False)
    plugin.register()
    assert registry == {}
    assert said == []


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("EIGENLORAX_PACK", "/nowhere/at/all", PackMissingError),
        ("EIGENLORAX_SHARED_BASIS", "yes", OptionError),
        ("EIGENLORAX_CACHE_BYTES", "lots", OptionError),
    ],
)
def test_a_server_that_could_not_serve_does_not_start(registry, settings, monkeypatch, variable, value, error):
    monkeypatch.setenv("EIGENLORAX_PACK", settings.pack)
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=value):
        plugin.register()
    assert registry == {}
