"""The manifest: a change of its bytes is noticed, and what a mistaken tool signed is refused before it is believed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import eigenlorax as ex
from eigenlorax.core import atomic_files, keys
from eigenlorax.errors import PackDamagedError, PackVersionError
from eigenlorax.pack import card, manifest_json, subspace_json
from planted import random_adapter, random_collection
from versions import older, unfolded

PATH = Path("pack", keys.MANIFEST)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("pack") / "pack"
    ex.fit(random_collection(2), n_components=4).augment(2, seed=7).save(place)
    return (place / keys.MANIFEST).read_bytes()


def signed(body):
    """A manifest of this content whose digest fits."""
    body = {key: value for key, value in body.items() if key != "digest"}
    canonical = json.dumps(body, indent=1, sort_keys=True) + "\n"
    return json.dumps({**body, "digest": atomic_files.digest(canonical.encode())}).encode()


def places(value, path=()):
    """The path to everything in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(data, path, change):
    body = json.loads(data)
    *parents, last = path
    holder = body
    for key in parents:
        holder = holder[key]
    change(holder, last)
    return signed(body)


def changed_canonically(data, path, value):
    """The manifest's bytes with another value in one place, as a writer of ours has them."""
    body = json.loads(changed(data, path, put(value)))
    return (json.dumps(body, separators=(",", ":"), sort_keys=True) + "\n").encode()


def put(value):
    return lambda holder, key: holder.__setitem__(key, value)


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_are_read_and_written_as_the_newest(data, version):
    found = manifest_json.parse(signed(older(json.loads(data), version)), PATH)
    assert (found.fit.auto, found.fit.max_error, found.fit.n_components) == (False, None, 4)
    assert (found.fit.solver, found.subspace.n_extra) == ("exact", 2)
    # what the fingerprint was before the augmentation was not noted then
    # nor were configs stored as differences
    whole = changed(data, ("source_fields",), put({}))
    assert manifest_json.to_bytes(found) == changed_canonically(whole, ("subspace", "growth", 0, "fingerprint"), None)


@pytest.mark.parametrize(
    ("version", "path", "value", "message"),
    [
        (1, ("fit", "auto"), True, r"fit has the fields \['auto'\], which version 1 lacks"),
        (2, ("fit", "solver"), "exact", r"fit has the fields \['solver'\], which version 2 lacks"),
        (2, ("adapters", "a0", "bound"), False, r"adapters.a0 has the fields \['bound'\], which version 2 lacks"),
        (5, ("adapters", "a0", "head_error"), 0.0, r"adapters.a0 has the fields \['head_error'\], which version 5"),
        (5, ("fit", "purpose"), None, r"fit has the fields \['purpose'\], which version 5 lacks"),
        (2, ("subspace", "growth"), [], "the field growth, which version 2 lacks"),
        (2, ("subspace", "augmentations"), ..., "subspace.augmentations is missing"),
        (2, ("subspace", "augmentations", 0, "n_extra"), 0, "a step of growth appends nothing"),
        (2, ("subspace", "augmentations"), [{"n_extra": 1, "seed": 7}] * 2, "one seed"),
        (2, ("subspace", "modules", "encoder.0.query", "down", "grown"), [2], "modules.encoder.0.query.down has"),
    ],
)
def test_of_an_earlier_version_what_does_not_belong_there_is_refused(data, version, path, value, message):
    change = (lambda holder, key: holder.pop(key)) if value is ... else put(value)
    with pytest.raises(PackDamagedError, match=f"{PATH} does not follow the pack format: .*{message}"):
        manifest_json.parse(changed(signed(older(json.loads(data), version)), path, change), PATH)


def test_auto_goes_with_a_number_of_components(data):
    assert (
        manifest_json.parse(changed(data, ("fit", "auto"), put(True)), PATH).fit.size == "at most 4 components (auto)"
    )
    body = json.loads(data)
    body["fit"] |= {"auto": True, "n_components": None, "energy": 0.5}
    with pytest.raises(PackDamagedError, match="fit.auto goes with n_components"):
        manifest_json.parse(signed(body), PATH)


