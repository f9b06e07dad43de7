"""Adapters of a pack for vLLM's offline engine, and models that a pack is not for."""

import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

from core_packs import fit_with_cores

import eigenlorax as ex
from eigenlorax.errors import AdapterNameError, ModuleNameError, OptionError, ServingError, ShapeError
from eigenlorax.serving.vllm import Adapters
from families import _SHARED, FAMILIES, Family, made_adapters
from offline import greedy, peft_greedy, with_engine
from rests import with_rests

pytestmark = pytest.mark.slow

FAMILY = FAMILIES["llama"]
PROMPTS = [[5, 6, 7, 8 + i] for i in range(3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`base`, `adapters` a0 to a3, and a `pack` of the first three."""
    place = tmp_path_factory.mktemp("made")
    FAMILY.made(place / "base")
    made_adapters(FAMILY, place / "base", place / "adapters", n=4)
    ex.fit([place / "adapters" / f"a{i}" for i in range(3)], n_components=20).save(place / "pack")
    return place


@pytest.fixture
def pack(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLORAX_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made / "pack", tmp_path / "pack")


def test_adapters_are_a_mapping_of_the_pack(pack):
    adapters = Adapters(pack)
    assert list(adapters) == ["a0", "a1", "a2"]
    assert len(adapters) == 3
    assert "a1" in adapters
    assert "../a1" not in adapters
    assert adapters.get("a9") is None
    assert adapters["a2"].lora_name == "a2"


def test_ids_are_those_of_an_adapter_as_it_is(pack, made):
    adapters = Adapters(pack)
    first, second = adapters["a1"], adapters["a0"]
    assert min(first.lora_int_id, second.lora_int_id) >= 1
    assert first.lora_int_id != second.lora_int_id
    # of another object too: the engine is the same
    assert (adapters["a1"].lora_int_id, Adapters(pack)["a1"].lora_int_id) == (first.lora_int_id,) * 2
    assert (first.lora_name, first.lora_path) == ("a1", adapters["a1"].lora_path)
    with ex.Pack.edit(pack) as edited:
        edited.remove("a1")
        edited.add(made / "adapters" / "a3", name="a1")
    assert adapters["a1"].lora_int_id not in (first.lora_int_id, second.lora_int_id)
    assert adapters["a1"].lora_path != first.lora_path


@pytest.mark.parametrize("name", ["a9", "../a0", ""])
def test_other_names_are_an_error(pack, name):
    with pytest.raises(AdapterNameError, match="name"):
        Adapters(pack)[name]


def test_what_cannot_be_served_is_an_error(pack, made, tmp_path):
    source = shutil.copytree(made / "adapters" / "a3", tmp_path / "blocks")
    config = source / "adapter_config.json"
    config.write_text(config.read_text().replace('"r":', '"use_bdlora": true, "r":'))
    with ex.Pack.edit(pack) as edited:
        edited.add(source)
    with pytest.raises(ServingError, match="'blocks' cannot be served: vLLM does not support block-diagonal LoRA"):
        Adapters(pack)["blocks"]


def test_the_environment_says_whether_a_basis_is_shared(pack, monkeypatch):
    expanded = Adapters(pack)["a0"].lora_path
    monkeypatch.setenv("EIGENLORAX_SHARED_BASIS", "1")
    shared = Adapters(pack)["a0"].lora_path
    assert Adapters(pack, shared_basis=False)["a0"].lora_path.rpartition("/")[2] == expanded.rpartition("/")[2]
    assert shared.rpartition("/")[2] != expanded.rpartition("/")[2]
    monkeypatch.setenv("EIGENLORAX_SHARED_BASIS", "yes")
    with pytest.raises(OptionError, match="must be 1"):
        Adapters(pack)


def test_an_adapter_that_is_replaced_while_the_engine_runs_answers_anew(pack, made, tmp_path):
    """Under its old name, and with a prompt that the engine has seen: it keeps what it computed, by name and path."""
    wanted = peft_greedy(made / "base", [PROMPTS[0] * 40] * 2, _exported(pack, tmp_path / "before", "a0", "a1"))

    def check(llm):
        adapters = Adapters(pack)
        before = greedy(llm, [PROMPTS[0] * 40], [adapters["a0"]])
        with ex.Pack.edit(pack) as edited:
            edited.remove("a0", "a1")
            edited.add(made / "adapters" / "a1", name="a0")
        return before + greedy(llm, [PROMPTS[0] * 40], [adapters["a0"]])

    # longer than a block of the cache
    options = {"max_model_len": 256, "max_num_batched_tokens": 256, "enable_prefix_caching": True}
    assert with_engine(check, made / "base", pack, **options) == wanted


@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_with_a_rest_is_served_expanded_and_others_in_both_ways(made, tmp_path, monkeypatch, shared):
    monkeypatch.setenv("EIGENLORAX_CACHE", str(tmp_path / "cache"))
    pack = with_rests(ex.Pack.open(made / "pack"), {"a0": ["both"]}).save(tmp_path / "pack")
    names = ["a1", "a2"] if shared else ["a0", "a1", "a2"]
    wanted = peft_greedy(made / "base", PROMPTS[: len(names)], _exported(pack, tmp_path / "out", *names))
    adapters = Adapters(pack, shared_basis=shared)
    if shared:
        with pytest.raises(ServingError, match="'a0' cannot be served: it has a residual in"):
            adapters["a0"]
    requests = [adapters[name] for name in names]

    def answers(llm):
        return greedy(llm, PROMPTS[: len(names)], requests)

    assert with_engine(answers, made / "base", pack, shared=shared) == wanted


@pytest.mark.parametrize(("kind", "shared"), [("full", True), ("diagonal", False), ("diagonal", True)])
def test_a_pack_with_cores_is_served_in_both_ways(made, tmp_path, monkeypatch, kind, shared):
    monkeypatch.setenv("EIGENLORAX_CACHE", str(tmp_path / "cache"))
    names = ["a0", "a1", "a2"]
    pack = fit_with_cores([made / "adapters" / name for name in names], kind, n_components=7)
    path = pack.save(tmp_path / "pack")
    wanted = peft_greedy(made / "base", PROMPTS, _exported(path, tmp_path / "out", *names))
    requests = [Adapters(path, shared_basis=shared)[name] for name in names]
    got = with_engine(lambda llm: greedy(llm, PROMPTS, requests), made / "base", path, shared=shared)
    assert got == wanted
    assert got != peft_greedy(made / "base", PROMPTS, [None] * 3)


@pytest.mark.parametrize("shared", [False, True])
def test_a_coded_pack_with_a_basis_is_served_in_both_ways(made, tmp_path, monkeypatch, shared):
    """Expanded as it is in the pack; with a shared basis, as its projection on that."""
    monkeypatch.setenv("EIGENLORAX_CACHE", str(tmp_path / "cache"))
    names = ["a0", "a1", "a2"]
    pack = ex.fit([made / "adapters" / name for name in names], max_error=0.05, basis=20)
    path = pack.save(tmp_path / "pack")
    served = pack.on_basis(0.9).save(tmp_path / "served") if shared else path
    wanted = peft_greedy(made / "base", PROMPTS, _exported(served, tmp_path / "out", *names))
    monkeypatch.setenv("EIGENLORAX_SERVE_WITHIN", "0.9")
    requests = [Adapters(path, shared_basis=shared)[name] for name in names]
    got = with_engine(lambda llm: greedy(llm, PROMPTS, requests), made / "base", path, shared=shared)
    assert got == wanted
    assert got != peft_greedy(made / "base", PROMPTS, [None] * 3)


def _exported(pack, folder, *names):
    exported = ex.Pack.open(pack).export(folder)
    return [exported[name] for name in names]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"intermediate_size": 96}, ShapeError, "is 48 × 96. Serve the base model"),
        ({"hidden_size": 40}, ShapeError, "Serve the base model"),
        ({"num_hidden_layers": 1}, ModuleNameError, "has no linear layer for 7 of the 14 modules"),
    ],
)
def test_a_model_that_the_pack_is_not_for_is_not_loaded(pack, made, tmp_path, fields, error, said, shared):
    """vLLM itself loads LoRAs of other sizes, and of more layers."""
    other = Family(FAMILY.config, fields={**_SHARED, **fields}).made(tmp_path / "other")
    with pytest.raises(error, match=said):
        with_engine(lambda llm: None, other, pack, shared=shared)


def test_one_with_more_layers_is(pack, made, tmp_path):
    other = Family(FAMILY.config, fields={**_SHARED, "num_hidden_layers": 3}).made(tmp_path / "other")
    wanted = peft_greedy(other, PROMPTS, _exported(pack, tmp_path / "out", "a0", "a1", "a2"))
    requests = [Adapters(pack)[name] for name in ("a0", "a1", "a2")]
    requests = [type(one)(one.lora_name, i + 1, one.lora_path) for i, one in enumerate(requests)]
    assert with_engine(lambda llm: greedy(llm, PROMPTS, requests), other, pack) == wanted


def test_a_rank_that_the_engine_has_no_room_for_is_an_error(pack):
    assert Adapters(pack, max_lora_rank=4)["a0"].lora_name == "a0"
    with pytest.raises(ServingError, match="'a0' cannot be served: its rank is 4, and max_lora_rank is 1"):
        Adapters(pack, max_lora_rank=1)["a0"]
