"""Licences of the adapters of a pack: in the manifest and the card, and what changes of the pack leave of them."""

import json
from dataclasses import replace

import pytest
import yaml
from markdown_it import MarkdownIt

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.core import atomic_files
from eigenlorax.core.license import License
from eigenlorax.errors import DuplicateAdapterWarning, PackDamagedError
from eigenlorax.pack import card, licenses, manifest_json

APACHE, MIT = License("apache-2.0"), License("mit")
OURS = License("other", "Ours 1.0", "https://example.com/license")
MANIFEST = "subspace_config.json"


def license_adapter(folder, fields):
    (folder / "README.md").write_text(f"---\n{fields}\n---\n# A model\n")


@pytest.fixture
def sources(tmp_path):
    """`alpha` and `beta` are of Apache 2.0, `gamma` of another licence, and `delta` states none."""
    make_adapters(tmp_path / "in", "alpha beta gamma delta")
    for name in ("alpha", "beta"):
        license_adapter(tmp_path / "in" / name, "license: apache-2.0")
    license_adapter(tmp_path / "in" / "gamma", f"license: other\nlicense_name: {OURS.name}\nlicense_link: {OURS.link}")
    return tmp_path / "in"


@pytest.fixture
def pack(sources, tmp_path):
    return ex.fit(sources, n_components=4).save(tmp_path / "pack")


EXPECTED = {"alpha": APACHE, "beta": APACHE, "delta": None, "gamma": OURS}


@pytest.mark.parametrize("options", [{"n_components": 4}, {"max_error": 0.1}, {"n_components": "auto"}])
def test_a_fit_records_them(sources, tmp_path, options):
    fitted = ex.fit(sources, **options)
    assert fitted.licenses == EXPECTED
    opened = ex.Pack.open(fitted.save(tmp_path / "pack"))
    assert opened.licenses == EXPECTED
    assert opened["gamma"].license == OURS
    assert opened.packed("delta").license is None


def test_the_manifest_lists_each_licence_once(pack):
    assert json.loads((pack / MANIFEST).read_bytes())["licenses"] == [
        {"id": "apache-2.0", "name": None, "link": None, "adapters": None},
        {"id": None, "name": None, "link": None, "adapters": ["delta"]},
        {"id": "other", "name": OURS.name, "link": OURS.link, "adapters": ["gamma"]},
    ]


def test_a_pack_of_adapters_that_state_none_is_as_before(tmp_path):
    make_adapters(tmp_path / "in", "alpha beta")
    pack = ex.fit(tmp_path / "in", n_components=2).save(tmp_path / "pack")
    assert "licenses" not in json.loads((pack / MANIFEST).read_bytes())
    assert "The pack records no licences of its adapters." in (pack / "README.md").read_text()


def test_changes_of_a_pack_keep_them(sources, pack, tmp_path):
    opened = ex.Pack.open(pack)
    new = make_adapter(tmp_path / "epsilon", seed=9)
    license_adapter(new, "license: mit")
    opened.add(new)
    opened.add(opened["gamma"], name="zeta")
    opened.remove("beta")
    opened.save()
    expected = {"alpha": APACHE, "delta": None, "epsilon": MIT, "gamma": OURS, "zeta": OURS}
    assert ex.Pack.open(pack).licenses == expected
    assert ex.Pack.from_pretrained(pack, adapters=["gamma", "epsilon"]).licenses == {"epsilon": MIT, "gamma": OURS}
    assert ex.Pack.open(opened.augment(2, seed=1).save(tmp_path / "copy")).licenses == expected
    assert ex.refit(opened, n_components=3).pack.licenses == expected
    # originals without their cards do not take a licence away, and cards replace it
    (sources / "alpha" / "README.md").unlink()
    license_adapter(sources / "delta", "license: mit")
    refitted = ex.refit(opened, n_components=3, adapters=[sources / "alpha", sources / "delta"])
    assert refitted.pack.licenses == {**expected, "delta": MIT}


def test_copies_of_one_adapter_keep_their_own(tmp_path):
    make_adapter(tmp_path / "in" / "alpha", seed=1)
    make_adapter(tmp_path / "in" / "beta", seed=2)
    make_adapter(tmp_path / "in" / "copy", seed=1)
    license_adapter(tmp_path / "in" / "copy", "license: mit")
    with pytest.warns(DuplicateAdapterWarning):
        fitted = ex.fit(tmp_path / "in", max_error=0.1)
    assert fitted.references
    assert fitted.licenses == {"alpha": None, "beta": None, "copy": MIT}
    assert ex.Pack.open(fitted.save(tmp_path / "pack")).licenses == fitted.licenses


def test_merged_adapters_have_no_licence(sources):
    adapters = [ex.read_adapter(sources / name) for name in ("alpha", "gamma")]
    assert ex.merge(adapters, name="both").adapter.license is None


def body_and_fields(text):
    _, matter, body = text.split("---\n", 2)
    return body, yaml.safe_load(matter)


def test_the_card_lists_them(pack):
    body, fields = body_and_fields((pack / "README.md").read_text())
    assert "license" not in fields
    rows = [line for line in body.partition("### Licences of the adapters")[2].splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| `apache-2.0` | 2 | `alpha`, `beta` |",
        "| not stated | 1 | `delta` |",
        "| `Ours 1.0`, `https://example.com/license` | 1 | `gamma` |",
    ]