def test_what_is_written_is_read(data):
    found = manifest_json.parse(data, PATH)
    assert manifest_json.to_bytes(found) == data
    assert manifest_json.parse(signed(json.loads(data)), PATH) == found


def test_a_flip_of_any_byte_is_noticed_unless_it_says_the_same(data):
    unnoticed = 0
    for index in range(len(data)):
        flipped = bytearray(data)
        flipped[index] ^= 1
        try:
            found = manifest_json.parse(bytes(flipped), PATH)
        except (PackDamagedError, PackVersionError) as error:
            assert str(error).startswith(str(PATH))  # noqa: PT017
        else:
            # the last digit of a float may be one of several that are read as the same number
            assert manifest_json.to_bytes(found) == data
            unnoticed += 1
    assert unnoticed < 10


def test_a_cut_anywhere_is_noticed(data):
    # without its last byte, a newline, it still says the same
    for end in range(0, len(data) - 1, 7):
        with pytest.raises(PackDamagedError, match=f"{PATH} is not valid JSON.*Restore the pack"):
            manifest_json.parse(data[:end], PATH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"null", "is not the manifest of a pack"),
        (b"{}", "is not the manifest of a pack"),
        (b'{"format_version": true}', "is not the manifest of a pack"),
        (b'{"format_version": "1"}', "is not the manifest of a pack"),
        (b'{"format_version": 1}', "digest does not fit"),
        (b'{"format_version": 1, "fit": NaN}', "NaN is not a JSON number"),
        (b'{"format_version": 1, "fit": 1e999}', "has values that no manifest can have"),
        (b'{"format_version": 1, "fit": ' + b"[" * 600 + b"]" * 600 + b"}", "digest does not fit|has values that no"),
    ],
)
def test_what_is_no_manifest(text, message):
    with pytest.raises(PackDamagedError, match=f"{PATH}.*{message}"):
        manifest_json.parse(text, PATH)


def test_a_newer_format_is_refused_before_anything_else(data):
    newer = signed({"format_version": 9, "eigenlorax_version": "9.1", "anything": []})
    with pytest.raises(PackVersionError, match="pack format 9 .*eigenlorax 9.1.*pip install --upgrade eigenlorax"):
        manifest_json.parse(newer, PATH)
    with pytest.raises(PackVersionError, match="pack format 9"):
        manifest_json.parse(json.dumps({**json.loads(data), "format_version": 9}).encode(), PATH)


FREE = {("eigenlorax_version",), ("digest",)}
# may be missing, where it is the same as the delta error
ROUNDING = "rounding_error"
# any number of JSON may stand for a float, and null where nothing was stated
ALIKE = {float: (int, float)}
OPTIONAL = {
    ("base_model_name_or_path",),
    ("revision",),
    ("fit", "n_components"),
    ("fit", "energy"),
    ("fit", "max_error"),
    ("fit", "max_bytes"),
    ("fit", "ratio"),
    ("fit", "head_error"),
    ("fit", "purpose"),
    ("shared_fields", "parent"),
    ("subspace", "growth", 0, "fingerprint"),
    ("subspace", "growth", 0, "seed"),
}


def is_free(path):
    """Whether anything may be there. Fields of configs are whatever sources have."""
    return path in FREE or (path[0] == "source_fields" and len(path) > 1)


def test_a_field_of_another_type_is_refused_though_the_digest_fits(data):
    body, refused = json.loads(data), 0
    for path in places(body):
        if is_free(path):
            continue
        value = body
        for key in path:
            value = value[key]
        for wrong in (None, True, 3, 0.5, "text", [], [None], {}, {"text": None}):
            fits = type(wrong) in ALIKE.get(type(value), (type(value),))
            if fits or (path in OPTIONAL and None in (value, wrong)):
                continue
            with pytest.raises((PackDamagedError, PackVersionError), match=str(PATH)):
                manifest_json.parse(changed(data, path, put(wrong)), PATH)
            refused += 1
    assert refused > 500


