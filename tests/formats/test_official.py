"""The authors' files against what their layer computes, written down in NumPy: orientation, scaling, mean, and whatever
their code is known to leave out."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

import eigenlorax as ex
import reference
from adapters import BASE, change_config, change_tensors, lora_config, make_adapter
from eigenlorax.errors import FormatError, OptionError, ShapeError

MODULES = {"encoder.layer.0.query": (17, 11), "encoder.layer.1.value": (13, 23)}  # (out, in)
K, RANK, ALPHA = 5, 3, 7.0


def planted(seed, k=K, rank=RANK, dtype=np.float32):
    """Tensors by the authors' keys. Components are not orthonormal: nothing in the format says that they are."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for module, (n_out, n_in) in MODULES.items():
        for side, dimension in (("A", n_in), ("B", n_out)):
            key = f"base_model.model.{module}.eigenlora_{side}"
            tensors[f"{key}.components"] = draw.standard_normal((dimension, k)).astype(dtype)
            tensors[f"{key}.loadings"] = draw.standard_normal((k, rank)).astype(dtype)
    return tensors


def config(**fields):
    """What their config has: no lora_alpha, for one."""
    given = {
        "peft_type": "EIGENLORA",
        "base_model_name_or_path": BASE,
        "bias": "none",
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "num_components": K,
        "r": RANK,
        "revision": None,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        **fields,
    }
    return {key: value for key, value in given.items() if value is not ...}


def make(folder, tensors=None, *, seed=1, **fields):
    folder.mkdir(parents=True)
    save_file(tensors if tensors is not None else planted(seed), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config(**fields)))
    return folder


def update(tensors, module):
    """What their layer adds to W at a scaling of 1: h = (V_B L_B)(V_A L_A)ᵀ x, on float64."""
    key = f"base_model.model.{module}.eigenlora"
    a, b = (
        tensors[f"{key}_{side}.components"].astype(np.float64) @ tensors[f"{key}_{side}.loadings"].astype(np.float64)
        for side in "AB"
    )
    return b @ a.T


def deltas(adapter):
    return {module: reference.dense(factors) for module, factors in adapter.modules.items()}


