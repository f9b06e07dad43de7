from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
import reference
from adapters import make_adapters
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import (
    AdapterNameError,
    BaseModelError,
    DuplicateAdapterWarning,
    ModuleNameError,
    NonFiniteError,
    OptionError,
    PackBusyError,
    PackDamagedError,
    PackExistsError,
    PackMissingError,
    ShapeError,
)
from eigenlorax.pack import loss_warnings
from planted import MODULES, random_adapter, random_collection, tree


@pytest.fixture
def saved(tmp_path):
    pack = ex.fit(random_collection(), n_components=6)
    pack.save(tmp_path / "pack")
    return tmp_path / "pack"


class TestOpen:
    def test_gives_what_was_saved(self, saved):
        pack, opened = ex.fit(random_collection(), n_components=6), ex.Pack.open(saved)
        assert opened.names == pack.names
        assert opened.records == pack.records
        assert opened.info == pack.info
        assert opened.summary == pack.summary
        assert opened.subspace.fingerprint == pack.subspace.fingerprint
        for name in pack.names:
            one, two = pack.adapter(name), opened.adapter(name)
            assert one.specs == two.specs
            for module in one.specs:
                assert torch.equal(one.modules[module].down, two.modules[module].down)
                assert torch.equal(one.modules[module].up, two.modules[module].up)

    def test_reads_no_tensor_before_it_is_asked_for(self, saved, monkeypatch):
        from eigenlorax.pack import folder

        monkeypatch.setattr(folder, "_read_checked", lambda *_: pytest.fail("a tensor file was read"))
        opened = ex.Pack.open(saved)
        assert opened.summary.adapters == 5
        with pytest.raises(pytest.fail.Exception, match="a tensor file was read"):
            opened.adapter("a0")

    def test_needs_a_pack(self, tmp_path):
        with pytest.raises(PackMissingError, match="has no subspace_config.json"):
            ex.Pack.open(tmp_path)

    def test_checks_bytes(self, saved):
        target = saved / "adapters" / "a1" / "adapter_model.safetensors"
        data = bytearray(target.read_bytes())
        data[-3] ^= 1
        target.write_bytes(data)
        opened = ex.Pack.open(saved)
        opened.adapter("a0")
        with pytest.raises(PackDamagedError, match=r"a1/adapter_model.safetensors was changed after it was written"):
            opened.adapter("a1")
        with pytest.raises(PackDamagedError, match=r"a1/adapter_model.safetensors"):
            opened.verify()


