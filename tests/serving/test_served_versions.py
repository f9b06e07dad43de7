"""Versions of a history in vLLM, offline and over HTTP, while others are appended, removed and pruned.

Prompts are longer than a block of vLLM's prefix cache, which would give the answers of another version if it mixed two.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax as ex
from eigenlorax.errors import OptionError, ShapeError
from eigenlorax.serving.vllm import Adapters
from families import _SHARED, FAMILIES, Family, made_adapters
from offline import greedy, peft_greedy, with_engine
from servers import serving

pytestmark = pytest.mark.slow

FAMILY = FAMILIES["llama"]
N = 5
PROMPT = [5, 6, 7, 8] * 40
ENGINE = {"max_model_len": 256, "max_num_batched_tokens": 256, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, `base`, and `adapters` a0 and so on, of which each can be a version of one run."""
    folder = tmp_path_factory.mktemp("made")
    FAMILY.made(folder / "base")
    made_adapters(FAMILY, folder / "base", folder / "adapters", n=N)
    return folder


@pytest.fixture(scope="module")
def answers(made):
    """The tokens of PEFT with each adapter, as it is in a history."""
    pack = ex.Pack.empty()
    for i in range(N):
        append(pack, made, i)
    exported = pack.export(made / "exported", [f"run@{i}" for i in range(N)])
    found = peft_greedy(made / "base", [PROMPT] * N, list(exported.values()))
    assert len(set(map(tuple, found))) == N
    return found


@pytest.fixture
def history(made, tmp_path, monkeypatch):
    """A pack with the first version."""
    monkeypatch.setenv("EIGENLORAX_CACHE", str(tmp_path / "cache"))
    pack = ex.Pack.empty()
    append(pack, made, 0)
    return pack.save(tmp_path / "history")


def append(pack, made, i, label=None):
    """Append adapter i, key versions all of them, so that each is the same in whatever history it is."""
    return pack.append(made / "adapters" / f"a{i}", label or str(i), name="run", lossless=True)


def edit(history, made, i, label=None):
    with ex.Pack.edit(history) as pack:
        append(pack, made, i, label)


def test_the_offline_engine_answers_as_the_version_that_is_the_latest(history, made, answers):
    def check(llm):
        adapters = Adapters(history)
        found = greedy(llm, [PROMPT], [adapters["run@latest"]])
        edit(history, made, 1)
        found += greedy(llm, [PROMPT] * 3, [adapters[f"run@{label}"] for label in ("latest", "0", "1")])
        with ex.Pack.edit(history) as pack:
            pack.remove("run@0")
        edit(history, made, 2, "0")
        return found + greedy(llm, [PROMPT] * 2, [adapters["run@0"], adapters["run@1"]])

    order = [0, 1, 0, 1, 2, 1]
    assert with_engine(check, made / "base", history, **ENGINE) == [answers[i] for i in order]


def test_one_version_has_one_request_whatever_its_name(history):
    adapters = Adapters(history)
    latest, named = adapters["run@latest"], adapters["run@0"]
    assert latest == named
    assert (latest.lora_int_id, latest.lora_path) == (named.lora_int_id, named.lora_path)
    assert latest.lora_name == f"run@0:{ex.Pack.open(history).digest('run@0')[:16]}"


def test_a_pack_without_bases_cannot_be_served_from_a_shared_basis(history, made):
    with pytest.raises(OptionError, match="needs a pack with bases, and .* has none"):
        with_engine(lambda llm: None, made / "base", history, shared=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 80}, "module model.layers.0.mlp.* of the pack has a weight of .*80.* it is .*88"),
        (
            {"num_key_value_heads": 1},
            "module .*_proj of the pack has a weight of 32 × 48, in the served model it is 64 ×",
        ),
    ],
)
def test_a_version_of_another_model_is_an_error(history, made, tmp_path, fields, message):
    """vLLM itself loads it, and answers something else."""
    other = Family(FAMILY.config, fields={**_SHARED, **fields})
    other.made(tmp_path / "other")
    made_adapters(other, tmp_path / "other", tmp_path / "adapters", n=1)
    with ex.Pack.edit(history) as pack:
        pack.append(tmp_path / "adapters" / "a0", name="other", same_base=True)
    with pytest.raises(ShapeError, match=message):
        with_engine(
            lambda llm: llm.llm_engine.add_lora(Adapters(history)["other@latest"]), made / "base", history, **ENGINE
        )


