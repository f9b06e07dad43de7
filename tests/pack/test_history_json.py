"""Histories in the manifest: they come back as they were, and what a mistaken tool signed is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_manifest import PATH, changed, places, put, signed

import eigenlorax as ex
from eigenlorax.core.json_dataclasses import JsonTypeError
from eigenlorax.core.origin import Origin
from eigenlorax.errors import PackDamagedError
from eigenlorax.pack import history_json, manifest_json
from eigenlorax.pack.history import History, VersionRecord
from runs import make_run

RECORD = VersionRecord(
    version="1",
    step=None,
    metrics={},
    sha256="a" * 64,
    reference=None,
    lossless=False,
    max_error=0.05,
    head_error=0.1,
    delta_error=0.0499,
    tensor_error=0.0,
    lora_bytes=101,
    tensor_bytes=203,
    source_lora_bytes=1009,
    source_tensor_bytes=2003,
    source_file_bytes=4001,
    source_sha256="b" * 64,
    change=None,
    source_config='{"eigenlorax_changed":{}}\n',
    origin=None,
)
FIRST = ("histories", "run", "versions", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The manifest of a pack with a history, some of whose fields are shared."""
    folder = tmp_path_factory.mktemp("history")
    pack = ex.Pack.empty()
    for number, checkpoint in enumerate(make_run(folder / "run", (10, 20, 30))):
        pack.append(checkpoint, metrics={"loss": 0.5, "accuracy": 0.25 * number}, lossless=True)
    return (pack.save(folder / "pack") / PATH.name).read_bytes()


figures = st.floats(0, 1e6, exclude_max=True)
sizes = st.integers(0, 2**40)
hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
spellings = st.lists(st.text(max_size=3), max_size=2)
fields = st.fixed_dictionaries(
    {
        "step": st.none() | sizes,
        "metrics": st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
        "sha256": hexadecimal,
        "lossless": st.booleans(),
        "max_error": st.just(0.05),
        "head_error": st.sampled_from([0.1, 0.3]),
        "delta_error": figures,
        "tensor_error": figures,
        "lora_bytes": sizes,
        "tensor_bytes": sizes,
        "source_lora_bytes": sizes,
        "source_tensor_bytes": sizes,
        "source_file_bytes": sizes,
        "source_sha256": hexadecimal,
        "change": st.none() | figures,
        "source_config": st.sampled_from(['{"eigenlorax_changed":{}}\n', '{"r":8}']),
        "spelling": st.none() | spellings,
    }
)


@given(st.lists(fields, min_size=1, max_size=5), st.integers(0, 5))
def test_histories_come_back_as_they_were(drawn, distance):
    versions: list[VersionRecord] = []
    for number, values in enumerate(drawn):
        spelling = values.pop("spelling")
        origin = Origin("kohya", tuple(spelling), {"note": "n"}) if spelling is not None else None
        record = VersionRecord(**values, version=f"v{number}", reference=None, origin=origin)
        if record.lossless:
            record = replace(record, max_error=None, head_error=None)
        earlier = [each.version for each in versions if each.lossless == record.lossless]
        reference = earlier[-distance] if 0 < distance <= len(earlier) else None
        versions.append(replace(record, reference=reference))
    histories = {"run": History("run", tuple(versions), {"r": 4}), "one": History("one", (RECORD,))}
    written = json.loads(json.dumps(history_json.to_json(histories), allow_nan=False))
    assert history_json.read(written, {}) == histories


def test_metrics_are_told_apart_by_type():
    entry = replace(RECORD, metrics={"a": 1.0})
    written = json.loads(
        json.dumps(history_json.to_json({"run": History("run", (entry, replace(entry, version="2")))}))
    )
    assert [record.metrics for record in history_json.read(written, {})["run"]] == [{"a": 1.0}] * 2
    assert isinstance(history_json.read(written, {})["run"].latest.metrics["a"], float)


def test_a_field_of_another_type_is_refused_though_the_digest_fits(data):
    body, refused = json.loads(data), 0
    for path in places(body):
        # fields of configs are whatever sources have
        if path[0] != "histories" or "source_fields" in path[:-1]:
            continue
        value = body
        for key in path:
            value = value[key]
        for wrong in (None, True, 3, 0.5, "text", [], [None], {}, {"text": None}):
            # a number of JSON may stand for a float, and null for what is unknown
            fits = type(wrong) is type(value) or (type(value) is float and type(wrong) is int)
            if fits or (wrong is None and path[-1] in ("step", "reference", "change")):
                continue
            if path[-1] == "metrics" and wrong == {}:
                continue
            if path[-2:] == ("shared_fields", path[-1]) and path[-1] in ("max_error", "head_error") and wrong is None:
                continue
            with pytest.raises(PackDamagedError, match=str(PATH)):
                manifest_json.parse(changed(data, path, put(wrong)), PATH)
            refused += 1
    assert refused > 150