def test_a_field_that_is_missing_or_unknown_is_refused_though_the_digest_fits(data):
    for path in places(json.loads(data)):
        # adapters, steps of growth, ranks and modules are as many as there are
        optional = (
            is_free(path)
            or path[-1] == ROUNDING
            or path[:-1] in {("adapters",), ("subspace", "modules"), ("fit", "skipped")}
        )
        if not optional and isinstance(path[-1], str):
            with pytest.raises(PackDamagedError, match=str(PATH)):
                manifest_json.parse(changed(data, path, lambda holder, key: holder.pop(key)), PATH)
    for path in (
        ("fit", "more"),
        ("subspace", "more"),
        ("adapters", "a0", "more"),
        ("adapters", "a0", "files", "more"),
        ("shared_fields", "more"),
        ("shared_fields", "delta_error"),
    ):
        with pytest.raises(PackDamagedError, match="more|files|shared_fields has the fields"):
            manifest_json.parse(changed(data, path, put("text")), PATH)


def test_long_lists_of_ranks_are_not_shared(data):
    found = manifest_json.parse(data, PATH)
    entry = found.adapters["a0"]
    long = replace(entry, record=replace(entry.record, ranks=list(range(1, 66))))
    written = manifest_json.to_bytes(replace(found, adapters={"a0": long, "a1": long}))
    assert "ranks" not in json.loads(written)["shared_fields"]
    assert manifest_json.parse(written, PATH).adapters["a1"] == long


SIDE = ("subspace", "modules", "encoder.0.query", "down")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "other", "'other'"),
        (("format_version",), 0, "0"),
        (("subspace", "file"), "../../secret", "subspace.file is '../../secret'"),
        (("subspace", "file"), "adapters", "subspace.file"),
        (("adapters", "a0", "files", "../../../secret"), "0" * 64, "files"),
        (("adapters", "../a"), {}, "adapter name '../a' is not allowed"),
        (("subspace", "dtype"), "int3", "dtype"),
        (("subspace", "reference_bytes"), -1, "reference_bytes is not 0 to stored_bytes"),
        (("subspace", "reference_bytes"), 10**9, "reference_bytes is not 0 to stored_bytes"),
        (("shared_fields", "ranks"), [3] * 65, "more than 64 ranks"),
        (("shared_fields", "files"), {"adapter_model.safetensors": "0" * 64}, "may have .*source_config.json"),
        (("adapters", "a0", "files"), {}, "an adapter's files"),
        (("subspace", "shared_fields", "square"), 1.0, r"subspace.shared_fields has the fields .*'square'"),
        (("subspace", "shared_fields", "grown"), [0] * 40_000, "of which the product may be 65,536 at most"),
        (("subspace", "shared_fields", "k"), 1000, "k is out of range"),
        (("subspace", "modules", "encoder.0.query", "sideways"), {}, "modules.encoder.0.query.down has the fields"),
        (("coefficient_dtype",), "complex64", "dtype"),
        (
            ("format_version",),
            1,
            r"fit has the fields \['auto', 'head_error', 'max_bytes', .*\], which version 1 lacks",
        ),
        (("fit", "solver"), "lucky", "fit.solver is 'lucky'"),
        (("fit", "purpose"), "fun", "fit.purpose is 'fun'"),
        (("fit", "head_error"), 1.0, "fit.head_error is 1.0"),
        (("fit", "energy"), 0.5, "one of n_components, energy, max_error, max_bytes and ratio"),
        (("fit", "max_error"), 0.5, "one of n_components, energy, max_error, max_bytes and ratio"),
        (("fit", "n_components"), None, "one of n_components, energy, max_error, max_bytes and ratio"),
        ((*SIDE, "k"), 1000, "k is out of range"),
        ((*SIDE, "k"), 1, "k is out of range"),
        ((*SIDE, "square"), -1.0, "square is negative"),
        ((*SIDE, "shortfall"), -0.1, "shortfall is negative"),
        ((*SIDE, "grown"), [], "lacks a step of growth"),
        ((*SIDE, "grown"), [-2], "less than nothing"),
        ((*SIDE, "grown"), [1], "some sides more than to others"),
        (("subspace", "growth"), [{"fingerprint": None, "seed": 7}] * 2, "lacks a step"),
        (
            (*SIDE[:-1], "sideways"),
            {"dimension": 29, "k": 6, "energy": 1.0, "square": 1.0, "shortfall": 0.0, "grown": [2]},
            "side",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_though_the_digest_fits(data, path, value, message):
    with pytest.raises(PackDamagedError, match=f"{PATH} does not follow the pack format: .*{message}"):
        manifest_json.parse(changed(data, path, put(value)), PATH)


def test_two_names_that_differ_by_case_are_refused_though_the_digest_fits(data):
    body = json.loads(data)
    body["adapters"]["A0"] = body["adapters"]["a0"]
    with pytest.raises(PackDamagedError, match="differ by case alone"):
        manifest_json.parse(signed(body), PATH)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("base_model_name_or_path",), None),
        (("base_model_name_or_path",), "\ud800"),
        (("revision",), "main"),
        (("eigenlorax_version",), "99"),
        (("adapters",), {}),
        ((*SIDE, "energy"), 1),
        (("fit", "skipped"), {"bad": "a reason"}),
    ],
)
def test_what_else_may_be_there(data, path, value):
    found = manifest_json.parse(changed(data, path, put(value)), PATH)
    assert card.render(found)
    assert manifest_json.parse(manifest_json.to_bytes(found), PATH) == found