def listing(pack, **stated):
    """The manifest of a pack whose adapters state other licences."""
    listed = manifest_json.parse((pack / MANIFEST).read_bytes(), pack)
    return replace(listed, adapters={name: replace(listed.adapters["alpha"], license=stated[name]) for name in stated})


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ([MIT, MIT], "mit"),
        ([MIT, APACHE], None),
        ([MIT, None], None),
        ([OURS, OURS], None),
        ([License("other")] * 2, None),
        # has the form of an identifier, but the Hub might reject it and with it the push
        ([License("not-on-the-hub-1.0")] * 2, None),
    ],
)
def test_the_licence_of_all_adapters_is_that_of_the_pack(pack, stated, expected):
    listed = listing(pack, alpha=stated[0], beta=stated[1])
    assert body_and_fields(card.render(listed))[1].get("license") == expected
    assert body_and_fields(card.render(listed, license="gemma"))[1]["license"] == "gemma"


def test_versions_of_unknown_licence(pack, tmp_path):
    opened = ex.Pack.open(pack)
    opened.remove("gamma", "delta")
    assert body_and_fields((opened.save(tmp_path / "apache") / "README.md").read_text())[1]["license"] == "apache-2.0"
    opened.append(make_adapter(tmp_path / "run", seed=3), step=1, name="run")
    assert "license" not in body_and_fields((opened.save(tmp_path / "histories") / "README.md").read_text())[1]


def test_a_large_collection_is_counted(pack):
    many = {f"m{i:03}": MIT for i in range(120)} | {f"n{i:03}": License("other", f"Terms {i}") for i in range(90)}
    body, _ = body_and_fields(card.render(listing(pack, **many)))
    rows = body.partition("### Licences of the adapters")[2]
    assert "| `mit` | 120 | `m000`, `m001`, `m002`, `m003`, `m004`, `m005`, `m006`, `m007`, `m008`, `m009`, … |" in rows
    assert "| 41 other licences | 41 | |" in rows
    assert rows.count("\n|") == 2 + 50 + 1
    assert licenses.describe(listing(pack, **many).licenses).endswith("Terms 0 (1), Terms 1 (1), Terms 2 (1), …")


@pytest.mark.parametrize(
    "name",
    [
        '<img src=x onerror="alert(1)">',
        "a | b || c \\| d \\",
        "[link](javascript:alert(1)) ![i](https://example.com/x.png)",
        "`` ` ```",
        "---",
        "license: mit",
        "*emphasis* $x$ &lt; &#124; \\",
        "“\u202eevil\x1b[31m\ud800",
    ],
)
def test_names_of_strangers_are_text(sources, tmp_path, name):
    metadata = json.dumps(name)
    (sources / "alpha" / "README.md").write_text(f"---\nlicense: other\nlicense_name: {metadata}\n---\n")
    fitted = ex.fit([sources / "alpha", sources / "beta"], n_components=2)
    saved = fitted.save(tmp_path / "pack")
    body, fields = body_and_fields((saved / "README.md").read_text("utf-8"))
    assert fields.keys() == {"library_name", "tags", "base_model", "base_model_relation"}
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(
        body.partition("### Licences of the adapters")[2]
    )
    kinds = [child.type for token in tokens for child in token.children or []]
    assert set(kinds) <= {"text", "code_inline", "softbreak"}
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert fitted.licenses["alpha"].title in shown
    assert ex.Pack.open(saved).licenses == fitted.licenses


def changed(pack, value):
    """Write a manifest with other licences, and its digest."""
    path = pack / MANIFEST
    body = json.loads(path.read_bytes())
    body.pop("digest")
    body["licenses"] = value
    body["digest"] = atomic_files.digest((json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    path.write_text(json.dumps(body))


GROUP = {"id": "mit", "name": None, "link": None, "adapters": ["alpha"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "licenses is an object"),
        ([[]], r"licenses\[0\] is an array"),
        ([{"id": "mit"}], r"licenses\[0\] has the fields \['id'\]"),
        ([{**GROUP, "adapters": ["gone"]}], "one that the pack lacks"),
        ([GROUP, GROUP], "names an adapter twice"),
        ([{**GROUP, "adapters": None}] * 2, "two objects without adapters"),
        ([{**GROUP, "id": "<b>"}], "do not describe a licence"),
        ([{**GROUP, "name": "two\nlines"}], "do not describe a licence"),
        ([{**GROUP, "link": "javascript:alert(1)"}], "do not describe a licence"),
        ([{**GROUP, "name": "x" * 1000}], "do not describe a licence"),
    ],
)
def test_a_manifest_with_other_licences_is_damaged(pack, value, message):
    changed(pack, value)
    with pytest.raises(PackDamagedError, match=message):
        ex.Pack.open(pack)


def test_a_manifest_may_leave_adapters_out(pack):
    changed(pack, [GROUP])
    assert ex.Pack.open(pack).licenses == {"alpha": MIT, "beta": None, "delta": None, "gamma": None}
