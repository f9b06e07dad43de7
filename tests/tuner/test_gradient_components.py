"""Gradient components: compared with dense gradients in float64, saved and loaded, and what is refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import eigenlorax as ex
from eigenlorax.errors import FormatError, NonFiniteError, OptionError, ShapeError
from eigenlorax.tuner import combine, initialize_gradient_components, serve, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from loaders import base
from tiny import shake

IN, HIDDEN, CLASSES = 13, 17, 5


class Network(nn.Module):
    """A linear layer, a nonlinearity and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x, labels):
        logits = self.head(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def loss(model, batch):
    return model(**batch)["loss"]


def batches(n, rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(rows, IN, generator=generator),
            "labels": torch.randint(CLASSES, (rows,), generator=generator),
        }
        for _ in range(n)
    ]


def adapted(n_gradient=3, **fields):
    """A network with gradient components alone, without a pack."""
    torch.manual_seed(1)
    config = ex.EigenLoraxConfig(target_modules=["first"], n_gradient=n_gradient, **{"r": 2, **fields})
    return get_peft_model(Network(), config)


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, EigenLoraxLayer))


def dense_gradients(model, of_batches):
    """The gradient (out, in) of the layer's weight for each batch, in float64."""
    weight = layer_of(model).base_layer.weight
    network = model.base_model.model.double()
    weight.requires_grad_(True)
    gradients = []
    with model.disable_adapter():
        for batch in of_batches:
            (gradient,) = torch.autograd.grad(loss(network, {**batch, "x": batch["x"].double()}), weight)
            gradients.append(gradient.double())
    weight.requires_grad_(False)
    network.float()
    return gradients


class TestComponents:
    def test_of_gradients_of_low_rank_are_their_singular_vectors(self):
        # two rows in a batch: its gradient has rank 2, which a sketch of six rows represents exactly
        of_batches = batches(1, rows=2)
        model = adapted(n_gradient=2)
        gradients = dense_gradients(model, of_batches)
        initialize_gradient_components(model, of_batches, loss=loss)
        down, up = (basis.double() for basis in layer_of(model).bases_of("default"))
        u, _, vh = torch.linalg.svd(gradients[0], full_matrices=False)
        # 8 bits move unit vectors by less than a hundredth
        torch.testing.assert_close(down.T @ down, vh[:2].T @ vh[:2], atol=0.02, rtol=0)
        torch.testing.assert_close(up.T @ up, u[:, :2] @ u[:, :2].T, atol=0.02, rtol=0)

    def test_of_several_batches_hold_nearly_as_much_as_the_best(self):
        of_batches = batches(6)
        model = adapted(n_gradient=3)
        gradients = dense_gradients(model, of_batches)
        initialize_gradient_components(model, of_batches, loss=loss)
        down, up = (basis.double() for basis in layer_of(model).bases_of("default"))
        for rows, components in ((torch.cat(gradients), down), (torch.cat([g.T for g in gradients]), up)):
            best = torch.linalg.svdvals(rows)[:3].square().sum()
            assert (rows @ components.T).square().sum() > 0.9 * best

    def test_are_orthogonal_to_the_subspace(self, saved_base, bert_pack, ids):
        model = bert(saved_base, bert_pack, n_gradient=2)
        initialize_gradient_components(model, bert_batches(ids))
        for layer in bert_layers(model):
            for basis in layer.bases_of("default"):
                inside, own = basis[:-2].double(), basis[-2:].double()
                assert (inside @ own.T).abs().max() < 0.02
                torch.testing.assert_close(own @ own.T, torch.eye(2).double(), atol=0.02, rtol=0)

    def test_leave_the_model_and_its_gradients_as_they_were(self, saved_base, bert_pack, ids):
        model = bert(saved_base, bert_pack, n_gradient=2).train()
        frozen = model.base_model.model.bert.embeddings.eval()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        initialize_gradient_components(model, bert_batches(ids))
        assert model.training
        assert not frozen.training
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
        # the update is still zero
        with torch.no_grad():
            adapted_logits = model.eval()(ids).logits
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, adapted_logits)

    def test_modules_that_the_subspace_lacks_have_gradient_components_only(self, saved_base, bert_pack, ids):
        targets = ["query", "key", "value"]
        model = bert(saved_base, bert_pack, r=2, n_gradient=2, target_modules=targets)
        initialize_gradient_components(model, bert_batches(ids))
        sizes = {len(layer.bases_of("default")[0]) for name, layer in named_layers(model) if name.endswith("key")}
        assert sizes == {2}
        others = {len(layer.bases_of("default")[0]) for name, layer in named_layers(model) if not name.endswith("key")}
        assert min(others) > 2

    def test_start_from_an_adapter_has_zeros_for_them(self, saved_base, bert_pack, ids):
        name = ex.Pack.open(bert_pack).names[0]
        plain = bert(saved_base, bert_pack, start=name, r=5)
        model = bert(saved_base, bert_pack, start=name, r=5, n_gradient=2)
        initialize_gradient_components(model, bert_batches(ids))
        for mine, other in zip(bert_layers(model), bert_layers(plain), strict=True):
            torch.testing.assert_close(mine.get_delta_weight("default"), other.get_delta_weight("default"))

    def test_seed_decides(self):
        def components(seed):
            model = adapted()
            initialize_gradient_components(model, batches(2), loss=loss, seed=seed)
            return layer_of(model).bases_of("default")[0]

        assert torch.equal(components(3), components(3))
        assert not torch.equal(components(3), components(4))


