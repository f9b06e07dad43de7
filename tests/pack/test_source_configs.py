"""Configs of sources as differences from what they share: the text comes back to the byte, whatever the config is."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eigenlorax as ex
from adapters import MODULES, make_adapter, make_adapters
from eigenlorax.core import keys
from eigenlorax.errors import PackDamagedError
from eigenlorax.pack import source_configs
from planted import tree
from signing import signed_again

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from("abcdef"), JSON)
PEFT = {
    "alpha_pattern": {},
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": 8,
    "task_type": "SEQ_CLS",
    "use_dora": False,
}


def text_of(**fields):
    return json.dumps({**PEFT, **fields}, indent=2, sort_keys=True)


class TestOneConfig:
    @given(
        FIELDS,
        FIELDS,
        st.sampled_from([{"indent": n, "sort_keys": True} for n in (1, 2, 8, 9)] + [{"indent": 2}, {}]),
        st.sampled_from(["", "\n", "\n\n", " "]),
    )
    def test_comes_back_to_the_byte(self, fields, shared, form, end):
        text = json.dumps(fields, **form) + end
        found, parsed = source_configs.from_bytes(source_configs.to_bytes(text, shared), shared)
        assert found == text
        assert json.dumps(parsed) == json.dumps(json.loads(text))

    @pytest.mark.parametrize(
        "text",
        ['{"r": 8, "r": 9}', '{"r":8}', '{\n  "r": NaN\n}', '{"r": 8}\n', '{\n  "a": "\u00e9",\n  "r": 8.0\n}'],
    )
    def test_of_another_form_is_stored_word_for_word(self, text):
        assert source_configs.to_bytes(text, {"r": 8, "a": "é"}) == text.encode()

    def test_one_that_has_the_field_for_differences_itself(self):
        text = json.dumps({"eigenlorax_changed": 1}, indent=2, sort_keys=True)
        assert source_configs.to_bytes(text, PEFT) == text.encode()

    def test_a_number_of_another_type_is_another_value(self):
        text = text_of(lora_alpha=16.0, use_dora=0)
        data = source_configs.to_bytes(text, PEFT)
        assert json.loads(data) == {"eigenlorax_changed": {"lora_alpha": 16.0, "use_dora": 0}}
        assert source_configs.from_bytes(data, PEFT)[0] == text

    @pytest.mark.parametrize(
        "fields",
        [
            {"eigenlorax_changed": []},
            {"eigenlorax_changed": {}, "eigenlorax_removed": "r"},
            {"eigenlorax_changed": {}, "r": 8},
            {"eigenlorax_changed": {}, "eigenlorax_indent": 0},
            {"eigenlorax_changed": {}, "eigenlorax_indent": 10**9},
            {"eigenlorax_changed": {}, "eigenlorax_indent": True},
            {"eigenlorax_changed": {}, "eigenlorax_end": " "},
            {"eigenlorax_changed": {}, "eigenlorax_modules": 1},
            # a history is in no subspace
            {"eigenlorax_changed": {}, "eigenlorax_modules": True},
        ],
    )
    def test_differences_of_another_form_are_refused(self, fields):
        with pytest.raises(ValueError, match="differences of an unknown form"):
            source_configs.from_bytes(json.dumps(fields).encode(), PEFT)

    def test_layouts_and_modules_are_not_repeated(self):
        text = json.dumps({**PEFT, "target_modules": ["k", "q", "v"]}, indent=1, sort_keys=True) + "\n"
        shared = source_configs.shared_fields([text] * 2, modules="vqk")
        assert shared == PEFT
        data = source_configs.to_bytes(text, shared, "vqk")
        assert json.loads(data) == {
            "eigenlorax_changed": {},
            "eigenlorax_end": "\n",
            "eigenlorax_indent": 1,
            "eigenlorax_modules": True,
        }
        assert source_configs.from_bytes(data, shared, "vqk")[0] == text
        # some modules, or another order of them, are listed
        assert b'"target_modules":["k","q","v"]' in source_configs.to_bytes(text, shared, "vqkx")


def test_what_is_shared_is_what_most_have_in_any_order():
    texts = [text_of(target_modules=["q", "v"]), text_of(target_modules=["v", "q"]), text_of(r=4), "{}", "no json"]
    shared = source_configs.shared_fields(texts)
    assert shared == PEFT
    random.Random(1).shuffle(texts)
    assert source_configs.shared_fields(texts) == shared
    assert source_configs.shared_fields(texts[:1]) == {}
    # of two that are as common, the first as a text
    pairs = [text_of(r=n) for n in (9, 5, 9, 5)]
    assert source_configs.shared_fields(pairs)["r"] == 5


def test_fields_that_every_adapter_would_repeat_in_memory_are_not_shared():
    pattern = {f"layer.{n}.query": n for n in range(10_000)}
    assert source_configs.shared_fields([text_of(rank_pattern=pattern)] * 3) == PEFT


class TestPacks:
    @pytest.fixture
    def sources(self, tmp_path):
        """Four sources, of which one's config has another form."""
        make_adapters(tmp_path / "in", "a b c d")
        names = sorted({module.rpartition(".")[2] for module in MODULES})
        for number, name in enumerate("abc"):
            config = json.loads((tmp_path / "in" / name / keys.ADAPTER_CONFIG).read_text())
            fields = {**PEFT, **config, "target_modules": names[number % 2 :] + names[: number % 2]}
            (tmp_path / "in" / name / keys.ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))
        (tmp_path / "in" / "d" / keys.ADAPTER_CONFIG).write_text(json.dumps(config, indent=7))
        return tmp_path / "in"

    def texts(self, sources):
        return {path.name: (path / keys.ADAPTER_CONFIG).read_text() for path in sources.iterdir()}

    @pytest.mark.parametrize("options", [{"n_components": 4}, {"max_error": 0.1}])
    def test_export_gives_the_configs_to_the_byte(self, sources, tmp_path, options):
        folder = ex.fit(sources, **options).save(tmp_path / "pack")
        sizes = {name: (folder / "adapters" / name / keys.SOURCE_CONFIG).stat().st_size for name in "abcd"}
        assert max(sizes[name] for name in "abc") < 120
        opened = ex.Pack.open(folder)
        opened.verify()
        exported = opened.export(tmp_path / "out")
        assert {name: (path / keys.ADAPTER_CONFIG).read_text() for name, path in exported.items()} == self.texts(
            sources
        )

    def test_a_copy_has_the_same_bytes_after_changes_too(self, sources, tmp_path):
        folder = ex.fit(sources, n_components=4).save(tmp_path / "pack")
        before = tree(folder / "adapters")
        with ex.Pack.edit(folder) as pack:
            pack.add(make_adapter(tmp_path / "late", seed=9))
            pack.remove("b")
        after = tree(folder / "adapters")
        assert {path: data for path, data in after.items() if path in before} == {
            path: data for path, data in before.items() if not path.startswith("b/")
        }
        copy = ex.Pack.open(folder).save(tmp_path / "copy")
        assert tree(copy) == tree(folder)
        assert ex.Pack.open(copy).packed("late").source_config == (tmp_path / "late" / keys.ADAPTER_CONFIG).read_text()

    def test_some_of_the_adapters(self, sources, tmp_path):
        folder = ex.fit(sources, n_components=4).save(tmp_path / "pack")
        some = ex.Pack.from_pretrained(folder, adapters=["c", "d"]).save(tmp_path / "some")
        opened = ex.Pack.open(some)
        assert {name: opened.packed(name).source_config for name in opened.names} == {
            name: text for name, text in self.texts(sources).items() if name in "cd"
        }

    def test_a_wrong_file_is_noticed(self, sources, tmp_path):
        folder = ex.fit(sources, n_components=4).save(tmp_path / "pack")
        (folder / "adapters" / "a" / keys.SOURCE_CONFIG).write_text('{"eigenlorax_changed": 1}')
        signed_again(folder)
        with pytest.raises(PackDamagedError, match="differences of an unknown form"):
            ex.Pack.open(folder).packed("a")

    def test_large_shared_fields_are_refused(self, sources, tmp_path):
        folder = ex.fit(sources, n_components=4).save(tmp_path / "pack")
        body = json.loads((folder / keys.MANIFEST).read_text())
        body["source_fields"]["rank_pattern"] = {"x" * 70_000: 1}
        (folder / keys.MANIFEST).write_text(json.dumps(body))
        signed_again(folder)
        with pytest.raises(PackDamagedError, match="source_fields is too large"):
            ex.Pack.open(folder)

    def test_the_folder_of_an_adapter_names_modules_only_where_it_lacks_some(self, tmp_path):
        first = next(iter(MODULES))
        make_adapters(tmp_path / "in", "a b")
        make_adapter(tmp_path / "in" / "part", seed=5, modules={first: MODULES[first]})
        folder = ex.fit(tmp_path / "in", n_components=4).save(tmp_path / "pack")
        configs = {
            name: json.loads((folder / "adapters" / name / keys.ADAPTER_CONFIG).read_text()) for name in ("a", "part")
        }
        assert "target_modules" not in configs["a"]
        assert configs["part"]["target_modules"] == [first]
        opened = ex.Pack.open(folder)
        assert list(opened.adapter("a").modules) == sorted(MODULES)
        assert list(opened.adapter("part").modules) == [first]
