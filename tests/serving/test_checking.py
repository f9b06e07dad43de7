"""Packs beside models that the command line cannot easily be given."""

import pytest

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import BaseModelWarning, ModuleNameError, OptionError, ShapeError
from eigenlorax.serving.vllm.checking import ServerOptions, check
from eigenlorax.serving.vllm.plan import EMBEDDING, Layer, Shapes
from planted import factors_in, orthonormal, random_factors
from rests import with_rests

Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.gate_proj"


def make_pack(modules, base="org/base"):
    adapters = [
        from_factors(
            f"a{n}", {m: random_factors(2, *shape, seed=9 * n) for m, shape in modules.items()}, base_model=base
        )
        for n in range(3)
    ]
    return ex.fit(adapters, n_components=4)


def shapes(model="org/base", **fields):
    return Shapes(model, "bfloat16", {Q: Layer(17, 11)}, **fields)


def test_another_model_by_name_is_warned_of():
    with pytest.warns(BaseModelWarning, match="fitted to adapters of 'org/base', and this model is 'org/other'"):
        check(make_pack({Q: (17, 11)}), "pack", shapes("org/other"))


def test_the_same_model_by_another_owner_is_not():
    assert check(make_pack({Q: (17, 11)}), "pack", shapes("mirror/base")).notes == []


def test_adapters_of_which_the_pack_holds_little_are_named():
    pack = ex.refit(make_pack({Q: (17, 11)}), n_components=1, warn_above=1.0).pack
    named = [name for name, record in pack.records.items() if record.delta_error > 0.5]
    (note,) = check(pack, "pack", shapes()).notes
    assert note.startswith("The delta error is")
    assert note.endswith("An update of zeros has an error of 1.")
    assert named
    assert all(name in note for name in named)


def test_experts_are_served_expanded_alone_and_count_as_the_pack_has_them():
    found = check(make_pack({Q: (17, 11), GATE: (13, 11)}), "pack", shapes(experts=("model.layers.0.mlp.experts",)))
    assert found.not_held == [GATE]
    assert found.shared.served == 0
    assert found.expanded.served == 3
    assert found.target_modules == ["experts", "q_proj"]
    assert found.plan.expanded.slot_numbers == 8 * (17 + 11 + 13 + 11)
    assert found.notes == [
        "org/base is a mixture of experts: with LoRA, vLLM 0.32 computes its experts by kernels for GPUs (Triton or "
        "FlashInfer), and a server on a CPU ends with an error.",
        "only experts that the pack has are counted; vLLM allocates all experts of a layer, so that a slot can be "
        "larger.",
    ]


def test_experts_where_the_model_has_none():
    with pytest.raises(ModuleNameError, match="org/base lacks 1 of the 2 modules of the pack, such as .*experts"):
        check(make_pack({Q: (17, 11), GATE: (13, 11)}), "pack", shapes())


def test_layers_of_which_nobody_knows_how_they_are_cut():
    asked = ServerOptions(tensor_parallel_size=2)
    (note,) = check(make_pack({Q: (17, 11)}), "pack", shapes(whole=True), asked).notes
    assert "does not say how its layers are divided among GPUs" in note
    assert check(make_pack({Q: (17, 11)}), "pack", shapes(whole=True)).notes == []


def test_an_embedding_by_the_name_of_a_module_is_not_one_for_bases():
    found = check(make_pack({Q: (17, 11)}), "pack", Shapes("org/base", "float16", {Q: Layer(17, 11, EMBEDDING)}))
    assert found.not_held == [Q]


def test_the_revision_of_the_model_is_in_the_commands():
    found = check(make_pack({Q: (17, 11)}), "org/pack@v2", shapes(), revision="abc")
    assert "EIGENLORAX_PACK=org/pack@v2" in found.shared.command
    assert "vllm serve org/base --revision abc" in found.shared.command


def test_memory_for_a_hundred_adapters_at_most(monkeypatch):
    monkeypatch.setattr("eigenlorax.serving.vllm.checking.MOST_IN_MEMORY", 2)
    assert check(make_pack({Q: (17, 11)}), "pack", shapes(), ServerOptions(max_loras=1)).plan.choices.max_cpu_loras == 2


@pytest.mark.parametrize("fields", [{"max_loras": True}, {"max_cpu_loras": 9.5}, {"adapters": "1"}])
def test_numbers_are_integers(fields):
    with pytest.raises(OptionError, match=f"{next(iter(fields))} must be an integer"):
        ServerOptions(**fields)


def test_names_that_are_not_the_model_s_own_are_said():
    (note,) = check(make_pack({Q.removeprefix("model."): (17, 11)}), "pack", shapes()).notes
    assert note.startswith("'layers.0.self_attn.q_proj' and 0 more modules of the pack have other names in org/base")


def test_rests_are_served_expanded_alone():
    found = check(with_rests(make_pack({Q: (17, 11)}), {"a1": ["down"]}), "pack", shapes())
    assert found.expanded.served == 3
    assert found.shared.served == 2
    assert list(found.shared.refused) == ["a1"]
    assert "without a shared basis it can be served" in found.shared.refused["a1"]


