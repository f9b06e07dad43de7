"""Exports in the dtype of their sources: which one that is, what rounding adds to the error, and that PEFT loads it."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import eigenlorax as ex
import reference
from adapters import change_tensors, make_adapter, make_adapters
from eigenlorax.core import keys
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import PackDamagedError, RoundingWarning
from eigenlorax.pack import export
from hostile import change_json
from planted import random_factors, shared_collection
from signing import signed_again
from tiny import make_bert

NARROW = [torch.float16, torch.bfloat16]
REFERENCE_PACKS = Path(__file__).parents[1] / "data" / "packs"


def dtypes_of(folder):
    """The dtypes in an adapter's file."""
    return {tensor.dtype for tensor in load_file(folder / keys.ADAPTER_WEIGHTS).values()}


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("size", [{"n_components": 3}, {"max_error": 0.2}])
def test_adapters_that_are_held_have_the_bytes_of_those_that_are_read_twice(size, dtype, tmp_path, monkeypatch):
    make_adapters(tmp_path / "in", "a b c", shared=4)
    pack = ex.fit(tmp_path / "in", **size, warn_above=1.0)
    opened = ex.Pack.open(pack.save(tmp_path / "pack"))
    held = opened.export(tmp_path / "held", dtype=dtype)
    monkeypatch.setattr(export, "HELD_BYTES", 0)
    for name, path in opened.export(tmp_path / "read", dtype=dtype).items():
        for file in (keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS):
            assert (path / file).read_bytes() == (held[name] / file).read_bytes()
        plain = opened.adapter(name, dtype)
        tensors = load_file(path / keys.ADAPTER_WEIGHTS)
        for module, factors in plain.modules.items():
            assert torch.equal(tensors[keys.lora_key(module, "up")], factors.up)


