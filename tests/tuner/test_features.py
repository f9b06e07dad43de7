"""What PEFT users do with any method."""

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import eigenlorax as ex
from tiny import BERT, IN, make_bert, make_gpt2, make_pack, shake

pytestmark = pytest.mark.slow


def model_of(pack, **fields):
    return shake(
        get_peft_model(make_bert(), ex.EigenLoraxConfig(subspace=pack, **{"r": 4, "lora_alpha": 6, **fields}))
    ).eval()


class TestMerging:
    @pytest.mark.parametrize("core", [False, True])
    def test_changes_no_output_and_can_be_taken_back(self, bert_pack, ids, core):
        model = model_of(bert_pack, core=core)
        wanted, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
        model.merge_adapter(safe_merge=core)
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-6, rtol=0)
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, wanted, atol=1e-6, rtol=0)

    def test_of_conv1d(self, gpt2_pack, ids):
        config = ex.EigenLoraxConfig(subspace=gpt2_pack, r=4, fan_in_fan_out=True)
        model = shake(get_peft_model(make_gpt2(), config)).eval()
        wanted = model(ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, wanted, atol=1e-6, rtol=0)

    def test_safe_merge_leaves_the_model_alone_if_it_cannot(self, bert_pack, ids):
        model = model_of(bert_pack)
        base = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
        model.get_submodule(f"base_model.model.{BERT[0]}").eigenlorax_up["default"].data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(
            dict(model.named_parameters())[f"base_model.model.{BERT[0]}.base_layer.weight"],
            base[f"base_model.model.{BERT[0]}.base_layer.weight"],
        )

    def test_unload_and_disable_give_the_base_model(self, bert_pack, ids):
        wanted = make_bert()(ids).logits
        model = model_of(bert_pack)
        assert not torch.allclose(model(ids).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model.unload()(ids).logits, wanted)