def test_fields_that_sides_have_alike_are_stated_once(tmp_path):
    adapters = [random_adapter(f"a{n}", 100 * n) for n in range(3)]
    path = ex.fit(adapters, max_error=0.5).save(tmp_path / "pack") / keys.MANIFEST
    body = json.loads(path.read_bytes())
    # bases of a coded pack that has no use for them have the same `square` on both sides
    assert body["subspace"]["shared_fields"] == {"energy": 0.0, "grown": [], "k": 0, "shortfall": 0.0}
    assert body["subspace"]["modules"]["encoder.0.query"].keys() == {"square", "down", "up"}
    assert body["subspace"]["modules"]["encoder.0.query"]["down"].keys() == {"dimension"}
    # adapters with one config have one file of it, and one digest
    assert body["shared_fields"]["files"].keys() == {keys.ADAPTER_CONFIG, keys.SOURCE_CONFIG}
    assert body["adapters"]["a1"]["files"].keys() == {keys.ADAPTER_WEIGHTS}
    found = manifest_json.parse(path.read_bytes(), path)
    assert found.subspace == ex.Pack.open(path.parent).info
    assert all(len(entry.files) == 3 for entry in found.adapters.values())
    assert manifest_json.parse(signed(unfolded(body)), PATH) == found


def test_shared_steps_of_growth_are_few(tmp_path, monkeypatch):
    """Each side has a list of its own in memory, so that a small file could take much."""
    pack = ex.fit(random_collection(3), n_components=3, warn_above=1).augment(2, seed=1)
    folder = pack.save(tmp_path / "pack")
    assert json.loads((folder / keys.MANIFEST).read_text("utf-8"))["subspace"]["shared_fields"]["grown"] == [2]
    monkeypatch.setattr(subspace_json, "_MAX_SHARED_STEPS", 1)
    with pytest.raises(PackDamagedError, match="1 steps for 2 modules, of which the product may be 1 at most"):
        ex.Pack.open(folder)
    other = pack.save(tmp_path / "other")
    assert ex.Pack.open(other).info == pack.info
