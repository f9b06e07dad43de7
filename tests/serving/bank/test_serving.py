"""Adapters come and go while requests run: which ones a request sees, and what is an error."""

import asyncio
import gc
import random
import threading
import weakref

import pytest
import torch

import eigenlorax as ex
from eigenlorax.errors import AdapterNameError, LossWarning, OptionError, ShapeError
from planted import random_factors
from served import BASE
from tiny import BERT, IN, make_bert

pytestmark = pytest.mark.slow


@pytest.fixture
def one(served):
    return served("bert")


@pytest.fixture
def bank(one):
    return one.bank()


def logits(bank, inputs, **options):
    with torch.no_grad():
        return bank(**inputs, **options).logits


class TestWhatIsThere:
    def test_all_of_a_pack_or_those_that_are_named(self, one):
        bank = one.bank()
        assert bank.names == list(bank) == ex.Pack.open(one.pack).names
        assert len(bank) == len(bank.names)
        assert "wide" in bank
        assert BASE not in bank
        assert one.bank(adapters=["wide", "plain-a"]).names == ["plain-a", "wide"]
        assert one.bank(adapters="wide").names == ["wide"]
        assert len(one.bank(adapters=[])) == 0
        assert repr(bank) == "<AdapterBank of 8 adapters on 4 modules of a BertForSequenceClassification>"

    def test_a_pack_that_is_open(self, one):
        pack = ex.Pack.open(one.pack)
        assert ex.AdapterBank(make_bert(), pack).pack is pack

    def test_add_from_the_pack_by_its_own_name_or_another(self, one):
        bank, inputs = one.bank(adapters=[]), one.inputs(2)
        record = bank.add("wide")
        assert record == ex.Pack.open(one.pack).records["wide"]
        bank.add("copy", "wide")
        bank.add("again", ex.Pack.open(one.pack).packed("plain-a"))
        assert bank.names == ["again", "copy", "wide"]
        wanted = one.wanted(["wide", "plain-a"], inputs)
        torch.testing.assert_close(logits(bank, inputs, adapter_names=["copy", "again"]), wanted, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("as_folder", [True, False])
    def test_add_a_lora_which_is_projected(self, one, bank, as_folder):
        inputs = one.inputs(2)
        source = one.loras["wide"] if as_folder else ex.read_adapter(one.loras["wide"])
        # it lies in the subspace: nothing is lost
        assert bank.add("returned", source).delta_error < 1e-5
        wanted = one.wanted(["wide", "wide"], inputs)
        torch.testing.assert_close(logits(bank, inputs, adapter_names="returned"), wanted, atol=1e-5, rtol=0)

    def test_what_a_new_adapter_loses_is_told(self, bank):
        foreign = ex.from_factors("foreign", {m: random_factors(3, IN, IN, seed=n) for n, m in enumerate(BERT)})
        with pytest.warns(LossWarning, match="foreign"):
            record = bank.add("foreign", foreign)
        assert record.delta_error > 0.5
        assert bank.replace("foreign", foreign, warn_above=1.0).delta_error == record.delta_error
        assert "foreign" not in bank.pack

    def test_remove_all_or_none(self, bank):
        with pytest.raises(AdapterNameError, match="no adapter named 'nope' in the bank. It has: narrow, partial"):
            bank.remove("wide", "nope")
        assert "wide" in bank
        bank.remove("wide", "plain-a", "wide")
        assert not {"wide", "plain-a"} & set(bank.names)

    def test_replace_is_for_the_next_request(self, one, bank):
        inputs = one.inputs(2)
        bank.set_adapter("wide")
        with bank.using("wide"):
            bank.replace("wide", "plain-b")
            assert torch.equal(logits(bank, inputs), logits(one.bank(), inputs, adapter_names="wide"))
        wanted = logits(bank, inputs, adapter_names="plain-b")
        assert torch.equal(logits(bank, inputs, adapter_names="wide"), wanted)
        # the default one too
        assert torch.equal(logits(bank, inputs), wanted)


class TestRequests:
    def test_one_that_is_running_ends_with_what_it_began_with(self, one, bank):
        inputs, names = one.inputs(2), ["wide", "plain-a"]
        before = logits(bank, inputs, adapter_names=names)
        with bank.using(names):
            bank.remove("wide")
            bank.replace("plain-a", "plain-b")
            bank.add("wide", "plain-c")
            assert torch.equal(logits(bank, inputs), before)
        wanted = one.wanted(["plain-c", "plain-b"], inputs)
        torch.testing.assert_close(logits(bank, inputs, adapter_names=names), wanted, atol=1e-5, rtol=0)

    def test_a_removed_adapter_goes_from_memory_with_its_last_request(self, bank):
        numbers = weakref.ref(bank._adapters["wide"].flat.untyped_storage())
        with bank.using("wide"):
            bank.remove("wide")
            gc.collect()
            assert numbers() is not None
        gc.collect()
        assert numbers() is None

    def test_new_ones_hear_that_an_adapter_is_gone(self, one, bank):
        bank.set_adapter("wide")
        bank.remove("wide")
        with pytest.raises(AdapterNameError, match="'wide', chosen by set_adapter, was removed"):
            bank.model(**one.inputs(1))
        with pytest.raises(AdapterNameError, match="no adapter named 'wide'"):
            bank.using(["plain-a", "wide"])
        with pytest.raises(AdapterNameError, match="no adapter named 'wide'"):
            bank.set_adapter("wide")
        assert bank.active_adapter == "wide"
        bank.add("wide")
        bank.model(**one.inputs(1))

    def test_one_in_another(self, one, bank):
        inputs = one.inputs(2)
        alone = {name: logits(bank, inputs, adapter_names=name) for name in ("wide", "plain-a", BASE)}
        with bank.using("wide"):
            with bank.using(BASE):
                assert torch.equal(logits(bank, inputs), alone[BASE])
            assert torch.equal(logits(bank, inputs, adapter_names="plain-a"), alone["plain-a"])
            assert torch.equal(logits(bank, inputs), alone["wide"])
        assert torch.equal(logits(bank, inputs), alone[BASE])

    def test_an_error_ends_it(self, one, bank):
        bank.set_adapter("plain-a")
        with pytest.raises(ValueError, match="input_ids"):
            bank(adapter_names="wide")
        with pytest.raises(KeyboardInterrupt), bank.using("wide"):
            raise KeyboardInterrupt
        inputs = one.inputs(1)
        assert torch.equal(bank.model(**inputs).logits, logits(bank, inputs, adapter_names="plain-a"))

    def test_a_call_of_the_model_is_one(self, one, bank):
        """Between its layers the default may change, and it does not hear of it."""
        inputs = one.inputs(2)
        bank.set_adapter("wide")
        wanted = logits(bank, inputs)
        middle = bank.model.get_submodule("bert.encoder.layer.1")
        handle = middle.register_forward_pre_hook(lambda *_: bank.set_adapter("plain-a"))
        with torch.no_grad():
            got = bank.model(**inputs).logits
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
        handle.remove()
        torch.testing.assert_close(
            logits(bank, inputs), logits(bank, inputs, adapter_names="plain-a"), atol=1e-6, rtol=0
        )

    def test_tasks_of_one_thread_do_not_see_each_other_s(self, one, bank):
        inputs = one.inputs(2)
        alone = {name: logits(bank, inputs, adapter_names=name) for name in ("wide", "plain-a")}

        async def ask(name):
            with bank.using(name):
                await asyncio.sleep(0)
                return logits(bank, inputs)

        async def both():
            return await asyncio.gather(ask("wide"), ask("plain-a"))

        for got, name in zip(asyncio.run(both()), alone, strict=True):
            assert torch.equal(got, alone[name])

    def test_what_using_gives_can_be_entered_again_and_by_several_at_once(self, one, bank):
        inputs, names = one.inputs(2), ["wide", "plain-a"]
        wanted, got = logits(bank, inputs, adapter_names=names), []
        team, barrier = bank.using(names), threading.Barrier(2)

        def ask():
            for _ in range(5):
                barrier.wait()
                with team, team:
                    got.append(logits(bank, inputs))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 10
        assert all(torch.equal(one, wanted) for one in got)
        assert torch.equal(logits(bank, inputs), logits(bank, inputs, adapter_names=BASE))

    def test_what_begins_in_inference_mode_goes_on_in_any(self, one, bank):
        inputs = one.inputs(2)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            bank.add("new", "plain-b")
            bank.set_adapter("new")
            team = bank.using(["new", "wide"])
            bank.model(**inputs)
        torch.testing.assert_close(
            bank.model(**inputs).logits.detach(), one.wanted(["plain-b"] * 2, inputs), atol=1e-5, rtol=0
        )
        with team:
            got = bank.model(**inputs).logits
        torch.testing.assert_close(got.detach(), one.wanted(["plain-b", "wide"], inputs), atol=1e-5, rtol=0)
        got.sum().backward()

    def test_two_banks_on_one_model_add_up(self, one):
        bank, inputs = one.bank(heads=False), one.inputs(2)
        base = logits(bank, inputs)
        first = logits(bank, inputs, adapter_names="wide")
        other = ex.AdapterBank(bank.model, one.pack, heads=False)
        with bank.using("wide"):
            assert torch.equal(logits(other, inputs), first)
            assert not torch.allclose(logits(other, inputs, adapter_names="plain-a"), first)
        other.unload()
        assert torch.equal(logits(bank, inputs, adapter_names="wide"), first)
        bank.unload()
        with torch.no_grad():
            assert torch.equal(bank.model(**inputs).logits, base)

    def test_wrong_numbers_of_rows(self, one, bank):
        with pytest.raises(ShapeError, match=r"query got 4 rows, but 2 adapter names.*bank.generate"):
            bank(**one.inputs(4), adapter_names=["wide", "plain-a"])
        with pytest.raises(ShapeError, match=r"got 3 rows, but 2 adapter names"):
            bank(**one.inputs(3), adapter_names=["wide", "wide"])
        with pytest.raises(ShapeError, match=r"got 3 rows, but 1 adapter names"):
            bank(**one.inputs(3), adapter_names=[BASE])
        with pytest.raises(OptionError, match="adapter_names is empty"):
            bank(**one.inputs(3), adapter_names=[])


class TestThreads:
    N_CHANGING, N_SERVING, ADAPTERS = 4, 2, 1000

    def test_a_thousand_adapters_come_and_go_and_no_row_is_wrong(self, one):
        """Each name stands for one of two known answers at any time; what is a third one is wrong."""
        bank, inputs = one.bank(adapters=[]), one.inputs(6)
        recipes = [name for name in one.names if name != BASE]
        held = {name: ex.Pack.open(one.pack).packed(name) for name in recipes}
        alone = {name: one.wanted([name] * 6, inputs) for name in one.names}
        names = [f"n{number}" for number in range(self.ADAPTERS)]
        first = {name: recipes[number % len(recipes)] for number, name in enumerate(names)}
        second = {name: recipes[(number + 3) % len(recipes)] for number, name in enumerate(names)}
        errors, served, lacking = [], [0] * self.N_SERVING, [0] * self.N_SERVING
        done = threading.Event()

        def change(thread):
            try:
                own = names[thread :: self.N_CHANGING]
                for name in own:
                    bank.add(name, held[first[name]])
                for name in own:
                    bank.replace(name, held[second[name]])
                for name in own[::2]:
                    bank.remove(name)
                for name in own[::2]:
                    bank.add(name, held[first[name]])
            except Exception as error:  # noqa: BLE001 (of whatever kind, the test is to hear of it)
                errors.append(error)

        def serve(thread):
            chance = random.Random(thread)
            try:
                while not done.is_set() or served[thread] < 20:
                    chosen = [chance.choice([*names[: len(bank) + 1], BASE]) for _ in range(6)]
                    try:
                        got = logits(bank, inputs, adapter_names=chosen)
                    except AdapterNameError:
                        lacking[thread] += 1
                        continue
                    for row, name in enumerate(chosen):
                        possible = [BASE] if name == BASE else [first[name], second[name]]
                        error = min((got[row] - alone[answer][row]).abs().max().item() for answer in possible)
                        assert error < 1e-5, (name, error)
                    served[thread] += 1
            except Exception as error:  # noqa: BLE001 (of whatever kind, the test is to hear of it)
                errors.append(error)

        servers = [threading.Thread(target=serve, args=(number,)) for number in range(self.N_SERVING)]
        changers = [threading.Thread(target=change, args=(number,)) for number in range(self.N_CHANGING)]
        for thread in servers + changers:
            thread.start()
        for thread in changers:
            thread.join()
        done.set()
        for thread in servers:
            thread.join()
        assert not errors
        assert min(served) >= 20
        assert len(bank) == self.ADAPTERS
        last = {name: second[name] for name in names}
        for thread in range(self.N_CHANGING):
            last |= {name: first[name] for name in names[thread :: self.N_CHANGING][::2]}
        for start in range(0, self.ADAPTERS, 6):
            chosen = (names[start:] + names)[:6]
            got = logits(bank, inputs, adapter_names=chosen)
            wanted = torch.stack([alone[last[name]][row] for row, name in enumerate(chosen)])
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)

    def test_each_has_its_own_choice(self, one, bank):
        inputs = one.inputs(3)
        alone = {name: logits(bank, inputs, adapter_names=name) for name in one.names}
        wrong, barrier = [], threading.Barrier(4)

        def ask(name):
            barrier.wait()
            got = [logits(bank, inputs, adapter_names=name) for _ in range(40)]
            wrong.extend(name for one in got if not torch.equal(one, alone[name]))

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("wide", "plain-a", "narrow", BASE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
