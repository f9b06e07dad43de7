"""What is trained, where it starts, and what it costs."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

import eigenlorax as ex
from eigenlorax.errors import ModuleNameError, OptionError, ProjectionWarning, RankWarning, ShapeError
from eigenlorax.train import models
from eigenlorax.tuner.layer import EigenLoraxLayer
from planted import random_factors
from tiny import BERT, GPT2, IN, RANK, make_bert, make_pack, shake

pytestmark = pytest.mark.slow


def layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, EigenLoraxLayer)}


def oracle(layer, adapter="default"):
    """scaling · Uᵀ C_up C_down V in float64 NumPy."""
    down_basis, up_basis = (basis.double().numpy() for basis in layer.bases_of(adapter))
    core = layer.core_of(adapter).detach().double().numpy()
    return layer.scaling[adapter] * up_basis.T @ core @ down_basis


class TestWhatIsTrained:
    @pytest.mark.parametrize(("core", "wanted"), [(False, 24 * 2 * 32 * 8), (True, 24 * 32 * 32)])
    def test_numbers_at_the_shape_of_roberta_base(self, core, wanted):
        config = RobertaConfig(
            vocab_size=11, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=5
        )
        modules = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in range(12) for part in ("query", "value")]
        pack, _ = make_pack(dict.fromkeys(modules, (768, 768)), n=11, n_components=32)
        model = get_peft_model(
            RobertaForSequenceClassification(config),
            ex.EigenLoraxConfig(subspace=pack, r=8, core=core, task_type="SEQ_CLS"),
        )
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert sum(n for name, n in trained.items() if "eigenlorax" in name) == wanted
        assert all("eigenlorax_" in name or "classifier" in name for name in trained)

    def test_basis_is_untouched_and_everything_else_frozen(self, bert, bert_pack, ids):
        model = shake(get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, r=4)))
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        bases = {n: b.clone() for n, b in model.named_buffers() if "basis" in n}
        assert len(bases) == 2 * len(BERT)
        before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0)
        for _ in range(3):
            model(ids, labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
        assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in bases.items())
        assert all(not torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())

    def test_gradients_are_those_of_the_dense_update(self, bert, bert_pack, ids):
        model = shake(get_peft_model(bert.double(), ex.EigenLoraxConfig(subspace=bert_pack, r=4)))
        layer = layers(model)[BERT[1]]
        x = torch.randn(7, IN, dtype=torch.float64)
        down, up = (
            p["default"].detach().clone().requires_grad_() for p in (layer.eigenlorax_down, layer.eigenlorax_up)
        )
        down_basis, up_basis = layer.bases_of("default")
        delta = layer.scaling["default"] * up_basis.double().mT @ up @ down @ down_basis.double()
        weights = torch.randn(7, IN, dtype=torch.float64)
        ((layer.base_layer(x) + x @ delta.mT) * weights).sum().backward()
        (layer(x) * weights).sum().backward()
        torch.testing.assert_close(layer.eigenlorax_down["default"].grad, down.grad)
        torch.testing.assert_close(layer.eigenlorax_up["default"].grad, up.grad)

    def test_backward_keeps_what_is_k_wide(self, bert_pack):
        model = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, r=4))
        layer = shake(layers(model)[BERT[0]])
        x = torch.randn(50, IN, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(x)
        rows = {tuple(t.shape) for t in kept if t.shape[0] == 50}
        assert rows == {(50, 9), (50, 4)}

    def test_a_whole_layer_of_dropout_is_another_matter(self, bert, bert_pack, ids):
        model = shake(get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, r=4, lora_dropout=0.5)))
        quiet = model.eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, quiet)
        assert not torch.equal(model.train()(ids).logits, quiet)


class TestTheUpdate:
    @pytest.mark.parametrize("core", [False, True])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_is_that_of_the_formula(self, bert, bert_pack, core, use_rslora):
        config = ex.EigenLoraxConfig(subspace=bert_pack, r=5, lora_alpha=11, core=core, use_rslora=use_rslora)
        layer = shake(get_peft_model(bert, config)).get_submodule(f"base_model.model.{BERT[2]}")
        assert layer.scaling["default"] == pytest.approx(11 / (5**0.5 if use_rslora else 5))
        delta = oracle(layer)
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), delta, atol=1e-5)
        x = torch.randn(6, IN)
        got = (layer(x) - layer.base_layer(x)).detach().numpy()
        np.testing.assert_allclose(got, x.numpy() @ delta.T, atol=1e-5)

    def test_of_conv1d(self, gpt2, gpt2_pack, ids):
        model = shake(get_peft_model(gpt2, ex.EigenLoraxConfig(subspace=gpt2_pack, r=4, fan_in_fan_out=True)))
        assert set(layers(model)) == set(GPT2)
        for name, layer in layers(model).items():
            n_out, n_in = GPT2[name]
            x = torch.randn(6, n_in)
            got = (layer(x) - layer.base_layer(x)).detach().numpy()
            np.testing.assert_allclose(got, x.numpy() @ oracle(layer).T, atol=1e-5)
            assert layer.get_delta_weight("default").shape == (n_in, n_out)

    def test_conv1d_sets_fan_in_fan_out_by_itself(self, gpt2, gpt2_pack):
        with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
            get_peft_model(gpt2, ex.EigenLoraxConfig(subspace=gpt2_pack, r=4))

    def test_patterns_are_peft_s(self, bert, bert_pack):
        config = ex.EigenLoraxConfig(
            subspace=bert_pack,
            r=4,
            lora_alpha=8,
            rank_pattern={"layer.1.attention.self.query": 2},
            alpha_pattern={"value": 6},
        )
        found = layers(get_peft_model(bert, config))
        assert [found[name].r["default"] for name in BERT] == [4, 4, 2, 4]
        assert [found[name].scaling["default"] for name in BERT] == [2, 1.5, 4, 1.5]

    def test_layers_and_exclusions_are_peft_s(self, bert_pack):
        def names(**fields):
            return sorted(layers(get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, **fields))))

        assert names() == sorted(BERT)
        assert names(target_modules=["query"]) == [BERT[0], BERT[2]]
        assert names(target_modules="all-linear", exclude_modules=r".*(key|dense|pooler|classifier).*") == sorted(BERT)
        assert names(target_modules=["query", "value"], layers_to_transform=[1]) == sorted(BERT[2:])
        assert names(exclude_modules=["value"]) == [BERT[0], BERT[2]]
        assert names(layers_to_transform=[0]) == sorted(BERT[:2])
        assert names(layers_to_transform=0, layers_pattern="layer") == sorted(BERT[:2])


class TestStarts:
    def logits(self, pack, ids, start, **fields):
        model = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, start=start, **fields))
        return model, model.eval()(ids).logits

    @pytest.mark.parametrize("core", [False, True])
    def test_zero_is_the_base_model_to_the_bit(self, bert, bert_pack, ids, core):
        wanted = bert(ids).logits
        model, got = self.logits(bert_pack, ids, "zero", core=core)
        assert torch.equal(got, wanted)
        if not core:
            assert all(layer.eigenlorax_down["default"].abs().sum() > 0 for layer in layers(model).values())

    @pytest.mark.parametrize("core", [False, True])
    def test_a_named_adapter_is_that_adapter(self, bert_pack, ids, core):
        adapter = ex.Pack.open(bert_pack).adapter("a2")
        model, _ = self.logits(bert_pack, ids, "a2", core=core, r=RANK, lora_alpha=5)
        for name, layer in layers(model).items():
            factors = adapter.modules[name]
            wanted = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(layer.get_delta_weight("default"), wanted, atol=1e-5, rtol=1e-5)

    def test_the_mean_is_the_mean_of_the_updates(self, bert_pack, ids):
        pack = ex.Pack.open(bert_pack)
        adapters = [pack.adapter(name) for name in pack.names]
        model, _ = self.logits(bert_pack, ids, "mean", core=True, r=3)
        for name, layer in layers(model).items():
            found = [adapter.modules[name] for adapter in adapters]
            wanted = torch.stack([f.scaling * f.up @ f.down for f in found]).mean(dim=0)
            torch.testing.assert_close(layer.get_delta_weight("default"), wanted, atol=1e-5, rtol=1e-4)

    def test_a_pack_in_memory_has_adapters_too(self, bert_pack):
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
        same = ex.Pack.open(bert_pack)
        for start in ("mean", "a1"):
            one, other = (
                get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=given, start=start, core=True))
                for given in (pack, same)
            )
            for name, layer in layers(one).items():
                assert layer.core_of("default").abs().sum() > 0
                torch.testing.assert_close(layer.core_of("default"), layers(other)[name].core_of("default"))

    def test_at_a_rank_it_is_the_best_one_of_that_rank(self, bert_pack, ids):
        exact, _ = self.logits(bert_pack, ids, "mean", core=True)
        model, _ = self.logits(bert_pack, ids, "mean", r=2)
        for name, layer in layers(model).items():
            sigma = np.linalg.svd(oracle(layers(exact)[name]), compute_uv=False)
            lost = np.linalg.norm(oracle(layers(exact)[name]) - oracle(layer))
            assert lost == pytest.approx(np.sqrt((sigma[2:] ** 2).sum()), rel=1e-4)

    def test_an_outside_lora_is_projected(self, bert_pack, ids, tmp_path):
        outside = {name: random_factors(RANK, IN, IN, seed=900 + i) for i, name in enumerate(BERT)}
        adapter = ex.from_factors("outside", outside)
        ex.write_adapter(adapter, tmp_path / "outside")
        pack = ex.Pack.open(bert_pack)
        pack.add(adapter)
        projected = pack.adapter("outside")
        with pytest.warns(ProjectionWarning, match=f"error.* is {pack.records['outside'].delta_error:.4f}"):
            model, _ = self.logits(bert_pack, ids, str(tmp_path / "outside"), r=RANK)
        for name, layer in layers(model).items():
            factors = projected.modules[name]
            wanted = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(layer.get_delta_weight("default"), wanted, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("modules", "error", "match"),
        [
            ({"elsewhere": (IN, IN)}, ModuleNameError, "none of the modules of the subspace"),
            ({BERT[0]: (IN, IN + 1)}, ShapeError, r"\(24, 25\), and \(24, 24\) in the subspace"),
        ],
    )
    def test_a_lora_of_another_model_is_refused(self, bert, bert_pack, tmp_path, modules, error, match):
        factors = {name: random_factors(RANK, *shape, seed=1) for name, shape in modules.items()}
        ex.write_adapter(ex.from_factors("other", factors), tmp_path / "other")
        with pytest.raises(error, match=match):
            get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, start=str(tmp_path / "other")))

    def test_uniform_is_the_paper_s(self, bert_pack, ids):
        model, _ = self.logits(bert_pack, ids, "uniform")
        for layer in layers(model).values():
            for part in (layer.eigenlorax_down["default"], layer.eigenlorax_up["default"]):
                assert part.detach().abs().max() <= 0.5
                assert part.detach().std() == pytest.approx(12**-0.5, rel=0.25)

    def test_unknown_ones_are_named(self, bert, bert_pack):
        before = dict(bert.named_modules())
        with pytest.raises(OptionError, match="start='nope' is neither .* Adapters of the pack: a0, a1, a2, a3"):
            get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, start="nope"))
        assert dict(bert.named_modules()) == before

    def test_of_many_adapters_the_first_are_named(self, tmp_path):
        pack = make_pack(dict.fromkeys(BERT, (IN, IN)), n=14)[0].save(tmp_path / "pack")
        with pytest.raises(OptionError, match=r"Adapters of the pack: a0, .*, a6, a7 …\.$"):
            get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, start="nope"))

    def test_init_weights_false_is_not_the_identity(self, bert, bert_pack, ids):
        wanted = bert(ids).logits
        for core in (False, True):
            _, got = self.logits(bert_pack, ids, "zero", init_weights=False, core=core)
            assert not torch.allclose(got, wanted)


class TestExtraDirections:
    def test_widen_the_bases_and_change_no_start(self, bert, bert_pack, ids):
        wanted = bert(ids).logits
        model = get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, n_extra=3, extra_seed=4))
        assert torch.equal(model.eval()(ids).logits, wanted)
        augmented = ex.Pack.open(bert_pack).augment(3, 4).subspace
        for name, layer in layers(model).items():
            down, up = layer.bases_of("default")
            assert torch.equal(down, augmented.modules[name].down.components)
            assert torch.equal(up, augmented.modules[name].up.components)
            torch.testing.assert_close(down @ down.mT, torch.eye(12), atol=1e-6, rtol=0)

    def test_starts_are_zero_on_them(self, bert_pack):
        plain, wide = (
            get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, start="a1", r=RANK, n_extra=n))
            for n in (0, 3)
        )
        for name, layer in layers(wide).items():
            torch.testing.assert_close(
                layer.get_delta_weight("default"), layers(plain)[name].get_delta_weight("default")
            )

    def test_a_machine_that_rebuilds_them_otherwise_is_told(self, bert, bert_pack):
        config = ex.EigenLoraxConfig(subspace=bert_pack, n_extra=3, extra_seed=4)
        get_peft_model(make_bert(), config)
        assert set(config.extra_check) == set(BERT)
        config.extra_check[BERT[1]] += 0.5
        with pytest.raises(OptionError, match=f"added components of {BERT[1]} from seed 4 differently"):
            get_peft_model(bert, config)


def test_a_rank_above_k_is_warned_of(bert, bert_pack):
    # `train` silences what PEFT warns of, but not this
    with pytest.warns(RankWarning, match=r"r=10 \(--rank\) is larger than the 9 components"), models.quiet():
        get_peft_model(bert, ex.EigenLoraxConfig(subspace=bert_pack, r=10))
    with pytest.warns(RankWarning, match=r"r=11 \(--rank\) is larger than the 9 components"):
        get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=bert_pack, r=4, rank_pattern={"query": 11}))