def test_a_field_that_is_missing_or_unknown_is_refused_though_the_digest_fits(data):
    body = json.loads(data)
    optional = {"step", "metrics", "reference", "change"}
    for path in places(body):
        *parents, last = path
        is_free = len(path) < 3 or path[0] != "histories" or {"source_fields", "metrics"} & set(map(str, parents))
        if not is_free and isinstance(last, str) and last not in optional:
            with pytest.raises(PackDamagedError, match=str(PATH)):
                manifest_json.parse(changed(data, path, lambda holder, key: holder.pop(key)), PATH)
    with pytest.raises(PackDamagedError, match="histories is missing"):
        manifest_json.parse(changed(data, ("histories",), lambda holder, key: holder.pop(key)), PATH)
    for path in (("histories", "run", "more"), (*FIRST, "more"), ("histories", "run", "shared_fields", "sha256")):
        with pytest.raises(PackDamagedError, match="more|sha256"):
            manifest_json.parse(changed(data, path, put("a" * 64)), PATH)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("histories", "../run"), {}, "adapter name '../run' is not allowed"),
        (("histories", "run@1"), {}, "adapter name 'run@1' is not allowed"),
        (("histories", "run", "versions"), [], "histories.run has no version"),
        (("histories", "run", "source_fields"), {"a": "x" * 2**16}, "source_fields is too large"),
        (("histories", "run", "source_fields"), {"a": nested(101)}, "nests lists and objects more than 100 deep"),
        ((*FIRST, "version"), "latest", "version label 'latest' is not allowed"),
        ((*FIRST, "version"), "a/b", "version label 'a/b' is not allowed"),
        ((*FIRST, "version"), "20", "two versions of one label"),
        ((*FIRST, "sha256"), "a" * 63, r"versions\[0\]: a digest is wrong"),
        ((*FIRST, "sha256"), "../" + "a" * 61, "a digest is wrong"),
        ((*FIRST, "source_sha256"), "A" * 64, "a digest is wrong"),
        ((*FIRST, "step"), -1, "step is wrong"),
        ((*FIRST, "lora_bytes"), -1, "a figure is wrong"),
        ((*FIRST, "lora_bytes"), 2**63, "a figure is wrong"),
        ((*FIRST, "delta_error"), -0.5, "a figure is wrong"),
        ((*FIRST, "change"), -0.5, "change is wrong"),
        ((*FIRST, "change_error"), 0.5, "change_error is wrong"),
        ((*FIRST, "reference"), "10", "reference is wrong"),
        ((*FIRST, "reference"), "20", "reference is wrong"),
        ((*FIRST, "reference"), "none", "reference is wrong"),
        ((*FIRST, "lossless"), False, "lossless goes without error bounds"),
        ((*FIRST, "max_error"), 0.05, "lossless goes without error bounds"),
        ((*FIRST, "source_config"), "{", "source_config.json is not valid JSON"),
        ((*FIRST, "source_config"), "[]", "an object was expected"),
        ((*FIRST, "source_config"), '{"eigenlorax_changed": 3}', "differences of an unknown form"),
    ],
)
def test_a_value_out_of_range_is_refused_though_the_digest_fits(data, path, value, message):
    with pytest.raises(PackDamagedError, match=f"{PATH} does not follow the pack format: .*{message}"):
        manifest_json.parse(changed(data, path, put(value)), PATH)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bundle": "a" * 63, "offset": 0}, r"versions\[0\]: bundle is wrong"),
        ({"bundle": "a" * 64}, "bundle goes with offset, which is wrong"),
        ({"offset": 0}, "bundle goes with offset, which is wrong"),
        ({"bundle": "a" * 64, "offset": 1}, r"versions\[0\]: offset is wrong"),
        ({"bundle": "a" * 64, "offset": -1}, r"versions\[0\]: offset is wrong"),
    ],
)
def test_a_version_in_a_bundle_begins_where_the_one_before_ends(fields, message):
    bundled = replace(RECORD, bundle="a" * 64, offset=0)
    following = replace(bundled, version="2", offset=RECORD.file_bytes)
    histories = {"run": History("run", (bundled, following))}
    assert history_json.read(history_json.to_json(histories), {}) == histories
    wrong = replace(bundled, offset=None, bundle=None)
    written = history_json.to_json({"run": History("run", (replace(wrong, **fields), replace(RECORD, version="3")))})
    with pytest.raises(JsonTypeError, match=message):
        history_json.read(written, {})


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1])
def test_error_bounds_are_above_0_and_below_1(bound):
    for field in ("max_error", "head_error"):
        written = history_json.to_json({"run": History("run", (replace(RECORD, **{field: bound}),))})
        with pytest.raises(JsonTypeError, match="an error bound is wrong"):
            history_json.read(written, {})


def test_a_version_refers_to_its_own_kind():
    lossless = replace(RECORD, lossless=True, max_error=None, head_error=None)
    written = history_json.to_json({"run": History("run", (RECORD, replace(lossless, version="2", reference="1")))})
    with pytest.raises(JsonTypeError, match=r"versions\[1\]: reference is wrong"):
        history_json.read(written, {})


def test_long_chains_are_refused():
    versions = [
        replace(RECORD, version=str(number), reference=str(number - 1) if number else None) for number in range(65)
    ]
    short = History("run", tuple(versions[:-1]))
    assert history_json.read(history_json.to_json({"run": short}), {})["run"] == short
    with pytest.raises(JsonTypeError, match="more than 64 versions would have to be decoded for one"):
        history_json.read(history_json.to_json({"run": History("run", tuple(versions))}), {})


def test_names_that_differ_by_case_are_refused(data):
    body = json.loads(data)
    body["histories"]["RUN"] = body["histories"]["run"]
    with pytest.raises(PackDamagedError, match="a history has the name of an adapter or of another history"):
        manifest_json.parse(signed(body), PATH)
    with pytest.raises(JsonTypeError, match="a history has the name of an adapter"):
        history_json.read(history_json.to_json({"run": History("run", (RECORD,))}), {"Run": {}})