class TestWhatItStandsFor:
    def test_is_what_their_layer_computes(self, tmp_path):
        tensors = planted(1)
        # a scaling of 1, which is theirs
        adapter = ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=RANK))
        assert (adapter.name, adapter.base_model, adapter.ranks) == ("one", BASE, (RANK,))
        assert adapter.modules.keys() == MODULES.keys()
        for module, delta in deltas(adapter).items():
            assert delta.shape == MODULES[module]
            np.testing.assert_allclose(delta, update(tensors, module), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("alpha", [ALPHA, 1.5])
    def test_scaled_by_what_its_config_or_the_caller_says(self, tmp_path, alpha):
        tensors = planted(2)
        stated = ex.read_adapter(make(tmp_path / "stated", tensors, lora_alpha=alpha))
        given = ex.read_adapter(make(tmp_path / "given", tensors), format="official", lora_alpha=alpha)
        instead = ex.read_adapter(make(tmp_path / "both", tensors, lora_alpha=99), format="official", lora_alpha=alpha)
        for adapter in (stated, given, instead):
            for module, delta in deltas(adapter).items():
                np.testing.assert_allclose(delta, alpha / RANK * update(tensors, module), rtol=1e-5, atol=1e-5)

    def test_a_projected_lora_is_it_but_for_what_lies_outside_and_the_mean_is_not_added(self, tmp_path):
        """Their way: components of the centred factors, coefficients of the factors as they are, at no scaling."""
        draw = np.random.default_rng(3)
        tensors, wanted = {}, {}
        for module, (n_out, n_in) in MODULES.items():
            sides = {}
            for side, dimension in (("A", n_in), ("B", n_out)):
                factors = draw.standard_normal((4, dimension, RANK)) + 2
                columns = np.concatenate(list(factors), axis=1)
                values, vectors = np.linalg.eigh(np.cov(columns))
                components = vectors[:, np.argsort(values)[::-1][:K]]
                key = f"base_model.model.{module}.eigenlora_{side}"
                tensors[f"{key}.components"] = np.ascontiguousarray(components).astype(np.float32)
                tensors[f"{key}.loadings"] = np.ascontiguousarray(components.T @ factors[0]).astype(np.float32)
                sides[side] = components @ components.T @ factors[0]
            wanted[module] = ALPHA / RANK * sides["B"] @ sides["A"].T
        adapter = ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=ALPHA))
        for module, delta in deltas(adapter).items():
            np.testing.assert_allclose(delta, wanted[module], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("dtype", "of_lora"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
    )
    def test_the_product_is_no_less_exact_than_its_factors(self, tmp_path, dtype, of_lora):
        tensors = {key: torch.from_numpy(value).to(dtype) for key, value in planted(4, dtype=np.float64).items()}
        folder = make(tmp_path / "one", lora_alpha=RANK)
        save_torch_file(tensors, folder / "adapter_model.safetensors")
        adapter = ex.read_adapter(folder)
        assert {spec.dtype for spec in adapter.specs.values()} == {of_lora}
        as_float = {key: value.double().numpy() for key, value in tensors.items()}
        for module, delta in deltas(adapter).items():
            np.testing.assert_allclose(delta, update(as_float, module), rtol=1e-6, atol=1e-6)

    def test_heads_are_kept_to_the_bit(self, tmp_path):
        head = np.arange(62, dtype=np.float32).reshape(2, 31)
        tensors = planted(1) | {"base_model.model.classifier.weight": head}
        adapter = ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=2, modules_to_save=["classifier"]))
        assert list(adapter.heads) == ["base_model.model.classifier.weight"]
        assert np.array_equal(adapter.heads["base_model.model.classifier.weight"].numpy(), head)

    @pytest.mark.parametrize("spelling", ["{side}.default.{part}", "{side}.{part}.default", "{side}.{part}.weight"])
    def test_spellings_of_one_tensor(self, tmp_path, spelling):
        def respelled(key):
            before, side, part = re.fullmatch(r"(.*)(eigenlora_[AB])\.(\w+)", key).groups()
            return before.removeprefix("base_model.model.") + spelling.format(side=side, part=part)

        tensors = planted(1)
        one = ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=2))
        two = ex.read_adapter(make(tmp_path / "two", {respelled(k): v for k, v in tensors.items()}, lora_alpha=2))
        assert one.specs == two.specs
        assert all(np.array_equal(deltas(one)[module], deltas(two)[module]) for module in MODULES)

    def test_tensors_are_read_when_they_are_asked_for(self, tmp_path):
        folder = make(tmp_path / "one", lora_alpha=2)
        adapter = ex.read_adapter(folder)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError):
            adapter.modules["encoder.layer.0.query"]


class TestBeside:
    """Their code saves the coefficients alone unless it is told otherwise."""

    @pytest.fixture
    def parted(self, tmp_path):
        tensors = planted(1)
        own = {key: value for key, value in tensors.items() if key.endswith("loadings")}
        rest = {key: value for key, value in tensors.items() if key.endswith("components")}
        return make(tmp_path / "task", own, lora_alpha=RANK), make(tmp_path / "basis", rest), tensors

    def test_components_from_another_folder(self, parted):
        task, basis, tensors = parted
        adapter = ex.read_adapter(task, format="official", components=basis)
        assert adapter.name == "task"
        for module, delta in deltas(adapter).items():
            np.testing.assert_allclose(delta, update(tensors, module), rtol=1e-5, atol=1e-5)

    def test_its_own_components_go_first(self, tmp_path, parted):
        whole = make(tmp_path / "whole", planted(7), lora_alpha=RANK)
        adapter = ex.read_adapter(whole, format="official", components=parted[1])
        for module, delta in deltas(adapter).items():
            np.testing.assert_allclose(delta, update(planted(7), module), rtol=1e-5, atol=1e-5)

    def test_without_them(self, parted):
        with pytest.raises(FormatError, match=r"task/.*eigenlora_A of module .*no components.*components='the folder'"):
            ex.read_adapter(parted[0])

    def test_components_alone_are_no_adapter(self, parted):
        with pytest.raises(FormatError, match=r"basis/.*no loadings: components alone are a basis, not an adapter\."):
            ex.read_adapter(parted[1])


