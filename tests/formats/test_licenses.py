"""Licences of adapters: in the card beside them, the metadata of their file, and a file LICENSE."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core import license as licences
from eigenlorax.core import printable
from eigenlorax.core.license import MAX_NAME, License
from eigenlorax.formats import licenses

APACHE = "Apache License\n                           Version 2.0, January 2004\n\n   TERMS AND CONDITIONS\n"
CC = "Attribution-NonCommercial 4.0 International\n\n====\n\nCreative Commons Corporation is not a law firm\n"
OTHER = License("other", "flux-1-dev-non-commercial-license", "https://example.com/LICENSE.md")


def card(fields):
    return f"---\nbase_model: org/base\n{fields}\ntags:\n- lora\n---\n# A model\n\nlicense: mit\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (card("license: apache-2.0"), License("apache-2.0")),
        (card("license: 'MIT'  # of the weights"), License("mit")),
        (card("license: Apache 2.0"), License("apache-2.0")),
        (card("license: openrail++"), License("openrail++")),
        (card("license:\n- mit\n- apache-2.0"), License("other", "mit, apache-2.0")),
        (card("license: [mit]"), License("mit")),
        (card("license: no"), License("other", "no")),
        (
            card(f"license: other\nlicense_name: {OTHER.name}\nlicense_link: {OTHER.link}"),
            OTHER,
        ),
        (card("license: other\nlicense_name: Ours\nlicense_link: LICENSE"), License("other", "Ours")),
        (card("license: other\nlicense_link: javascript:alert(1)"), License("other")),
        (card("license_name: Ours"), License("other", "Ours")),
        # tags are ignored, and nothing runs
        (card("license: !!python/object/apply:os.system [true]"), License("other", "true")),
        # malformed elsewhere: the Hub shows no such card, but the licence is stated
        (card("tags: [\nlicense: mit\nmodel: {"), License("mit")),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", License("mit")),
        ("---\nlicense: mit\n---", License("mit")),
        (card("license: unknown"), None),
        (card("license:"), None),
        (card("license: null"), None),
        (card("license: {mit: yes}"), None),
        (card("license: [[mit]]"), None),
        (card("license: 'mit"), None),
        (card("license: *a"), None),
        (card("model:\n  license: mit"), None),
        ("# A model\n\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_card(tmp_path, text, expected):
    folder = make_adapter(tmp_path / "alpha", seed=1)
    (folder / "README.md").write_bytes(text.encode())
    assert ex.read_adapter(folder).license == expected


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe---\nlicense: mit\n---\n", b"---\n" + b"a: b\n" * 20_000 + b"license: mit\n---\n", b"x" * (2 << 20)],
)
def test_a_card_that_cannot_be_read_states_nothing(tmp_path, content):
    folder = make_adapter(tmp_path / "alpha", seed=1)
    (folder / "README.md").write_bytes(content)
    assert ex.read_adapter(folder).license is None


def test_a_card_that_is_a_folder_or_a_broken_link(tmp_path):
    folder = make_adapter(tmp_path / "alpha", seed=1)
    (folder / "README.md").mkdir()
    (folder / "LICENSE").symlink_to(tmp_path / "gone")
    assert ex.read_adapter(folder).license is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MIT License\n\nCopyright (c) 2026 A\n", License("mit")),
        (APACHE, License("apache-2.0")),
        (CC, License("cc-by-nc-4.0")),
        ("\n\nLLAMA X COMMUNITY LICENSE AGREEMENT\nVersion\n", License("other", "LLAMA X COMMUNITY LICENSE AGREEMENT")),
        ("MIT Licensed by nobody\n", License("other", "MIT Licensed by nobody")),
        (" \n", None),
    ],
)
def test_a_text_of_a_licence(tmp_path, text, expected):
    folder = make_adapter(tmp_path / "alpha", seed=1)
    (folder / "LICENSE").write_text(text)
    assert ex.read_adapter(folder).license == expected
    (folder / "README.md").write_text(card("license: gemma"))
    assert ex.read_adapter(folder).license == License("gemma")


def kohya(path, metadata):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(16, 2)}
    path.parent.mkdir(exist_ok=True)
    save_file({**tensors, f"{layer}.alpha": torch.tensor(2.0)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("file", ["style.safetensors", "pytorch_lora_weights.safetensors"])
def test_of_a_single_file(tmp_path, file):
    path = kohya(tmp_path / "loras" / file, {"modelspec.license": "CreativeML OpenRAIL-M"})
    (path.parent / "README.md").write_text(card("license: mit"))
    assert ex.read_adapter(path).license == License("creativeml-openrail-m")
    kohya(path, {"modelspec.title": "style"})
    assert ex.read_adapter(path).license == License("mit")
    # the licence of a folder of an adapter, and of many things beside a loose file
    (path.parent / "README.md").unlink()
    (path.parent / "LICENSE").write_text(APACHE)
    is_folder = file == "pytorch_lora_weights.safetensors"
    assert ex.read_adapter(path).license == (License("apache-2.0") if is_folder else None)


def test_of_a_gguf_file():
    stated = {"general.license": "other", "general.license.name": OTHER.name, "general.license.link": OTHER.link}
    assert licenses.of_gguf(stated) == OTHER
    assert licenses.of_gguf({"general.license": ["mit"], "general.name": "x"}) is None


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_any_text_becomes_a_short_line(license, name, link):
    found = licences.from_fields(license, name, link)
    if found is not None:
        assert all(len(text) <= MAX_NAME for text in (found.id, found.name or ""))
        assert printable.one_line(found.title) == found.title
        # parsing it again changes nothing
        assert licences.from_fields(found.id, found.name, found.link) == found


@pytest.mark.parametrize(
    "fields",
    [("MIT",), ("",), ("mit", ""), ("mit", "two\nlines"), ("mit", "x" * (MAX_NAME + 1)), ("mit", None, "file:///x")],
)
def test_fields_of_another_form(fields):
    with pytest.raises(ValueError, match="do not describe a licence"):
        License(*fields)