class TestBasis:
    """Coded packs with a basis: adapters that share four directions, and one that does not."""

    @pytest.fixture(scope="class")
    def pack(self):
        bases = orthonormal(4, 11, 1), orthonormal(4, 17, 2)
        members = {f"a{n}": factors_in(bases, 2, seed=10 * n) for n in range(6)}
        members["far"] = random_factors(4, 17, 11, seed=99)
        adapters = [from_factors(name, {Q: factors}, base_model="org/base") for name, factors in members.items()]
        return ex.fit(adapters, max_error=0.03, basis=4)

    def test_serves_those_within_the_error(self, pack):
        found = check(pack, "pack", shapes(), ServerOptions(serve_within=0.15))
        assert found.shared.served == 6
        assert found.expanded.served == 7
        assert list(found.shared.refused) == ["far"]
        assert "above 0.15, the largest that is served (serve_within=, --serve-within)" in found.shared.refused["far"]
        assert found.within == 0.15
        assert found.basis_errors == {n: r.delta_error for n, r in pack.on_basis(0.9999).records.items()}
        served = {name: error for name, error in found.basis_errors.items() if name != "far"}
        assert found.shared.largest_error == served[found.shared.worst_adapter] == max(served.values())
        assert found.expanded.largest_error == pack.summary.in_fit.worst
        assert found.plan.shared.basis_bytes == 2 * 4 * (17 + 11)
        assert found.plan.shared.slot_numbers == 8 * (4 + 4)
        assert "EIGENLORAX_SHARED_BASIS=1 EIGENLORAX_SERVE_WITHIN=0.15 vllm" in found.shared.command
        assert "SERVE_WITHIN" not in found.expanded.command

    def test_default(self, pack):
        assert check(pack, "pack", shapes()).within == 0.1
        coarse = ex.refit(pack, max_error=0.2).pack
        assert check(coarse, "pack", shapes()).within == 0.4

    def test_is_refused_for_other_packs(self):
        with pytest.raises(OptionError, match="has no basis beside its subspace"):
            check(make_pack({Q: (17, 11)}), "pack", shapes(), ServerOptions(serve_within=0.1))

    def test_without_a_basis_the_remedy_is_named(self, pack):
        plain = ex.fit([pack.adapter(name) for name in pack.names], max_error=0.03)
        found = check(plain, "pack", shapes())
        assert found.within is None
        assert found.basis_errors == {}
        assert any("--basis 32" in reason for reason in found.shared.refused.values())


def test_a_model_with_lora_in_another_implementation_alone_is_served_by_that():
    found = check(make_pack({Q: (17, 11)}), "pack", shapes(architecture="StableLmForCausalLM"))
    assert (found.expanded.served, found.shared.served) == (3, 3)
    for mode in (found.expanded, found.shared):
        assert " vllm serve org/base --model-impl transformers --enable-lora " in mode.command
    assert found.notes == [
        "vLLM 0.32 has no LoRA in its own class for StableLmForCausalLM: the commands choose vLLM's implementation "
        "with transformers (--model-impl transformers)."
    ]
    others = check(make_pack({Q: (17, 11)}), "pack", shapes(architecture="LlamaForCausalLM"))
    assert "--model-impl" not in others.expanded.command + others.shared.command


def test_a_model_that_vllm_has_no_lora_for_is_served_in_neither_way():
    pack = make_pack({Q: (17, 11)})
    pack.append(from_factors("run", {Q: random_factors(3, 17, 11, seed=5)}, base_model="org/base"), "1", name="run")
    found = check(pack, "pack", shapes(architecture="FalconForCausalLM"))
    for mode in (found.expanded, found.shared):
        assert (mode.served, mode.command, mode.worst_adapter) == (0, None, None)
        assert list(mode.refused) == ["a0", "a1", "a2"]
        assert "vLLM 0.32 has no LoRA for models of the architecture FalconForCausalLM" in mode.refused["a1"]
    versions, none = sorted(found.notes, reverse=True)
    assert versions.startswith("versions of the history 'run' cannot be served: vLLM 0.32 has no LoRA for models")
    assert none == "no adapter of the pack can be served."
    assert check(pack, "pack", shapes(architecture="LlamaForCausalLM")).shared.served == 3


def test_histories_are_named_with_what_a_version_takes():
    pack, modules = make_pack({Q: (17, 11)}), {Q: random_factors(3, 17, 11, seed=5)}
    for step in (10, 20):
        pack.append(from_factors("run", modules, base_model="org/base"), step=step, name="run", lossless=True)
    refused = from_factors("large", {Q: random_factors(600, 17, 11, seed=5)}, base_model="org/base")
    pack.append(refused, name="large", lossless=True)
    n_bytes = 3 * (17 + 11) * modules[Q].down.itemsize
    assert check(pack, "pack", shapes()).notes == [
        "versions of the history 'large' cannot be served: its rank is 600, and vLLM's largest rank is 512.",
        "versions of the history 'run' (2) are served on demand, by names such as 'run@latest'. The last one needs "
        f"--max-lora-rank 8 and {n_bytes:,} bytes in the cache.",
    ]


@pytest.mark.parametrize(
    ("module", "factors", "error"), [(Q, (3, 17, 13), ShapeError), ("other.module", (3, 17, 11), ModuleNameError)]
)
def test_a_history_of_another_model_is_refused(module, factors, error):
    pack = ex.Pack.empty("org/base")
    pack.append(from_factors("run", {module: random_factors(*factors, seed=5)}, base_model="org/base"), name="run")
    with pytest.raises(error, match="Pass the base model of the pack's adapters"):
        check(pack, "pack", shapes())


def test_a_pack_of_histories_alone_is_checked():
    pack = ex.Pack.empty("org/base")
    pack.append(from_factors("run", {Q: random_factors(3, 17, 11, seed=5)}, base_model="org/base"), "1", name="run")
    checked = check(pack, "pack", shapes())
    assert (checked.expanded.served, checked.shared.served, checked.expanded.command) == (0, 0, None)
    (note,) = checked.notes
    assert note.startswith("versions of the history 'run' (1) are served on demand")
