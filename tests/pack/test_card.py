"""The model card of packs whose texts want to be YAML, HTML, links or the end of a table; and what it says of paths."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.core import printable
from eigenlorax.errors import SkippedAdapterWarning
from eigenlorax.formats import sources
from eigenlorax.pack import card, manifest_json

HOSTILE = [
    "org/base",
    'org/base"\ntags: [evil]\n---\n<script>alert(1)</script>',
    "<img src=x onerror=alert(1)> & <b>bold</b> <!-- ",
    "a | b || c \\| d \\",
    "![image](https://example.com/x.png) [link](javascript:alert(1)) <https://example.com> https://example.com",
    "`` ` ``` code ~~~ `",
    "\r\n\r\n# Heading\n\n- list\n\n> quote\n\n    code\n\n```\nfence",
    "*emphasis* __strong__ ~~gone~~ $x$ &lt; &#124; \\",
    "\x1b[31m\u202e\ud800",
    " ",
    "|",
]
COMMONMARK = MarkdownIt("gfm-like", {"html": True, "linkify": False})


def elements(tokens):
    """The kinds of a document's elements, but for inline code."""
    found = [token.type for token in tokens if token.type not in ("inline", "text", "code_inline", "softbreak")]
    return found + [kind for token in tokens for kind in elements(token.children or [])]


