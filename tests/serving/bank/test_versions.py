"""Versions of a history in the bank: every row as PEFT computes it with the exported version, whatever is appended."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from adapters import change_tensors
from eigenlorax.errors import AdapterNameError, ModuleNameError, OptionError, ShapeError
from eigenlorax.pack.folder import PackFolder
from served import BASE, KINDS, VOCABULARY, write_adapter

LABELS = ("plain-a", "plain-b", "plain-c")
"""Labels of the versions, which are the adapters of these recipes: they have the same modules and heads."""


class Run:
    """Versions of one kind of model, each as a folder, and PEFT's answers with each."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.sources = {
            name: write_adapter(folder / "sources" / name, kind, name, seed=1000 * number)
            for number, name in enumerate(LABELS, start=1)
        }
        self.history = self.started(*LABELS).save(folder / "history")
        # as the codec has them
        names = [f"run@{label}" for label in LABELS]
        self.exported = ex.Pack.open(self.history).export(folder / "exported", names)

    def started(self, *labels, pack=None):
        """A pack with the first versions of the run."""
        pack = pack if pack is not None else ex.Pack.empty()
        for label in labels:
            self.append(pack, label)
        return pack

    def append(self, pack, label, as_label=None):
        return pack.append(self.sources[label], as_label or label, name="run", max_error=0.01)

    def edit(self, folder, label, as_label=None):
        with ex.Pack.edit(folder) as pack:
            return self.append(pack, label, as_label)

    def inputs(self, rows, tokens=5):
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))
        return {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if self.kind.task == "SEQ_2_SEQ_LM" else {})}

    @torch.no_grad()
    def wanted(self, names, inputs, paths=None):
        """The logits of each row with its version alone, by PEFT."""
        paths, rows = {**self.exported, **(paths or {})}, []
        for row, name in enumerate(names):
            model = self.kind.model()
            if name != BASE:
                model = PeftModel.from_pretrained(model, paths[name]).eval()
            rows.append(model(**{key: tensor[row : row + 1] for key, tensor in inputs.items()}).logits)
        return torch.cat(rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = Run(KINDS[kind], tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@pytest.fixture
def run(runs):
    return runs("llama")


@pytest.fixture
def history(run, tmp_path):
    """A folder with the first version."""
    return run.started("plain-a").save(tmp_path / "history")


@torch.no_grad()
def logits(bank, inputs, names=None):
    return bank(**inputs, adapter_names=names).logits


def assert_rows(found, wanted):
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [4, 9])
def test_each_row_has_its_own_version(runs, kind, tokens):
    run = runs(kind)
    names = ["run@plain-b", BASE, "run@plain-a", "run@plain-a", "run@plain-c"]
    inputs = run.inputs(len(names), tokens)
    bank = ex.AdapterBank(run.kind.model(), run.history)
    assert_rows(logits(bank, inputs, names), run.wanted(names, inputs))
    assert_rows(logits(bank, inputs, "run@latest"), run.wanted(["run@plain-c"] * 5, inputs))
    assert_rows(logits(bank, inputs), run.wanted([BASE] * 5, inputs))


@pytest.mark.parametrize("options", [{"n_components": 4}, {"n_components": 4, "dtype": "float16"}, {"max_error": 0.05}])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rows_of_adapters_and_versions_are_mixed(runs, kind, options, tmp_path):
    """The subspace has half of the modules, and a version has all."""
    run = runs(kind)
    sources = {name: write_adapter(tmp_path / name, run.kind, "partial", seed=7000 + i) for i, name in enumerate("xy")}
    pack = run.started(*LABELS, pack=ex.fit(sources, warn_above=1.0, **options))
    bank = ex.AdapterBank(run.kind.model(), pack.save(tmp_path / "pack"))
    names = ["x", "run@plain-a", BASE, "y", "run@plain-b", "x", "run@plain-a"]
    inputs = run.inputs(len(names))
    wanted = run.wanted(names, inputs, pack.export(tmp_path / "loras"))
    assert_rows(logits(bank, inputs, names), wanted)
    assert_rows(logits(bank, inputs, names[::-1]), run.wanted(names[::-1], inputs, pack.export(tmp_path / "again")))
    assert_rows(logits(bank, inputs, "run@plain-a")[1], wanted[1])
    assert bank.names == ["x", "y"]
    assert "run@plain-a" in bank
    assert "run@latest" in bank
    assert "run@x" not in bank


def test_latest_is_the_last_version_when_a_request_starts(run, history):
    bank, inputs = ex.AdapterBank(run.kind.model(), history), run.inputs(2)
    first, second, third = (run.wanted([f"run@{label}"] * 2, inputs) for label in LABELS)
    started = bank.using("run@latest")
    assert_rows(logits(bank, inputs, "run@latest"), first)
    run.edit(history, "plain-b")
    assert_rows(logits(bank, inputs, "run@latest"), second)
    with started:
        assert_rows(logits(bank, inputs), first)
    assert_rows(logits(bank, inputs, ["run@latest", "run@plain-a"]), torch.stack([second[0], first[1]]))
    with ex.Pack.edit(history) as pack:
        pack.remove("run@plain-a")
        run.append(pack, "plain-c", "plain-a")
    assert_rows(logits(bank, inputs, "run@plain-a"), third)
    with ex.Pack.edit(history) as pack:
        pack.prune("run", keep_last=1)
    with pytest.raises(AdapterNameError, match="no version 'plain-b' in the history 'run'"):
        bank.using("run@plain-b")
    with started:
        assert_rows(logits(bank, inputs), first)


def perturbed(source, folder, seed, rate=0.05):
    """A copy of an adapter whose tensors differ by `rate` times noise of their size, as a user's from a common one."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensors):
        for key, tensor in tensors.items():
            tensors[key] = tensor + rate * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return change_tensors(shutil.copytree(source, folder), change)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_members_of_a_population(runs, kind, tmp_path):
    run = runs(kind)
    sources = {
        name: perturbed(run.sources["plain-a"], tmp_path / name, seed) for seed, name in enumerate(("x", "y", "z"))
    }
    new = sources.pop("z")
    pack = ex.fit(sources, reference=run.sources["plain-a"])
    folder = pack.save(tmp_path / "users")
    names = ["members@y", BASE, "members@common", "members@x", "members@y"]
    exported = ex.Pack.open(folder).export(tmp_path / "loras", sorted(set(names) - {BASE}))
    bank, inputs = ex.AdapterBank(run.kind.model(), folder), run.inputs(len(names))
    wanted = run.wanted(names, inputs, exported)
    assert_rows(logits(bank, inputs, names), wanted)
    # each user has answers of their own
    assert (wanted[0] - run.wanted(["members@x"] * 5, inputs, exported)[0]).abs().max() > 1e-3
    with ex.Pack.edit(folder) as edited:
        edited.remove("members@x")
        edited.append(new, "z", name="members")
    exported = ex.Pack.open(folder).export(tmp_path / "again", ["members@y", "members@z", "members@common"])
    names = ["members@z", "members@y", "members@common", BASE, "members@z"]
    assert_rows(logits(bank, inputs, names), run.wanted(names, inputs, exported))
    with pytest.raises(AdapterNameError, match="no version 'x' in the history 'members'"):
        bank.using("members@x")


def test_the_default_adapter_can_be_the_latest_version(run, history):
    bank, inputs = ex.AdapterBank(run.kind.model(), history), run.inputs(2)
    bank.set_adapter("run@latest")
    assert bank.active_adapter == "run@latest"
    for label in LABELS:
        if label != LABELS[0]:
            run.edit(history, label)
        assert_rows(logits(bank, inputs), run.wanted([f"run@{label}"] * 2, inputs))
    bank.set_adapter(None)
    assert_rows(logits(bank, inputs), run.wanted([BASE] * 2, inputs))


def test_a_pack_in_memory_is_served_as_it_is(run):
    pack = ex.Pack.empty()
    bank, inputs = ex.AdapterBank(run.kind.model(), pack), run.inputs(1)
    for label in LABELS:
        run.append(pack, label)
        assert_rows(logits(bank, inputs, "run@latest"), run.wanted([f"run@{label}"], inputs))


def test_a_version_is_decoded_once_and_memory_is_bounded(run, monkeypatch):
    read, read_version = [], PackFolder.read_version
    monkeypatch.setattr(
        PackFolder, "read_version", lambda pack, record: read.append(record.version) or read_version(pack, record)
    )
    bank, inputs = ex.AdapterBank(run.kind.model(), run.history), run.inputs(1)
    logits(bank, inputs, "run@plain-a")
    a, version_bytes = bank.nbytes, bank._versions.adapters[0].nbytes
    assert a >= version_bytes
    for name in ("run@plain-b", "run@plain-a", "run@latest", "run@plain-c"):
        logits(bank, inputs, name)
    assert sorted(read) == sorted(LABELS)
    assert bank.nbytes == a + 2 * version_bytes
    small = ex.AdapterBank(run.kind.model(), run.history, version_bytes=2 * version_bytes)
    for label in (*LABELS, "plain-b", "plain-a"):
        assert_rows(logits(small, inputs, f"run@{label}"), run.wanted([f"run@{label}"], inputs))
        assert len(small._versions.adapters) <= 2
    assert [adapter.name for adapter in small._versions.adapters] == ["run@plain-b", "run@plain-a"]
    tiny = ex.AdapterBank(run.kind.model(), run.history, version_bytes=1)
    names = [f"run@{label}" for label in LABELS]
    inputs = run.inputs(3)
    assert_rows(logits(tiny, inputs, names), run.wanted(names, inputs))
    assert len(tiny._versions.adapters) == 1


@pytest.mark.slow
def test_threads_get_whole_versions_while_others_are_appended(run, history):
    bank, inputs = ex.AdapterBank(run.kind.model(), history), run.inputs(1)
    wanted = [run.wanted([name], inputs) for name in (*(f"run@{label}" for label in LABELS), BASE)]
    done = threading.Event()

    def ask(number):
        answers = []
        while not done.is_set():
            if number:
                bank.set_adapter([None, "run@latest"][len(answers) % 2])
            answers.append(logits(bank, inputs, None if number else "run@latest"))
        return answers

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(ask, number % 2) for number in range(4)]
        try:
            for label in LABELS[1:]:
                run.edit(history, label)
        finally:
            done.set()
        for answers in running:
            for answer in answers.result():
                assert any(torch.allclose(answer, each, atol=5e-5) for each in wanted)
    assert_rows(logits(bank, inputs, "run@latest"), wanted[2])


def test_generation(run):
    bank = ex.AdapterBank(run.kind.model(), run.history)
    names = ["run@plain-a", BASE, "run@latest"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = run.inputs(3)["input_ids"]
    found = bank.generate(ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        model = run.kind.model()
        if name != BASE:
            model = PeftModel.from_pretrained(model, run.exported[name.replace("latest", "plain-c")]).eval()
        assert torch.equal(found[row], model.generate(input_ids=ids[row : row + 1], **options)[0])


@pytest.mark.slow
def test_a_compiled_model_serves_versions_that_come_later(runs, tmp_path):
    run = runs("bert")
    history = run.started("plain-a").save(tmp_path / "history")
    bank, inputs = ex.AdapterBank(run.kind.model(), history), run.inputs(2)
    bank.model.compile(backend="eager", fullgraph=True)
    assert_rows(logits(bank, inputs), run.wanted([BASE] * 2, inputs))
    assert_rows(logits(bank, inputs, "run@latest"), run.wanted(["run@plain-a"] * 2, inputs))
    run.edit(history, "plain-b")
    names = ["run@latest", BASE]
    assert_rows(logits(bank, inputs, names), run.wanted(["run@plain-b", BASE], inputs))


def test_unload_restores_the_model(run):
    model, inputs = run.kind.model(), run.inputs(2)
    bank = ex.AdapterBank(model, run.history)
    logits(bank, inputs, "run@latest")
    assert bank.unload() is model
    assert bank.nbytes == 0
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, run.kind.model()(**inputs).logits)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(OptionError, match="this bank was unloaded"):
        bank.using("run@latest")


def test_versions_that_cannot_be_served_are_named(run, history, tmp_path):
    with pytest.raises(AdapterNameError, match="adapters has 'run@latest', and is for adapters of the pack only"):
        ex.AdapterBank(run.kind.model(), history, adapters=["run@latest"])
    bank = ex.AdapterBank(run.kind.model(), history)
    with pytest.raises(AdapterNameError, match="no version '5' in the history 'run'"):
        bank.using(["run@5"])
    with pytest.raises(AdapterNameError, match="no history named 'other' in the pack"):
        bank.set_adapter("other@latest")
    with pytest.raises(AdapterNameError, match="'run@plain-a' is a version of a history"):
        bank.add("pinned", "run@plain-a")
    narrow = shutil.copytree(run.sources["plain-a"], tmp_path / "narrow")
    change_tensors(narrow, lambda own: own.update({key: t[:, :-1].clone() for key, t in own.items() if "_A" in key}))
    deep = shutil.copytree(run.sources["plain-a"], tmp_path / "deep")
    change_tensors(deep, lambda own: own.update({key.replace(".1.", ".2."): t.clone() for key, t in own.items()}))
    with ex.Pack.edit(history) as pack:
        pack.append(narrow, name="narrow")
        pack.append(deep, name="deep")
    with pytest.raises(ShapeError, match="in the model and .* in version 'narrow@1'. It belongs to a different base"):
        bank.using("narrow@latest")
    with pytest.raises(ModuleNameError, match="version 'deep@1' has module .* which the model lacks"):
        bank.using("deep@latest")
    with pytest.raises(OptionError, match="version_bytes"):
        ex.AdapterBank(run.kind.model(), history, version_bytes="much")
