"""vLLM's server with a pack, over HTTP: adapters that nobody announced, names that are none, many clients at once.

A server starts in half a minute: the tests of a module share two of them, one for each way of serving.
"""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import URLError

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax as ex
from fake_hub import FakeHub, running
from families import FAMILIES, made_adapters
from offline import peft_greedy
from servers import SECONDS_TO_START, serving, starting

pytestmark = pytest.mark.slow

N, CLIENTS, REQUESTS = 50, 8, 200
FAMILY = FAMILIES["llama"]
BASE = "base"
# for an adapter with the update of one in the pack, whose answers are known
copies = pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")


def prompt(i):
    return [5, 6, 7, 8 + i]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`base`, `adapters` and a `pack` of them that has lost much, so that what is served is not what was trained."""
    place = tmp_path_factory.mktemp("made")
    FAMILY.made(place / "base")
    made_adapters(FAMILY, place / "base", place / "adapters", n=N)
    ex.fit(place / "adapters", n_components=20).save(place / "pack")
    return place


@pytest.fixture(scope="module")
def wanted(made):
    """What PEFT answers with each adapter, exported, to its prompt."""
    exported = ex.Pack.open(made / "pack").export(made / "exported")
    names = [f"a{i}" for i in range(N)]
    answers = peft_greedy(made / "base", [prompt(i) for i in range(N)], [exported[name] for name in names])
    assert len({tuple(answer) for answer in answers}) > N // 2
    return dict(zip(names, answers, strict=True))


@pytest.fixture(scope="module", params=[False, True], ids=["on demand", "shared basis"])
def server(request, made, tmp_path_factory):
    """With room for few adapters, so that they are evicted all the time."""
    place = tmp_path_factory.mktemp("server")
    pack = shutil.copytree(made / "pack", place / "pack")
    env = {"EIGENLORAX_CACHE": str(place / "cache")}
    with serving(
        made / "base", pack, place / "log", shared=request.param, max_loras=4, max_cpu_loras=6, env=env
    ) as found:
        found.pack, found.shared = pack, request.param
        yield found
        assert found.status(BASE) == 200


def test_adapters_answer_by_their_names_at_once(server, wanted):
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda i: server.greedy(f"a{i}", prompt(i)), range(8)))
    assert answers == [wanted[f"a{i}"] for i in range(8)]


def test_so_it_does_after_it_was_evicted(server, wanted):
    for i in [0, *range(1, 8), 0]:
        assert server.greedy(f"a{i}", prompt(i)) == wanted[f"a{i}"]


@pytest.mark.parametrize(
    "name", ["a999", "A0", "../a0", "a0/../a1", "/etc", " ", "a 0", "a0\0", "ä0", "x" * 10_000, "%2e%2e%2fa0", "."]
)
def test_other_names_are_not_found_and_the_server_lives(server, wanted, name):
    assert server.status(name) == 404
    assert server.greedy("a1", prompt(1)) == wanted["a1"]


def test_many_clients_at_once_get_what_they_asked_for(server, wanted):
    def ask(n):
        i = (7 * n) % N
        return i, server.greedy(f"a{i}", prompt(i))

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, range(REQUESTS)))
    assert {i for i, _ in answers} == set(range(N))
    assert [i for i, answer in answers if answer != wanted[f"a{i}"]] == []


@copies
def test_an_adapter_that_comes_while_it_runs_is_found_and_replaced_once_unloaded(server, made, tmp_path, wanted):
    assert server.status("new") == 404
    with ex.Pack.edit(server.pack) as pack:
        pack.add(made / "adapters" / "a3", name="new")
    # the basis has not changed: nor has what the adapter is
    assert server.greedy("new", prompt(3)) == wanted["a3"]
    with ex.Pack.edit(server.pack) as pack:
        pack.remove("new")
        pack.add(made / "adapters" / "a5", name="new")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    assert server.greedy("new", prompt(5)) == wanted["a5"]


@copies
def test_one_that_cannot_be_served_is_said_in_the_log_once(server, made, tmp_path):
    source = shutil.copytree(made / "adapters" / "a4", tmp_path / "blocks")
    config = source / "adapter_config.json"
    config.write_text(config.read_text().replace('"r":', '"use_bdlora": true, "r":'))
    with ex.Pack.edit(server.pack) as pack:
        pack.add(source)
    assert [server.status("blocks") for _ in range(3)] == [404] * 3
    refusal = "adapter 'blocks' cannot be served: vLLM does not support block-diagonal LoRA (use_bdlora)."
    assert server.said.count(refusal) == 1


def test_a_changed_pack_is_served_after_a_restart_and_a_full_cache_serves_what_it_has(made, wanted, tmp_path):
    """From the Hub, in the place of a server that was killed."""
    others = {"a0": "a10", "a1": "a11", "a2": "a12"}
    changed = ex.Pack.open(made / "pack")
    changed.remove(*changed.names)
    for name, source in others.items():
        changed.add(made / "adapters" / source, name=name)
    changed.save(tmp_path / "changed")
    (tmp_path / "commits").mkdir()
    hub = FakeHub({"org/pack": {"main": made / "pack"}}, room=tmp_path / "commits")
    room = sum(file.stat().st_size for file in (made / "exported" / "a0").iterdir())
    env = {"EIGENLORAX_CACHE": str(tmp_path / "cache"), "EIGENLORAX_CACHE_BYTES": str(int(2.5 * room))}
    with running(hub):
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        with starting(made / "base", "org/pack", tmp_path / "log", env=env) as killed:
            _until(lambda: _answers(killed, "a9") or killed.process.poll() is not None)
            killed.process.send_signal(signal.SIGKILL)
        (left,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
        hub.new("org/pack", "main", tmp_path / "changed", lambda folder: None)
        with serving(made / "base", "org/pack", tmp_path / "log", env=env) as server:
            assert not left.exists()
            assert server.greedy("a0", prompt(10)) == wanted["a10"]
            assert server.greedy("a1", prompt(11)) == wanted["a11"]
            assert [server.status("a2") for _ in range(2)] == [404, 404]
            assert len([line for line in server.said if line.startswith("no room for a2-")]) == 1
            assert server.greedy("a0", prompt(10)) == wanted["a10"]
    assert list((tmp_path / "cache").iterdir()) == []


def _answers(server, name):
    # it does not listen yet
    with suppress(URLError):
        return server.status(name) == 200
    return False


def _until(happened):
    until = time.monotonic() + SECONDS_TO_START
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_server_for_a_pack_that_is_not_there_does_not_start(made, tmp_path):
    with starting(made / "base", tmp_path / "nowhere", tmp_path / "log") as server:
        assert server.process.wait(SECONDS_TO_START) != 0
        (line,) = [line for line in server.log.splitlines() if "PackMissingError: " in line]
    assert f"{tmp_path / 'nowhere'} is not a pack" in line
