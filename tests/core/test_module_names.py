"""Modules under different names, and which of them are the same."""

import pytest

from eigenlorax.core import module_names, renamed_modules
from eigenlorax.errors import ModuleNameError

OLD_VIT = [
    "vit.encoder.layer.3.attention.attention.query",
    "vit.encoder.layer.3.attention.attention.value",
    "vit.encoder.layer.3.attention.output.dense",
    "vit.encoder.layer.3.intermediate.dense",
    "vit.encoder.layer.3.output.dense",
]
NEW_VIT = [
    "vit.layers.3.attention.q_proj",
    "vit.layers.3.attention.v_proj",
    "vit.layers.3.attention.o_proj",
    "vit.layers.3.mlp.fc1",
    "vit.layers.3.mlp.fc2",
]


class TestOneNamePerModule:
    def test_the_longest_form_is_kept(self):
        found = module_names.canonical_names([["encoder.q", "encoder.v"], ["bert.encoder.q"], ["encoder.v"]])
        assert found == {"encoder.q": "bert.encoder.q", "bert.encoder.q": "bert.encoder.q", "encoder.v": "encoder.v"}

    def test_chains_end_at_the_longest(self):
        found = module_names.canonical_names([["q.w"], ["p.q.w"], ["o.p.q.w"]])
        assert set(found.values()) == {"o.p.q.w"}
        assert module_names.resolve("q.w", found.values()) == "o.p.q.w"

    def test_two_of_one_adapter_stay_two(self):
        found = module_names.canonical_names([["0.q", "decoder.0.q"], ["0.q"]])
        assert found == {"0.q": "0.q", "decoder.0.q": "decoder.0.q"}

    def test_a_chain_that_would_join_two_of_one_adapter_is_an_error(self):
        with pytest.raises(ModuleNameError, match="'q.w' and 'o.p.q.w' of one adapter are one module"):
            module_names.canonical_names([["q.w", "o.p.q.w"], ["p.q.w"]])

    def test_two_longer_forms_are_an_error(self):
        with pytest.raises(ModuleNameError, match="'q.w' of one adapter could be 'a.q.w' or 'b.q.w'"):
            module_names.canonical_names([["q.w"], ["a.q.w"], ["b.q.w"]])


class TestResolve:
    def test_exact_before_suffix(self):
        assert module_names.resolve("0.q", ["0.q", "decoder.0.q"]) == "0.q"
        assert module_names.resolve("bert.0.q", ["0.q"]) == "0.q"
        assert module_names.resolve("0.q", ["bert.0.q"]) == "bert.0.q"
        assert module_names.resolve("0.q", ["10.q", "0.v"]) is None

    def test_ambiguity_is_an_error(self):
        with pytest.raises(ModuleNameError, match="'0.q' fits two modules of the subspace, 'a.0.q' and 'b.0.q'"):
            module_names.resolve("0.q", ["a.0.q", "b.0.q"])

    def test_two_modules_of_one_adapter_never_share_a_place(self):
        assert module_names.resolve_all(["0.q", "decoder.0.q"], ["decoder.0.q"]) == {
            "0.q": None,
            "decoder.0.q": "decoder.0.q",
        }

    def test_two_modules_of_one_adapter_are_never_one(self):
        with pytest.raises(ModuleNameError, match="'x.m' and 'y.x.m' of one adapter both fit the module 'm'"):
            module_names.resolve_all(["x.m", "y.x.m"], ["m"])


