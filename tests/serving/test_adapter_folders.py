"""From names to folders: what is written for vLLM, under which name, and what becomes of it when the pack changes."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from adapters import MODULES, make_adapter, make_adapters
from children import needs_fork
from eigenlorax.errors import (
    AdapterNameError,
    CacheFullError,
    DuplicateAdapterWarning,
    OptionError,
    PackMissingError,
    ServingError,
)
from eigenlorax.serving.vllm.adapter_folders import AdapterFolders
from eigenlorax.serving.vllm.cores import core_name
from eigenlorax.serving.vllm.servable import expanded_rank, shared_rank
from eigenlorax.serving.vllm.settings import Settings
from rests import with_rests

pytestmark = needs_fork


@pytest.fixture
def pack(tmp_path):
    """A pack of alpha and beta, its folder."""
    make_adapters(tmp_path / "in", "alpha beta")
    ex.fit(tmp_path / "in", n_components=4).save(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def serve(pack, tmp_path):
    def start(*, shared=False, **fields):
        return AdapterFolders(replace(Settings(str(pack), shared, tmp_path / "cache"), **fields))

    return start


def path_of(folders, name):
    return folders.request(name).result(timeout=60).path


def test_without_a_shared_basis_it_is_what_is_exported(serve, pack, tmp_path):
    exported = ex.Pack.open(pack).export(tmp_path / "out", ["alpha"])["alpha"]
    served = path_of(serve(), "alpha")
    assert sorted(path.name for path in served.iterdir()) == sorted(path.name for path in exported.iterdir())
    for path in exported.iterdir():
        assert (served / path.name).read_bytes() == path.read_bytes()


def test_a_rest_is_in_what_is_expanded_and_refused_between_shared_bases(serve, pack):
    wanted = with_rests(ex.Pack.open(pack), {"alpha": ["both"], "beta": ["none", "up"]})
    wanted.save(pack, overwrite=True)
    served = ex.read_adapter(path_of(serve(), "alpha"))
    for module, factors in wanted.adapter("alpha").modules.items():
        assert torch.equal(served.modules[module].down, factors.down)
        assert torch.equal(served.modules[module].up, factors.up)
    with pytest.raises(ServingError, match="'alpha' cannot be served: it has a residual"):
        path_of(serve(shared=True), "alpha")


def test_bytes_that_were_chosen_are_expanded(serve, pack, tmp_path):
    ex.fit(tmp_path / "in", max_error=0.1).save(pack, overwrite=True)
    wanted = ex.Pack.open(pack)
    for name in wanted.names:
        served = ex.read_adapter(path_of(serve(), name))
        for module, factors in wanted.adapter(name).modules.items():
            assert torch.equal(served.modules[module].down, factors.down)
            assert torch.equal(served.modules[module].up, factors.up)
    with pytest.raises(ServingError, match="'alpha' cannot be served: it has a residual"):
        path_of(serve(shared=True), "alpha")


def test_a_reference_is_expanded(serve, pack, tmp_path):
    shutil.copytree(tmp_path / "in" / "alpha", tmp_path / "in" / "copy")
    with pytest.warns(DuplicateAdapterWarning, match="copy has the same update as alpha"):
        ex.fit(tmp_path / "in", max_error=0.1).save(pack, overwrite=True)
    folders = serve()
    copy, alpha = (load_file(path_of(folders, name) / "adapter_model.safetensors") for name in ("copy", "alpha"))
    assert copy.keys() == alpha.keys()
    assert all(torch.equal(copy[key], alpha[key]) for key in alpha)
    before = path_of(folders, "copy")
    with ex.Pack.edit(pack) as edited:
        edited.remove("alpha")
    after = path_of(serve(), "copy")
    assert load_file(after / "adapter_model.safetensors").keys() == copy.keys()
    assert before != after


def test_with_one_it_is_a_lora_of_the_cores(serve, pack):
    folders = serve(shared=True)
    served, core = path_of(folders, "alpha"), core_name(ex.Pack.open(pack).info.fingerprint)
    config = json.loads((served / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(f"{module}.{core}" for module in MODULES)
    wanted, opened = load_file(served / "adapter_model.safetensors"), ex.Pack.open(pack)
    alpha = opened.adapter("alpha", torch.float64)
    for module in MODULES:
        bases = opened.subspace.modules[module]
        down, up = (wanted[f"base_model.model.{module}.{core}.lora_{side}.weight"].double() for side in "AB")
        update = bases.up.components.double().mT @ up @ down @ bases.down.components.double()
        factors = alpha.modules[module]
        torch.testing.assert_close(update, factors.scaling * factors.up @ factors.down, rtol=1e-5, atol=1e-6)


def test_a_folder_is_named_by_all_that_decides_its_content(serve, pack, tmp_path):
    before, shared = path_of(serve(), "alpha"), path_of(serve(shared=True), "alpha")
    again = path_of(serve(), "alpha")
    assert before.name == again.name
    assert len({before.name, shared.name}) == 2
    make_adapter(tmp_path / "in" / "alpha", seed=77)
    ex.fit(tmp_path / "in", n_components=4).save(pack, overwrite=True)
    assert path_of(serve(), "alpha").name not in (before.name, shared.name)
    ex.fit(tmp_path / "in", n_components=3).save(pack, overwrite=True)
    assert len({before.name, path_of(serve(), "alpha").name, path_of(serve(), "beta").name}) == 3


def test_modules_have_the_names_of_the_subspace(serve, pack, tmp_path):
    """vLLM does not find what lacks the first part, and does not say so."""
    short = {name.removeprefix("encoder."): shape for name, shape in MODULES.items()}
    patterns = {"rank_pattern": {"layer.1.query": 2}, "alpha_pattern": {"0.value": 17}, "use_rslora": True}
    make_adapter(
        tmp_path / "gamma", seed=5, modules=short, config=patterns, tensors=_of_rank(2, "layer.1.query", short)
    )
    with ex.Pack.edit(pack) as edited:
        edited.add(tmp_path / "gamma")
    served = ex.read_adapter(path_of(serve(), "gamma"))
    wanted = ex.Pack.open(pack).adapter("gamma")
    assert set(served.modules) == set(MODULES)
    for module in short:
        one, other = served.modules[f"encoder.{module}"], wanted.modules[module]
        assert one.scaling == pytest.approx(other.scaling)
        assert torch.equal(one.down, other.down)
        assert torch.equal(one.up, other.up)


def test_what_cannot_be_given_them_is_refused(serve, pack, tmp_path):
    short = {name.removeprefix("encoder."): shape for name, shape in MODULES.items()}
    lora = {"base_model.model.words.lora_embedding_A": torch.ones(3, 43)}
    lora["base_model.model.words.lora_embedding_B"] = torch.ones(7, 3)
    with ex.Pack.edit(pack) as edited:
        edited.add(make_adapter(tmp_path / "gamma", seed=5, modules=short, tensors=lora))
    with pytest.raises(ServingError, match="lack the first part of the model's names"):
        path_of(serve(), "gamma")


def _of_rank(rank, module, modules):
    n_out, n_in = modules[module]
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(rank, n_in), f"{name}.lora_B.weight": torch.ones(n_out, rank)}


@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_that_is_added_is_found(serve, pack, tmp_path, shared):
    folders = serve(shared=shared)
    with pytest.raises(AdapterNameError, match="no adapter named 'gamma'"):
        path_of(folders, "gamma")
    with ex.Pack.edit(pack) as edited:
        edited.add(make_adapter(tmp_path / "gamma", seed=5))
    assert path_of(folders, "gamma").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../alpha",
        "alpha/../beta",
        "/etc/passwd",
        "al pha",
        "alpha\0",
        "ålpha",
        ".",
        "..",
        "a" * 10_000,
        "alpha/",
        "-",
    ],
)
def test_what_is_no_name_is_refused_shortly(serve, name):
    with pytest.raises(AdapterNameError, match="is not a valid name of an adapter") as raised:
        path_of(serve(), name)
    assert len(str(raised.value)) < 500


def test_a_name_is_one_in_its_own_case_only(serve):
    with pytest.raises(AdapterNameError, match="no adapter named 'Alpha'"):
        path_of(serve(), "Alpha")


def test_a_refit_is_served_anew_without_a_shared_basis(serve, pack, tmp_path):
    folders = serve()
    before = path_of(folders, "alpha")
    ex.refit(pack, tmp_path / "in", n_components=2).pack.save(pack, overwrite=True)
    after = path_of(folders, "alpha")
    assert before.name != after.name
    assert before.is_dir()
    exported = ex.Pack.open(pack).export(tmp_path / "out", ["alpha"])["alpha"]
    name = "adapter_model.safetensors"
    assert (after / name).read_bytes() == (exported / name).read_bytes()


def test_a_refit_needs_a_restart_with_one(serve, pack, tmp_path):
    folders = serve(shared=True)
    before = path_of(folders, "alpha")
    ex.refit(pack, tmp_path / "in", n_components=2).pack.save(pack, overwrite=True)
    for _ in range(2):
        with pytest.raises(ServingError, match="'alpha' cannot be served.*another subspace.*Restart the server"):
            path_of(folders, "alpha")
    assert before.is_dir()
    assert path_of(serve(shared=True), "alpha").is_dir()


def test_what_was_there_before_the_subspace_grew_is_served_still(serve, pack, tmp_path):
    folders = serve(shared=True)
    core = core_name(folders.served.fingerprint)
    with ex.Pack.edit(pack) as edited:
        edited.add(make_adapter(tmp_path / "gamma", seed=5), extend=2)
    served = load_file(path_of(folders, "alpha") / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in served} == {core}
    with pytest.raises(ServingError, match="'gamma' cannot be served.*Restart the server"):
        path_of(folders, "gamma")
    # after which both are, in the subspace that has grown
    again = serve(shared=True)
    assert path_of(again, "alpha").name != path_of(folders, "alpha").name
    assert path_of(again, "gamma").is_dir()


def test_a_rank_above_the_number_of_components_is_cut_to_what_it_is_said_to_be(tmp_path):
    """The number of the components that the adapter's coefficients are on, though the subspace has grown since."""
    make_adapter(tmp_path / "wide", seed=1, rank=9)
    make_adapter(tmp_path / "other", seed=2, rank=2)
    ex.fit([tmp_path / "wide", tmp_path / "other"], n_components=5).save(tmp_path / "pack")
    with ex.Pack.edit(tmp_path / "pack") as edited:
        edited.add(make_adapter(tmp_path / "gamma", seed=3), extend=2)
    folders = AdapterFolders(Settings(str(tmp_path / "pack"), shared_basis=True, cache=tmp_path / "cache"))
    served, opened = ex.read_adapter(path_of(folders, "wide")), ex.Pack.open(tmp_path / "pack")
    assert served.ranks == (shared_rank(opened.packed("wide")),) == (5,)
    wanted = opened.adapter("wide", torch.float64)
    for module in MODULES:
        core, factors = served.modules[f"{module}.{core_name(opened.info.fingerprint)}"], wanted.modules[module]
        bases = opened.subspace.modules[module]
        update = (
            bases.up.components.double().mT @ core.up.double() @ core.down.double() @ bases.down.components.double()
        )
        torch.testing.assert_close(update, factors.scaling * factors.up @ factors.down, rtol=1e-5, atol=1e-5)