class TestAdd:
    def test_says_what_was_lost(self, saved):
        pack, new = ex.Pack.open(saved), random_adapter("new", 4242)
        record = pack.add(new)
        assert record.delta_error == pytest.approx(reference.delta_error(new, pack.adapter("new")), rel=1e-5)
        assert record.delta_error > 0.3
        assert not record.in_fit
        assert pack.summary.projected.worst_adapter == "new"

    def test_an_adapter_of_the_fit_loses_what_it_lost(self, saved):
        pack = ex.Pack.open(saved)
        again = random_collection()[2]
        with pytest.warns(DuplicateAdapterWarning, match=r"^again has the same update as a2\.$"):
            record = pack.add(again, name="again")
        assert record.delta_error == pytest.approx(pack.records["a2"].delta_error, rel=1e-6)

    def test_is_in_memory_until_saved(self, saved):
        before = tree(saved)
        pack = ex.Pack.open(saved)
        pack.add(random_adapter("new", 4242))
        pack.remove("a0")
        assert tree(saved) == before
        pack.save()
        assert ex.Pack.open(saved).names == ["a1", "a2", "a3", "a4", "new"]
        assert not (saved / "adapters" / "a0").exists()

    def test_leaves_the_other_files_alone(self, saved):
        before = tree(saved)
        with ex.Pack.edit(saved) as pack:
            pack.add(random_adapter("new", 4242))
        after = tree(saved)
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {"subspace_config.json", "README.md"}

    def test_a_module_that_the_subspace_lacks_is_an_error(self, saved):
        pack = ex.Pack.open(saved)
        new = random_adapter("new", 1, modules={**MODULES, "encoder.0.value": (43, 31)})
        with pytest.raises(ModuleNameError, match=r"'new' has 1 of 3 modules .* 'encoder.0.value'.*--carry-missing"):
            pack.add(new)
        assert "new" not in pack.names

    def test_unless_it_may_be_carried(self, saved):
        new = random_adapter("new", 1, modules={**MODULES, "encoder.0.value": (43, 31)})
        with ex.Pack.edit(saved) as pack:
            pack.add(new, carry_missing=True)
        back = ex.Pack.open(saved).adapter("new").modules["encoder.0.value"]
        assert torch.equal(back.down, new.modules["encoder.0.value"].down)
        assert torch.equal(back.up, new.modules["encoder.0.value"].up)
        lost = {"new": replace(ex.Pack.open(saved).records["new"], delta_error=0.9)}
        assert "for new (0.90 of what is not carried)." in loss_warnings.describe_losses(lost, 0.5)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"base": "org/other"}, BaseModelError, "'new' has 'org/other', and the pack has 'org/base'"),
            (
                {"modules": {"encoder.0.query": (41, 30)}},
                ShapeError,
                r"\(41, 30\) in adapter 'new' and \(41, 29\) in the",
            ),
        ],
    )
    def test_what_does_not_belong_is_refused(self, saved, options, error, message):
        with pytest.raises(error, match=message):
            ex.Pack.open(saved).add(random_adapter("new", 1, **options))

    @pytest.mark.parametrize("name", ["a0", "A0"])
    def test_a_name_is_given_once(self, saved, name):
        with pytest.raises(AdapterNameError, match=f"already has an adapter named '{name}'"):
            ex.Pack.open(saved).add(random_adapter(name, 1))

    @pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "x" * 97, "a\n", "ä", "a."])
    def test_a_name_that_is_no_folder_is_refused(self, saved, name):
        with pytest.raises(AdapterNameError, match="is not allowed"):
            ex.Pack.open(saved).add(random_adapter("new", 1), name=name)

    def test_what_is_wrong_with_an_adapter_is_said_without_the_options_of_a_fit(self, saved):
        """Neither `Pack.add` nor `eigenlorax add` can leave an adapter out."""
        one = random_adapter("new", 900)
        module, factors = next(iter(one.modules.items()))
        bad = replace(one, modules={**one.modules, module: replace(factors, down=factors.down * float("nan"))})
        with pytest.raises(NonFiniteError, match="NaN or Inf. Its training has diverged, or the file is dam") as caught:
            ex.Pack.open(saved).add(bad)
        assert "--" not in str(caught.value)
        assert "skip_bad" not in str(caught.value)
        with pytest.raises(NonFiniteError, match=r"exclude_adapters=\['new'\] \(--exclude-adapter new\), or all.*skip"):
            ex.fit([bad, random_adapter("other", 901)])


class TestRemove:
    def test_forgets_the_adapter_and_its_files(self, saved):
        with ex.Pack.edit(saved) as pack:
            pack.remove("a3")
        assert ex.Pack.open(saved).names == ["a0", "a1", "a2", "a4"]
        assert not any("a3" in name for name in tree(saved))

    def test_the_last_one_may_go(self, saved):
        with ex.Pack.edit(saved) as pack:
            for name in pack.names:
                pack.remove(name)
        assert ex.Pack.open(saved).names == []
        assert ex.Pack.open(saved).summary.in_fit is None

    def test_needs_a_name_that_is_there(self, saved):
        with pytest.raises(AdapterNameError, match="no adapter named 'b'.*It has: a0, a1, a2, a3, a4"):
            ex.Pack.open(saved).remove("b")

    def test_a_name_may_come_back_with_other_content(self, saved):
        new = random_adapter("a3", 4242)
        with ex.Pack.edit(saved) as pack:
            pack.remove("a3")
            pack.add(new)
        opened = ex.Pack.open(saved)
        opened.verify()
        assert opened.records["a3"].delta_error == pytest.approx(
            reference.delta_error(new, opened.adapter("a3")), rel=1e-5
        )
        assert sorted(p.name for p in (saved / "adapters").iterdir()) == opened.names