def test_a_server_answers_as_the_version_that_is_the_latest(history, made, answers, tmp_path):
    env = {"EIGENLORAX_CACHE": str(tmp_path / "cache")}
    with serving(made / "base", history, tmp_path / "log", env=env, max_loras=2, max_cpu_loras=2, **ENGINE) as server:
        assert [server.status(name) for name in ("run@9", "run", "run@../0", "other@0", "run@latest:00")] == [404] * 5
        for i in range(N):
            if i:
                edit(history, made, i)
            assert server.greedy("run@latest", PROMPT) == answers[i]
        # evicted from the workers meanwhile
        for i in (0, 3, 1, 0):
            assert server.greedy(f"run@{i}", PROMPT) == answers[i]
        in_vllm = f"run@4:{ex.Pack.open(history).digest('run@4')[:16]}"
        body = {"model": "run@latest", "prompt": PROMPT, "max_tokens": 1}
        assert server.post("/v1/completions", body)[1]["model"] == in_vllm
        assert server.greedy(in_vllm, PROMPT) == answers[4]

        # a label that is used again
        with ex.Pack.edit(history) as pack:
            pack.remove("run@4")
        assert server.greedy("run@latest", PROMPT) == answers[3]
        assert server.status("run@4") == 404
        edit(history, made, 2, "4")
        assert server.greedy("run@4", PROMPT) == server.greedy("run@latest", PROMPT) == answers[2]

        with ex.Pack.edit(history) as pack:
            pack.prune("run", keep_last=2)
        assert [server.status(f"run@{i}") for i in range(3)] == [404] * 3
        assert server.greedy("run@3", PROMPT) == answers[3]


def test_clients_get_whole_versions_while_others_are_appended(history, made, answers, tmp_path):
    env = {"EIGENLORAX_CACHE": str(tmp_path / "cache")}
    with serving(made / "base", history, tmp_path / "log", env=env, max_loras=2, **ENGINE) as server:

        def ask(n):
            return server.greedy("run@latest", PROMPT)

        with ThreadPoolExecutor(4) as clients:
            running = clients.map(ask, range(40))
            for i in range(1, N):
                time.sleep(0.3)
                edit(history, made, i)
            found = list(running)
        assert all(answer in answers for answer in found)
        assert server.greedy("run@latest", PROMPT) == answers[N - 1]


def test_a_full_cache_serves_what_it_has_and_keeps_what_was_just_requested(history, made, answers, tmp_path):
    (folder,) = ex.Pack.open(history).export(tmp_path / "size", ["run@0"]).values()
    room = int(2.5 * sum(file.stat().st_size for file in folder.iterdir()))
    env = {"EIGENLORAX_CACHE": str(tmp_path / "cache"), "EIGENLORAX_CACHE_BYTES": str(room)}
    with serving(made / "base", history, tmp_path / "log", env=env, max_loras=2, **ENGINE) as server:
        for i in range(2):
            if i:
                edit(history, made, i)
            assert server.greedy("run@latest", PROMPT) == answers[i]
        edit(history, made, 2)
        assert [server.status("run@latest") for _ in range(2)] == [404] * 2
        assert [line[:18] for line in server.said if "no room" in line] == ["no room for run-2-"]
        assert [server.greedy(f"run@{i}", PROMPT) for i in (1, 0)] == [answers[1], answers[0]]