def test_an_entropy_coded_adapter_has_the_rank_that_is_stored(tmp_path):
    """Rank 2, in factors of rank 8 whose other components are far below the error bound."""
    for number, name in enumerate(("alpha", "beta")):
        folder = make_adapter(tmp_path / "in" / name, seed=number, rank=8, alpha=12.0)
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            if "lora_A" in key:
                tensor[2:] *= 1e-6
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ex.fit(tmp_path / "in", max_error=0.05).save(tmp_path / "pack")
    pack = ex.Pack.open(tmp_path / "pack")
    assert pack.adapter("alpha").ranks == (8,)
    assert expanded_rank(pack.packed("alpha")) == 2
    folders = AdapterFolders(Settings(str(tmp_path / "pack"), cache=tmp_path / "cache"), max_lora_rank=2)
    folder = path_of(folders, "alpha")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    served, wanted = ex.read_adapter(folder), pack.adapter("alpha")
    assert served.ranks == (2,)
    for module, factors in wanted.modules.items():
        reduced = served.modules[module]
        torch.testing.assert_close(reduced.up @ reduced.down, factors.scaling * factors.up @ factors.down)


def test_a_pack_of_another_model_in_the_place_of_the_one_that_was_compared_needs_a_restart(serve, pack, tmp_path):
    folders = serve()
    narrow = {name: (n_out - 2, n_in - 2) for name, (n_out, n_in) in MODULES.items()}
    make_adapters(tmp_path / "other", "alpha beta", modules=narrow)
    ex.fit(tmp_path / "other", n_components=4).save(pack, overwrite=True)
    with pytest.raises(ServingError, match="modules or sizes of another model.*Restart the server"):
        path_of(folders, "alpha")


