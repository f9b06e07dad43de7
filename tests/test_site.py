"""The site: every page has its place, every public name its reference, every term its explanation."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import typer
from docs_site import accessible_pages, changelog_page, glossary_tooltips, json_reference

import eigenlorax
from eigenlorax.cli import command_line

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GLOSSARY = (DOCS / glossary_tooltips.GLOSSARY).read_text("utf-8")
OWN_TERMS = glossary_tooltips.terms(GLOSSARY.partition("\n## Words of eigenlorax\n")[2])
NAVIGATION = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
# terms that a page for newcomers may use before it has explained them: their everyday meaning is enough
EVERYDAY = {"fit", "side", "version", "history", "subspace", "pack", "k", "population", "left out", "compression ratio"}


def test_the_navigation_has_every_page():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert NAVIGATION - {"changelog.md", "reference/commands.md", "reference/json.md"} == pages


def test_links_of_the_changelog_lead_from_docs():
    page = changelog_page.markdown("[a](docs/b.md#c) [d](CONTRIBUTING.md) [e](https://f.org/g.md)")
    assert page == "[a](b.md#c) [d](../CONTRIBUTING.md) [e](https://f.org/g.md)"


def test_the_reference_has_every_public_name_once():
    pages = [path.read_text("utf-8") for path in sorted((DOCS / "reference/api").glob("*.md"))]
    names = [name for page in pages for name in re.findall(r"^::: eigenlorax\.(\w+)$", page, re.MULTILINE)]
    assert sorted(names) == sorted([*(name for name in eigenlorax.__all__ if name != "__version__"), "errors"])


def test_the_reference_of_the_command_line_has_every_option():
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install '.[docs]'")
    from docs_site import command_reference

    page = command_reference.markdown()
    for name, verb in typer.main.get_command(command_line()).commands.items():
        text = page.partition(f"\n## `eigenlorax {name}`\n")[2].partition("\n## ")[0]
        assert text, name
        for parameter in verb.params:
            for spelling in parameter.opts if parameter.param_type_name == "option" else ():
                assert re.search(rf"`{spelling}[ `]", text), (name, spelling)


@pytest.mark.parametrize(
    "of", [one for classes in json_reference.SECTIONS.values() for one in classes], ids=lambda of: of.__name__
)
def test_the_reference_of_the_json_has_every_field(of):
    names = [field.name for field in dataclasses.fields(of)]
    assert names
    text = json_reference.markdown().partition(f"\n### {of.__name__}\n")[2].partition("\n### ")[0]
    assert [name for name, meaning in re.findall(r"^- `(\w+)` \(`.+?`\): (.+)$", text, re.MULTILINE)] == names


def test_the_reference_of_the_json_has_sections_of_verbs():
    verbs = typer.main.get_command(command_line()).commands
    titles = [title for title in json_reference.SECTIONS if title.startswith("`")]
    assert {title.strip("`").removeprefix("eigenlorax ") for title in titles} <= verbs.keys()


def test_classes_that_the_page_of_the_command_line_names_are_in_the_reference():
    names = set(re.findall(r"class `(\w+)`", (DOCS / "cli.md").read_text("utf-8")))
    assert len(names) > 5
    assert names <= {of.__name__ for classes in json_reference.SECTIONS.values() for of in classes}


def test_the_glossary_explains_each_term_briefly():
    assert {"k", "delta error", "coefficients", "core", "gauge", "residual", "carried"} <= OWN_TERMS.keys()
    assert list(OWN_TERMS) == sorted(OWN_TERMS)
    for term, explanation in glossary_tooltips.terms(GLOSSARY).items():
        assert len(re.findall(r"[.;](?: |$)", explanation)) <= 3, term


def test_a_page_explains_a_term_once_outside_headings_and_links():
    html = (
        '<h2 id="b">A <abbr title="rows">basis</abbr><a class="headerlink" href="#b">¶</a></h2><p><a href="x">the '
        '<abbr title="rows">basis</abbr></a>, a <abbr title="rows">basis</abbr>, <a href="glossary.html#energy"><abbr '
        'title="norm">energy</abbr></a>, <abbr title="norm">energy</abbr>, and a <abbr title="rows">basis</abbr></p>'
    )
    assert glossary_tooltips.on_page_content(html) == (
        '<h2 id="b">A basis<a class="headerlink" href="#b">¶</a></h2><p><a href="x">the basis</a>, a '
        '<abbr title="rows">basis</abbr>, <a href="glossary.html#energy">energy</a>, energy, and a basis</p>'
    )


@pytest.mark.parametrize("page", sorted((DOCS / "get-started").glob("*.md")), ids=lambda page: page.name)
def test_terms_on_pages_for_newcomers_lead_to_the_glossary(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`|<!--.*?-->", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = re.sub(r"\]\([^)]*\)", "]", text)
    for term in OWN_TERMS.keys() - EVERYDAY:
        if re.search(rf"\b{term}\b", words, flags=re.IGNORECASE):
            assert f"glossary.md#{term.replace(' ', '-')})" in text, f"{page.name} does not explain {term!r}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_a_page_defines_at_most_one_term_that_the_glossary_lacks(page):
    """Terms stand in italics where they are defined. Names of books, columns and pages begin with a capital."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`|\$[^$]*\$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    defined = {" ".join(term.split()) for term in re.findall(r"(?<![*\w])\*([a-z][^*]*?)\*(?!\*)", text)}
    if page.name != "pack-format.md":
        assert len(defined - glossary_tooltips.terms(GLOSSARY).keys()) <= 1, defined


@pytest.mark.parametrize("name", ["codec", "figures", "method"])
def test_a_diagram_is_what_its_script_draws(name):
    drawn = runpy.run_path(str(ROOT / f"scripts/docs_site/{name}_diagram.py"))["draw"]()
    assert (DOCS / f"concepts/{name}.svg").read_text("utf-8") == drawn


def test_cells_without_a_header_are_headers_of_rows():
    body = '<tbody>\n<tr>\n<td>a</td>\n<td align="right">1</td>\n</tr>\n</tbody>\n</table>'
    with_names = f"<table>\n<thead>\n<tr>\n<th></th>\n<th>k</th>\n</tr>\n</thead>\n{body}"
    without = f"<table>\n<thead>\n<tr>\n<th>name</th>\n<th>k</th>\n</tr>\n</thead>\n{body}"
    expected = with_names.replace("<td>a</td>", '<th scope="row">a</th>')
    assert accessible_pages.on_page_content(without + with_names + without) == without + expected + without


def test_the_search_dialog_has_a_name():
    dialog = '<div class="md-search" data-md-component="search" role="dialog">'
    assert accessible_pages.on_post_page(dialog) == dialog.replace('">', '" aria-label="Search">')
