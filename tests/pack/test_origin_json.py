"""`source_file.json`: metadata come back as they were, long ones in few bytes, and hostile ones are refused."""

import base64
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigenlorax.core.origin import Origin
from eigenlorax.pack import origin_json

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
LONG = {"ss_tag_frequency": json.dumps({f"{n}_style": {"a cat": n, "a dog": 2 * n} for n in range(500)})}


def with_deflated(data, **fields):
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = base64.b64encode(compressor.compress(data) + compressor.flush()).decode()
    return json.dumps({"format": "kohya", "spelling": [], "deflated_metadata": text, **fields}).encode()


@given(st.dictionaries(TEXTS, TEXTS), st.integers(0, 99))
def test_comes_back(metadata, repeated):
    origin = Origin("kohya", ("te1",), {name: repeated * text for name, text in metadata.items()})
    assert origin_json.from_bytes(origin_json.to_bytes(origin)) == origin


def test_long_metadata_take_few_bytes():
    data = origin_json.to_bytes(Origin("kohya", (), LONG))
    assert 4 * len(data) < len(json.dumps(LONG))
    assert origin_json.from_bytes(data).metadata == LONG
    assert origin_json.to_bytes(Origin("kohya")) == b'{"format":"kohya","metadata":{},"spelling":[]}\n'


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (with_deflated(b"[]"), "deflated_metadata contains an array"),
        (with_deflated(b'{"a":1}'), "source_file.json.metadata.a is 1"),
        (with_deflated(b'{"a":"\\ud800"}'), "surrogates not allowed"),
        (with_deflated(b"{}", metadata={}), "source_file.json has the fields"),
        (with_deflated(b"{}", deflated_metadata=None), "deflated_metadata is null"),
        (with_deflated(b"{}", deflated_metadata="e30 "), "base64"),
        (with_deflated(b"{}", deflated_metadata="////"), "cannot be inflated"),
        (with_deflated(b"{}", deflated_metadata=base64.b64encode(b"\xaa").decode()), "not one deflated object"),
    ],
)
def test_another_form_is_refused(data, match):
    with pytest.raises(ValueError, match=match):
        origin_json.from_bytes(data)


def test_metadata_beyond_the_limit_are_refused_before_they_are_inflated(monkeypatch):
    monkeypatch.setattr(origin_json, "_MAX_METADATA_BYTES", 10_000)
    with pytest.raises(ValueError, match="at most 10,000 bytes"):
        origin_json.from_bytes(with_deflated(b'{"a":"' + b"b" * 10_000 + b'"}'))
    # such metadata are written as they are
    origin = Origin("kohya", (), {"a": "b" * 10_000})
    assert origin_json.from_bytes(origin_json.to_bytes(origin)) == origin