def test_an_adapter_that_vllm_cannot_serve_is_refused_each_time(serve, pack, tmp_path):
    with ex.Pack.edit(pack) as edited:
        edited.add(make_adapter(tmp_path / "gamma", seed=5, config={"bias": "all"}))
    folders = serve()
    for _ in range(2):
        with pytest.raises(ServingError, match="trained biases"):
            path_of(folders, "gamma")


def test_a_damaged_adapter_is_an_error_until_it_is_mended(serve, pack):
    folders, file = serve(), pack / "adapters" / "alpha" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ex.EigenloraxError, match="changed after it was written"):
        path_of(folders, "alpha")
    file.write_bytes(whole)
    assert path_of(folders, "alpha").is_dir()


def test_a_damaged_manifest_is_an_error_until_it_is_mended(serve, pack):
    folders, file = serve(), pack / "subspace_config.json"
    whole = file.read_bytes()
    file.write_bytes(b"{")
    with pytest.raises(ex.EigenloraxError, match="not valid JSON"):
        path_of(folders, "alpha")
    file.write_bytes(whole)
    assert path_of(folders, "alpha").is_dir()


def test_a_pack_that_is_not_there_is_an_error_at_once(serve, tmp_path):
    with pytest.raises(PackMissingError, match="is not a pack"):
        serve(pack=str(tmp_path / "nowhere"))