class TestInAPack:
    def test_fit_knows_them_by_their_tensors_beside_loras(self, tmp_path):
        make(tmp_path / "in" / "theirs", seed=1, lora_alpha=ALPHA)
        make_adapter(tmp_path / "in" / "ours", seed=2, modules=MODULES, rank=2)
        pack = ex.fit(tmp_path / "in", energy=1.0)
        assert pack.names == ["ours", "theirs"]
        assert pack.records["theirs"].delta_error < 1e-5
        for module, delta in deltas(pack.adapter("theirs")).items():
            np.testing.assert_allclose(delta, ALPHA / RANK * update(planted(1), module), rtol=1e-4, atol=1e-4)

    def test_and_comes_out_as_a_lora(self, tmp_path):
        head = {"base_model.model.classifier.weight": np.arange(62, dtype=np.float32).reshape(2, 31)}
        make(tmp_path / "theirs", planted(1) | head, lora_alpha=ALPHA, modules_to_save=["classifier"], bias="none")
        pack = ex.fit([make_adapter(tmp_path / "ours", seed=2, modules=MODULES)], energy=1.0)
        pack.add(tmp_path / "theirs")
        pack = ex.Pack.open(pack.save(tmp_path / "pack"))
        folder = pack.export(tmp_path / "out", ["theirs"])["theirs"]
        written = json.loads((folder / "adapter_config.json").read_text())
        assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", RANK, pytest.approx(ALPHA))
        assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
        assert "num_components" not in written
        saved = load_file(folder / "adapter_model.safetensors")
        assert torch.equal(saved["base_model.model.classifier.weight"], torch.arange(62.0).reshape(2, 31))
        assert {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in saved} - {""} == set(MODULES)

    def test_as_a_lora_at_once(self, tmp_path):
        adapter = ex.read_adapter(make(tmp_path / "theirs", lora_alpha=ALPHA))
        again = ex.read_adapter(ex.write_adapter(adapter, tmp_path / "lora"))
        assert again.specs == adapter.specs
        assert all(np.array_equal(deltas(again)[m], deltas(adapter)[m]) for m in MODULES)