class TestSave:
    def test_an_existing_pack_is_replaced_on_request_only(self, saved):
        other = ex.fit(random_collection(3), n_components=2)
        before = tree(saved)
        with pytest.raises(PackExistsError, match="is a pack already.*--overwrite"):
            other.save(saved)
        assert tree(saved) == before
        other.save(saved, overwrite=True)
        opened = ex.Pack.open(saved)
        opened.verify()
        assert opened.names == ["a0", "a1", "a2"]
        assert len(list(saved.glob("subspace-*"))) == 1

    def test_needs_a_path_once(self):
        with pytest.raises(OptionError, match="not on disk yet"):
            ex.fit(random_collection(), n_components=2).save()

    def test_a_pack_changed_by_another_writer_is_not_overwritten(self, saved):
        slow = ex.Pack.open(saved)
        slow.add(random_adapter("slow", 1))
        with ex.Pack.edit(saved) as quick:
            quick.add(random_adapter("quick", 2))
        with pytest.raises(PackBusyError, match="changed by another process since it was opened"):
            slow.save()
        assert "quick" in ex.Pack.open(saved).names

    def test_elsewhere_it_is_a_whole_copy(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        pack.save(tmp_path / "copy")
        assert {k: v for k, v in tree(tmp_path / "copy").items() if k != ".lock"} == {
            k: v for k, v in tree(saved).items() if k != ".lock"
        }

    def test_an_error_in_an_edit_changes_nothing(self, saved):
        before = tree(saved)

        def edit():
            with ex.Pack.edit(saved) as pack:
                pack.remove("a0")
                pack.remove("zzz")

        with pytest.raises(AdapterNameError, match="no adapter named 'zzz'"):
            edit()
        assert tree(saved) == before


class TestAugment:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_outputs_do_not_change(self, tmp_path, dtype):
        pack = ex.fit(random_collection(), n_components=6, dtype=dtype)
        pack.augment(7, seed=3).save(tmp_path / "more")
        opened = ex.Pack.open(tmp_path / "more")
        assert opened.summary.n_extra == 7
        assert {(s["down"].k, s["up"].k) for s in opened.info.modules.values()} == {(13, 13)}
        for name in pack.names:
            for module, factors in pack.adapter(name).modules.items():
                torch.testing.assert_close(opened.adapter(name).modules[module].down, factors.down, atol=0, rtol=0)
                torch.testing.assert_close(opened.adapter(name).modules[module].up, factors.up, atol=0, rtol=0)

    def test_extra_directions_are_stored_as_their_seed(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        more = pack.augment(7, seed=3)
        more.save(tmp_path / "more")
        sides = 2 * len(MODULES)
        assert more.summary.bytes.basis == pack.summary.bytes.basis + 4 * 7 * sides
        rebuilt = ex.Pack.open(tmp_path / "more").subspace
        for name, bases in more.subspace.modules.items():
            assert torch.equal(rebuilt.modules[name].down.components, bases.down.components)
        assert rebuilt.fingerprint == more.subspace.fingerprint

    def test_a_machine_that_rebuilds_them_differently_says_so(self, saved, tmp_path, monkeypatch):
        from eigenlorax.core import basis

        ex.Pack.open(saved).augment(7, seed=3).save(tmp_path / "more")
        real = basis.seeded_normal_rows
        monkeypatch.setattr(basis, "seeded_normal_rows", lambda *args: real(*args)[:, ::-1].copy())
        with pytest.raises(
            PackDamagedError, match="rebuilds the random components of encoder.0.dense.down differently"
        ):
            ex.Pack.open(tmp_path / "more").subspace.modules  # noqa: B018

    def test_it_helps_an_adapter_from_outside(self, saved):
        pack, new = ex.Pack.open(saved), random_adapter("new", 4242)
        more = pack.augment(20, seed=3)
        assert more.add(new).delta_error < pack.add(new).delta_error

    def test_twice_with_two_seeds(self, saved, tmp_path):
        twice = ex.Pack.open(saved).augment(3, seed=1).augment(4, seed=2)
        twice.save(tmp_path / "twice")
        opened = ex.Pack.open(tmp_path / "twice")
        for name, bases in twice.subspace.modules.items():
            assert torch.equal(opened.subspace.modules[name].up.components, bases.up.components)
            gram = bases.up.components.double() @ bases.up.components.double().mT
            torch.testing.assert_close(gram, torch.eye(13, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_too_many_are_refused(self, saved):
        with pytest.raises(ShapeError, match=r"query.down: 6 .* 24 extra components exceed its 29 dimensions"):
            ex.Pack.open(saved).augment(24, seed=1)


class TestExport:
    def test_names_and_folders_are_checked_first(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        with pytest.raises(AdapterNameError, match="no adapter named 'b'"):
            pack.export(tmp_path / "out", ["a0", "b"])
        assert not (tmp_path / "out").exists()
        pack.export(tmp_path / "out", ["a1"])
        with pytest.raises(PackExistsError, match="a1 exists and is not empty.*--overwrite"):
            pack.export(tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["a1"]
        assert set(pack.export(tmp_path / "out", overwrite=True)) == set(pack.names)

    def test_a_dtype_may_be_asked_for(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        written = pack.export(tmp_path / "out", ["a1"], dtype="bfloat16")
        assert {spec.dtype for spec in ex.read_adapter(written["a1"]).specs.values()} == {torch.bfloat16}


def test_a_pack_is_not_an_adapter(saved):
    with pytest.raises(ValueError, match="is a pack, not an adapter.*eigenlorax export"):
        ex.read_adapter(saved)
    with pytest.raises(ValueError, match="has coefficients of an adapter in a pack"):
        ex.read_adapter(saved / "adapters" / "a0")


def test_an_adapter_with_nothing_but_carried_tensors_can_be_kept(saved):
    key = "base_model.model.embeddings.lora_embedding_A"
    odd = from_factors(
        "odd", {}, carried={key: torch.ones(2, 9)}, base_model="org/base", source_config='{"peft_type": "LORA"}'
    )
    pack = ex.Pack.open(saved)
    record = pack.add(odd)
    assert record.untrained is False
    assert torch.equal(pack.adapter("odd").carried[key], torch.ones(2, 9))


class TestModuleNames:
    """Names that differ by leading components, where a rule alone could not tell which module is meant."""

    def assert_read_back(self, pack, adapters, path):
        pack.save(path)
        opened = ex.Pack.open(path)
        opened.export(path.with_name("out"))
        for source in adapters:
            for back in (opened.adapter(source.name), ex.read_adapter(path.with_name("out") / source.name)):
                assert sorted(back.modules) == sorted(source.modules)
                for module, factors in source.modules.items():
                    wanted, got = (f.scaling * f.up.double() @ f.down.double() for f in (factors, back.modules[module]))
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    def test_a_short_name_that_two_longer_ones_end_with(self, tmp_path):
        shape = (13, 11)
        modules = {"model.layers.0.q": shape, "model.vision.layers.0.q": shape}
        adapters = [
            random_adapter("a", 1, modules={"layers.0.q": shape}),
            random_adapter("b", 2, modules=modules),
        ]
        pack = ex.fit(adapters, energy=1.0, dtype="float32")
        assert set(pack.subspace.modules) == set(modules)
        self.assert_read_back(pack, adapters, tmp_path / "pack")

    def test_an_added_adapter_with_names_that_overlap(self, tmp_path):
        shape = (11, 11)  # square, so that one adapter spans both sides
        first = random_adapter("first", 1, rank=11, modules={"a.m": shape, "b.a.m": shape})
        second = random_adapter("second", 5, modules={"a.m": shape, "m": shape})
        pack = ex.fit([first], energy=1.0, dtype="float32")
        pack.add(second)
        self.assert_read_back(pack, [first, second], tmp_path / "pack")


class TestFileSizes:
    def test_there_are_none_unless_the_pack_is_on_disk_as_it_is(self, tmp_path):
        make_adapters(tmp_path / "in", "a b c")
        pack = ex.fit(tmp_path / "in", n_components=2)
        assert pack.summary.files is None
        pack.save(tmp_path / "pack")
        whole = pack.summary.files
        assert whole.pack == sum(path.stat().st_size for path in (tmp_path / "pack").rglob("*") if path.is_file())
        assert ex.Pack.open(tmp_path / "pack").summary.files == whole
        assert ex.Pack.from_pretrained(tmp_path / "pack", adapters="a").summary.files is None
        pack.remove("a")
        assert pack.summary.files is None
        pack.save()
        assert pack.summary.files.pack < whole.pack
        assert pack.augment(2, seed=1).summary.files is None

    def test_of_adapters_that_had_no_file_the_ratio_is_not_known(self, tmp_path):
        pack = ex.fit([random_adapter("a", 1), random_adapter("b", 2)], n_components=2)
        pack.save(tmp_path / "pack")
        files = pack.summary.files
        assert files.pack > 0
        assert (files.sources, files.ratio, files.ratio_without_heads, files.ratio_with_reports) == (None,) * 4

    def test_a_file_that_is_missing_leaves_them_unknown(self, tmp_path):
        make_adapters(tmp_path / "in", "a b")
        pack = ex.fit(tmp_path / "in", n_components=2)
        pack.save(tmp_path / "pack")
        (tmp_path / "pack" / "adapters" / "b" / "source_config.json").unlink()
        assert ex.Pack.open(tmp_path / "pack").summary.files is None
