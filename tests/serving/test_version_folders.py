"""From names of versions to folders: which version a name stands for, and when folders and names change."""

from dataclasses import replace

import pytest

import eigenlorax as ex
from adapters import change_config, make_adapters
from children import needs_fork, run
from eigenlorax.errors import AdapterNameError, CacheFullError, PackBusyError, ServingError
from eigenlorax.pack.folder import PackFolder
from eigenlorax.serving.vllm import cache
from eigenlorax.serving.vllm.adapter_folders import AdapterFolders
from eigenlorax.serving.vllm.settings import Settings
from runs import make_run
from users import make_users

pytestmark = [needs_fork, pytest.mark.usefixtures("module_without_shape_checks")]

STEPS = (10, 20, 30, 40, 50)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", STEPS)


@pytest.fixture(params=["lossy", "lossless"])
def history(request, checkpoints, tmp_path):
    """The folder of a pack with the first three versions."""
    pack = ex.Pack.empty()
    for checkpoint in checkpoints[:3]:
        pack.append(checkpoint, lossless=request.param == "lossless")
    return pack.save(tmp_path / "history")


@pytest.fixture
def folders(history, tmp_path):
    return AdapterFolders(Settings(str(history), cache=tmp_path / "cache"))


def folder_of(folders, name):
    return folders.request(name).result(timeout=60)


def append(history, checkpoint, **options):
    with ex.Pack.edit(history) as pack:
        return pack.append(checkpoint, **options)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_folder_has_the_files_of_an_export(folders, history, tmp_path):
    exported = ex.Pack.open(history).export(tmp_path / "out", ["run@10", "run@20", "run@30"])
    for name, path in exported.items():
        assert content(folder_of(folders, name).path) == content(path)


def test_latest_is_the_last_version_when_it_is_requested(folders, history, checkpoints):
    before = folder_of(folders, "run@latest")
    assert before == folder_of(folders, "run@30")
    for checkpoint in checkpoints[3:]:
        assert run(lambda source=checkpoint: append(history, source, lossless=True)).code == 0
        pack = ex.Pack.open(history)
        latest = folder_of(folders, "run@latest")
        assert latest.name == f"run@{pack.histories['run'].latest.version}:{pack.digest('run@latest')[:16]}"
        assert latest.path != before.path
    assert folder_of(folders, "run@30") == before


def test_a_name_in_vllm_has_the_digest_of_the_content(folders, history, checkpoints):
    before = folder_of(folders, "run@20")
    assert folder_of(folders, before.name) == before
    with ex.Pack.edit(history) as pack:
        pack.remove("run@20")
        pack.append(checkpoints[3], "20", lossless=True)
    after = folder_of(folders, "run@20")
    assert (after.name.partition(":")[0], before.name.partition(":")[0]) == ("run@20", "run@20")
    assert after.name != before.name
    assert after.path != before.path
    with pytest.raises(AdapterNameError, match=f"another version 'run@20' than '{before.name}'"):
        folder_of(folders, before.name)
    # for a request that started with it
    assert before.path.is_dir()


def test_a_pruned_version_is_unknown_and_its_folder_stays(folders, history):
    before = {step: folder_of(folders, f"run@{step}") for step in (10, 30)}
    kept = content(before[30].path)
    with ex.Pack.edit(history) as pack:
        pack.prune("run", keep_last=1)
    with pytest.raises(AdapterNameError, match="no version '10' in the history 'run'"):
        folder_of(folders, "run@10")
    assert before[10].path.is_dir()
    assert content(folder_of(folders, "run@latest").path) == kept


def test_a_new_version_is_decoded_from_the_one_before(folders, history, checkpoints, monkeypatch):
    folder_of(folders, "run@latest")
    appended = append(history, checkpoints[3], lossless=True)
    read, read_version = [], PackFolder.read_version
    monkeypatch.setattr(
        PackFolder, "read_version", lambda pack, record: read.append(record.version) or read_version(pack, record)
    )
    folder_of(folders, "run@latest")
    assert read == ([appended.version] if appended.reference in (None, "30") else [])


def test_a_pack_that_is_replaced_while_it_is_read_is_read_again(history, checkpoints, tmp_path, monkeypatch):
    original = PackFolder.read_version

    def replaced(pack, record):
        monkeypatch.setattr(PackFolder, "read_version", original)
        append(history, checkpoints[3])
        raise PackBusyError("replaced")

    monkeypatch.setattr(PackFolder, "read_version", replaced)
    folders = AdapterFolders(Settings(str(history), cache=tmp_path / "cache"))
    assert folder_of(folders, "run@latest").name.startswith("run@40:")


def test_adapters_and_versions_are_served_from_one_pack(tmp_path, checkpoints):
    make_adapters(tmp_path / "in", "alpha beta")
    pack = ex.fit(tmp_path / "in", n_components=4)
    pack.append(checkpoints[0], name="run")
    folders = AdapterFolders(Settings(str(pack.save(tmp_path / "pack")), cache=tmp_path / "cache"))
    assert folder_of(folders, "alpha").name == "alpha"
    assert folder_of(folders, "run@10").name.startswith("run@10:")
    shared = AdapterFolders(Settings(str(tmp_path / "pack"), True, tmp_path / "cache"))
    assert folder_of(shared, "alpha").name == "alpha"
    with pytest.raises(ServingError, match="'run@10' cannot be served: it is an ordinary LoRA.*without a shared basis"):
        folder_of(shared, "run@latest")