class TestRenamedModules:
    """What transformers 5 calls otherwise than transformers 4 did."""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (OLD_VIT, NEW_VIT),
            (
                ["dinov2.encoder.layer.1.attention.attention.key", "dinov2.encoder.layer.1.attention.output.dense"],
                ["dinov2.encoder.layer.1.attention.k_proj", "dinov2.encoder.layer.1.attention.o_proj"],
            ),
            (
                ["swin.encoder.layers.0.blocks.1.attention.self.query", "swin.encoder.layers.0.blocks.1.output.dense"],
                ["swin.encoder.layers.0.blocks.1.attention.q_proj", "swin.encoder.layers.0.blocks.1.mlp.fc2"],
            ),
            (
                ["segformer.encoder.block.0.1.attention.self.value", "segformer.encoder.block.0.1.mlp.dense1"],
                ["segformer.stages.0.blocks.1.attention.v_proj", "segformer.stages.0.blocks.1.mlp.fc1"],
            ),
            (
                ["model.decoder.layers.2.encoder_attn.out_proj", "model.decoder.layers.2.fc1"],
                ["model.decoder.layers.2.encoder_attn.o_proj", "model.decoder.layers.2.mlp.fc1"],
            ),
            (
                ["language_model.model.layers.0.mlp.up_proj", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"],
                [
                    "model.language_model.layers.0.mlp.up_proj",
                    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
                ],
            ),
            (
                ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"],
                ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1"],
            ),
        ],
        ids=["vit", "dinov2", "swin", "segformer", "detr", "llava", "clip"],
    )
    def test_are_found_under_either_name(self, old, new):
        assert module_names.resolve_all(old, new) == dict(zip(old, new, strict=True))
        assert module_names.resolve_all(new, old) == dict(zip(new, old, strict=True))
        assert [module_names.resolve(name, new) for name in old] == new
        assert [module_names.resolve(name, old) for name in new] == old

    def test_with_a_leading_component_more_or_less(self):
        assert module_names.resolve("encoder.layer.3.output.dense", NEW_VIT) == NEW_VIT[-1]
        assert module_names.resolve("layers.3.attention.v_proj", OLD_VIT) == OLD_VIT[1]

    def test_what_fits_as_it_is_goes_first(self):
        names = ["a.encoder.layer.0.output.dense", "a.layers.0.mlp.fc2"]
        assert module_names.resolve_all(names, names[1:]) == {names[0]: None, names[1]: names[1]}
        assert module_names.resolve_all(names, ["b." + names[1]]) == {names[0]: None, names[1]: "b." + names[1]}

    def test_names_of_bert_stay_apart_from_those_of_others(self):
        assert module_names.resolve("encoder.layer.0.attention.self.query", ["vit.layers.0.attention.q_proj"]) is None

    def test_two_that_fit_are_an_error(self):
        with pytest.raises(
            ModuleNameError, match=r"'encoder.layer.0.output.dense' fits two modules .* 'a.l.* and 'b.l"
        ):
            module_names.resolve("encoder.layer.0.output.dense", ["a.layers.0.mlp.fc2", "b.layers.0.mlp.fc2"])

    def test_of_two_adapters_are_one_module_of_the_newest_name(self):
        found = module_names.canonical_names([OLD_VIT, NEW_VIT, ["encoder.layer.3.output.dense"]])
        assert found == {**dict(zip(OLD_VIT, NEW_VIT, strict=True)), **{n: n for n in NEW_VIT}} | {
            "encoder.layer.3.output.dense": NEW_VIT[-1]
        }

    def test_of_old_adapters_alone_keep_their_names(self):
        assert module_names.canonical_names([OLD_VIT, OLD_VIT[:2]]) == {name: name for name in OLD_VIT}

    def test_of_a_short_new_and_a_long_old_name_the_module_has_the_long_one(self):
        found = module_names.canonical_names([["layers.3.mlp.fc1"], ["vit.encoder.layer.3.intermediate.dense"]])
        assert set(found.values()) == {"vit.encoder.layer.3.intermediate.dense"}

    def test_both_names_in_one_adapter_are_an_error(self):
        with pytest.raises(ModuleNameError, match="of one adapter could be the same module, which transformers"):
            module_names.canonical_names([["x.intermediate.dense", "x.mlp.fc1"], ["x.mlp.fc1"]])

    @pytest.mark.parametrize(
        "name", ["bert.encoder.layer.0.attention.self.key", "model.layers.0.self_attn.q_proj", "x"]
    )
    def test_a_name_stays_one_in_its_newest_form(self, name):
        assert renamed_modules.newest_name(renamed_modules.newest_name(name)) == renamed_modules.newest_name(name)
