"""What a bank costs, which models and packs it takes, and that a model is what it was once it is unloaded."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn

import eigenlorax as ex
from eigenlorax.core.row_groups import group_rows
from eigenlorax.errors import (
    AdapterNameError,
    BaseModelWarning,
    ModuleNameError,
    OptionError,
    PackDamagedError,
    ShapeError,
)
from eigenlorax.serving.bank import bank_adapter
from planted import MODULES, normal, random_adapter, random_collection, random_factors
from served import BASE
from tiny import BERT, GPT2, IN, make_bert, make_gpt2, make_pack


@pytest.fixture
def one(served):
    return served("bert")


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


class TestMemory:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_is_one_basis_and_the_coefficients(self, dtype):
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), dtype=dtype)
        basis = sum(2 * sides["down"].k * IN * 4 for sides in pack.info.modules.values())
        coefficients = sum(record.coefficient_bytes for record in pack.records.values())
        bank = ex.AdapterBank(make_bert(), pack)
        # bases are computed with in float32; those of the pack stay beside them
        of_the_pack = basis // 2 if dtype == "float16" else 0
        assert bank.nbytes == basis + of_the_pack + coefficients
        for number in range(100):
            bank.add(f"n{number}", "a1")
        assert bank.nbytes == basis + of_the_pack + coefficients + 100 * pack.records["a1"].coefficient_bytes
        bank.remove(*(f"n{number}" for number in range(100)))
        assert bank.nbytes == basis + of_the_pack + coefficients

    def test_counts_heads_and_no_copies_of_the_model(self, one):
        pack = ex.Pack.open(one.pack)
        heads = sum(record.head_bytes for record in pack.records.values())
        assert heads > 0
        bank, without = one.bank(), one.bank(heads=False)
        assert bank.nbytes - without.nbytes == heads

    def test_an_adapter_is_the_numbers_that_are_stored(self):
        """No dtype is widened at rest, and none is narrowed in silence."""
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), dtype="bfloat16")
        bank = ex.AdapterBank(make_bert(), pack)
        assert {adapter.flat.dtype for adapter in bank._adapters.values()} == {torch.bfloat16}
        wider, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
        with pytest.raises(OptionError, match=r"'a0' is torch.float32, which the bank's torch.bfloat16 would round"):
            bank.replace("a0", wider.packed("a1"))


class TestModels:
    def test_conv1d(self):
        pack, adapters = make_pack(GPT2, n_components=40)
        bank = ex.AdapterBank(make_gpt2(), pack)
        inputs = {"input_ids": torch.arange(3, 15).view(2, 6)}
        got = logits(bank, inputs, adapter_names=["a1", "a2"])
        for row, adapter in enumerate(adapters[1:3]):
            model = make_gpt2()
            for module, factors in adapter.modules.items():
                model.get_submodule(module).weight.data += factors.scaling * (factors.up @ factors.down).mT
            torch.testing.assert_close(got[row], logits(model, inputs)[row], atol=2e-5, rtol=0)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_a_device_or_moved_there(self, one):
        inputs = one.inputs(3)
        names = ["wide", "plain-a", BASE]
        moved = one.bank()
        moved.model.cuda()
        there = ex.AdapterBank(make_bert().cuda(), one.pack)
        for bank in (moved, there):
            got = logits(bank, {key: value.cuda() for key, value in inputs.items()}, adapter_names=names)
            torch.testing.assert_close(got.cpu(), one.wanted(names, inputs), atol=1e-4, rtol=0)

    def test_what_another_hook_has_seen_stays_what_it_was(self, one):
        model, seen = make_bert(), []
        module = model.get_submodule(BERT[0])
        module.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
        bank = ex.AdapterBank(model, one.pack)
        logits(bank, one.inputs(2), adapter_names="wide")
        ((output, copied),) = seen
        assert torch.equal(output, copied)

    def test_part_of_a_model(self, one):
        """Names that differ by leading components are one module."""
        whole, part = one.bank(heads=False), ex.AdapterBank(make_bert().bert, one.pack, heads=False)
        ids = one.inputs(2)["input_ids"]
        with torch.no_grad(), whole.using("wide"), part.using("wide"):
            assert torch.equal(whole.model.bert(ids).last_hidden_state, part.model(ids).last_hidden_state)

    def test_a_model_without_a_module_of_an_adapter(self, one):
        model = make_bert()
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        with pytest.raises(
            ModuleNameError, match=r"'narrow' has 2 of 4 modules that the model lacks, such as .*layer.1"
        ):
            ex.AdapterBank(model, one.pack)

    def test_another_model(self, one):
        with pytest.raises(ModuleNameError, match="has none of the 4 modules of the pack"):
            ex.AdapterBank(make_gpt2(), one.pack)
        model = make_bert()
        model.get_submodule("bert.encoder.layer.0.attention.self").query = nn.Linear(IN, IN + 1)
        with pytest.raises(
            ShapeError, match=r"layer.0.attention.self.query: \(out, in\) is \(25, 24\) in the model and"
        ):
            ex.AdapterBank(model, one.pack)

    def test_another_model_by_its_name(self):
        pack, _ = make_pack(dict.fromkeys(BERT, (IN, IN)))
        pack.base_model = "org/base"
        model = make_bert()
        model.name_or_path = "org/other"
        with pytest.warns(BaseModelWarning, match="adapters of 'org/base', and this model is 'org/other'"):
            ex.AdapterBank(model, pack)

    def test_attention_that_does_not_call_its_projection(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(IN, 2)

        pack, _ = make_pack({"attention.out_proj": (IN, IN)})
        with pytest.raises(ModuleNameError, match=r"attention.out_proj is a part of nn.MultiheadAttention"):
            ex.AdapterBank(Model(), pack)

    def test_rows_that_are_not_the_batch_s(self, one):
        """A module that sees tokens in an order of its own takes one adapter for all rows, and says so."""

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(IN, IN)

            def forward(self, x):
                return self.inner(x.reshape(-1, IN))

        pack, _ = make_pack({"inner": (IN, IN)})
        bank, x = ex.AdapterBank(Flat(), pack), normal(2, 5, IN, seed=1).float()
        assert bank(x, adapter_names="a1").shape == (10, IN)
        with pytest.raises(ShapeError, match="inner got 10 rows, but 2 adapter names"):
            bank(x, adapter_names=["a1", "a2"])


class TestUnload:
    def test_gives_the_model_back_bit_for_bit(self, one):
        model, fresh, inputs = make_bert(), make_bert(), one.inputs(3)
        signature, attributes = inspect.signature(model.forward), set(vars(model))
        bank = ex.AdapterBank(model, one.pack)
        assert inspect.signature(model.forward) == signature
        assert list(model.state_dict()) == list(fresh.state_dict())
        logits(bank, inputs, adapter_names=["wide", "plain-a", BASE])
        bank.set_adapter("wide")
        assert bank.unload() is model
        assert set(vars(model)) == attributes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        for (name, value), other in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
        assert torch.equal(logits(model, inputs), logits(fresh, inputs))

    def test_of_a_forward_that_was_replaced_before(self, one):
        model = make_bert()
        calls, original = [], model.forward

        def forward(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        model.forward = forward
        bank, inputs = ex.AdapterBank(model, one.pack), one.inputs(2)
        assert inspect.signature(model.forward) == inspect.signature(forward)
        got = logits(bank, inputs, adapter_names="wide")
        torch.testing.assert_close(got, one.wanted(["wide"] * 2, inputs), atol=1e-5, rtol=0)
        assert bank.unload().forward is forward
        assert calls == [1]

    @pytest.mark.parametrize("first", [0, 1])
    def test_of_two_banks_in_any_order(self, one, first):
        model, inputs = make_bert(), one.inputs(2)
        banks = [ex.AdapterBank(model, one.pack, heads=False) for _ in range(2)]
        banks[first].unload()
        left = banks[1 - first]
        left.set_adapter("wide")
        wanted = one.bank(heads=False)
        torch.testing.assert_close(
            logits(model, inputs), logits(wanted, inputs, adapter_names="wide"), atol=1e-6, rtol=0
        )
        left.unload()
        assert "forward" not in vars(model)
        assert torch.equal(logits(model, inputs), logits(make_bert(), inputs))

    def test_and_the_bank_is_of_no_use(self, one):
        bank = one.bank()
        bank.unload()
        assert len(bank) == 0
        for use in (lambda: bank.set_adapter("wide"), lambda: bank.using("wide"), lambda: bank.add("wide")):
            with pytest.raises(OptionError, match="this bank was unloaded"):
                use()

    def test_an_error_while_loading_leaves_the_model_alone(self, one):
        model = make_bert().bert
        with pytest.raises(ModuleNameError, match="has a head"):
            ex.AdapterBank(model, one.pack)
        assert "forward" not in vars(model)
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_copy_of_a_served_model_serves_its_own_weights(self, one):
        bank, inputs = one.bank(heads=False), one.inputs(2)
        other = copy.deepcopy(bank.model)
        nn.init.zeros_(other.classifier.weight)
        with bank.using("wide"):
            assert logits(other, inputs).std() == 0
            assert logits(bank.model, inputs).std() > 0


class TestErrors:
    def test_names(self, one):
        with pytest.raises(AdapterNameError, match="no adapter named 'nope' in the pack"):
            one.bank(adapters=["wide", "nope"])
        bank = one.bank(adapters=["wide"])
        with pytest.raises(AdapterNameError, match="the bank already has an adapter named 'wide': replace it"):
            bank.add("wide")
        with pytest.raises(AdapterNameError, match="no adapter named 'plain-a' in the bank. It has: wide."):
            bank.replace("plain-a", "wide")
        with pytest.raises(AdapterNameError, match="adapter name '__base__' is not allowed"):
            bank.add(BASE, "wide")
        with pytest.raises(AdapterNameError, match="no adapter named 'mine' in the pack"):
            bank.add("mine")

    def test_carried_tensors(self, tmp_path):
        pack, adapters = make_pack(dict.fromkeys(BERT, (IN, IN)))
        more = {**adapters[0].modules, "elsewhere": random_factors(3, IN, IN, seed=1)}
        pack.add(ex.from_factors("more", more), carry_missing=True, warn_above=1.0)
        wanted = (
            r"cannot express all tensors of 'more' \(DoRA .*AdapterBank\(model, pack, adapters=\['a0'.*\) serves the"
        )
        with pytest.raises(OptionError, match=wanted) as refused:
            ex.AdapterBank(make_bert(), pack)
        way = re.search(r"AdapterBank\(.*\)(?= serves)", str(refused.value))[0]
        served = eval(way, {"AdapterBank": ex.AdapterBank, "model": make_bert(), "pack": pack})
        assert served.names == [one.name for one in adapters]
        with pytest.raises(
            OptionError, match=r"'more' has tensors that coefficients cannot express, such as '.*elsewhere"
        ):
            ex.AdapterBank(make_bert(), pack, adapters=["more"])
        bank = ex.AdapterBank(make_bert(), pack, adapters=["a0"])
        with pytest.raises(OptionError, match="'more' has tensors"):
            bank.add("more")

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
    def test_carried_tensors_of_some_among_many_or_of_all(self):
        pack = ex.fit(random_collection(10), n_components=3, warn_above=1.0)
        more = [
            ex.from_factors(name, {"elsewhere": random_factors(3, 11, 7, seed=seed)}, base_model="org/base")
            for seed, name in enumerate(("more", "other"))
        ]
        pack.add_all(more, carry_missing=True, warn_above=1.0)
        with pytest.raises(OptionError, match="express all tensors of 'more', 'other' .*with pack a `Pack`") as refused:
            bank_adapter.check_none_carried(pack)
        names = eval(re.search(r"adapters=(\[.*\])\)", str(refused.value))[1], {"pack": pack})
        assert names == [name for name in pack.names if name not in ("more", "other")]
        pack.remove(*names)
        with pytest.raises(OptionError, match="of 'more', 'other' .*lacks.. `eigenlorax export` writes each as"):
            bank_adapter.check_none_carried(pack)

    def test_coefficients_of_another_subspace(self, one):
        other, _ = make_pack(dict.fromkeys(BERT, (IN, IN)), n_components=4)
        with pytest.raises(
            ShapeError, match=r"'a1', module .*: its coefficients have \(k_down, k_up\) = \(4, 4\), and the"
        ):
            one.bank().add("a1", other.packed("a1"))

    def test_a_damaged_pack(self, one, tmp_path):
        pack = ex.Pack.open(one.pack)
        pack.save(tmp_path / "pack")
        path = tmp_path / "pack/adapters/wide/adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(PackDamagedError, match="wide"):
            ex.AdapterBank(make_bert(), tmp_path / "pack")


class TestArranging:
    @pytest.mark.parametrize(
        ("owners", "groups"),
        [
            ([0, 1, 2], [0, 1, 2]),
            ([0, 0, 1, 1], [0, 1]),
            ([1, 0, 1, 0, 1, 0], [1, 0]),
            ([0, 0, 0, 0, 1], [0, 0, 0, 0, 1]),
            ([0] * 6 + [1] * 5 + [2] * 4, [0, 1, 2]),
        ],
    )
    def test_every_row_is_in_a_group_of_its_owner(self, owners, groups):
        found, order = group_rows(owners)
        assert found == groups
        rows = normal(len(owners), 3, 5, seed=2)
        gathered = order.gather(rows)
        assert len(gathered) == len(found)
        assert torch.equal(order.scatter(gathered), rows)
        of_owner = torch.tensor(owners, dtype=rows.dtype)[:, None, None].expand(-1, 3, 5)
        for group, owner in zip(order.gather(of_owner.contiguous()), found, strict=True):
            assert (group == owner).all()


class TestGrown:
    """A pack that was extended: adapters of before it have coefficients on fewer components."""

    def test_adapters_of_both_times_serve_in_one_batch(self, tmp_path):
        pack = ex.fit(random_collection(4), n_components=5, warn_above=1.0)
        pack.add(random_adapter("new", 777), extend=3, warn_above=1.0)
        pack.save(tmp_path / "pack")
        (n_out, n_in), module = MODULES["encoder.0.query"], "encoder.0.query"
        model = nn.ModuleDict({"encoder": nn.ModuleList([nn.ModuleDict({"query": nn.Linear(n_in, n_out)})])})
        linear, x = model["encoder"][0]["query"], normal(3, 4, n_in, seed=1, dtype=torch.float32)
        names = ["a0", "new", "a2"]
        with pytest.raises(ModuleNameError, match="modules that the model lacks"):
            ex.AdapterBank(model, tmp_path / "pack")
        model["encoder"][0]["dense"] = nn.Linear(37, 53)
        with torch.no_grad():
            base = linear(x)
            bank = ex.AdapterBank(model, tmp_path / "pack")
            with bank.using(names):
                mixed = linear(x)
        for row, name in enumerate(names):
            factors = pack.adapter(name).modules[module]
            wanted = base[row] + factors.scaling * (x[row] @ factors.down.mT) @ factors.up.mT
            torch.testing.assert_close(mixed[row], wanted, rtol=1e-5, atol=1e-4)

    def test_an_adapter_of_another_pack_is_refused_by_its_subspace(self, tmp_path):
        one, other = (
            ex.fit([random_adapter(f"a{i}", seed + i) for i in range(4)], n_components=5, warn_above=1.0).save(
                tmp_path / str(seed)
            )
            for seed in (1000, 2000)
        )
        alien = ex.Pack.open(other).packed("a0")
        model = nn.ModuleDict(
            {"encoder": nn.ModuleList([nn.ModuleDict({"query": nn.Linear(29, 41), "dense": nn.Linear(37, 53)})])}
        )
        bank = ex.AdapterBank(model, one)
        with pytest.raises(OptionError, match="not to the bank's pack"):
            bank.add("alien", alien)