def test_members_of_a_population(tmp_path):
    """A member keeps its name in vLLM and its folder, whoever else joins or leaves."""
    common, users = make_users(tmp_path, ["ann", "bob", "cem"])
    new = users.pop("cem")
    pack = ex.fit(users, reference=common).save(tmp_path / "users-pack")
    folders = AdapterFolders(Settings(str(pack), cache=tmp_path / "cache"))
    names = ("members@common", "members@ann", "members@bob")
    exported = ex.Pack.open(pack).export(tmp_path / "out", names)
    before = {name: folder_of(folders, name) for name in names}
    assert len({folder.path for folder in before.values()}) == 3
    for name, folder in before.items():
        assert content(folder.path) == content(exported[name])
        assert folder.name == f"{name}:{ex.Pack.open(pack).digest(name)[:16]}"
    with ex.Pack.edit(pack) as edited:
        edited.remove("members@ann")
        edited.append(new, "cem", name="members", max_bytes=2000)
    with pytest.raises(AdapterNameError, match="no version 'ann' in the history 'members'"):
        folder_of(folders, "members@ann")
    assert folder_of(folders, "members@bob") == before["members@bob"]
    assert folder_of(folders, "members@common") == before["members@common"]
    assert content(folder_of(folders, "members@cem").path) == content(
        ex.Pack.open(pack).export(tmp_path / "more", ["members@cem"])["members@cem"]
    )


def test_versions_that_vllm_cannot_serve_are_refused(history, tmp_path, checkpoints):
    source = make_run(tmp_path / "other", [60])[0]
    change_config(source, bias="all")
    append(history, source, name="biased")
    folders = AdapterFolders(Settings(str(history), cache=tmp_path / "cache"), max_lora_rank=1)
    with pytest.raises(
        ServingError, match="version 'biased@60' cannot be served: vLLM does not support trained biases"
    ):
        folder_of(folders, "biased@latest")
    with pytest.raises(ServingError, match="version 'run@10' cannot be served: its rank is 3, and max_lora_rank is 1"):
        folder_of(folders, "run@10")


@pytest.mark.parametrize(
    "name",
    [
        *("run@", "@latest", "@", "run@@10", "run@../10", "../run@10", "run@10/..", "run@-1", "run@10.", "run@1 0"),
        *("rün@10", "run@" + "1" * 10_000),
    ],
)
def test_texts_that_are_no_names_are_refused(folders, name):
    with pytest.raises(AdapterNameError, match="is not a valid name of an adapter") as raised:
        folder_of(folders, name)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other@10", "no history named 'other' in the pack"),
        ("run@11", "no version '11' in the history 'run'"),
        ("run@LATEST", "no version 'LATEST'"),
        ("run@10:", "another version 'run@10' than 'run@10:'"),
        ("run@latest:0123456789abcdef", "another version 'run@30' than"),
        ("run", "no adapter named 'run'"),
    ],
)
def test_unknown_versions_are_named(folders, name, message):
    with pytest.raises(AdapterNameError, match=message):
        folder_of(folders, name)


def test_versions_that_no_request_uses_give_way_to_others(history, checkpoints, tmp_path, monkeypatch):
    now, used = [1000.0], set()
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    for checkpoint in checkpoints[3:]:
        append(history, checkpoint)
    (exported,) = ex.Pack.open(history).export(tmp_path / "out", ["run@10"]).values()
    room = int(2.5 * sum(map(len, content(exported).values())))
    folders = AdapterFolders(Settings(str(history), cache=tmp_path / "cache", cache_bytes=room))

    def request(step):
        return folders.request(f"run@{step}", lambda: used).result(timeout=60)

    first, second = request(10), request(20)
    with pytest.raises(CacheFullError, match="no room for run-30-.* Only versions that no request uses are deleted"):
        request(30)
    now[0] += 61
    request(10)
    # 20 was requested less recently than 10
    third = request(30)
    assert [folder.path.is_dir() for folder in (first, second, third)] == [True, False, True]
    now[0] += 61
    used |= {first.name, third.name}
    with pytest.raises(CacheFullError, match="no room for run-20-"):
        request(20)
    used.remove(first.name)
    before = content(third.path)
    assert request(20) == second
    assert not first.path.exists()
    assert content(third.path) == before
    used.clear()
    now[0] += 61
    for step in (40, 50, 10, 20):
        folder = request(step)
        assert content(folder.path).keys() == before.keys()
        now[0] += 61
    assert len([path for path in folder.path.parent.iterdir() if not path.name.startswith(".")]) == 2


def test_adapters_do_not_give_way(tmp_path, checkpoints, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    make_adapters(tmp_path / "in", "alpha beta")
    pack = ex.fit(tmp_path / "in", n_components=4)
    pack.append(checkpoints[0], name="run")
    path = pack.save(tmp_path / "pack")
    sizes = [
        sum(map(len, content(path).values())) for path in pack.export(tmp_path / "out", ["alpha", "run@10"]).values()
    ]
    folders = AdapterFolders(Settings(str(path), cache=tmp_path / "cache", cache_bytes=sum(sizes) + 100))
    alpha, version = (folders.request(name, set).result(timeout=60) for name in ("alpha", "run@10"))
    now[0] += 1000
    beta = folders.request("beta", set).result(timeout=60)
    assert [folder.path.is_dir() for folder in (alpha, version, beta)] == [True, False, True]
    with pytest.raises(CacheFullError, match="no room for run-10-"):
        folders.request("run@10", set).result(timeout=60)


def test_a_folder_is_refused_when_the_cache_is_full(folders, history, tmp_path):
    size = sum(map(len, content(folder_of(folders, "run@10").path).values()))
    small = AdapterFolders(replace(Settings(str(history), cache=tmp_path / "cache"), cache_bytes=size + 10))
    assert folder_of(small, "run@10").path.is_dir()
    with pytest.raises(CacheFullError, match="no room for run-20-"):
        folder_of(small, "run@20")