class TestFiles:
    @pytest.mark.parametrize("fields", [{}, {"core": True}, {"embed_subspace": True}])
    def test_load_with_equal_logits(self, saved_base, bert_pack, tmp_path, ids, fields):
        model = trained(saved_base, bert_pack, ids, **fields)
        model.save_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "out", subspace=bert_pack).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        # and once more, from the loaded model
        loaded.save_pretrained(tmp_path / "again")
        files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_without_a_pack(self, tmp_path):
        model = adapted()
        initialize_gradient_components(model, batches(2), loss=loss)
        shake(model)
        model.save_pretrained(tmp_path)
        torch.manual_seed(1)
        loaded = PeftModel.from_pretrained(Network(), tmp_path)
        (batch,) = batches(1, seed=5)
        assert torch.equal(loaded(**batch)["logits"], model(**batch)["logits"])

    def test_beside_random_components(self, saved_base, bert_pack, tmp_path, ids):
        model = trained(saved_base, bert_pack, ids, n_extra=2, extra_seed=5)
        model.save_pretrained(tmp_path / "mine")
        ex.Pack.open(bert_pack)
        ex.write_adapter(ex.read_adapter(tmp_path / "mine"), tmp_path / "lora")
        lora = PeftModel.from_pretrained(base(saved_base), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)

    def test_store_eight_bits_a_number(self, saved_base, bert_pack, tmp_path, ids):
        trained(saved_base, bert_pack, ids).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        codes = [tensor for name, tensor in tensors.items() if name.endswith(("gradient_down", "gradient_up"))]
        assert codes
        assert all(tensor.dtype == torch.int8 and len(tensor) == 2 for tensor in codes)
        assert not any("embedded" in name or "basis" in name for name in tensors)

    def test_become_a_lora_with_the_same_logits(self, saved_base, bert_pack, tmp_path, ids):
        model = trained(saved_base, bert_pack, ids)
        ex.write_adapter(to_lora(model), tmp_path / "lora")
        lora = PeftModel.from_pretrained(base(saved_base), tmp_path / "lora").eval()
        torch.testing.assert_close(lora(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)

    def test_join_a_pack_whole_with_a_residual(self, saved_base, bert_pack, tmp_path, ids):
        model = trained(saved_base, bert_pack, ids)
        model.save_pretrained(tmp_path / "mine")
        pack = ex.Pack.open(bert_pack)
        assert pack.add(tmp_path / "mine", name="projected", warn_above=1).delta_error > 0.1
        pack.remove("projected")
        record = pack.add(tmp_path / "mine", name="mine", residual=True)
        assert record.delta_error < 1e-3
        pack.save(tmp_path / "pack")
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "pack" / "adapters" / "mine").eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