class TestWhatIsRefused:
    @pytest.mark.parametrize("fields", [{}, {"lora_alpha": None}])
    def test_no_scaling_is_guessed(self, tmp_path, fields):
        with pytest.raises(FormatError, match=r"does not state the scaling of its update.*lora_alpha is its rank, 3;"):
            ex.read_adapter(make(tmp_path / "one", **fields))

    def test_nor_taken_from_a_config_that_knows_nothing_of_it(self, tmp_path):
        """A LoRA's config beside such tensors: 8 may be a default that nobody chose."""
        folder = make(tmp_path / "one", planted(1))
        (folder / "adapter_config.json").write_text(json.dumps(lora_config(MODULES, lora_alpha=8, r=RANK)))
        with pytest.raises(FormatError, match="does not state the scaling of its update"):
            ex.read_adapter(folder)
        adapter = ex.read_adapter(folder, format="official", lora_alpha=float(RANK))
        np.testing.assert_allclose(
            deltas(adapter)["encoder.layer.0.query"], update(planted(1), "encoder.layer.0.query"), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize("alpha", ["8", True, float("nan"), [8]])
    def test_a_scaling_that_is_none(self, tmp_path, alpha):
        with pytest.raises(FormatError, match="not usable numbers"):
            ex.read_adapter(make(tmp_path / "one", lora_alpha=alpha))

    def test_a_rank_that_is_not_the_tensors(self, tmp_path):
        with pytest.raises(ShapeError, match=r"its rank is 3, but adapter_config.json says 32"):
            ex.read_adapter(make(tmp_path / "one", r=32, lora_alpha=8))

    def test_no_rank_in_the_config_is_that_of_the_tensors(self, tmp_path):
        assert ex.read_adapter(make(tmp_path / "one", r=..., lora_alpha=6)).specs["encoder.layer.0.query"].scaling == 2

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("eigenlora_A.components", lambda t: t.T),  # the other way round
            ("eigenlora_A.loadings", lambda t: t.T),
            ("eigenlora_B.components", lambda t: np.concatenate([t, t[:, :2]], axis=1)),  # augmented, the other not
            ("eigenlora_B.loadings", lambda t: t[:, 0]),  # one scalar a component: their flattened way
            ("eigenlora_B.loadings", lambda t: t[:, :0]),
        ],
    )
    def test_shapes_that_do_not_fit(self, tmp_path, key, change):
        tensors = planted(1)
        name = f"base_model.model.encoder.layer.1.value.{key}"
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
        with pytest.raises(ShapeError, match=rf"{name}.*must share one K"):
            ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=8))

    def test_two_ranks(self, tmp_path):
        tensors = planted(1)
        name = "base_model.model.encoder.layer.1.value.eigenlora_B.loadings"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :2])
        with pytest.raises(ShapeError, match="rank 3 of eigenlora_A, 2 of eigenlora_B"):
            ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=8))

    @pytest.mark.parametrize(
        "key",
        ["encoder.layer.0.query.eigenlora_loading_A", "encoder.layer.0.query.eigenlora_A.mean", "x.vera_lambda_b"],
    )
    def test_a_tensor_that_is_not_understood(self, tmp_path, key):
        tensors = planted(1) | {f"base_model.model.{key}": np.ones(4, np.float32)}
        with pytest.raises(FormatError, match=rf"{key}' is neither components nor loadings of eigenlora_A"):
            ex.read_adapter(make(tmp_path / "one", tensors, lora_alpha=8))

    def test_one_of_theirs_in_a_lora_is_no_head(self, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1, tensors={"x.eigenlora_loading_A": torch.ones(4)})
        with pytest.raises(FormatError, match=r"tensor 'x.eigenlora_loading_A' is not part of a PEFT LoRA"):
            ex.read_adapter(folder)

    def test_two_spellings_of_one(self, tmp_path):
        folder = make(tmp_path / "one", lora_alpha=8)
        key = "base_model.model.encoder.layer.0.query.eigenlora_A.components"
        change_tensors(folder, lambda t: t.update({key.replace("_A.", "_A.default."): t[key].clone()}))
        with pytest.raises(FormatError, match="have the same key"):
            ex.read_adapter(folder)

    @pytest.mark.parametrize("part", ["components", "loadings"])
    def test_a_module_that_is_not_whole(self, tmp_path, part):
        folder = make(tmp_path / "one", lora_alpha=8)
        change_tensors(folder, lambda t: t.pop(f"base_model.model.encoder.layer.1.value.eigenlora_B.{part}"))
        with pytest.raises(FormatError, match=rf"eigenlora_B of module encoder.layer.1.value has .*no {part}"):
            ex.read_adapter(folder)

    def test_nothing_of_theirs(self, tmp_path):
        with pytest.raises(FormatError, match="has neither components nor loadings"):
            ex.read_adapter(make(tmp_path / "one", {"classifier.weight": np.ones((2, 3), np.float32)}, lora_alpha=8))

    def test_a_lora(self, tmp_path):
        folder = make_adapter(tmp_path / "one", seed=1)
        with pytest.raises(FormatError, match=r"belongs to a LoRA.*format='peft'"):
            ex.read_adapter(folder, format="official")

    def test_a_dtype_that_is_none_of_a_factor(self, tmp_path):
        tensors = planted(1)
        name = "base_model.model.encoder.layer.0.query.eigenlora_A.loadings"
        with pytest.raises(FormatError, match=rf"{name}.*is not float64, float32, float16 or bfloat16"):
            ex.read_adapter(make(tmp_path / "one", tensors | {name: tensors[name].astype(np.int32)}, lora_alpha=8))

    def test_writing(self, tmp_path):
        adapter = ex.read_adapter(make(tmp_path / "one", lora_alpha=8))
        with pytest.raises(
            OptionError, match=r"format 'official' is read, not written. Formats that can be written: peft"
        ):
            ex.write_adapter(adapter, tmp_path / "two", format="official")

    def test_another_kind_still(self, tmp_path):
        folder = change_config(make_adapter(tmp_path / "one", seed=1), peft_type="LOHA")
        with pytest.raises(FormatError, match="peft_type is 'LOHA'"):
            ex.read_adapter(folder)