def test_so_is_a_cache_that_cannot_be_one(serve, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="EIGENLORAX_CACHE"):
        serve(cache=tmp_path / "file")


def test_a_full_cache_refuses_new_names_and_serves_old_ones(serve):
    folders = serve(cache_bytes=4_000)
    alpha = path_of(folders, "alpha")
    with pytest.raises(CacheFullError, match="no room for beta-"):
        path_of(folders, "beta")
    assert path_of(folders, "alpha") == alpha


def test_embeddings_of_the_base_model_are_not_written(pack, tmp_path):
    key = "base_model.model.embed_tokens"
    lora = {f"{key}.lora_embedding_A": torch.ones(3, 43), f"{key}.lora_embedding_B": torch.ones(7, 3)}
    whole = {f"{key}.base_layer.weight": torch.ones(43, 7)}
    make_adapter(tmp_path / "gamma", seed=5, tensors={**lora, **whole})
    with ex.Pack.edit(pack) as edited:
        edited.add(tmp_path / "gamma")
    folders = AdapterFolders(Settings(str(pack), cache=tmp_path / "cache"))
    served = load_file(path_of(folders, "gamma") / "adapter_model.safetensors")
    assert set(lora) <= set(served)
    assert not set(whole) & set(served)


def test_the_threads_of_torch_stay_as_many_as_they_were(serve, monkeypatch):
    counts = []
    # an engine that another test had in this process has put a function there that does nothing
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)

    def note():
        counts.append(torch.get_num_threads())

    def in_a_new_thread():
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        folders = serve()
        path_of(folders, "alpha")
        folders._executor.submit(note).result()
        in_a_new_thread()
        note()
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 3, 3]


class TestBasis:
    """A coded pack with a basis: with a shared basis, projections on that are served, up to an error."""

    @pytest.fixture
    def based(self, pack, tmp_path):
        ex.fit(tmp_path / "in", max_error=0.1, basis=4).save(pack, overwrite=True)
        return ex.Pack.open(pack)

    def test_serves_the_projections(self, based, serve):
        folders = serve(shared=True, serve_within=0.99)
        assert folders.served == based.basis.info
        projected = based.on_basis(0.99)
        assert projected.names
        for name in projected.names:
            served = ex.read_adapter(path_of(folders, name))
            core = core_name(based.basis.info.fingerprint)
            for module, factors in projected.packed(name).coefficients.items():
                found = served.modules[f"{module}.{core}"]
                wanted = factors.scaling * factors.up @ factors.down
                torch.testing.assert_close(found.scaling * found.up @ found.down, wanted)

    def test_refuses_the_others_and_serves_them_expanded(self, based, serve):
        with pytest.raises(ServingError, match="'alpha' cannot be served: its error in the basis may be above 0.11"):
            path_of(serve(shared=True, serve_within=0.11), "alpha")
        served = ex.read_adapter(path_of(serve(), "alpha"))
        for module, factors in based.adapter("alpha").modules.items():
            assert torch.equal(served.modules[module].down, factors.down)

    def test_another_basis_waits_for_a_restart(self, based, serve, pack):
        folders = serve(shared=True, serve_within=0.99)
        path_of(folders, "alpha")
        ex.refit(based, basis=2).pack.save(pack, overwrite=True)
        with pytest.raises(ServingError, match="its coefficients are in another subspace"):
            path_of(folders, "alpha")

    def test_the_error_is_a_number(self, based, serve):
        with pytest.raises(OptionError, match="^serve_within must be above 0 and below 1, got 2.0"):
            serve(shared=True, serve_within=2.0)