class TestRefusals:
    def test_use_before_they_are_there(self, saved_base, bert_pack, ids):
        with pytest.raises(OptionError, match=r"has no gradient components yet\. For a new adapter, call"):
            bert(saved_base, bert_pack, n_gradient=2)(ids)

    def test_saving_before_they_are_there(self, saved_base, bert_pack, tmp_path):
        with pytest.raises(OptionError, match="no gradient components yet"):
            bert(saved_base, bert_pack, n_gradient=2).save_pretrained(tmp_path)

    def test_a_second_time(self):
        model = adapted()
        initialize_gradient_components(model, batches(2), loss=loss)
        with pytest.raises(OptionError, match="no gradient components to compute"):
            initialize_gradient_components(model, batches(2), loss=loss)

    def test_no_batch(self):
        model = adapted()
        with pytest.raises(OptionError, match="batches is empty"):
            initialize_gradient_components(model, [], loss=loss)
        # it can still be done
        initialize_gradient_components(model, batches(2), loss=loss)

    def test_too_few_directions(self):
        model = adapted()
        with pytest.raises(OptionError, match=r"have 1 directions outside the subspace, and n_gradient asks for 3"):
            initialize_gradient_components(model, batches(1, rows=1), loss=loss)
        with pytest.raises(OptionError, match="no gradient components yet"):
            model(**batches(1)[0])

    def test_merging_and_serving_before_they_are_there(self):
        for use in (lambda model: model.merge_adapter(), serve):
            with pytest.raises(OptionError, match="no gradient components yet"):
                use(adapted())

    def test_one_adapter_may_wait_while_another_is_used(self):
        model = adapted()
        model.add_adapter("other", ex.EigenLoraxConfig(target_modules=["first"], n_gradient=2, r=2))
        initialize_gradient_components(model, batches(2), loss=loss)
        model(**batches(1)[0])
        with pytest.raises(OptionError, match="adapter 'other' has no gradient components yet"):
            model.set_adapter("other") or model(**batches(1)[0])

    def test_embedding_cannot_be_taken_back(self, saved_base, bert_pack, tmp_path, ids):
        trained(saved_base, bert_pack, ids, embed_subspace=True).save_pretrained(tmp_path / "with")
        loaded = PeftModel.from_pretrained(base(saved_base), tmp_path / "with")
        loaded.peft_config["default"].embed_subspace = False
        with pytest.raises(OptionError, match="was loaded with embedded bases"):
            loaded.save_pretrained(tmp_path / "without")

    def test_batches_without_labels(self, saved_base, bert_pack, ids):
        with pytest.raises(OptionError, match=r"batch 0 gives no loss\. Pass batches with labels"):
            initialize_gradient_components(bert(saved_base, bert_pack, n_gradient=2), [{"input_ids": ids}])

    def test_neither_pack_nor_modules(self):
        with pytest.raises(OptionError, match="n_gradient=4 without a pack needs target_modules"):
            get_peft_model(Network(), ex.EigenLoraxConfig(n_gradient=4, r=4))

    def test_gradients_that_are_not_finite(self):
        (batch,) = batches(1)
        batch["x"][0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="the gradient of module base_model.model.first is NaN or infinite"):
            initialize_gradient_components(adapted(), [batch], loss=loss)

    def test_a_sum_of_adapters(self, saved_base, bert_pack, ids):
        model = trained(saved_base, bert_pack, ids)
        with pytest.raises(OptionError, match=r"'default' has gradient components of its own"):
            combine(model, ["default"], "sum")

    @pytest.mark.parametrize("n", [-1, 1.5])
    def test_numbers_out_of_range(self, n):
        with pytest.raises(OptionError, match="n_gradient"):
            ex.EigenLoraxConfig(n_gradient=n)

    def test_a_config_of_another_type(self, saved_base, bert_pack, tmp_path, ids):
        trained(saved_base, bert_pack, ids).save_pretrained(tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_text(config.read_text().replace('"n_gradient": 2', '"n_gradient": "2"'))
        pack = ex.Pack.open(bert_pack)
        with pytest.raises(FormatError, match="n_gradient is '2' in the config"):
            pack.add(tmp_path, name="x")

    @pytest.mark.parametrize("into_pack", [False, True])
    @pytest.mark.parametrize(
        ("suffix", "change", "error", "message"),
        [
            ("gradient_up", lambda tensor: None, FormatError, "no gradient components"),
            ("gradient_up", lambda tensor: tensor[:1], ShapeError, "expected int8"),
            ("_scales", lambda tensor: tensor / 0, ShapeError, "expected int8"),
        ],
    )
    def test_damaged_files(self, saved_base, bert_pack, tmp_path, ids, into_pack, suffix, change, error, message):
        trained(saved_base, bert_pack, ids).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        changed = {name: change(t) if name.endswith(suffix) else t for name, t in load_file(file).items()}
        save_file({name: tensor.clone() for name, tensor in changed.items() if tensor is not None}, file)
        pack = ex.Pack.open(bert_pack)
        with pytest.raises(error, match=message):
            pack.add(tmp_path, name="x") if into_pack else PeftModel.from_pretrained(base(saved_base), tmp_path)


def bert(folder, pack, **fields):
    config = ex.EigenLoraxConfig(subspace=pack, task_type="SEQ_CLS", **{"r": 4, "lora_alpha": 9, **fields})
    return get_peft_model(base(folder), config)


def bert_batches(ids):
    labels = torch.arange(len(ids)) % 2
    return [{"input_ids": ids, "labels": labels}, {"input_ids": ids.flip(1), "labels": 1 - labels}]


def trained(folder, pack, ids, **fields):
    """A model of which all coefficients have values, as after training."""
    model = bert(folder, pack, n_gradient=2, **fields)
    initialize_gradient_components(model, bert_batches(ids))
    return shake(model).eval()


def named_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, EigenLoraxLayer)]


def bert_layers(model):
    return [layer for _, layer in named_layers(model)]