class TestMixedBatches:
    @pytest.fixture
    def model(self, bert_pack):
        model = model_of(bert_pack, task_type="SEQ_CLS")
        model.add_adapter("other", ex.EigenLoraxConfig(subspace=bert_pack, r=2, core=True, task_type="SEQ_CLS"))
        return shake(model, "other", seed=9).eval()

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
    def test_each_row_has_its_own(self, model, ids, dtype, tolerance):
        model.to(dtype)
        names = ["default", "__base__", "other", "other", "default"]
        got = model(ids, adapter_names=names).logits
        for index, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model(ids[index : index + 1]).logits
            else:
                model.set_adapter(name)
                wanted = model(ids[index : index + 1]).logits
            torch.testing.assert_close(got[index : index + 1], wanted, atol=tolerance, rtol=tolerance)

    def test_many_ranks_cores_subspaces_and_repeats(self, bert_pack, ids):
        model = model_of(bert_pack, task_type="SEQ_CLS")
        other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=2)
        recipes = {
            "b": {"r": 4, "lora_alpha": 3},
            "c": {"r": 2, "use_rslora": True},
            "d": {"r": 3, "core": True},
            "e": {"r": 3, "core": True, "lora_alpha": 1},
            "f": {"r": 4, "embed_subspace": True},
            "g": {"r": 4, "subspace": other},
            "h": {"r": 4, "target_modules": BERT[:1]},
        }
        for seed, (name, fields) in enumerate(recipes.items()):
            fields = {"subspace": bert_pack, "task_type": "SEQ_CLS", **fields}
            model.add_adapter(name, ex.EigenLoraxConfig(**fields))
            shake(model, name, seed=20 + seed)
        model.eval()
        names = ["default", *recipes, "__base__", "b", "b", "c", "default", "e"]
        inputs = ids.repeat(3, 1)[: len(names)]
        got = model(inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter("default" if name == "__base__" else name)
            lone = inputs[row : row + 1]
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model(lone).logits
            else:
                wanted = model(lone).logits
            torch.testing.assert_close(got[row : row + 1], wanted, atol=1e-6, rtol=1e-6)

    def test_gradients_reach_the_adapter_of_a_row_alone(self, model, ids):
        model.set_adapter("default")
        layer = model.get_submodule(f"base_model.model.{BERT[0]}")
        layer.requires_grad_(True)
        model(ids[:2], adapter_names=["default", "__base__"]).logits.sum().backward()
        assert layer.eigenlorax_up["default"].grad.abs().sum() > 0
        assert layer.eigenlorax_core["other"].grad is None

    def test_wrong_use(self, model, ids):
        with pytest.raises(ValueError, match="non-existing adapter.*nope"):
            model(ids, adapter_names=["nope"] * 5)
        with pytest.raises(ValueError, match="should be the same as the number of inputs"):
            model(ids, adapter_names=["other"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(ids, adapter_names=["other"] * 5)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(ids, adapter_names=["other"] * 5)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generation(self, gpt2_pack, ids, beams):
        config = ex.EigenLoraxConfig(subspace=gpt2_pack, r=4, fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = shake(get_peft_model(make_gpt2(), config)).eval()
        model.add_adapter("other", config)
        shake(model, "other", seed=11)
        options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        got = model.generate(input_ids=ids[:3], adapter_names=["default", "other", "__base__"], **options)
        alone = []
        for index, name in enumerate(["default", "other"]):
            model.set_adapter(name)
            alone.append(model.generate(input_ids=ids[index : index + 1], **options))
        with model.disable_adapter():
            alone.append(model.generate(input_ids=ids[2:3], **options))
        for index, wanted in enumerate(alone):
            assert torch.equal(got[index, : wanted.shape[1]], wanted[0])

    def test_generation_with_an_encoder(self, ids):
        config = T5Config(
            vocab_size=53,
            d_model=IN,
            d_kv=12,
            d_ff=40,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(4)
            base = T5ForConditionalGeneration(config).eval()
        modules = [name for name, _ in base.named_modules() if name.endswith((".q", ".v"))]
        pack, _ = make_pack(dict.fromkeys(modules, (24, IN)))
        model = shake(get_peft_model(base, ex.EigenLoraxConfig(subspace=pack, task_type="SEQ_2_SEQ_LM"))).eval()
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        got = model.generate(input_ids=ids[:2], adapter_names=["default", "__base__"], **options)
        alone = model.generate(input_ids=ids[:1], **options)
        assert torch.equal(got[0, : alone.shape[1]], alone[0])


class TestTraining:
    def test_bf16_autocast(self, bert_pack, ids):
        model = model_of(bert_pack)
        wanted = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(ids).logits
            got.sum().backward()
        torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.05)

    def test_a_half_precision_model_keeps_float32_coefficients(self, bert_pack, ids):
        config = ex.EigenLoraxConfig(subspace=bert_pack, r=4)
        model = shake(get_peft_model(make_bert().to(torch.bfloat16), config)).eval()
        layer = model.get_submodule(f"base_model.model.{BERT[0]}")
        assert layer.eigenlorax_down["default"].dtype == torch.float32
        assert model(ids).logits.dtype == torch.bfloat16

    def test_compiles_as_one_graph(self, bert_pack, ids):
        model = model_of(bert_pack)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        compiled(ids, labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        assert model.get_submodule(f"base_model.model.{BERT[0]}").eigenlorax_up["default"].grad.abs().sum() > 0

    def test_trainer_resumes_where_it_was(self, bert_pack, ids, tmp_path):
        pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
        rows = [{"input_ids": row, "labels": torch.tensor(index % 3)} for index, row in enumerate(ids.repeat(4, 1))]

        def trained(folder, resume=False):
            config = ex.EigenLoraxConfig(subspace=bert_pack, r=4, task_type="SEQ_CLS")
            with torch.random.fork_rng():
                torch.manual_seed(3)
                model = get_peft_model(make_bert(), config)
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=2,
                per_device_train_batch_size=5,
                save_strategy="epoch",
                eval_strategy="epoch",
                load_best_model_at_end=True,
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
            trainer.train(resume_from_checkpoint=resume and str(tmp_path / "a" / "checkpoint-4"))
            return model.eval()(ids).logits

        whole = trained(tmp_path / "a")
        torch.testing.assert_close(trained(tmp_path / "b", resume=True), whole, atol=1e-6, rtol=1e-6)


class TestSeveral:
    def test_active_together_add_up(self, bert_pack):
        model = model_of(bert_pack)
        model.add_adapter("other", ex.EigenLoraxConfig(subspace=bert_pack, r=2))
        shake(model, "other", seed=9)
        model.base_model.set_adapter(["default", "other"])
        layer = model.get_submodule(f"base_model.model.{BERT[0]}")
        x = torch.randn(4, IN)
        wanted = layer.base_layer(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("other")).mT
        torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)

    def test_of_two_subspaces_have_two_bases(self, bert_pack):
        model = model_of(bert_pack)
        other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n=2)
        model.add_adapter("other", ex.EigenLoraxConfig(subspace=other, r=2))
        layer = model.get_submodule(f"base_model.model.{BERT[0]}")
        assert len(layer.eigenlorax_basis_down) == 2
        model.delete_adapter("other")
        assert list(layer.eigenlorax_basis_down) == [ex.Pack.open(bert_pack).info.fingerprint]

    def test_scales_are_peft_s(self, bert_pack):
        model = model_of(bert_pack)
        layer = model.get_submodule(f"base_model.model.{BERT[0]}")
        layer.scale_layer(3)
        assert layer.scaling["default"] == pytest.approx(3 * 6 / 4)
        layer.unscale_layer(2)
        assert layer.scaling["default"] == pytest.approx(1.5 * 6 / 4)
        layer.unscale_layer()
        assert layer.scaling["default"] == pytest.approx(6 / 4)
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"] == pytest.approx(0.75)