class TestDtype:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_numbers_that_the_subspace_holds_come_back_to_the_bit(self, dtype, tmp_path):
        make_adapters(tmp_path / "in", "a b c", shared=4, dtype=dtype)
        ex.fit(tmp_path / "in", energy=1.0, dtype="float32").save(tmp_path / "pack")
        for name, path in ex.Pack.open(tmp_path / "pack").export(tmp_path / "out").items():
            before, after = (load_file(f / keys.ADAPTER_WEIGHTS) for f in (tmp_path / "in" / name, path))
            assert dtypes_of(path) == {dtype}
            for key in before:
                # the numbers next to zero have a finer grid than the float32 of the pack
                torch.testing.assert_close(after[key], before[key], rtol=torch.finfo(dtype).eps, atol=1e-6)
            equal = [torch.eq(before[key], after[key]).float().mean() for key in before]
            assert min(equal) > 0.95
            sizes = [(f / keys.ADAPTER_WEIGHTS).stat().st_size for f in (tmp_path / "in" / name, path)]
            assert sizes[0] == sizes[1]

    @pytest.mark.parametrize("options", [{"n_components": 3}, {"max_error": 0.3}, {"energy": 0.9, "dtype": "int8"}])
    def test_each_adapter_has_that_of_its_own_source(self, options, tmp_path):
        names = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
        for seed, (name, dtype) in enumerate(names.items()):
            make_adapter(tmp_path / "in" / name, seed=seed, dtype=dtype)
        ex.fit(tmp_path / "in", **options, warn_above=1.0).save(tmp_path / "pack")
        opened = ex.Pack.open(tmp_path / "pack")
        for name, path in opened.export(tmp_path / "out").items():
            assert dtypes_of(path) == {names[name]}
            assert opened.export_errors(name).dtype == str(names[name]).removeprefix("torch.")
        for path in opened.export(tmp_path / "asked", dtype="float32").values():
            assert dtypes_of(path) == {torch.float32}

    @pytest.mark.parametrize(
        ("first", "second", "widest"),
        [
            (torch.float16, torch.bfloat16, torch.float32),
            (torch.float16, torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ],
    )
    def test_an_adapter_of_several_dtypes_has_the_widest(self, first, second, widest):
        one, two = random_factors(3, 41, 29, seed=1), random_factors(3, 53, 37, seed=2)
        mixed = {
            "encoder.0.query": LoRAFactors(one.down.to(first), one.up.to(second), 2.0),
            "encoder.0.dense": LoRAFactors(two.down.to(first), two.up.to(first), 2.0),
        }
        packed = ex.fit([from_factors("mixed", mixed, base_model="org/base")], energy=1.0).packed("mixed")
        assert packed.source_dtype == widest

    def test_heads_and_modules_outside_the_subspace_keep_theirs(self, tmp_path):
        make_adapter(tmp_path / "in" / "a", seed=1, dtype=torch.float16, head=(2, 31))
        pack = ex.fit(tmp_path / "in", n_components=2, exclude_modules="encoder.layer.1.query", dtype="float32")
        before, after = (
            load_file(f / keys.ADAPTER_WEIGHTS)
            for f in (tmp_path / "in" / "a", *pack.export(tmp_path / "out").values())
        )
        assert {key: tensor.dtype for key, tensor in after.items()} == {k: t.dtype for k, t in before.items()}
        kept = [key for key in before if "classifier" in key or "layer.1" in key]
        assert len(kept) == 3
        assert all(torch.equal(before[key], after[key]) for key in kept)

    def test_it_outlives_changes_of_the_pack(self, tmp_path):
        make_adapters(tmp_path / "in", "a b", dtype=torch.float16)
        make_adapter(tmp_path / "late", seed=9, dtype=torch.bfloat16)
        pack = ex.fit(tmp_path / "in", n_components=3, dtype="float32")
        pack.add(tmp_path / "late", warn_above=1.0)
        expected = {"a": torch.float16, "b": torch.float16, "late": torch.bfloat16}
        changed = {
            "augmented": pack.augment(2, seed=1),
            "refitted": ex.refit(pack, n_components=2, warn_above=1.0).pack,
            "coded": ex.refit(pack, max_error=0.2).pack,
        }
        for kind, other in changed.items():
            other.save(tmp_path / kind)
            opened = ex.Pack.open(tmp_path / kind)
            assert {name: opened.packed(name).source_dtype for name in opened.names} == expected, kind

    def test_packs_that_do_not_say_it_are_exported_as_before(self, tmp_path):
        for name in ("float16", "coded-terms", "bfloat16"):
            pack = ex.Pack.open(REFERENCE_PACKS / name)
            assert {pack.packed(each).source_dtype for each in pack.names} == {None}
            for path in pack.export(tmp_path / name).values():
                factors = {k: t.dtype for k, t in load_file(path / keys.ADAPTER_WEIGHTS).items() if ".lora_" in k}
                assert set(factors.values()) == {torch.float32}

    @pytest.mark.parametrize("claimed", ["int8", "float8", 16, ["float16"], ""])
    def test_a_dtype_that_is_none_is_damage(self, claimed, tmp_path):
        make_adapter(tmp_path / "in" / "a", seed=1)
        ex.fit(tmp_path / "in", n_components=2).save(tmp_path / "pack")
        change_json(keys.ADAPTER_CONFIG, lambda config: {**config, keys.SOURCE_DTYPE: claimed})(tmp_path / "pack")
        signed_again(tmp_path / "pack")
        with pytest.raises(PackDamagedError, match=r"source_dtype|dtype must be one of"):
            ex.Pack.open(tmp_path / "pack").packed("a")


class TestErrors:
    @pytest.mark.parametrize("dtype", NARROW)
    @pytest.mark.parametrize("options", [{"max_error": 0.1}, {"n_components": 4}])
    def test_the_bound_holds_for_the_file_that_is_written(self, dtype, options, tmp_path):
        originals, _ = shared_collection(5, noise=0.2, dtype=dtype)
        pack = ex.fit(originals, **options, warn_above=1.0)
        for name, path in pack.export(tmp_path).items():
            (original,) = (adapter for adapter in originals if adapter.name == name)
            errors = pack.export_errors(name)
            measured = reference.delta_error(original, ex.read_adapter(path))
            assert errors.delta_error == pack.records[name].delta_error
            assert errors.rounding == pack.export_rounding(name)
            assert measured <= errors.bound < errors.delta_error + 0.01
            rounding = reference.delta_error(ex.read_adapter(path), pack.adapter(name, torch.float64))
            assert rounding == pytest.approx(errors.rounding, rel=1e-2)

    def test_it_is_of_the_modules_that_the_pack_has_in_its_subspace(self, tmp_path):
        # one that dwarfs the others would hide their rounding
        make_adapter(tmp_path / "in" / "a", seed=1, dtype=torch.bfloat16)
        loud = "encoder.layer.1.query"
        change_tensors(
            tmp_path / "in" / "a", lambda found: [t.mul_(1e3) for key, t in found.items() if f"{loud}.lora_A" in key]
        )
        pack = ex.fit(tmp_path / "in", max_error=0.1, exclude_modules=loud)
        assert 1e-3 < pack.export_rounding("a") < 5e-3

    def test_digits_that_float16_lacks_are_warned_of_as_with_dtype(self, tmp_path):
        small = {"encoder.0.query": random_factors(3, 41, 29, seed=1, size=1e-6, dtype=torch.float16)}
        pack = ex.fit([from_factors("small", small, base_model="org/base")], max_error=0.1)
        with pytest.warns(RoundingWarning, match="'small': rounding to float16 .* Use bfloat16 or float32"):
            pack.export(tmp_path / "out")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pack.export(tmp_path / "wide", dtype="float32")


@pytest.mark.parametrize("dtype", NARROW)
def test_peft_loads_what_was_half_the_size(dtype, tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(make_bert(), config)
    model.to(dtype).save_pretrained(tmp_path / "in" / "a")
    before = (tmp_path / "in" / "a" / keys.ADAPTER_WEIGHTS).stat().st_size
    pack = ex.fit(tmp_path / "in", max_error=0.05)
    path = pack.export(tmp_path / "out")["a"]
    assert dtypes_of(path) == {dtype}
    assert (path / keys.ADAPTER_WEIGHTS).stat().st_size == before
    assert json.loads((path / keys.ADAPTER_CONFIG).read_bytes())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(make_bert(), path).base_model.model.eval()
    exact = pack.adapter("a", torch.float64)
    for module, factors in exact.modules.items():
        update = factors.scaling * factors.up @ factors.down
        delta = loaded.get_submodule(module).get_delta_weight("default").double()
        assert (delta - update).norm() < 6e-3 * update.norm()