def shown(tokens):
    """The text of a document."""
    return "".join(
        token.content + shown(token.children or []) if token.type != "inline" else shown(token.children)
        for token in tokens
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The manifest of a pack from which nothing was left out."""
    place = tmp_path_factory.mktemp("made")
    make_adapters(place / "in", "alpha beta")
    ex.fit(place / "in", n_components=3).save(place / "pack")
    return place / "pack"


def changed(pack, fit, **fields):
    """The manifest of a pack, saying something else."""
    found = manifest_json.parse((pack / "subspace_config.json").read_bytes(), pack)
    return replace(found, fit=replace(found.fit, **fit), **fields)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_of_strangers_are_text(plain, hostile):
    fit = {"skipped": {hostile: hostile}, "weighting": hostile, "excluded_modules": [hostile]}
    _, matter, body = card.render(changed(plain, fit, base_model=hostile)).split("---\n", 2)
    usual = changed(plain, {"skipped": {"name": "reason"}})
    _, usual_matter, usual_body = card.render(usual).split("---\n", 2)
    fields = yaml.safe_load(matter)
    assert fields.keys() <= yaml.safe_load(usual_matter).keys()
    assert fields.get("base_model") in (None, "org/base")
    assert fields["tags"] == ["eigenlorax", "lora", "peft"]
    tokens = COMMONMARK.parse(body)
    assert elements(tokens) == elements(COMMONMARK.parse(usual_body))
    assert shown(tokens).count(printable.one_line(hostile)) >= 4


@given(st.text(st.sampled_from("`|\\<>&a *_[]()!\n#\u202e"), max_size=20))
def test_code_shows_any_text_in_a_cell(text):
    document = f"| head | second |\n|---|---|\n| {printable.markdown_code(text)} | end |\n"
    tokens = COMMONMARK.parse(document)
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert {token.type for token in cells[2].children or []} <= {"text", "code_inline"}
    assert shown([cells[2]]).strip() == printable.one_line(text).strip()
    assert cells[3].content == "end"


@pytest.mark.parametrize(
    ("source", "message", "kept"),
    [
        ("in/one", "in/one/adapter_config.json is not valid JSON.", "one/adapter_config.json is not valid JSON."),
        ("../in/one", "../in/one has no adapter_config.json, so", "one has no adapter_config.json, so"),
        (Path("/a b/one"), "/a b/one/x.bin: tensor 'a/b' is (2, 3).", "one/x.bin: tensor 'a/b' is (2, 3)."),
        ("one", "one/adapter_config.json: r is 0; 1/2.", "one/adapter_config.json: r is 0; 1/2."),
        ("s3://bucket/of/one", "s3://bucket/of/one/x.bin is cut.", "one/x.bin is cut."),
        (
            "org/one",
            "/home/me and you/.cache/hub/models--org--one/snapshots/0123abc/adapter_config.json is not valid: https://x.y/z",
            "org--one/adapter_config.json is not valid: https://x.y/z",
        ),
        (None, "of '/data/in/one' and /data/in/two, not ~/three or a/b/c.", "of 'one' and two, not ~/three or a/b/c."),
        (None, "C:\\models\\one\\x.bin is cut.", "x.bin is cut."),
    ],
)
def test_reasons_have_names_but_no_folders(source, message, kept):
    assert sources.without_folders(message, source) == kept


def test_histories_are_listed_beside_adapters(plain, tmp_path):
    pack = ex.Pack.open(plain)
    for step in (10, 20):
        pack.append(plain.parent / "in" / "alpha", step=step, name="run")
    text = (pack.save(tmp_path / "pack") / "README.md").read_text("utf-8")
    history = pack.histories["run"]
    sources, error = 2 * history.latest.source_file_bytes, max(record.delta_error for record in history)
    size = sum({record.file: record.file_bytes for record in history}.values())
    assert f"| `run` | 2 | `20` | {size:,} | {sources:,} | {error:.4f} |" in text
    assert "# 2 LoRA adapters of `org/base` over one basis" in text
    assert 'pack.adapter("alpha")' in text


def test_of_a_pack_of_histories(tmp_path):
    make_adapter(tmp_path / "run" / "checkpoint-10", seed=1)
    pack = ex.Pack.empty()
    pack.append(tmp_path / "run" / "checkpoint-10", lossless=True)
    text = (pack.save(tmp_path / "pack") / "README.md").read_text("utf-8")
    assert "# Versions of LoRA adapters of `org/base`" in text
    assert "| lossless |" in text
    assert "over one basis" not in text
    assert 'ex.write_adapter(pack.adapter("run@latest"), "loras/run-latest")' in text


def test_of_adapters_of_one_name_each_has_its_reason(tmp_path):
    for parent in ("a", "b", "c"):
        make_adapter(tmp_path / parent / "one", seed=1)
        (tmp_path / parent / "one" / "adapter_config.json").write_text("[" if parent != "c" else "[]")
    sound = make_adapter(tmp_path / "sound", seed=2)
    with pytest.warns(SkippedAdapterWarning, match="left out one"):
        pack = ex.fit([*(tmp_path / parent / "one" for parent in "abc"), sound], n_components=2, skip_bad=True)
    skipped = pack.summary.fit.skipped
    assert [*skipped] == ["one", "one (2)", "one (3)"]
    assert skipped["one (3)"].startswith("one/adapter_config.json contains an array")


def test_an_adapter_that_is_not_there_is_left_out_under_its_own_name(tmp_path):
    with pytest.warns(SkippedAdapterWarning, match="left out gone"):
        pack = ex.fit([tmp_path / "gone", make_adapter(tmp_path / "sound", seed=2)], n_components=2, skip_bad=True)
    assert pack.summary.fit.skipped["gone"].startswith("gone does not exist")


@pytest.mark.parametrize(
    ("options", "has_rounding"), [({"max_error": 0.1}, False), ({"n_components": 2, "dtype": "int8"}, True)]
)
def test_rounding_is_left_out_where_it_is_all_of_the_error(tmp_path, options, has_rounding):
    make_adapters(tmp_path / "in", "alpha beta gamma")
    pack = ex.fit(tmp_path / "in", warn_above=1.0, **options)
    text = (pack.save(tmp_path / "pack") / "README.md").read_text("utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| delta error"))
    assert ("of which rounding" in row) == has_rounding
    assert f"mean {pack.summary.in_fit.mean:.4f}, worst {pack.summary.in_fit.worst:.4f}" in row


def test_metadata_are_those_of_the_hub(plain):
    data = ModelCard(card.render(changed(plain, {}))).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("eigenlorax", "org/base", "adapter")
    assert data.tags == ["eigenlorax", "lora", "peft"]
    # the licence is the author's to state
    assert data.license is None
    assert data.pipeline_tag is None


def test_without_a_model_id_there_is_no_relation(plain):
    data = ModelCard(card.render(changed(plain, {}, base_model="/home/me/base"))).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
